"""Moving averages of the student's weights, several at once, as a Lightning callback."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from flowanchor.base.rank_zero import rank_zero_info, rank_zero_warn
from flowanchor.ema_posthoc import gamma_from_sigma_rel, save_snapshot, snapshot_files
from flowanchor.errors import CheckpointError, ConfigError
from flowanchor.interfaces import Backbone
from flowanchor.module import FlowModule, skipped_steps
from flowanchor.weights import all_finite, copy_weights, local, shape_of


class Profile:
    """One averaging rule: `beta(t)`, the weight that the average keeps at update t = 1, 2, ..."""

    def __init__(self, sigma_rel: float | None = None, decay: float | None = None) -> None:
        self.sigma_rel, self.decay = sigma_rel, decay
        if sigma_rel is not None:
            self.gamma = gamma_from_sigma_rel(sigma_rel)
            self.name = f"power_{sigma_rel:g}"
        elif decay is not None and 0.0 <= decay < 1.0:
            self.name = f"constant_{decay:g}"
        else:
            raise ConfigError(f"ema.decay={decay} must lie in [0, 1), for instance ema.decay=0.999.")

    def beta(self, t: Any) -> Any:
        """Power function: (1 - 1/t)^(gamma + 1), EDM2 eq. 4 in steps (it forgets the initial weights at t = 1).

        Of an integer, or of a tensor [] float64.
        """
        if self.decay is not None:
            return self.decay
        return (1.0 - 1.0 / t) ** (self.gamma + 1.0)


def _as_list(value: float | Sequence[float] | None) -> list[float]:
    if value is None:
        return []
    return [float(value)] if isinstance(value, (int, float)) else [float(v) for v in value]


def _laid_out(part: Tensor, like: Tensor) -> Tensor:
    """This rank's part of a tensor as that tensor: sharded as `like` is, or itself where nothing is sharded."""
    if isinstance(like, DTensor):
        return DTensor.from_local(part, like.device_mesh, like.placements, shape=like.shape, stride=like.stride())
    return part


def _whole(tensor: Tensor) -> Tensor:
    """The full tensor (a collective when it is sharded)."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


class EMA(pl.Callback):
    """Averages of `pl_module.student`, updated after each optimizer step; the first profile is the default.

    Args:
        sigma_rel:      widths of power-function averages (EDM2); each must lie between 0 and 0.2887.
        decay:          factors of constant-decay averages, in [0, 1).
        snapshot_every: write `ema_snapshots/<step>_<profile>.safetensors` every so many steps, and at the end, for
                        post-hoc synthesis of other widths (power-function profiles only); null: never.
        snapshot_dtype: "float32" or "float16".

    It keeps the manners of Lightning's `WeightAveraging` (averages during validation, resume) but not its code: that
    one deep-copies the whole module (a frozen teacher included), holds one average and does not support sharding.
    Weights in `state_dict` stay raw; the averages are saved as `checkpoint["ema"] = {profile: {name: tensor}}`. Of a
    sharded student every rank averages and saves its own part.
    """

    def __init__(
        self,
        sigma_rel: float | Sequence[float] | None = None,
        decay: float | Sequence[float] | None = None,
        snapshot_every: int | None = None,
        snapshot_dtype: str = "float32",
    ) -> None:
        profiles = [Profile(sigma_rel=s) for s in _as_list(sigma_rel)] + [Profile(decay=d) for d in _as_list(decay)]
        self.profiles = {profile.name: profile for profile in profiles}
        if not profiles:
            raise ConfigError("ema averages nothing: set ema.sigma_rel=[0.2] or ema.decay=0.999, or choose ema=none.")
        if len(self.profiles) != len(profiles):
            raise ConfigError(f"ema names a profile twice ({', '.join(p.name for p in profiles)}): name each once.")
        if snapshot_every is not None and snapshot_every < 1:
            raise ConfigError(f"ema.snapshot_every={snapshot_every} must be a positive number of steps, or null.")
        if snapshot_dtype not in ("float32", "float16"):
            raise ConfigError(f"ema.snapshot_dtype={snapshot_dtype} is unknown: choose float32 or float16.")
        self.snapshot_every, self.snapshot_dtype = snapshot_every, getattr(torch, snapshot_dtype)
        self._updates = 0
        self._counted: Tensor | None = None  # updates, float64 [] on the device, where the host does not know of skips
        self._trained: tuple[nn.Module, list[nn.Parameter]] | None = None  # a student that is not sharded, and its own
        self._latest_step = 0
        self._shadows: dict[str, dict[str, Tensor]] = {}  # profile -> parameter name -> this rank's float32 part
        self._loaded: Mapping[str, Mapping[str, Tensor]] | None = None  # from a checkpoint, until the student is set up
        self._raw: list[Tensor] | None = None  # the raw weights while averages are swapped in
        self._active: str | None = None  # the profile that is swapped in

    @property
    def default(self) -> str:
        """Name of the profile that validation, grids and evaluation use."""
        return next(iter(self.profiles))

    # -------------------------------------------------------------------------------------------------- averaging

    @staticmethod
    def _averaged(student: nn.Module) -> dict[str, nn.Parameter]:
        for module in student.modules():  # a stage may still be whole after a forward without a backward
            if isinstance(module, FSDPModule):
                module.reshard()
        return {name: p for name, p in student.named_parameters() if p.requires_grad}

    def _parameters(self, student: nn.Module) -> list[nn.Parameter]:
        """The same without names, at each step; the modules of a student that is not sharded are walked once."""
        if self._trained is None or self._trained[0] is not student:
            if any(isinstance(module, FSDPModule) for module in student.modules()):
                return list(self._averaged(student).values())
            self._trained = student, [p for p in student.parameters() if p.requires_grad]
        return self._trained[1]

    @torch.no_grad()
    def _ensure(self, pl_module: pl.LightningModule) -> None:
        """Create the averages, on first need: by then the student is on its device, sharded and restored."""
        if self._shadows:
            return
        parameters = self._averaged(_student(pl_module))
        for profile in self.profiles:
            shadows = {name: local(p).detach().to(torch.float32, copy=True) for name, p in parameters.items()}
            if self._loaded is not None:
                wanted = {name: _laid_out(part, parameters[name]) for name, part in shadows.items()}
                copy_weights(self._stored(profile, wanted), wanted)
            self._shadows[profile] = shadows
        self._loaded = None

    def _stored(self, profile: str, wanted: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        assert self._loaded is not None
        if profile not in self._loaded:
            raise CheckpointError(
                f"The checkpoint holds the averages {', '.join(self._loaded)} but not {profile}: "
                "resume with the ema settings of the run, or train into a new folder."
            )
        stored = self._loaded[profile]
        for name, tensor in wanted.items():
            if name not in stored or shape_of(stored, name) != tensor.shape:
                raise CheckpointError(
                    f"The average {profile} in the checkpoint has no fitting entry for the parameter {name}: "
                    "resume with the backbone of the run, or train into a new folder."
                )
        return stored

    @property
    def updates(self) -> int:
        """How often the averages have moved; the host waits for the device where that is counted there."""
        if self._counted is not None:
            self._updates = int(self._counted)
        return self._updates

    @torch.no_grad()
    def update(self, pl_module: pl.LightningModule, verdict: Tensor | bool = True) -> None:
        """One step of every average: shadow <- beta shadow + (1 - beta) weights.

        `verdict`: whether the step was made, where the host does not know a tensor [] of 1 or 0.
        """
        self._ensure(pl_module)
        weights = [local(p).float() for p in self._parameters(_student(pl_module))]
        if isinstance(verdict, Tensor):
            self._update_on_device(weights, verdict)
            return
        self._updates += 1
        for name, profile in self.profiles.items():
            torch._foreach_lerp_(list(self._shadows[name].values()), weights, 1.0 - profile.beta(self._updates))

    def _update_on_device(self, weights: list[Tensor], verdict: Tensor) -> None:
        if self._counted is None:
            self._counted = torch.full((), self._updates, dtype=torch.float64, device=verdict.device)
        self._counted.add_(verdict)
        for name, profile in self.profiles.items():
            kept = profile.beta(self._counted.clamp(min=1))
            share = ((1.0 - kept) * verdict).float()
            torch._foreach_lerp_(list(self._shadows[name].values()), weights, [share] * len(weights))

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step <= self._latest_step:  # gradients are still being accumulated
            return
        self._latest_step = trainer.global_step
        verdict = pl_module.skips.verdict if isinstance(pl_module, FlowModule) else True
        if verdict is False:
            return  # nothing has changed, or it has diverged
        self.update(pl_module, verdict)
        due = self.snapshot_every is not None and trainer.global_step % self.snapshot_every == 0
        if due and not skipped_steps(pl_module):
            self._snapshot(trainer, pl_module)

    # --------------------------------------------------------------------------------------------------- swapping

    @contextmanager
    def swapped(self, pl_module: pl.LightningModule, profile: str | None = None) -> Iterator[None]:
        """Within it the student holds the averaged weights (default: the first profile). May be nested."""
        before = self._active
        self._swap_in(pl_module, profile or self.default)
        try:
            yield
        finally:
            if before is None:
                self._swap_out(pl_module)
            else:
                self._swap_in(pl_module, before)

    @torch.no_grad()
    def _swap_in(self, pl_module: pl.LightningModule, profile: str) -> None:
        if profile not in self.profiles:
            raise ConfigError(f"There is no average named {profile}: choose one of {', '.join(self.profiles)}.")
        self._ensure(pl_module)
        weights = [local(p) for p in self._averaged(_student(pl_module)).values()]
        if self._raw is None:
            self._raw = [w.clone() for w in weights]
        torch._foreach_copy_(weights, list(self._shadows[profile].values()))
        self._active = profile

    @torch.no_grad()
    def _swap_out(self, pl_module: pl.LightningModule) -> None:
        if self._raw is not None:
            weights = [local(p) for p in self._averaged(_student(pl_module)).values()]
            torch._foreach_copy_(weights, self._raw)
        self._raw = self._active = None

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._swap_in(pl_module, self.default)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._swap_out(pl_module)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._swap_out(pl_module)

    # ------------------------------------------------------------------------------------------------ checkpoints

    def averages(self, pl_module: pl.LightningModule, profile: str, keep: bool = True) -> dict[str, Tensor]:
        """Full state dict of the student under a profile, on the CPU; frozen parameters and buffers are copied.

        Every rank must call it when the student is sharded; with `keep=False` this rank drops what it gathers.
        """
        state = {}
        for name, tensor in self._parts(pl_module, profile).items():
            whole = _whole(tensor)
            if keep:
                state[name] = whole.to("cpu", copy=True)
        return state

    @torch.no_grad()
    def _parts(self, pl_module: pl.LightningModule, profile: str) -> dict[str, Tensor]:
        """State dict of the student under a profile, sharded as the student is, sharing storage with what is kept."""
        self._ensure(pl_module)
        student = _student(pl_module)
        shadow_of = {id(p): self._shadows[profile][name] for name, p in self._averaged(student).items()}
        borrowed = student.borrowed() if isinstance(student, Backbone) else set()
        return {
            name: _laid_out(shadow_of[id(tensor)], tensor) if id(tensor) in shadow_of else tensor.detach()
            for name, tensor in student.state_dict(keep_vars=True).items()
            if name not in borrowed
        }

    def state_dict(self) -> dict[str, Any]:
        return {"updates": self.updates, "latest_step": self._latest_step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._updates, self._latest_step = int(state_dict["updates"]), int(state_dict["latest_step"])
        self._counted = None

    @torch.no_grad()
    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        # Parts, not wholes: a strategy that shards the student also knows how to save what is sharded.
        keep = trainer.is_global_zero
        checkpoint["ema"] = {name: self._copied(self._parts(pl_module, name), keep) for name in self.profiles}
        if self._raw is not None:  # saved in the middle of a validation: the file must still hold the raw weights
            names = self._averaged(_student(pl_module))
            for (name, p), raw in zip(names.items(), self._raw, strict=True):
                key = f"student.{name}"
                if key in checkpoint["state_dict"]:
                    checkpoint["state_dict"][key] = _laid_out(raw.clone(), p)

    @staticmethod
    def _copied(state: dict[str, Tensor], keep: bool) -> dict[str, Tensor]:
        """What is sharded, as it is; what every rank has whole, on the CPU of the rank that shall `keep` it."""
        return {
            name: tensor if isinstance(tensor, DTensor) else tensor.to("cpu", copy=True)
            for name, tensor in state.items()
            if keep or isinstance(tensor, DTensor)
        }

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self._shadows, self._loaded = {}, checkpoint.get("ema")
        if self._loaded is None:
            rank_zero_warn("The checkpoint holds no averaged weights: averaging starts from its raw weights.")

    # -------------------------------------------------------------------------------------------------- snapshots

    def _folder(self, trainer: pl.Trainer) -> Path:
        return Path(trainer.default_root_dir) / "ema_snapshots"

    def shadows(self) -> Iterator[Tensor]:
        """This rank's parts of all averages."""
        for profile in self._shadows.values():
            yield from profile.values()

    def _snapshot(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.strategy.reduce_boolean_decision(all_finite(self.shadows())):
            rank_zero_warn(f"No snapshot of step {trainer.global_step} was written: the averages are not finite.")
            return
        student = _student(pl_module)
        averaged = {id(p) for p in self._averaged(student).values()}
        borrowed = student.borrowed() if isinstance(student, Backbone) else set()
        state = {name: v for name, v in student.state_dict(keep_vars=True).items() if name not in borrowed}
        copied = [name for name, v in state.items() if id(v) not in averaged]
        for name, profile in self.profiles.items():
            if profile.sigma_rel is None:
                continue
            state = self.averages(pl_module, name, keep=trainer.is_global_zero)
            if trainer.is_global_zero:
                path = self._folder(trainer) / f"{trainer.global_step:08d}_{name}.safetensors"
                run = pl_module.identity.get("run") if isinstance(pl_module, FlowModule) else None
                save_snapshot(path, state, profile.sigma_rel, self.updates, copied, self.snapshot_dtype, run)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._ensure(pl_module)
        if self.snapshot_every is None or not trainer.is_global_zero:
            return
        for path, step in snapshot_files(self._folder(trainer)):
            if step > trainer.global_step:  # of a run that was cut off after its last checkpoint, or started afresh
                rank_zero_info(
                    f"Removing {path.name}: it lies ahead of step {trainer.global_step}, where this run starts."
                )
                path.unlink()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        due = self.snapshot_every is not None and self.updates and trainer.global_step % self.snapshot_every
        if due and not skipped_steps(pl_module):
            self._snapshot(trainer, pl_module)


def _student(module: pl.LightningModule) -> Backbone:
    """The network that a `FlowModule` trains."""
    return cast(FlowModule, module).student
