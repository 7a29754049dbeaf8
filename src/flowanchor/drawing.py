"""The contracts of what draws: samplers, which ask a trained network, and codecs, which turn its samples into pixels.

Part of `flowanchor.interfaces`, which says what the words and shapes mean; import them from there.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from torch import Tensor, nn

from flowanchor.errors import ConfigError

if TYPE_CHECKING:
    from flowanchor.interfaces import Backbone, Interval

Kind = Literal["flow", "shortcut"]  # what a network has learned: velocities at an instant alone, or averages, too


class Sampler(ABC):
    """Draws samples with a trained network. The state is kept in float64, the network sees float32 (or autocast)."""

    kind: Kind = "shortcut"  # "shortcut": asks the average velocity; "flow": asks the anchor's instantaneous velocity
    needs_anchor: bool = False  # whether it also asks the instantaneous velocity of a network with a shortcut
    needs_end: bool = False  # whether it asks for averages that end anywhere, which not every interval can tell
    watch: Callable[[float, Tensor], None] | None = None  # told the state [B, *] at each time on the way, noise first

    @abstractmethod
    def sample(
        self,
        backbone: Backbone,
        noise: Tensor,
        cond: Any,
        interval: Interval,
        renoise: Callable[[int], Tensor] | None = None,
    ) -> Tensor:
        """noise [B, *] -> samples [B, *] (float64). `renoise(step)` gives fresh noise [B, *] after a step."""

    def tell(self, time: float, state: Tensor) -> None:
        """Called by `sample` at each time of its way, for whoever wants to see it; the data last, at 1."""
        if self.watch is not None:
            self.watch(time, state)

    @abstractmethod
    def with_nfe(self, nfe: int) -> Sampler:
        """The same sampler with a budget of `nfe` velocity evaluations; raises `ConfigError` where impossible."""

    @property
    @abstractmethod
    def nfe(self) -> int | None:
        """Velocity evaluations per sample; None where the solver decides by itself."""

    @property
    def network_calls(self) -> int | None:
        """Calls of the network per sample: guidance makes two of an evaluation."""
        return self.nfe

    @property
    def label(self) -> str:
        """What a table calls it."""
        return type(self).__name__

    def told(self) -> str:
        """In words for one line: its name, the times at which it asks, and what else decides the images."""
        return self.label


class Posterior(NamedTuple):
    """What a codec knows of an image's latent: a diagonal Gaussian, or a point (`logvar` None). Raw: not normalised."""

    mean: Tensor  # [B, C, h, w]
    logvar: Tensor | None = None  # [B, C, h, w]

    def sample(self, noise: Tensor) -> Tensor:
        """`mean + std * noise` for standard normal noise [B, C, h, w]."""
        return self.mean if self.logvar is None else self.mean + (0.5 * self.logvar).exp() * noise


class Codec(nn.Module, ABC):
    """Maps samples of the network's space to pixels in [-1, 1] and back.

    Attributes:
        name: of the codec, as in `codec=<name>`.
        downsampling: pixels per latent along each side.
        latent_channels: channels of a latent; None: those of the image.
        usable: whether it can decode and encode; False where it was not told its weights.
    """

    name: str = ""
    downsampling: int = 1
    latent_channels: int | None = None
    usable: bool = True

    @abstractmethod
    def decode(self, latents: Tensor) -> Tensor:
        """[B, *] -> images [B, C, H, W] in [-1, 1]."""

    @abstractmethod
    def encode(self, images: Tensor) -> Tensor:
        """images [B, C, H, W] in [-1, 1] -> [B, *], the posterior's mean, normalised."""

    def posterior(self, images: Tensor) -> Posterior:
        """images [B, C, H, W] in [-1, 1] -> what is stored of them: raw, before any normalisation."""
        return Posterior(images)

    def fingerprint(self) -> str:
        """Hash (hex) of all that decides the raw latents: weights and settings, not the statistics."""
        return self.name

    def save(self, path: Path) -> None:
        """Write its weights into a file that its `weights` reads, to be published beside a network."""
        raise ConfigError("with_codec=true: this network draws pixels and has no codec to publish: leave it out.")
