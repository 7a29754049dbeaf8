"""What the published runs would take: operations, hours of cards, memory. Each number with its formula.

    python benchmarks/what_it_takes.py            # counts the operations anew (a minute); refreshes docs
    python benchmarks/what_it_takes.py --table    # the page from the records; runs nothing

Operations are PyTorch's count of one forward pass on tensors without values. Hours come from a step that was measured
on a card (make gpu-check), where the records have one, and are not guessed where they have none. Memory is the plan's.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from gpu.training import FORWARDS
from gpu_check import recorded
from harness import RESULTS, ROOT, machine, markdown, refresh, write_json
from memory_plan import A14B, WAN, XL

sys.path.insert(0, str(ROOT / "src"))

from flowanchor.interfaces import Backbone
from flowanchor.plugins.backbones.lightningdit import LightningDiT
from flowanchor.plugins.backbones.wan import Wan
from flowanchor.text.base import Tokens

PAGE = ROOT / "docs" / "results" / "what_it_takes.md"
RECORD = RESULTS / "what_it_takes.json"
IMAGES = 1_281_167  # ImageNet's training images
NETWORKS = {
    "XL/1": lambda: LightningDiT(input_size=16, **XL),
    "Wan 1.3B": lambda: Wan.from_preset("1.3B", height=128, width=128),
    "Wan A14B": lambda: Wan.from_preset(**A14B),
}


@dataclass(frozen=True)
class Run:
    """A recipe on so many cards."""

    name: str
    recipe: str
    network: str  # of NETWORKS
    samples: int  # trained on, over the whole run
    told: str  # how that number comes about
    cards: int
    plan: str  # of memory_plan.json
    step: str | None = None  # of the GPU's record: a step on samples of this size


RUNS = (
    Run("ImageNet 256, two steps (1.32 in the paper)", "imagenet256_facm", "XL/1", 100 * IMAGES,
        "100 epochs x 1,281,167", 32, "LightningDiT-XL/1, 256 tokens, 32 samples per GPU", "XL/1, 32, compiled, graph"),
    Run("Wan 1.3B, images of 1024 x 1024", "wan21_t2i_1p3b_facm", "Wan 1.3B", 20_000 * 8 * 4,
        "20,000 steps x 8 cards x 4", 8, "Wan 1.3B, 4,096 tokens, 4 samples per GPU"),
    Run("Wan A14B, one expert after the other", "wan22_t2i_high_facm, wan22_t2i_low_facm", "Wan A14B", 2 * 20_000 * 8,
        "2 x 20,000 steps x 8 cards x 1", 8, f"{WAN}, an expert, 4,096 tokens, 1 sample per GPU"),
    Run("Wan A14B, both experts in one run", "wan22_t2i_facm", "Wan A14B", 20_000 * 64,
        "20,000 steps x 64 cards x 1", 64, f"{WAN}, both experts in one run, 4,096 tokens, 1 sample per GPU"),
)  # fmt: skip


def forward_flops(network: str) -> int:
    """Operations of one forward pass for one sample; of attention its plain form is counted, which the fused equal."""
    with torch.device("meta"):
        made: Backbone = NETWORKS[network]()
    plainly = sdpa_kernel(SDPBackend.MATH)
    with (
        FakeTensorMode(allow_non_fake_inputs=True),
        torch.no_grad(),
        plainly,
        FlopCounterMode(display=False) as counter,
    ):
        made._apply(lambda tensor: torch.empty(tensor.shape, dtype=tensor.dtype))
        cond: Any = Tokens(torch.empty(1, 512, 4096)) if "Wan" in network else torch.zeros(1, dtype=torch.int64)
        made.predict(torch.empty(1, *made.sample_shape), torch.empty(1), cond, None)
    return counter.get_total_flops()


def peak(plans: Mapping[str, Any], run: Run) -> float:
    """Bytes per card with Chain(recompute)."""
    return float(sum(plans[run.plan]["Chain(recompute)"][str(run.cards)]["parts"].values()))


def hours(gpu: Mapping[str, Any] | None, run: Run) -> str:
    """Hours of one card for the whole run, or that nobody measured a step."""
    found = {} if gpu is None or run.step is None else gpu["rows"].get(run.step, {})
    if "images_per_second" not in found:
        return "not measured"
    return f"{run.samples / found['images_per_second'] / 3600:,.0f}"


def page(record: Mapping[str, Any], plans: Mapping[str, Any], gpu: Mapping[str, Any] | None) -> str:
    forwards = FORWARDS["chain"]
    rows = []
    for run in RUNS:
        flops = record["forward_flops"][run.network]
        rows.append([
            run.name, f"`{run.recipe}`", f"{run.told} = {run.samples / 1e6:.1f} M", f"{flops / 1e12:.2f}",
            f"{run.samples * forwards * flops / 1e21:.2f}", hours(gpu, run), f"{run.cards}",
            f"{peak(plans, run) / 1e9:.1f}",
        ])  # fmt: skip
    about = record["machine"]
    header = (
        "run", "recipe", "samples S", "TFLOP of a forward pass, f", "ZFLOP of the run, S n f", "card hours",
        "cards", "GB per card",
    )  # fmt: skip
    card = "no card has been measured" if gpu is None else f"the card is {gpu['machine']['device']}"
    return "\n\n".join(
        [
            markdown(header, rows),
            f"n = {forwards} forward passes of a FACM step with a guided teacher and `jvp.recompute=true`: teacher 2, "
            "anchor 1, shortcut and tangent 2, two backward passes 4, computed again 2. Card hours: S / (images per "
            f"second of the measured step) / 3600, so without communication between cards; {card}. With a card that "
            "does R TFLOP/s of these products they are 10^9 (S n f in ZFLOP) / (3600 R). Memory: the plan of "
            f"`benchmarks/memory_plan.py` with Chain(recompute), not measured. Operations counted by `python "
            f"benchmarks/what_it_takes.py`, torch {about['torch']}, {about['date']}, commit {about['commit']}.",
        ]
    )


def show() -> None:
    plans = json.loads((RESULTS / "memory_plan.json").read_text())["plans"]
    text = page(json.loads(RECORD.read_text()), plans, recorded())
    print(text)
    refresh(PAGE, "what it takes", text)


def main() -> None:
    parser = argparse.ArgumentParser(description="What the published runs would take.")
    parser.add_argument("--table", action="store_true", help="the page from the records; run nothing")
    arguments = parser.parse_args()
    if not arguments.table:
        write_json(RECORD, {"machine": machine(), "forward_flops": {name: forward_flops(name) for name in NETWORKS}})
    show()


if __name__ == "__main__":
    main()
