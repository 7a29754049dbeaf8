"""Post-hoc synthesis: an average of any width, from snapshots of a few (EDM2, Karras et al. 2024, arXiv 2312.02696).

A power-function average is the mean of the weights under the profile p(tau) ~ tau^gamma on [0, t]. The profile of a
wanted width is approximated by a linear combination of the stored ones, in least squares (EDM2, sec. 3.2 and app. C).
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from flowanchor.base.seal import write_sealed
from flowanchor.errors import CheckpointError, ConfigError

MAX_SIGMA_REL = 12**-0.5  # gamma = 0: the flat average over all of training, the widest of the family
POOR_FIT = 0.1  # relative misfit of the profile above which a synthesis deserves a warning


def gamma_from_sigma_rel(sigma_rel: float) -> float:
    """Exponent gamma of the power function whose relative width is `sigma_rel` (EDM2, eq. 6).

    sigma_rel = (gamma + 1)^1/2 (gamma + 2)^-1 (gamma + 3)^-1/2, a cubic in gamma. Raises `ConfigError` unless
    0 < sigma_rel < 0.2887 (gamma > 0).
    """
    if not 0.0 < sigma_rel < MAX_SIGMA_REL:
        raise ConfigError(
            f"sigma_rel={sigma_rel:g} is no width of a power-function average: choose it between 0 and 0.2887, "
            "for instance 0.2 or 0.05."
        )
    t = sigma_rel**-2  # (gamma + 2)^2 (gamma + 3) = t (gamma + 1)
    return float(np.roots([1.0, 7.0, 16.0 - t, 12.0 - t]).real.max())


def p_dot_p(t_a: ArrayLike, gamma_a: ArrayLike, t_b: ArrayLike, gamma_b: ArrayLike) -> NDArray[np.float64]:
    """Inner product of two averaging profiles, in closed form (broadcasts).

    With p(tau; t, gamma) = (gamma + 1) tau^gamma / t^(gamma + 1) on [0, t], the integral of p_a p_b over
    [0, min(t_a, t_b)].
    """
    t_a, t_b = np.asarray(t_a, np.float64), np.asarray(t_b, np.float64)
    gamma_a, gamma_b = np.asarray(gamma_a, np.float64), np.asarray(gamma_b, np.float64)
    ratio = (t_a / t_b) ** np.where(t_a < t_b, gamma_b, -gamma_a)
    return (gamma_a + 1) * (gamma_b + 1) * ratio / ((gamma_a + gamma_b + 1) * np.maximum(t_a, t_b))


def solve_weights(
    t: NDArray[np.float64], gamma: NDArray[np.float64], t_want: float, gamma_want: float
) -> tuple[NDArray[np.float64], float]:
    """Least-squares coefficients [K] of K stored profiles for a wanted one, and the relative misfit in [0, 1].

    The misfit is ||p - sum_i x_i p_i|| / ||p||. Profiles are scaled to unit norm first, in float64.
    """
    gram = p_dot_p(t[:, None], gamma[:, None], t[None, :], gamma[None, :])
    right = p_dot_p(t, gamma, t_want, gamma_want)
    scale = np.sqrt(np.diag(gram))
    unit_gram, unit_right = gram / scale[:, None] / scale[None, :], right / scale
    unit = np.linalg.lstsq(unit_gram, unit_right, rcond=1e-12)[0]
    norm = float(p_dot_p(t_want, gamma_want, t_want, gamma_want))
    misfit = max(0.0, norm - 2 * float(unit @ unit_right) + float(unit @ unit_gram @ unit)) / norm
    return unit / scale, float(np.sqrt(misfit))


# ---------------------------------------------------------------------------------------------------------- snapshots


@dataclass(frozen=True)
class Snapshot:
    """One stored average: `updates` of the average with relative width `sigma_rel`."""

    path: Path
    step: int
    updates: int
    sigma_rel: float
    copied: frozenset[str]  # entries that are not averages: buffers, frozen parameters
    run: str | None = None  # the name of the run that made it; None: made before runs had one
    weights: Mapping[str, Tensor] | None = None  # held by a checkpoint, not by a file of its own

    def tensors(self) -> Mapping[str, Tensor]:
        """Name -> tensor."""
        return load_file(self.path) if self.weights is None else self.weights


@dataclass(frozen=True)
class Owner:
    """The checkpoint that an average is made for."""

    run: str | None  # its run's name
    at_home: bool  # whether it lies in a run folder, whose snapshots without a name are its own
    averages: tuple[Snapshot, ...] = ()  # those that it holds itself

    @classmethod
    def of(cls, file: Path, content: Mapping[str, Any]) -> Owner:
        """The owner that a checkpoint's content describes."""
        meta = content["flowanchor"]
        settings = meta["config"].get("ema") or {}
        widths = settings.get("sigma_rel") or []
        updates: Any = ((content.get("callbacks") or {}).get("EMA") or {}).get("updates")
        kept = {f"power_{width:g}": width for width in (widths if isinstance(widths, list) else [widths])}
        held = [] if updates is None else [name for name in kept if name in (content.get("ema") or {})]
        averages = tuple(
            Snapshot(file, int(meta["step"]), int(updates), kept[n], frozenset(), weights=content["ema"][n])
            for n in held
        )
        return cls(meta.get("run"), file.parent.name == "checkpoints", averages)

    def owns(self, snapshot: Snapshot) -> bool:
        """Whether a snapshot is one of this checkpoint's run."""
        named = snapshot.run is not None and self.run is not None
        return snapshot.run == self.run if named else self.at_home


def save_snapshot(
    path: Path,
    state: dict[str, Tensor],
    sigma_rel: float,
    updates: int,
    copied: list[str],
    dtype: torch.dtype,
    run: str | None = None,
) -> None:
    """Write one average of a run, by that name; floating entries that are averages are stored as `dtype`."""
    keep = set(copied)
    tensors = {name: (v if name in keep else v.to(dtype)).clone().contiguous() for name, v in state.items()}
    step = path.name.split("_")[0]
    metadata = {"step": str(int(step)), "updates": str(updates), "sigma_rel": repr(sigma_rel)}
    metadata |= {"copied": json.dumps(sorted(keep)), **({} if run is None else {"run": run})}
    write_sealed(path, tensors, metadata)


def snapshot_files(folder: Path) -> list[tuple[Path, int]]:
    """The snapshot files of a folder with their steps, in order."""
    found = [(p, p.name.split("_")[0]) for p in sorted(Path(folder).glob("*_*.safetensors"))]
    return [(p, int(step)) for p, step in found if step.isdigit()]


def read_snapshots(folder: str | Path) -> list[Snapshot]:
    """All snapshots of a folder; raises `CheckpointError` if there is none, or if one is foreign."""
    snapshots = []
    for path, _ in snapshot_files(Path(folder)):
        with safe_open(path, framework="pt") as file:
            meta = file.metadata() or {}
        try:
            snapshots.append(
                Snapshot(
                    path=path, step=int(meta["step"]), updates=int(meta["updates"]),
                    sigma_rel=float(meta["sigma_rel"]), copied=frozenset(json.loads(meta["copied"])),
                    run=meta.get("run"),
                )
            )  # fmt: skip
        except (KeyError, ValueError) as error:
            raise CheckpointError(
                f"{path} is not a snapshot of averaged weights: remove it from the folder, or name another run."
            ) from error
    if not snapshots:
        raise CheckpointError(
            f"There are no snapshots of averaged weights in {folder}: train with ema=power ema.snapshot_every=500, "
            "or ask for one of the stored averages."
        )
    return snapshots


def synthesise(
    folder: str | Path, sigma_rel: float, step: int | None = None, owner: Owner | None = None
) -> dict[str, Tensor]:
    """State dict of the power-function average of width `sigma_rel` at `step` (default: the last snapshot's).

    Snapshots up to that step, of the `owner`'s run alone, and the averages that the owner holds itself are combined in
    float64; buffers and frozen parameters come from the latest. Entries that are averages come back as float32.

    Raises `ConfigError` for a width that no power function has, `CheckpointError` if the folder has no snapshot of that
    run, or none that reaches that step.
    """
    gamma_want = gamma_from_sigma_rel(sigma_rel)
    snapshots = [s for s in read_snapshots(folder) if owner is None or owner.owns(s)]
    if not snapshots:
        raise CheckpointError(
            f"The snapshots in {folder} are those of another run: ask for one of the stored averages, or give the "
            "checkpoint in the folder of its run."
        )
    used = [s for s in snapshots if step is None or s.step <= step]
    if not used:
        raise CheckpointError(
            f"The first snapshot in {folder} is of step {min(s.step for s in snapshots)}, after step {step}: "
            "ask for a later step, or for one of the stored averages."
        )
    held = [replace(s, copied=used[-1].copied) for s in owner.averages] if owner is not None else []
    profiles = {(s.updates, s.sigma_rel) for s in held}
    used = [s for s in used if (s.updates, s.sigma_rel) not in profiles] + held
    latest = max(used, key=lambda s: s.updates)
    # Updates and steps differ only if averaging began late; a step between snapshots is beyond the last by a bit.
    t_want = latest.updates + (0 if step is None else max(0, step - latest.step))
    t = np.array([s.updates for s in used], np.float64)
    gamma = np.array([gamma_from_sigma_rel(s.sigma_rel) for s in used])
    weights, misfit = solve_weights(t, gamma, float(t_want), gamma_want)
    if misfit > POOR_FIT and t_want > latest.updates:
        raise CheckpointError(
            f"No snapshot in {folder} reaches step {step}, the last before it is of step {latest.step}: ask for one of "
            "the stored averages, or give a checkpoint at the step of a snapshot."
        )
    if misfit > POOR_FIT:
        warnings.warn(
            f"sigma_rel={sigma_rel:g} is only roughly reproduced from the snapshots in {folder} (misfit {misfit:.0%}): "
            "snapshots must be denser in time, or of wider and narrower averages.",
            stacklevel=2,
        )
    total: dict[str, Tensor] = {}
    for weight, snapshot in zip(weights.tolist(), used, strict=True):
        for name, tensor in snapshot.tensors().items():
            if name in snapshot.copied:
                if snapshot is latest:
                    total[name] = tensor
            elif name in total:
                total[name].add_(tensor.double(), alpha=weight)
            else:
                total[name] = tensor.double() * weight
    return {name: v if name in latest.copied else v.float() for name, v in total.items()}
