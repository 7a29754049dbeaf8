"""A proof, in the first steps of a run, that its processes train one and the same network."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, NoReturn

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Replicate

from flowanchor.base.rank_zero import rank_zero_warn
from flowanchor.base.version import VERSION
from flowanchor.errors import ConfigError, RankDisagreement
from flowanchor.interfaces import Batch
from flowanchor.weights import local

OWN = ("callbacks", "logger", "name", "debug")  # parts of a config that may differ: what a machine shows and keeps
BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int32}  # bytes per value -> how its bits are read
MIX = 0x9E3779B97F4A7C1  # any large odd number
ADVICE = "look for what is done on one rank only, or leave this check out with ~callbacks.rank_agreement"


class Part(NamedTuple):
    """What a rank holds of a tensor: ranks that hold the same piece must hold the same bits."""

    layout: str  # shape, type and how it is spread over the ranks
    piece: tuple[int, ...]  # which piece it is: position on the sharded dimensions of the mesh
    checksum: int | None  # None: there is no tensor (a gradient that did not arrive)


Parts = Mapping[str, Part]  # name of a parameter -> what this rank holds of it


class RankAgreement(pl.Callback):
    """Stops a run on all ranks, with one sentence, where its processes disagree. A single process is not checked.

    When training starts: versions, settings (but for absolute paths) and the step to start from. Then, around an
    optimizer step:

    - every trainable parameter has a gradient on all ranks or on none, and some have one;
    - gradients after reduction, and weights after the step, have the same bits on all ranks that hold the same piece:
      all ranks where a parameter is whole (DDP), the replicas of a shard (HSDP);
    - the norm that each rank clips by (`train/grad_norm`) is the same: with sharded parameters, a norm that is not
      reduced would scale every shard differently;
    - ranks train on different data; a warning only, since a tiny set may repeat itself.

    A check exchanges one number per parameter, no weights.

    Args:
        steps: optimizer steps that are checked from the start of a run (also of a resumed one).
        every: later check again every so many steps; null: never.

    Raises `RankDisagreement`, on every rank.
    """

    def __init__(self, steps: int = 3, every: int | None = None) -> None:
        if steps < 0 or (every is not None and every < 1):
            raise ConfigError(
                f"callbacks.rank_agreement.steps={steps} must not be negative, and callbacks.rank_agreement.every="
                f"{'null' if every is None else every} must be a positive number of steps, or null."
            )
        self.steps, self.every = steps, every
        self._taken = 0  # steps of this process; not the global step, which may be what ranks disagree about
        self._step: int | None = None  # global step of the optimizer step that is being checked
        self._batch: int | None = None
        self._warned = False

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._taken, self._step = 0, None
        if not _several():
            return
        versions = {"flowanchor": VERSION, "torch": torch.__version__}
        config = getattr(pl_module, "config", {})  # of a module of one's own, too
        config = _flat({key: value for key, value in config.items() if key not in OWN})
        check_same("versions", versions, "install the same packages on every machine")
        check_same("settings", config, "start every process with the same command")
        check_same("starting points", {"step": trainer.global_step}, "let every machine see the same run folder")

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if _several() and self._due():
            self._batch = checksum(batch.x1) if isinstance(batch, Batch) else None

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        due = _several() and self._due()
        self._taken += 1
        if not due:
            return
        self._step = trainer.global_step
        gradients = {name: part_of(parameter, parameter.grad) for name, parameter in trained(pl_module)}
        reports = gather((gradients, self._batch, self._step))
        check_steps(self._step, [step for _, _, step in reports])
        check_presence(self._step, [parts for parts, _, _ in reports])
        check_bits(self._step, "gradient", [parts for parts, _, _ in reports])
        self._check_data(self._step, [batch for _, batch, _ in reports])

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._step is None:  # no optimizer step in this batch (accumulation), or none to be checked
            return
        step, self._step = self._step, None
        norm = trainer.callback_metrics.get("train/grad_norm")
        weights = {name: part_of(parameter, parameter) for name, parameter in trained(pl_module)}
        reports = gather((weights, None if norm is None else float(norm)))
        check_norms(step, [norm for _, norm in reports])
        check_bits(step, "weight", [parts for parts, _ in reports])

    def _due(self) -> bool:
        return self._taken < self.steps or (self.every is not None and self._taken % self.every == 0)

    def _check_data(self, step: int, batches: Sequence[int | None]) -> None:
        same = [rank for rank, batch in enumerate(batches) if batch is not None and batches.count(batch) > 1]
        if same and not self._warned:
            self._warned = True
            first = [rank for rank in same if batches[rank] == batches[same[0]]]
            rank_zero_warn(
                f"{_ranks(first).capitalize()} train on the same batch at step {step}: unless the data repeat "
                "themselves, give every process its own share in the data module's sampler."
            )


# ------------------------------------------------------------------------------------------------- what a rank holds


def trained(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Names and trainable parameters; of a sharded one this rank's part, also where its unit is still whole."""
    for unit in module.modules():
        if isinstance(unit, FSDPModule):
            unit.reshard()
    return ((name, parameter) for name, parameter in module.named_parameters() if parameter.requires_grad)


@torch.no_grad()
def part_of(parameter: Tensor, tensor: Tensor | None) -> Part:
    """Of a tensor that belongs to a parameter (its gradient, or itself): what this rank holds."""
    of = parameter if tensor is None else tensor
    layout = f"{tuple(of.shape)} {of.dtype}"
    piece: tuple[int, ...] = ()
    if isinstance(of, DTensor):
        layout += f" {of.placements} on {tuple(of.device_mesh.shape)}"
        position = of.device_mesh.get_coordinate() or ()
        piece = tuple(i for i, how in zip(position, of.placements, strict=False) if not isinstance(how, Replicate))
    return Part(layout, piece, None if tensor is None else checksum(local(tensor)))


def checksum(tensor: Tensor) -> int:
    """A number of 64 bits that depends on every bit of a tensor and on its place; the same on every device."""
    if tensor.numel() == 0:
        return 0
    table = tensor.detach().reshape(-1, tensor.shape[-1] if tensor.ndim else 1).contiguous()
    bits = table.view(BITS[table.element_size()])
    # Weighted sums over rows and over columns: nothing of the tensor's size is allocated.
    columns, rows = (_weighted(bits.sum(dim, dtype=torch.int64)) for dim in (0, 1))
    return (columns * MIX + rows) % 2**64


def _weighted(sums: Tensor) -> int:
    """Sum of [n] integers, modulo 2^64, each times an odd number that belongs to its place."""
    place = torch.arange(1, len(sums) + 1, device=sums.device) * MIX
    return int((sums * ((place ^ (place >> 17)) | 1)).sum())


def _flat(settings: Any, key: str = "") -> dict[str, Any]:
    """Nested settings under dotted names, without absolute paths: folders may lie elsewhere on another machine."""
    if isinstance(settings, Mapping):
        items = [(f"{key}.{name}" if key else str(name), value) for name, value in settings.items()]
        return {name: leaf for inner, value in items for name, leaf in _flat(value, inner).items()}
    return {} if isinstance(settings, str) and os.path.isabs(settings) else {key: settings}


# ---------------------------------------------------------------------------------------------------------- checks


def _several() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def gather(report: Any) -> list[Any]:
    """The reports of all ranks, on every rank."""
    reports: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(reports, report)
    return reports


def check_same(what: str, values: Mapping[str, Any], advice: str) -> None:
    """Raise `RankDisagreement` on all ranks where one has other values. Collective."""
    digest = hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()
    if len(set(gather(digest))) == 1:
        return
    reports = gather(dict(values))
    for name in dict.fromkeys(name for report in reports for name in report):
        for rank, report in enumerate(reports):
            ours, theirs = (held.get(name, "absent") for held in (reports[0], report))
            if ours != theirs:
                where = f"{name} is {theirs} on rank {rank} and {ours} on rank 0"
                raise RankDisagreement(f"The ranks have different {what}: {where}; {advice}.")


def check_steps(step: int, steps: Sequence[int]) -> None:
    others = [rank for rank, other in enumerate(steps) if other != steps[0]]
    if others:
        _refuse(step, f"{_ranks(others)} count step {steps[others[0]]} while rank 0 counts step {steps[0]}")


def check_presence(step: int, reports: Sequence[Parts]) -> None:
    """A parameter must have a gradient on all ranks or on none, and some parameter must have one."""
    for name in dict.fromkeys(name for report in reports for name in report):
        ranks = range(len(reports))
        unknown = [rank for rank in ranks if name not in reports[rank]]
        if unknown:
            _refuse(step, f"{name} is not trained on {_ranks(unknown)}, but on the others it is")
        without = [rank for rank in ranks if reports[rank][name].checksum is None]
        if 0 < len(without) < len(reports):
            having = [rank for rank in ranks if rank not in without]
            _refuse(step, f"{name} has no gradient on {_ranks(without)} and has one on {_ranks(having)}")
    if all(part.checksum is None for report in reports for part in report.values()):
        _refuse(step, "no parameter has a gradient on any rank, as if gradients were never reduced")


def check_bits(step: int, what: str, reports: Sequence[Parts]) -> None:
    """Ranks that hold the same piece of a tensor must hold the same bits."""
    for name, expected in reports[0].items():
        first: dict[tuple[int, ...], int] = {}  # piece -> the first rank that holds it
        for rank, report in enumerate(reports):
            part = report[name]
            if part.layout != expected.layout:
                _refuse(step, f"the {what} of {name} is {part.layout} on rank {rank} and {expected.layout} on rank 0")
            holder = first.setdefault(part.piece, rank)
            if part.checksum != reports[holder][name].checksum:
                after = "reduction" if what == "gradient" else "the optimizer's step"
                _refuse(step, f"the {what} of {name} is another on rank {rank} than on rank {holder} after {after}")


def check_norms(step: int, norms: Sequence[float | None]) -> None:
    """Every rank must clip by the same norm; the last digits may depend on its device."""
    for rank, norm in enumerate(norms):
        if norm is None or norms[0] is None:
            same = norm is norms[0]
        else:
            same = math.isclose(norm, norms[0], rel_tol=1e-4) or (math.isnan(norm) and math.isnan(norms[0]))
        if not same:
            _refuse(step, f"the gradient's norm is {norm} on rank {rank} and {norms[0]} on rank 0")


def _refuse(step: int, what: str) -> NoReturn:
    raise RankDisagreement(f"The ranks disagree at step {step}: {what}; {ADVICE}.")


def _ranks(ranks: Sequence[int]) -> str:
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    shown = [str(rank) for rank in ranks[:4]] + ([f"{len(ranks) - 4} more"] if len(ranks) > 4 else [])
    return f"ranks {', '.join(shown[:-1])} and {shown[-1]}"
