"""How many GPUs does it take? The peak memory of one GPU in a sharded FACM step, by engine and number of GPUs.

    python benchmarks/memory_plan.py           # the networks of docs/memory.md, which it refreshes; takes minutes
    python benchmarks/memory_plan.py --plan    # the plans alone
    python benchmarks/memory_plan.py --check   # the plan against measured peaks on 2 and 4 processes
    python benchmarks/memory_plan.py backbone.preset=B/1 backbone.input_size=16 --batch 16 --worlds 8 64
                                               # the network of any config, by its overrides

The network is built on the meta device and sharded by the real strategy's code, and one FACM step (guided teacher,
anchor, shortcut) runs on it with tensors that have no values, on one of so many processes that do not exist. What the
step allocates is counted; nothing is estimated (planning.py).
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from multiprocessing import get_context
from typing import Any

from flowanchor.interfaces import Backbone
from flowanchor.jvp.attention import resolve
from harness import RESULTS, ROOT, machine, markdown, refresh, together, write_json
from planning import ENGINES, NETWORKS, Fused, Plan, Setting, lasting, networks, plan, plans
from workloads import RELEASED

WORLDS = (8, 16, 32, 64, 128, 256, 512)
ROUNDS = 3  # measurements of one case; for each process the least counts
CARD, MARGIN = 80e9, 0.1  # bytes; the share that is left to the CUDA context, NCCL and fragmentation
GB = 1e9


@dataclass(frozen=True)
class Case:
    """A network and a setting that are planned for."""

    name: str
    network: str  # of planning.NETWORKS, or "config"
    size: dict[str, Any]  # its arguments; of a config: its overrides
    setting: Setting
    precisions: tuple[bool, ...] = (False, True)  # in which it is checked: float32, bfloat16

    def build(self) -> Backbone:
        if self.network == "config":
            return configured(self.size["overrides"])
        return NETWORKS[self.network](**self.size)


XL = {"patch_size": 1, "hidden_size": 1152, "depth": 28, "num_heads": 16, "in_channels": 32, **RELEASED}
WAN, ONE, FOUR = "Wan A14B", *(Setting(batch, averages=1, text=(512, 4096)) for batch in (1, 4))  # as its recipes
A14B = {"preset": "A14B", "height": 128, "width": 128}
CASES = [
    Case("LightningDiT-XL/1, 256 tokens, 32 samples per GPU", "lightningdit", {"input_size": 16, **XL}, Setting(32)),
    Case("LightningDiT-XL/1, 1,024 tokens, 8 samples per GPU", "lightningdit", {"input_size": 32, **XL}, Setting(8)),
    Case("Wan 1.3B, 4,096 tokens, 4 samples per GPU", "wan", {"preset": "1.3B", "height": 128, "width": 128}, FOUR),
    Case(f"{WAN}, an expert, 4,096 tokens, 1 sample per GPU", "wan", A14B, ONE),
    Case(
        f"{WAN}, an expert, optimizer=adamw_bf16, 4,096 tokens, 1 sample per GPU",
        "wan",
        A14B,
        replace(ONE, low_moments=True),
    ),
    Case(f"{WAN}, both experts in one run, 4,096 tokens, 1 sample per GPU", "wan_experts", A14B, ONE),
    Case(f"{WAN}, an expert, 32,760 tokens, 1 sample per GPU", "wan", {"preset": "A14B", "frames": 21}, ONE),
]


def configured(overrides: Sequence[str]) -> Backbone:
    """The backbone of `train.py OVERRIDES`."""
    from hydra import compose, initialize_config_module
    from hydra.utils import instantiate

    with initialize_config_module("flowanchor.conf", version_base="1.3"):
        return instantiate(compose("train", overrides=list(overrides)).backbone)


def plan_one(case: Case, engine: str, worlds: Sequence[int]) -> dict[int, Plan]:
    warnings.simplefilter("ignore")
    return plans(case.build, ENGINES[engine](Fused()), case.setting, worlds)


def plan_all(cases: Sequence[Case], engines: Sequence[str], worlds: Sequence[int], jobs: int) -> dict[str, Any]:
    """case -> engine -> world size -> plan."""
    found: dict[str, Any] = {case.name: {} for case in cases}
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        started = [(case, engine, pool.submit(plan_one, case, engine, worlds)) for case in cases for engine in engines]
        for case, engine, planned in started:
            found[case.name][engine] = planned.result()
            print(f"planned {case.name}: {engine}", file=sys.stderr, flush=True)
    return found


def renew_lasting(planned: dict[str, Any]) -> None:
    """Count anew, in recorded plans, what lasts from step to step: it needs no run of a step."""
    for case in CASES:
        if case.name not in planned:
            continue
        _, shapes = networks(case.build, case.setting)
        for engines in planned[case.name].values():
            for world, one in engines.items():
                one["parts"].update(lasting(shapes, case.setting, int(world)))


# -------------------------------------------------------------------------------------------------------------- tables


def fits(peak: float) -> bool:
    return peak <= (1 - MARGIN) * CARD


def report(found: dict[str, Any]) -> str:
    """From how many GPUs on each network fits; then its peaks by engine, and the parts of the leanest engine."""
    answers = [[name, *answer(engines)] for name, engines in found.items()]
    rule = f"Fits: at most {(1 - MARGIN) * CARD / GB:.0f} of a card's {CARD / GB:.0f} GB (bold)."
    head = ["FACM with a frozen, guided teacher", "fits from", "with", "peak GB"]
    return "\n\n".join([markdown(head, answers), rule, *(section(name, engines) for name, engines in found.items())])


def answer(engines: dict[str, dict[int, Plan]]) -> list[str]:
    """The smallest number of GPUs, the engines that fit there, and the least peak."""
    worlds = next(iter(engines.values()))
    for world in worlds:
        enough = {name: plans[world].peak for name, plans in engines.items() if fits(plans[world].peak)}
        if enough:
            return [f"{world} GPUs", ", ".join(enough), f"{min(enough.values()) / GB:.1f}"]
    least = min(plans[world].peak for plans in engines.values())
    return [f"not on {world} GPUs", "any", f"{least / GB:.1f}"]


def section(name: str, engines: dict[str, dict[int, Plan]]) -> str:
    worlds = list(next(iter(engines.values())))
    leanest = min(engines, key=lambda engine: engines[engine][worlds[-1]].peak)
    peaks = [
        [engine, *(_bold(plans[w].peak) for w in worlds), _fewest(plans)] for engine, plans in engines.items()
    ]  # fmt: skip
    chosen = engines[leanest]
    kinds = list(dict.fromkeys(kind for plan in chosen.values() for kind in plan.parts))
    parts = [[kind, *(f"{chosen[w].parts.get(kind, 0) / GB:.2f}" for w in worlds)] for kind in kinds]
    sent = [
        [f"{kind}, per step", *(f"{chosen[w].communication.get(kind, 0) / GB:.1f}" for w in worlds)]
        for kind in ("all_gather", "reduce_scatter")
    ]
    return "\n\n".join(
        [
            f"### {name}",
            markdown(["peak per GPU in GB, on GPUs:", *map(str, worlds), "fits from"], peaks),
            f"Of these, with {leanest}:",
            markdown(["GB on GPUs:", *map(str, worlds)], [*parts, *sent]),
        ]
    )


def _bold(peak: float) -> str:
    return f"**{peak / GB:.1f}**" if fits(peak) else f"{peak / GB:.1f}"


def _fewest(plans: dict[int, Plan]) -> str:
    enough = [world for world, found in plans.items() if fits(found.peak)]
    return f"{min(enough)} GPUs" if enough else "none of these"


# --------------------------------------------------------------------------------------------------------------- check

DIT = {"input_size": 16, "patch_size": 1, "in_channels": 4, "hidden_size": 96, "depth": 4, "num_heads": 4, **RELEASED}
VIDEO_DIT = {
    "preset": "nano", "num_layers": 3, "in_channels": 4, "frames": 2, "height": 16, "width": 16, "text_dim": 32,
    "text_len": 32,
}  # fmt: skip
SMALL = [
    Case("LightningDiT", "lightningdit", DIT, Setting(2)),
    # Tensors without values lose their device in the float32 tangent of diffusers' rotary positions (written in place).
    Case("Wan", "wan", VIDEO_DIT, Setting(2, text=(32, 32)), precisions=(True,)),
    Case("Wan, two experts", "wan_experts", VIDEO_DIT, Setting(2, text=(32, 32)), precisions=(True,)),
]


@dataclass(frozen=True)
class Checked:
    """A planned peak of forward and backward beside the measured ones, in bytes."""

    network: str
    engine: str
    processes: int
    low_precision: bool
    planned: int
    measured: list[int] = field(default_factory=list)  # by process

    @property
    def error(self) -> float:
        """Relative, against the process with the largest peak."""
        return self.planned / max(self.measured) - 1


def check(
    engines: Sequence[str],
    worlds: Sequence[int],
    cases: Sequence[Case] = tuple(SMALL),
    rounds: int = ROUNDS,
) -> list[Checked]:
    """Small networks in real groups of gloo processes, measured `rounds` times by what the CPU's allocator handed out.

    Both sides use the CPU's attention here (tiled, plain PyTorch); whatever else a step allocates is the same code.
    """
    found = []
    for case in cases:
        for low in case.precisions:
            setting = Setting(**{**asdict(case.setting), "low_precision": low})
            for world in worlds:
                for engine in engines:
                    task = {"measure": "peak", "network": case.network, "size": case.size, "engine": engine}
                    runs = [together(world, {**task, "setting": asdict(setting)}) for _ in range(rounds)]
                    # On busy cores a collective ends late now and then, and its buffers live on: each process' least.
                    measured = [min(peaks) for peaks in zip(*runs, strict=True)]
                    planned = plan(case.build, ENGINES[engine](resolve("auto")), setting, world).step_peak
                    found.append(Checked(case.name, engine, world, low, planned, measured))
    return found


def check_table(found: Sequence[Checked]) -> str:
    rows = [
        [c.network, c.engine, c.processes, "bf16" if c.low_precision else "fp32", f"{c.planned / 1e6:.2f}",
         f"{max(c.measured) / 1e6:.2f}", f"{100 * c.error:+.1f} %"] for c in found
    ]  # fmt: skip
    largest = max(abs(c.error) for c in found)
    return "\n\n".join(
        [
            markdown(["network", "engine", "processes", "precision", "planned MB", "measured MB", "error"], rows),
            f"Largest error: {100 * largest:.1f} %.",
        ]
    )


# ---------------------------------------------------------------------------------------------------------------- main


def main() -> None:
    parser = argparse.ArgumentParser(description="Plan the memory of a sharded FACM step.")
    parser.add_argument("overrides", nargs="*", help="of the training config; none: the docs' networks")
    parser.add_argument("--batch", type=int, default=8, help="samples per GPU, of a config")
    parser.add_argument("--averages", type=int, default=2, help="moving averages of the weights, of a config")
    parser.add_argument("--no-teacher", action="store_true", help="train without a frozen teacher, of a config")
    parser.add_argument("--float32", action="store_true", help="float32 throughout, of a config")
    parser.add_argument("--text", type=int, nargs=2, metavar=("TOKENS", "WIDTH"), help="a text condition, of a config")
    parser.add_argument("--only", nargs="+", choices=[case.name for case in CASES], help="plan these, keep the others")
    parser.add_argument("--engines", nargs="+", choices=list(ENGINES), default=list(ENGINES))
    parser.add_argument("--worlds", nargs="+", type=int, default=list(WORLDS), help="numbers of GPUs")
    parser.add_argument("--jobs", type=int, default=2, help="plans made at the same time")
    parser.add_argument("--table", action="store_true", help="refresh docs/memory.md from the record; plan nothing")
    parser.add_argument("--lasting", action="store_true", help="weights and optimizers anew, in the recorded plans")
    parser.add_argument("--plan", action="store_true", help="the plans alone; keep the recorded measurements")
    parser.add_argument("--check", action="store_true", help="the measurements alone; keep the recorded plans")
    chosen = parser.parse_args()
    if chosen.overrides:
        setting = Setting(chosen.batch, chosen.averages, not chosen.no_teacher, not chosen.float32)
        setting = replace(setting, text=tuple(chosen.text)) if chosen.text else setting
        case = Case(" ".join(chosen.overrides), "config", {"overrides": chosen.overrides}, setting)
        print(report(plan_all([case], chosen.engines, chosen.worlds, chosen.jobs)))
        return
    record = RESULTS / "memory_plan.json"
    found = json.loads(record.read_text()) if record.is_file() else {}
    if chosen.lasting:
        renew_lasting(found["plans"])
        write_json(record, found)
    elif not chosen.table:
        if not chosen.check:
            cases = [case for case in CASES if not chosen.only or case.name in chosen.only]
            planned = plan_all(cases, chosen.engines, chosen.worlds, chosen.jobs)
            found["plans"] = {**found.get("plans", {}), **planned} if chosen.only else planned
        if not chosen.plan:
            found["check"] = check(chosen.engines, (2, 4))
            found["machine"] = machine()
        write_json(record, found)
    show(json.loads(record.read_text()))


def show(record: dict[str, Any]) -> None:
    """Print what is recorded, and refresh the docs."""
    found = {
        name: {engine: {int(world): Plan(**one) for world, one in of.items()} for engine, of in engines.items()}
        for name, engines in record["plans"].items()
    }
    page = ROOT / "docs" / "memory.md"
    for name, text in (
        ("memory plan", report(found)),
        ("memory check", check_table([Checked(**one) for one in record["check"]])),
    ):
        print(text)
        refresh(page, name, text)


if __name__ == "__main__":
    main()
