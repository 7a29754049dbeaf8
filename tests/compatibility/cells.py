"""A program for one of two gloo processes: one FACM step in every cell of the compatibility matrix, written as JSON.

    python cells.py RANK STORE RESULT all|part

Each step is compared with the same step by `Full` in one process, in float32, uncompiled: prediction, tangent, and
gradients, as relative errors. Steps without other processes are shared out between the two.
"""

from __future__ import annotations

import itertools
import json
import sys
import traceback
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from flowanchor.errors import ConfigError
from flowanchor.interfaces import Backbone, Batch, ObjectiveResult, TangentEngine
from flowanchor.jvp import Chain, FiniteDifference, Full, TwoPass, compile_blocks, compiled_forms, compiled_replay
from flowanchor.jvp.attention import Math, Streaming
from flowanchor.jvp.compatibility import check
from flowanchor.plugins.backbones.diffusers.network import DiffusersTransformer
from flowanchor.plugins.backbones.lightningdit import LightningDiT
from flowanchor.plugins.objectives.anchors.flow_matching import FlowMatchingAnchor
from flowanchor.plugins.objectives.composed import ComposedObjective
from flowanchor.plugins.objectives.intervals.expanded import ExpandedInterval
from flowanchor.plugins.objectives.shortcuts.consistency import ConsistencyShortcut
from flowanchor.plugins.objectives.times.arctan_lognormal import ArctanLogNormal
from flowanchor.plugins.teachers.data import DataVelocity
from flowanchor.strategies.sharding import shard_backbone
from flowanchor.text.base import PooledTokens

WORLD, BATCH = 2, 8
ENGINES = {
    "chain": ("off", "on", "selective"),  # checkpointing: `recompute` of chain, `checkpoint` of the others
    "two_pass": ("off", "on"),
    "full": ("off", "on"),
    "finite_difference": ("off", "on"),
}
SD3 = {
    "sample_size": 4, "patch_size": 2, "in_channels": 3, "out_channels": 3, "num_layers": 2, "attention_head_dim": 8,
    "num_attention_heads": 2, "joint_attention_dim": 8, "caption_projection_dim": 16, "pooled_projection_dim": 8,
    "pos_embed_max_size": 4, "dual_attention_layers": (0,), "qk_norm": "rms_norm",
}  # fmt: skip
SPREADS = ("plain", "DDP", "FSDP2", "FSDP2 + bf16")
ATTENTION = {"math": Math(), "streaming": Streaming(tile_queries=2, tile_keys=3)}  # several tiles for 4 tokens


@dataclass(frozen=True)
class Cell:
    """One combination."""

    engine: str
    spread: str
    checkpointing: str
    attention: str
    compiled: bool
    network: str = "lightningdit"

    def make_engine(self) -> TangentEngine:
        attention, on = ATTENTION[self.attention], self.checkpointing == "on"
        if self.engine == "chain":
            return Chain("selective" if self.checkpointing == "selective" else on, attention)
        if self.engine == "two_pass":
            return TwoPass(on, attention)
        if self.engine == "full":
            return Full(attention, on)
        return FiniteDifference(checkpoint=on)  # it takes no tangent of attention


# Cells of one network follow each other.
CELLS = [
    Cell(engine, spread, checkpointing, attention, compiled)
    for compiled, spread in itertools.product((False, True), SPREADS)
    for engine, modes in ENGINES.items()
    for checkpointing, attention in itertools.product(modes, ATTENTION)
] + [
    Cell("chain", spread, checkpointing, "math", False, "sd3")
    for spread in ("plain", "DDP", "FSDP2")
    for checkpointing in ENGINES["chain"]
]


# The compiled cells that stand for all: one of each engine and spread, in the order of `SPREADS`. Graphs take seconds,
# so "plain" and DDP, and the engines of one spread, share what they can.
IN_PART = {
    "chain": ("selective", "selective", "off", "on"),
    "two_pass": ("on", "on", "off", "off"),
    "full": ("off", "off", "off", "off"),
    "finite_difference": ("off", "off", "on", "on"),
}
ATTENTION_IN_PART = ("math", "math", "streaming", "math")


def in_part(cell: Cell) -> bool:
    """Whether a cell is in the part that stands for all: every entry of the page, and every pair of settings."""
    if cell.network != "lightningdit":
        return True
    spread = SPREADS.index(cell.spread)
    if cell.compiled:
        return (cell.checkpointing, cell.attention) == (IN_PART[cell.engine][spread], ATTENTION_IN_PART[spread])
    mode = ENGINES[cell.engine].index(cell.checkpointing)
    return cell.attention == tuple(ATTENTION)[(spread + mode) % 2]


class Step(nn.Module):
    """The loss of an objective as a module's forward, for `DistributedDataParallel`."""

    def __init__(self, student: Backbone) -> None:
        super().__init__()
        self.student = student
        shortcut, anchor = ConsistencyShortcut(), FlowMatchingAnchor()
        self.objective = ComposedObjective(ExpandedInterval(), ArctanLogNormal(), anchor, shortcut)

    def forward(self, engine: TangentEngine, samples: slice) -> tuple[Tensor, ObjectiveResult]:
        x1, noise, t, labels, *text = (tensor[samples] for tensor in _inputs())
        cond = PooledTokens(*text) if isinstance(self.student, DiffusersTransformer) else labels
        result = self.objective(self.student, Batch(x1, cond), DataVelocity(), engine, noise, t)
        return result.loss, result


@cache
def _inputs() -> tuple[Tensor, ...]:
    draw = torch.Generator().manual_seed(0)
    x1, noise = torch.randn(2, BATCH, 3, 4, 4, generator=draw)
    t, labels = torch.rand(BATCH, generator=draw), torch.randint(0, 5, (BATCH,), generator=draw)
    return x1, noise, t, labels, torch.randn(BATCH, 5, 8, generator=draw), torch.randn(BATCH, 8, generator=draw)


def network(name: str) -> Backbone:
    torch.manual_seed(0)
    if name == "sd3":
        return _drawn(DiffusersTransformer("SD3Transformer2DModel", SD3, height=4, width=4, text_len=5))
    switches = {"use_qknorm": True, "use_swiglu": True, "use_rope": True, "use_rmsnorm": True}
    made = LightningDiT(
        4, 2, 3, hidden_size=16, depth=2, num_heads=2, num_classes=5, disable_label_dropout=True, **switches
    )
    return _drawn(made)


def _drawn(made: Backbone) -> Backbone:
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.2)  # nothing starts at zero, where a wrong tangent would not show
    return made


class Outcome(dict[str, Tensor]):
    """Prediction [B, *] and tangent [B, *] of the joint batch, and the gradients in one vector."""

    def errors(self, wanted: Outcome) -> dict[str, float]:
        return {name: float((self[name] - wanted[name]).norm() / wanted[name].norm()) for name in wanted}


class Spread:
    """One network, spread as its name says, compiled or not; every cell that fits runs on it."""

    def __init__(self, name: str, spread: str, compiled: bool) -> None:
        student = network(name)
        self.low, self.joint = spread.endswith("bf16"), spread != "plain"
        self.step: nn.Module = Step(student)
        self.names = [name for name, p in student.named_parameters() if p.requires_grad]
        if spread.startswith("FSDP2"):
            policy = {"param_dtype": torch.bfloat16, "reduce_dtype": torch.float32} if self.low else {}
            shard_backbone(student, init_device_mesh("cpu", (WORLD,)), **policy)
        self.compiled_calls = 0
        if compiled:
            # A break of the graph, or one variant more than torch.compile keeps, is an error.
            compile_blocks(student, fullgraph=True)
            for block in student.blocks:
                block.forward.compiled = self._counted(block.forward.compiled)
        # Passes of `selective` whose linear layers are known have graphs of their own, or no answer.
        compiled_replay.ask_graph = self._counted(compiled_forms.ask_graph)
        self.student = student

    def replicate(self) -> None:
        """Under DDP from now on: the same network and, where it is compiled, the same graphs."""
        self.joint, self.step = True, DistributedDataParallel(self.step)

    def _counted(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*inputs: Any, **options: Any) -> Any:
            answer = function(*inputs, **options)
            self.compiled_calls += answer is not None
            return answer

        return call

    def run(self, engine: TangentEngine, whole: bool = False) -> Outcome:
        """One step of this process's share of the batch, which is the first one where nothing is shared out."""
        self.student.zero_grad()
        self.compiled_calls = 0
        share = BATCH // WORLD
        first = dist.get_rank() * share if self.joint else 0
        # Of one size everywhere: "plain" and DDP have the same graphs.
        samples = slice(None) if whole else slice(first, first + share)
        with torch.autocast("cpu", torch.bfloat16, enabled=self.low):
            loss, result = self.step(engine, samples)
        loss.backward()
        parameters = dict(self.student.named_parameters())
        gradients = torch.cat([_whole(parameters[name].grad).flatten() for name in self.names])
        assert result.prediction is not None and result.tangent is not None
        return Outcome(
            prediction=self._joined(result.prediction), tangent=self._joined(result.tangent), gradients=gradients
        )

    def _joined(self, share: Tensor) -> Tensor:
        if not self.joint:
            return share
        parts = [torch.empty_like(share) for _ in range(WORLD)]
        dist.all_gather(parts, share.contiguous())
        return torch.cat(parts)


def _whole(gradient: Tensor | None) -> Tensor:
    assert gradient is not None
    return gradient.full_tensor() if isinstance(gradient, DTensor) else gradient


def visit(cell: Cell, spread: Spread, wanted: Outcome) -> dict[str, Any]:
    """What one cell comes to: an error against the reference, or a refusal, or a failure."""
    found: dict[str, Any] = asdict(cell)
    try:
        engine = cell.make_engine()
        check(engine, spread.student, sharded="FSDP2" in cell.spread, low_precision=spread.low)
    except ConfigError as refusal:
        return {**found, "verdict": "no", "reason": str(refusal)}
    try:
        errors = spread.run(engine).errors(wanted)
        return {**found, "verdict": "yes", "errors": errors, "compiled_calls": spread.compiled_calls}
    except Exception:  # noqa: BLE001 - whatever happens in a cell is its outcome
        return {**found, "verdict": "fails", "reason": traceback.format_exc()}


def main() -> None:
    rank, store, result, extent = sys.argv[1:]
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    torch._dynamo.config.recompile_limit = 8
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=int(rank), world_size=WORLD)
    made = {name: Spread(name, "plain", compiled=False) for name in ("lightningdit", "sd3")}
    wanted = {(name, whole): made[name].run(Full("math"), whole) for name in made for whole in (False, True)}
    found: list[dict[str, Any]] = []
    chosen = [cell for cell in CELLS if extent == "all" or in_part(cell)]
    for (name, spread, compiled), group in itertools.groupby(chosen, lambda c: (c.network, c.spread, c.compiled)):
        if spread == "DDP":  # follows "plain"
            made[name].replicate()
        else:
            torch._dynamo.reset()
            made[name] = Spread(name, spread, compiled)
        cells, joint = list(group), made[name].joint
        mine = cells if joint else cells[int(rank) :: WORLD]
        found += [visit(cell, made[name], wanted[name, joint]) for cell in mine]
    Path(result).write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
