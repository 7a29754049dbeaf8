"""Which network's few-step LoRA fits on one card of 24, 48 or 80 GB, by how its frozen weights are kept.

    python benchmarks/small_cards.py            # plans and checks; refreshes docs/memory.md; some minutes on two cores
    python benchmarks/small_cards.py --check    # the measurements of small networks alone
    python benchmarks/small_cards.py --only "FLUX.1 dev"      # these plans anew, the others as recorded
    python benchmarks/small_cards.py --table    # the table from the record

One process, batch 1, pictures of 1024 x 1024, adapters of rank 64 in float32, AdamW, one average; the base teaches with
guidance (teacher=base), Chain-JVP computes everything again (jvp.recompute=true), bf16-mixed. Networks are built
without values from their public sizes. What lasts is arithmetic on their parameters; what a step takes is counted by
running it on shapes (`flowanchor.jvp.memory_plan`) at two depths, since each block adds the same. Texts are encoded
before: no text encoder is there, and no VAE.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from counting import allocator_peak
from flowanchor.checkpoints.frozen_base import keep_base
from flowanchor.checkpoints.load import store_low
from flowanchor.conditioning import Text
from flowanchor.interfaces import Backbone, Batch, Objective
from flowanchor.jvp import Chain
from flowanchor.jvp.attention import resolve
from flowanchor.jvp.attention.operator import Opaque
from flowanchor.jvp.memory_plan import StepOfShapes
from flowanchor.plugins.backbones.diffusers import qwen_image, z_image
from flowanchor.plugins.backbones.diffusers.network import DiffusersTransformer
from flowanchor.plugins.backbones.wan import Wan
from flowanchor.plugins.objectives.anchors.flow_matching import FlowMatchingAnchor
from flowanchor.plugins.objectives.composed import ComposedObjective
from flowanchor.plugins.objectives.intervals.expanded import ExpandedInterval
from flowanchor.plugins.objectives.shortcuts.consistency import ConsistencyShortcut
from flowanchor.plugins.objectives.times.uniform import Uniform
from flowanchor.plugins.teachers.base import BaseVelocity
from harness import RESULTS, ROOT, machine, markdown, refresh, write_json

CARDS = (24, 48, 80)  # GB
MARGIN = 0.1  # of a card: the CUDA context, fragmentation
BASES = ("float32", "bfloat16", "int8")  # float8 takes what int8 takes
GB = 1e9
SCALE = 4 + 1  # bytes per row of a quantised weight: its scale, the zero point that torchao keeps beside it
TRAINED = 4 * (1 + 1 + 2 + 1)  # bytes per value of an adapter: itself, its gradient, two moments, one average


@dataclass(frozen=True)
class Case:
    """A network by its public sizes: arguments of its class in diffusers that are not that class's own defaults."""

    name: str
    stock: str  # class in diffusers; Wan: a preset of backbone=wan
    sizes: dict[str, Any]
    text: int  # tokens of a text
    parameters: float  # as published, in billions: what is built is compared with it
    depths: tuple[str, ...] = ("num_layers",)  # the arguments that say how many blocks there are
    shape: tuple[int, ...] = (128, 128)  # of latents

    def with_blocks(self, each: int) -> Case:
        """The same with so many blocks of each kind."""
        sizes = {**self.sizes, **dict.fromkeys(self.depths, each)}
        if "dual_attention_layers" in sizes:
            sizes["dual_attention_layers"] = [one for one in sizes["dual_attention_layers"] if one < each]
        return replace(self, sizes=sizes)

    def build(self, rank: int = 64) -> Backbone:
        lora = {"rank": rank, "alpha": None, "targets": None}
        height, width = self.shape
        if self.stock == "Wan":
            return Wan.from_preset(**self.sizes, height=height, width=width, lora=lora)
        return DiffusersTransformer(self.stock, self.sizes, height=height, width=width, lora=lora)


# Sizes: config.json of the releases' transformer folders. What is not written is the class's default, checked by the
# number of parameters.
CASES = [
    Case("SD 3.5 Medium", "SD3Transformer2DModel", {
        "sample_size": 128, "patch_size": 2, "in_channels": 16, "out_channels": 16, "num_layers": 24,
        "attention_head_dim": 64, "num_attention_heads": 24, "joint_attention_dim": 4096,
        "caption_projection_dim": 1536, "pooled_projection_dim": 2048, "pos_embed_max_size": 384,
        "dual_attention_layers": list(range(13)), "qk_norm": "rms_norm",
    }, 333, 2.24),  # 2.47 with its table of positions, a buffer
    Case("FLUX.1 dev", "FluxTransformer2DModel", {
        "in_channels": 64, "num_layers": 19, "num_single_layers": 38, "attention_head_dim": 128,
        "num_attention_heads": 24, "joint_attention_dim": 4096, "pooled_projection_dim": 768, "guidance_embeds": True,
    }, 512, 11.9, ("num_layers", "num_single_layers")),
    Case("Z-Image", "ZImageTransformer2DModel", {
        "in_channels": 16, "dim": 3840, "n_layers": 30, "n_refiner_layers": 2, "n_heads": 30, "n_kv_heads": 30,
        "cap_feat_dim": 2560, "axes_dims": [32, 48, 48], "axes_lens": [1536, 512, 512],
    }, 128, 6.2, ("n_layers",)),
    Case("Qwen-Image", "QwenImageTransformer2DModel", {
        "in_channels": 64, "out_channels": 16, "num_layers": 60, "attention_head_dim": 128, "num_attention_heads": 24,
        "joint_attention_dim": 3584, "axes_dims_rope": [16, 56, 56],
    }, 128, 20.4),
    Case("Wan 2.1 1.3B", "Wan", {"preset": "1.3B"}, 512, 1.4),
    Case("Wan 2.1 14B", "Wan", {"preset": "A14B"}, 512, 14.3),
]  # fmt: skip

# Small ones of three kinds, which are run. Layers are wide enough for weights to count beside activations.
SMALL = [
    Case("SD3", "SD3Transformer2DModel", {
        "sample_size": 16, "patch_size": 2, "in_channels": 4, "out_channels": 4, "num_layers": 4,
        "attention_head_dim": 32, "num_attention_heads": 6, "joint_attention_dim": 64, "caption_projection_dim": 192,
        "pooled_projection_dim": 32, "pos_embed_max_size": 16, "qk_norm": "rms_norm",
    }, 40, 0, shape=(16, 16)),
    Case("FLUX.1", "FluxTransformer2DModel", {
        "in_channels": 16, "num_layers": 2, "num_single_layers": 4, "attention_head_dim": 32, "num_attention_heads": 6,
        "joint_attention_dim": 64, "pooled_projection_dim": 32, "guidance_embeds": True, "axes_dims_rope": [8, 12, 12],
    }, 40, 0, shape=(16, 16)),
    Case("Wan", "Wan", {
        "preset": "nano", "num_layers": 4, "in_channels": 4, "text_dim": 64, "text_len": 40, "attention_head_dim": 48,
        "ffn_dim": 384,
    }, 40, 0, shape=(16, 16)),
]  # fmt: skip


# ---------------------------------------------------------------------------------------------------------- what lasts


def lasting(network: Backbone, base: str) -> dict[str, int]:
    """Bytes that stay from step to step, of a network with or without values."""
    quantised = quantisable(network) if base == "int8" else set()
    frozen = 0
    for module in network.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if not parameter.requires_grad:
                one_byte = module in quantised and name == "weight"
                scales = parameter.shape[0] * SCALE if one_byte else 0
                frozen += parameter.numel() * (1 if one_byte else parameter.element_size()) + scales
    trained = sum(p.numel() for p in network.parameters() if p.requires_grad)
    buffers = sum(buffer.numel() * buffer.element_size() for buffer in network.buffers())
    return {"base": frozen + buffers, "adapters": TRAINED * trained}


def quantisable(network: Backbone) -> set[nn.Module]:
    """The layers whose weights `base_dtype=int8` keeps in eight bits."""
    blocks = [inner for stage in network.stage_modules()[1:-1] for part in stage for inner in part.modules()]
    return {one for one in blocks if isinstance(one, nn.Linear) and not one.weight.requires_grad}


# -------------------------------------------------------------------------------------------------------------- a step


def objective() -> Objective:
    """FACM's (arXiv 2507.03738)."""
    return ComposedObjective(ExpandedInterval(), Uniform(), FlowMatchingAnchor(), ConsistencyShortcut())


def teacher() -> BaseVelocity:
    return BaseVelocity(4.0, 0.0, 1.0)


def batch_of_one(network: Backbone, tokens: int) -> Batch:
    """A sample and its text, as long as said."""
    conditioning = network.conditioning
    assert isinstance(conditioning, Text)
    null = conditioning.null_text
    longest = conditioning.longest
    text = {}
    for name, one in zip(null._fields, null, strict=True):
        shape = (1, min(tokens, longest[name]), *one.shape[1:]) if name in longest else (1, *one.shape)
        text[name] = torch.ones(shape, dtype=torch.bool) if one.dtype == torch.bool else torch.randn(shape)
    return Batch(torch.randn(1, *network.sample_shape), conditioning.kind(**text))


def step_peak(network: Backbone, tokens: int, low: bool, attention: Any) -> int:
    """Bytes that forward and backward take at most beside the weights; adapters' gradients are not among them."""
    step = StepOfShapes(network, objective(), teacher())
    batch = batch_of_one(network, tokens)
    times = objective().draw(1, torch.device("cpu"))
    with torch.autocast("cpu", torch.bfloat16, enabled=low), whole_texts():
        return step.peak(Chain(attention=attention), batch, torch.randn_like(batch.x1), times, times.t, 0)


@contextmanager
def whole_texts() -> Iterator[None]:
    """A region in which no mask is looked at: texts without values are without padding."""

    def inputs(self: Any, network: Any, x: Tensor, t: Tensor, cond: Any) -> dict[str, Any]:
        return {"x": list(x[:, :, None].unbind()), "t": t, "cap_feats": list(cond.tokens.unbind())}

    with patch.object(qwen_image, "unless_whole", return_value=None), patch.object(z_image.ZImage, "inputs", inputs):
        yield


def plan(case: Case) -> dict[str, Any]:
    """What one network takes, by how its base is kept."""
    with torch.device("meta"):
        network = case.build()
    whole = sum(p.numel() for p in network.parameters() if not p.requires_grad)
    parts = {"float32": lasting(network, "float32")}
    store_low(network, torch.bfloat16, frozen=True)
    for base in ("bfloat16", "int8"):
        parts[base] = lasting(network, base)
    steps = {base: step_of_depth(case, len(network.stage_modules()) - 2, base) for base in ("bfloat16", "int8")}
    for base, found in parts.items():
        found["step"] = steps.get(base, steps["bfloat16"])  # autocast casts float32
    trained = sum(p.numel() for p in network.parameters() if p.requires_grad)
    return {"parameters": whole, "trained": trained, "parts": parts}


def step_of_depth(case: Case, blocks: int, base: str = "bfloat16", counted: tuple[int, int] = (2, 4)) -> int:
    """What a step of so many blocks takes. Chain-JVP keeps the same of each block, and works on one at a time: counted
    at two depths, the rest lies on the line through both."""
    found = []
    for each in counted:
        with torch.device("meta"):
            network = case.with_blocks(each).build()
        keep_base(network, base, low_precision=True)
        with_values(network)
        found.append((len(network.stage_modules()) - 2, step_peak(network, case.text, True, Opaque(resolve("auto")))))
    (few, low), (many, high) = found
    return round(low + (high - low) * (blocks - few) / (many - few))


def with_values(network: Backbone) -> None:
    """Buffers and what stands for no text, which a network on the meta device has no values of."""
    for module in network.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.is_meta:
                module._buffers[name] = torch.zeros(buffer.shape, dtype=buffer.dtype)


# --------------------------------------------------------------------------------------------------------------- check


@dataclass(frozen=True)
class Checked:
    """What was planned and measured of a small network, in bytes: what lasts, and what a step takes."""

    network: str
    base: str
    planned: tuple[int, int]
    measured: tuple[int, int]

    @property
    def error(self) -> float:
        return sum(self.planned) / sum(self.measured) - 1


def check(case: Case, base: str) -> Checked:
    """A small network's weights and optimizer, counted where they lie, and a step by what the allocator handed out."""
    torch.manual_seed(0)
    network, low = case.build(rank=8).train(), base != "float32"
    shapes = deepcopy(network)
    if low:
        store_low(shapes, torch.bfloat16, frozen=True)
    keep_base(network, base, low_precision=low)
    planned = sum(lasting(shapes, base).values()), step_peak(network, case.text, low, resolve("auto"))
    ours, batch = objective(), batch_of_one(network, case.text)
    trained = [p for p in network.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.0, foreach=False)

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            loss = ours(network, batch, teacher(), Chain(), torch.randn_like(batch.x1), *ours.draw(1, batch.x1.device))
        loss.loss.backward()

    step()  # gradients and moments are there from the second step on
    optimizer.step()
    lasts = sum(map(size, [*network.parameters(), *network.buffers()]))
    lasts += sum(size(value) for state in optimizer.state.values() for value in state.values() if value.ndim)
    lasts += sum(size(p.grad) for p in trained if p.grad is not None) + sum(map(size, trained))  # and their average
    return Checked(case.name, base, planned, (lasts, min(allocator_peak(step) for _ in range(2))))


def size(tensor: Tensor) -> int:
    """Bytes of a tensor; of a quantised one, of its parts."""
    if type(tensor.data) is Tensor:
        return tensor.numel() * tensor.element_size()
    return sum(size(getattr(tensor.data, name)) for name in tensor.data.__tensor_flatten__()[0])


# -------------------------------------------------------------------------------------------------------------- tables


def fits(total: float, card: int) -> bool:
    return total <= (1 - MARGIN) * card * GB


def table(plans: dict[str, Any]) -> str:
    """Per network and base: what it takes, and the cards that it fits on."""
    rows = []
    for name, found in plans.items():
        for base in BASES:
            parts = found["parts"][base]
            total = sum(parts.values())
            cells = [f"{parts[part] / GB:.1f}" for part in ("base", "adapters", "step")]
            answers = ["yes" if fits(total, card) else "no" for card in CARDS]
            what = f"{name}, {found['parameters'] / GB:.1f} B" if base == BASES[0] else ""
            rows.append([what, "int8, float8" if base == "int8" else base, *cells, f"{total / GB:.1f}", *answers])
    head = ["network", "`base_dtype`", "base", "adapters", "a step", "GB", *(f"{card} GB" for card in CARDS)]
    return markdown(head, rows)


def check_table(found: Sequence[Checked]) -> str:
    rows = [
        [c.network, c.base, *(f"{one / 1e6:.2f}" for pair in zip(c.planned, c.measured, strict=True) for one in pair),
         f"{100 * c.error:+.1f} %"] for c in found
    ]  # fmt: skip
    head = ["network", "`base_dtype`", "lasts: planned MB", "measured", "a step: planned MB", "measured", "error"]
    return markdown(head, rows) + f"\n\nLargest error: {100 * max(abs(c.error) for c in found):.1f} %."


def checks(record: dict[str, Any]) -> list[Checked]:
    return [
        Checked(**{**one, "planned": tuple(one["planned"]), "measured": tuple(one["measured"])})
        for one in record["check"]
    ]


def show(record: dict[str, Any]) -> None:
    page = ROOT / "docs" / "memory.md"
    for name, text in (("small cards", table(record["plans"])), ("small cards check", check_table(checks(record)))):
        print(text)
        refresh(page, name, text)


def main() -> None:
    parser = argparse.ArgumentParser(description="Plan the memory of few-step LoRAs on one card.")
    parser.add_argument("--only", nargs="+", choices=[case.name for case in CASES], help="plan these, keep the others")
    parser.add_argument("--check", action="store_true", help="the measurements alone; keep the recorded plans")
    parser.add_argument("--table", action="store_true", help="refresh docs/memory.md from the record")
    chosen = parser.parse_args()
    warnings.simplefilter("ignore")
    path = RESULTS / "small_cards.json"
    record = json.loads(path.read_text()) if path.is_file() else {"plans": {}}
    if not chosen.table:
        for case in [] if chosen.check else CASES:
            if not chosen.only or case.name in chosen.only:
                record["plans"][case.name] = plan(case)
                print(f"planned {case.name}", file=sys.stderr, flush=True)
                write_json(path, record)
        if not chosen.only:
            bases = [base for base in BASES if base != "int8" or find_spec("torchao") is not None]
            record["check"] = [check(case, base) for case in SMALL for base in bases]
            record["machine"] = machine()
        write_json(path, record)
    show(json.loads(path.read_text()))


if __name__ == "__main__":
    main()
