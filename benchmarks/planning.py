"""One sharded FACM step run on shapes alone: the real engine, objective and sharding, with tensors that have no values.

A process stands for one of any number of processes (PyTorch's fake process group); collectives return at once. Every
allocation of the step is counted, so that a plan needs no formula of its own.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore

from counting import Collectives, LiveBytes
from flowanchor.checkpoints.load import store_low
from flowanchor.interfaces import Backbone, Batch, TangentEngine
from flowanchor.jumps.guidance import Guidance
from flowanchor.jvp import Chain, Full, TwoPass
from flowanchor.jvp.attention import AttentionTangent
from flowanchor.jvp.memory_plan import ShapesOnly
from flowanchor.optimizers import AdamWBF16
from flowanchor.plugins.backbones.lightningdit import LightningDiT
from flowanchor.plugins.backbones.wan import Wan
from flowanchor.plugins.backbones.wan_experts import WanExperts
from flowanchor.plugins.objectives.anchors.flow_matching import FlowMatchingAnchor
from flowanchor.plugins.objectives.composed import ComposedObjective
from flowanchor.plugins.objectives.intervals.expanded import ExpandedInterval
from flowanchor.plugins.objectives.shortcuts.consistency import ConsistencyShortcut
from flowanchor.plugins.objectives.times.uniform import Uniform
from flowanchor.plugins.teachers.checkpoint import CheckpointVelocity
from flowanchor.plugins.teachers.data import DataVelocity
from flowanchor.strategies.sharding import shard_backbone
from flowanchor.text.base import Tokens


class RoutedExperts(WanExperts):
    """Two experts in a step whose batch belongs to one of them: times without values cannot tell to which."""

    def expert(self, t: Tensor) -> Wan:
        return self.low


NETWORKS: dict[str, Callable[..., Backbone]] = {
    "lightningdit": LightningDiT,
    "wan": Wan.from_preset,
    "wan_experts": RoutedExperts,
}
ENGINES: dict[str, Callable[[AttentionTangent], TangentEngine]] = {
    "Chain(recompute)": lambda attention: Chain(attention=attention),
    'Chain("selective")': lambda attention: Chain(recompute="selective", attention=attention),
    "Chain(recompute=False)": lambda attention: Chain(recompute=False, attention=attention),
    "TwoPass(checkpoint)": lambda attention: TwoPass(checkpoint=True, attention=attention),
    "Full": lambda attention: Full(),  # no kernel computes attention's gradient and tangent at once
}
ADAM_STATES = 2  # values per trained parameter
SHARDING, ATTENTION, ACTIVATIONS = "sharding", "attention", "activations"


@dataclass(frozen=True)
class Setting:
    """What is trained, and how."""

    batch: int  # samples per process
    averages: int = 2  # of the weights (EMA), float32
    teacher: bool = True
    low_precision: bool = True  # parameters gathered in bfloat16, autocast; else float32 throughout
    text: tuple[int, int] | None = None  # length and width of a text condition; None: labels
    low_moments: bool = False  # the optimizer's in bfloat16 (optimizer=adamw_bf16)


@dataclass(frozen=True)
class Plan:
    """Bytes of one process at the moment when it holds most, by what they are for; and what it receives per step."""

    parts: dict[str, int]
    step_peak: int  # what forward and backward allocate at most: gradients, and everything that does not outlive them
    communication: dict[str, int]  # by collective

    @property
    def peak(self) -> int:
        return sum(self.parts.values())


class Fused(AttentionTangent):
    """What a fused kernel allocates: O and dO, nothing else."""

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        dq: Tensor | None,
        dk: Tensor | None,
        dv: Tensor | None,
        scale: float | None = None,
    ) -> tuple[Tensor, Tensor]:
        shape = (*q.shape[:-1], v.shape[-1])
        return v.new_empty(shape), v.new_empty(shape)


@contextmanager
def group_of(processes: int) -> Iterator[DeviceMesh]:
    """This process as the first of so many that do not exist."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=processes)
    try:
        yield init_device_mesh("cpu", (processes,))
    finally:
        dist.destroy_process_group()


class ByPurpose(LiveBytes):
    """Counts what a step allocates by what it is for, told by the code that is running.

    Of the frames that lead to an allocation the innermost one that belongs to a known place counts: FSDP2 (gathered
    parameters, buffers of collectives, gradients that it reduced), attention's tangent, or anything else of ours.
    """

    places = {"/distributed/fsdp/": SHARDING, "/jvp/attention/": ATTENTION}

    def __init__(self) -> None:
        super().__init__()
        self.now: Counter[str] = Counter()
        self.moments: list[tuple[int, int, int]] = []  # after each operator: activations, attention, sharding
        self._purposes: dict[int, str] = {}
        self._births: dict[int, int] = {}  # of what sharding made: the moment

    def gradients(self) -> list[int]:
        """At each moment, the bytes of what sharding had made and what is alive still: the reduced gradients."""
        made = [0] * (len(self.moments) + 1)
        for key, moment in self._births.items():
            made[moment] += self._sizes[key]
        return list(accumulate(made))[: len(self.moments)]

    def _resize(self, key: int, size: int) -> None:
        if key not in self._purposes:
            self._purposes[key] = self._purpose()
            if self._purposes[key] == SHARDING:
                self._births[key] = len(self.moments)
        self.now[self._purposes[key]] += size - self._sizes[key]
        super()._resize(key, size)

    def _forget(self, key: int) -> None:
        super()._forget(key)
        self._purposes.pop(key, None)
        self._births.pop(key, None)

    def _after(self) -> None:
        self.moments.append((self.now[ACTIVATIONS], self.now[ATTENTION], self.now[SHARDING]))

    def _purpose(self) -> str:
        frame: FrameType | None = sys._getframe(1)
        while frame is not None and frame.f_globals.get("__name__") in (__name__, LiveBytes.__module__):
            frame = frame.f_back  # the counter's own
        while frame is not None:
            for place, purpose in self.places.items():
                if place in frame.f_code.co_filename:
                    return purpose
            if frame.f_globals.get("__name__", "").startswith("flowanchor."):
                break
            frame = frame.f_back
        return ACTIVATIONS


def plans(make: Callable[[], Backbone], engine: Any, setting: Setting, worlds: Sequence[int]) -> dict[int, Plan]:
    """The plan of one process, for each number of processes; `make` builds the network.

    The step runs once, at the first of these numbers. At another one what lasts has other shares of the parameters, and
    at each moment of the step the gradients that are reduced already have another share; the rest stays.
    """
    built, shapes = networks(make, setting)
    with group_of(worlds[0]) as mesh, ShapesOnly(allow_non_fake_inputs=True):
        built = [built[0], *map(asked_teacher, built[1:])]
        for network in built:
            network._apply(lambda tensor: torch.empty(tensor.shape, dtype=tensor.dtype))
            shard(network, mesh, setting)
        loss_of = facm_loss(built[0], built[1] if setting.teacher else None, engine, setting)
        with Collectives() as sent, ByPurpose() as counter:
            loss = loss_of()
            lasts = counter.now[ACTIVATIONS]
            loss.backward()
            del loss
        reduced = counter.gradients()
        updated = [one for one, p in zip(shapes[0], built[0].parameters(), strict=True) if p.grad is not None]
    found = {}
    for world in worlds:
        stepped = _share(updated, world)
        scale = worlds[0] / world
        # Of all moments the one with the largest sum.
        moment = max(range(len(reduced)), key=lambda i: sum(counter.moments[i]) - (1 - scale) * reduced[i])
        activations, attention, sharding = counter.moments[moment]
        backward = {
            "gradients": round(scale * reduced[moment]),
            "kept for backward": min(lasts, activations),
            "one stage at work": max(0, activations - lasts),
            "attention workspace": attention,
            "gathered stages": sharding - reduced[moment],
        }
        # After the backward pass AdamW's multi-tensor form needs one more copy of what is stepped.
        beside = min(4 * stepped, 16 * AdamWBF16.together) if setting.low_moments else stepped
        update = {"gradients": stepped, "optimizer's temporary": beside}
        most = max(backward, update, key=lambda parts: sum(parts.values()))
        received = {kind: round((world - 1) / world * size) for kind, size in sent.bytes.items()}
        found[world] = Plan(lasting(shapes, setting, world) | most, sum(backward.values()), received)
    return found


Shapes = list[tuple[torch.Size, bool, int]]  # of a network's parameters: shape, trained or not, bytes of a value


def networks(make: Callable[[], Backbone], setting: Setting) -> tuple[list[Backbone], list[Shapes]]:
    """Student and teacher without values, as a training keeps them; and the shapes of their parameters."""
    with torch.device("meta"):
        built = [make() for _ in range(1 + setting.teacher)]
    kept(built[1:], setting)
    return built, [[(p.shape, p.requires_grad, p.element_size()) for p in one.parameters()] for one in built]


def lasting(shapes: Sequence[Shapes], setting: Setting, processes: int) -> dict[str, int]:
    """Bytes that one process holds from step to step: arithmetic on shapes."""
    owned, trained = (_share(part, processes) for part in (shapes[0], [one for one in shapes[0] if one[1]]))
    return {
        "parameters": owned,
        "optimizer": ADAM_STATES * trained // (2 if setting.low_moments else 1),
        "averages": setting.averages * owned,
        "teacher": _share(shapes[1], processes) if setting.teacher else 0,
    }


def plan(make: Callable[[], Backbone], engine: Any, setting: Setting, processes: int) -> Plan:
    """The plan of one process of so many."""
    return plans(make, engine, setting, [processes])[processes]


def _share(shapes: Iterable[tuple[torch.Size, bool, int]], processes: int) -> int:
    """Bytes of one process' part: FSDP2 splits the first dimension, rounded up."""
    return sum(-(-shape[0] // processes) * shape[1:].numel() * width for shape, _, width in shapes)


def facm_loss(student: Backbone, teacher: Backbone | None, engine: Any, setting: Setting) -> Callable[[], Tensor]:
    """FACM's loss (arXiv 2507.03738) of a batch of shapes."""
    guidance = Guidance(1.75, 0.125, 1.0)
    field = DataVelocity() if teacher is None else CheckpointVelocity.of_network(teacher, guidance)
    objective = ComposedObjective(ExpandedInterval(), Uniform(), FlowMatchingAnchor(), ConsistencyShortcut())
    if setting.text:
        cond: Any = Tokens(torch.randn(setting.batch, *setting.text))
    else:
        cond = torch.randint(0, 10, (setting.batch,))
    batch = Batch(torch.randn(setting.batch, *student.sample_shape), cond)
    noise, t = torch.randn_like(batch.x1), torch.rand(setting.batch)

    def loss() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=setting.low_precision):
            return objective(student, batch, field, engine, noise, t).loss

    return loss


def asked_teacher(network: Backbone) -> Backbone:
    """What a step asks of a frozen network: of two experts one (objective/time=routed, teacher.one_side=true)."""
    return network.low if isinstance(network, RoutedExperts) else network


def kept(teachers: Iterable[Backbone], setting: Setting) -> None:
    """Give frozen networks the types that a training keeps them in (teacher.dtype=auto)."""
    for teacher in teachers:
        if setting.low_precision:
            store_low(teacher, torch.bfloat16)


def shard(network: Backbone, mesh: DeviceMesh, setting: Setting) -> None:
    """Shard a network as the strategy does."""
    low = torch.bfloat16 if setting.low_precision else None
    shard_backbone(network, mesh, param_dtype=low, reduce_dtype=None if low is None else torch.float32)
