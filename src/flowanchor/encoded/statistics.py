"""Per-channel mean and standard deviation of latents: what a network's samples are normalised with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flowanchor.base.files import replacing, save_torch
from flowanchor.base.plain import described
from flowanchor.base.torch_files import read_torch
from flowanchor.errors import CheckpointError, DataError
from flowanchor.weights import whole_tensor

STATISTICS = "latents_stats.pt"  # the released name


@dataclass(frozen=True)
class LatentStatistics:
    """`normalise` maps a codec's raw latents to a network's samples, `denormalise` back.

    Both act per channel: `(latents - mean) / std * multiplier`. Latents have shape [B, C, *].

    Args:
        mean, std: one value per channel; empty means 0 and 1.
        multiplier: applied last (1 for VA-VAE with per-channel statistics, 0.18215 alone for SiT and DiT).
    """

    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    multiplier: float = 1.0

    def __post_init__(self) -> None:
        if len(self.mean) != len(self.std):
            raise DataError(f"Latent statistics have {len(self.mean)} means and {len(self.std)} standard deviations.")
        values = torch.tensor([*self.mean, *self.std, self.multiplier], dtype=torch.float64)
        if not bool(values.isfinite().all()) or any(s <= 0 for s in self.std) or self.multiplier == 0:
            raise DataError("Latent statistics must be finite, with positive standard deviations.")

    def normalise(self, latents: Tensor) -> Tensor:
        """Raw latents [B, C, *] -> samples of the network."""
        return self.normalise_(latents.clone())

    def normalise_(self, latents: Tensor) -> Tensor:
        """The same, in place."""
        if self.mean:
            mean, std = self._shaped(latents)
            latents.sub_(mean).div_(std)
        return latents if self.multiplier == 1 else latents.mul_(self.multiplier)

    def denormalise(self, samples: Tensor) -> Tensor:
        """Samples of the network [B, C, *] -> raw latents."""
        if not self.mean:
            return samples / self.multiplier
        mean, std = self._shaped(samples)
        return samples * std / self.multiplier + mean

    def check(self, channels: int, source: object) -> None:
        """Raise `DataError` unless they are of latents with this many channels."""
        if self.mean and len(self.mean) != channels:
            raise DataError(
                f"{source} holds statistics of {len(self.mean)} channels and the latents have {channels}: "
                "use the statistics that were written with these latents."
            )

    def _shaped(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        shape = (1, -1, *[1] * (latents.dim() - 2))
        mean = torch.tensor(self.mean, dtype=latents.dtype, device=latents.device).view(shape)
        return mean, torch.tensor(self.std, dtype=latents.dtype, device=latents.device).view(shape)

    # -------------------------------------------------------------------------------------------- files and configs

    @classmethod
    def read(
        cls, source: str | Path | Mapping[str, Any] | LatentStatistics | None, multiplier: float | None = None
    ) -> LatentStatistics:
        """From a `latents_stats.pt` (`mean`, `std`: [1, C, 1, 1] or [C]), a config's mapping, or None (no statistics).

        `multiplier` replaces that of the source. Raises `DataError` for a file that is missing, foreign or damaged.
        """
        if isinstance(source, LatentStatistics):
            found: Mapping[str, Any] = source.as_config()
        elif source is None:
            found = {}
        elif isinstance(source, Mapping):
            found = source
        elif isinstance(source, (str, Path)):
            found = _read_file(Path(source).expanduser())
        else:
            raise DataError(
                f"Latent statistics are a file, or numbers such as {{multiplier: 0.18215}}, not {described(source)}."
            )
        given = multiplier if multiplier is not None else found.get("multiplier", 1.0)
        name = "Latent statistics" if isinstance(source, Mapping) else str(source)
        return cls(_values(found.get("mean"), name), _values(found.get("std"), name), *_values([given], name))

    def write(self, path: Path) -> None:
        """Write the released file: `mean` and `std` [1, C, 1, 1], float32."""
        content = {
            name: torch.tensor(values, dtype=torch.float32).view(1, -1, 1, 1)
            for name, values in (("mean", self.mean), ("std", self.std))
        }
        with replacing(path) as draft:
            save_torch(draft, content)

    def as_config(self) -> dict[str, Any]:
        """Plain numbers, for a run's configuration: `read` takes them back."""
        return {"mean": list(self.mean), "std": list(self.std), "multiplier": self.multiplier}


class RunningStatistics:
    """Mean and standard deviation per channel of batches [B, C, *], in float64; mergeable and storable."""

    def __init__(self, channels: int) -> None:
        self.count = 0
        self.mean = torch.zeros(channels, dtype=torch.float64)
        self.squares = torch.zeros(channels, dtype=torch.float64)  # sum of squared deviations from the mean

    def add(self, latents: Tensor) -> None:
        """Take in a batch."""
        values = latents.detach().to("cpu", torch.float64).transpose(0, 1).flatten(1)  # [C, B *]
        if values.shape[1]:
            mean = values.mean(1)
            self._merge(values.shape[1], mean, (values - mean[:, None]).square().sum(1))

    def merge(self, state: Mapping[str, Any]) -> None:
        """Take in another's `state`."""
        values = (torch.tensor(state[name], dtype=torch.float64) for name in ("mean", "squares"))
        self._merge(int(state["count"]), *values)

    def state(self) -> dict[str, Any]:
        """What `merge` takes, as plain numbers."""
        return {"count": self.count, "mean": self.mean.tolist(), "squares": self.squares.tolist()}

    def statistics(self) -> LatentStatistics:
        """The statistics so far (population standard deviation); raises `DataError` where a channel has one value."""
        flat = self.flat_channels()
        if flat:
            raise DataError(
                f"Channel {flat[0]} of all latents has the one value {self.mean[flat[0]]:.4g} ({len(flat)} of "
                f"{len(self.mean)} channels), so they cannot be normalised: are these pictures of one flat colour?"
            )
        return LatentStatistics(tuple(self.mean.tolist()), tuple(self._std().tolist()))

    def flat_channels(self) -> list[int]:
        """Channels that have had one value so far, but for what float32 rounds."""
        flat: list[int] = (self._std() <= 1e-6 * self.mean.abs()).nonzero().flatten().tolist()
        return flat

    def _std(self) -> Tensor:
        return (self.squares / max(1, self.count)).sqrt()

    def _merge(self, count: int, mean: Tensor, squares: Tensor) -> None:  # Chan et al. 1979
        if count == 0:
            return
        total = self.count + count
        shift = mean - self.mean
        self.squares += squares + shift.square() * (self.count * count / total)
        self.mean += shift * (count / total)
        self.count = total


def _values(found: Any, source: str) -> tuple[float, ...]:
    if found is None:
        return ()
    try:
        if isinstance(found, Tensor):
            return tuple(whole_tensor(found, source).detach().double().flatten().tolist())
        return tuple(float(v) for v in (found if isinstance(found, Sequence) else list(found)))
    except (TypeError, ValueError, RuntimeError, CheckpointError) as error:
        raise DataError(f"{source} holds means and deviations that are no numbers ({error}).") from error


def _read_file(path: Path) -> Mapping[str, Any]:
    if not path.is_file():
        raise DataError(f"There are no latent statistics at {path}: encode.py writes {STATISTICS} beside its shards.")
    try:
        content = read_torch(path, mmap=False, legacy=True)
    except Exception as error:  # damaged files make PyTorch raise almost anything
        raise DataError(f"{path} cannot be read safely as latent statistics: encode.py writes {STATISTICS}.") from error
    if not (isinstance(content, dict) and all(isinstance(content.get(k), Tensor) for k in ("mean", "std"))):
        raise DataError(f"{path} holds no 'mean' and 'std': encode.py writes {STATISTICS} beside its shards.")
    return content
