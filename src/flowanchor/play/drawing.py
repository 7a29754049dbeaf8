"""From what somebody wants to see to pictures, with what they cost."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils._pytree import tree_map

from flowanchor.base.pixels import to_uint8
from flowanchor.conditioning import Text
from flowanchor.errors import ConfigError, DataError
from flowanchor.generation.generator import one_image
from flowanchor.generation.opened import OpenedModel
from flowanchor.interfaces import Sampler
from flowanchor.jumps.precision import asking, state_dtype
from flowanchor.play.choices import build, own_choice
from flowanchor.play.noises import Noise
from flowanchor.play.watching import watching

Pixels = NDArray[np.uint8]
NUMBERS = 2**18  # of the samples of one batch, so that large ones are drawn one by one
ROWS = 10  # classes that are drawn where nobody chose any
BETWEEN = 8  # pictures from one seed to another


@dataclass(frozen=True)
class Wish:
    """What to draw.

    Attributes:
        seed: of the noise.
        each: pictures of each class or prompt, or of all where there are none.
        classes: those to draw; none: the first ten. Of networks with classes.
        prompts, negative: of networks of text.
        sampler: one of `choices`; None: the checkpoint's own.
        steps, guidance: of the sampler; None: its own.
    """

    seed: int = 0
    each: int = 4
    classes: tuple[int, ...] = ()
    prompts: tuple[str, ...] = ()
    negative: str | None = None
    sampler: str | None = None
    steps: int | None = None
    guidance: float | None = None


@dataclass(frozen=True)
class Drawing:
    """Pictures, a row of `each` per class or prompt, and what they cost.

    Attributes:
        images: uint8 [N, H, W, C].
        subjects: what each row shows, class numbers or prompts; empty where the network is told nothing.
        seconds: of sampling and decoding, by the clock.
        calls: of the network, for one picture, as counted; guidance makes two of a step.
        sampler: what a table calls it.
        frames: the way of the first pictures from noise to picture, [K, H, W, C] each; empty unless asked for.
    """

    images: Pixels
    subjects: tuple[int | str, ...]
    each: int
    seconds: float
    calls: float
    sampler: str
    wish: Wish
    frames: tuple[Pixels, ...] = ()

    def cost(self) -> str:
        """One line: how many, how long, how many calls."""
        count, calls = len(self.images), f"{self.calls:.4g}"
        return (
            f"{count} picture{'' if count == 1 else 's'} in {spoken(self.seconds)}, "
            f"{calls} network call{'' if calls == '1' else 's'} each, {self.sampler}, seed {self.wish.seed}"
        )


def draw(model: OpenedModel, wish: Wish, keep: int = 0) -> Drawing:
    """Draw what is wanted. Picture i has the noise of `(seed, i)`: the one that every program of the package gives it.

    `keep`: of so many pictures the way from noise is kept. Raises `ConfigError` for a wish that the model cannot be
    asked, `DataError` for pictures that are not finite.
    """
    subjects = asked_for(model, wish)
    count = max(1, len(subjects)) * wish.each
    return _draw(model, wish, subjects, Noise(wish.seed, range(count)), keep)


def between(model: OpenedModel, wish: Wish, other_seed: int, count: int = BETWEEN) -> Drawing:
    """A row per subject from the noise of one seed to that of another, along a great circle, in `count` pictures.

    The ends are the pictures that `draw` gives with `each=1` and the one or the other seed.
    """
    _check(other_seed, "The second seed", least=0)
    if count < 2:
        raise ConfigError(f"From one seed to another takes at least 2 pictures, not {count}.")
    wish = replace(wish, each=count)
    subjects = asked_for(model, wish)
    rows = max(1, len(subjects))
    shares = [step / (count - 1) for step in range(count)] * rows
    numbers = [row for row in range(rows) for _ in range(count)]
    return _draw(model, wish, subjects, Noise(wish.seed, numbers, (other_seed, shares)))


def asked_for(model: OpenedModel, wish: Wish) -> tuple[int | str, ...]:
    """What the rows show; raises `ConfigError` for what the model knows nothing of, or numbers out of range."""
    _check(wish.seed, "The seed", least=0)
    _check(wish.each, "The number of pictures", least=1)
    conditioning = model.backbone.conditioning
    if isinstance(conditioning, Text):
        if not wish.prompts:
            raise ConfigError("This network draws by prompts: say what it shall draw, one prompt a line.")
        return wish.prompts
    if not conditioning.classes:
        return ()
    return wish.classes or tuple(range(min(ROWS, conditioning.classes)))


def _draw(model: OpenedModel, wish: Wish, subjects: tuple[int | str, ...], noise: Noise, keep: int = 0) -> Drawing:
    count = max(1, len(subjects)) * wish.each
    each_subject = [subject for subject in subjects for _ in range(wish.each)]
    texts = isinstance(model.backbone.conditioning, Text)
    given = {"prompts" if texts else "classes": each_subject} if each_subject else {}
    negative = wish.negative if texts else None
    request = model.backbone.conditioning.request(count, negative=negative, **given)  # type: ignore[arg-type]
    request = request.encoded(model.text_encoder if texts else None)
    sampler = build(model, wish.sampler or own_choice(model), wish.steps, wish.guidance)
    shape = tuple(model.backbone.sample_shape)
    size = max(1, min(64, NUMBERS // max(1, int(np.prod(shape)))))
    images: list[Tensor] = []
    way: list[Tensor] = []  # of the first `keep` samples

    def tell(time: float, state: Tensor) -> None:
        way.append(state[:keep])

    model.codec.eval()  # read before the clock starts
    began = time.perf_counter()
    with watching(model.backbone) as seen:
        for start in range(0, count, size):
            stop = min(start + size, count)
            sampler.watch = tell if keep and start == 0 else None
            latents = _sample(model, sampler, noise, start, stop, request.cond(start, stop), shape)
            images.append(_pixels(model, latents))
    seconds = time.perf_counter() - began
    frames = tuple(_pixels(model, state, strict=False).numpy() for state in way)
    return Drawing(
        images=torch.cat(images).numpy(),
        subjects=subjects,
        each=wish.each,
        seconds=seconds,
        calls=seen.asked / count,
        sampler=sampler.label,
        wish=wish,
        frames=frames,
    )


def _sample(
    model: OpenedModel, sampler: Sampler, noise: Noise, start: int, stop: int, cond: object, shape: Sequence[int]
) -> Tensor:
    device, dtype = model.device, state_dtype(model.backbone)
    cond = tree_map(lambda part: part.to(device) if isinstance(part, Tensor) else part, cond)
    first = noise.draw(start, stop, shape).to(device=device, dtype=dtype)

    def fresh(step: int) -> Tensor:
        return noise.draw(start, stop, shape, step + 1).to(device)

    with asking(model.backbone, device):
        return sampler.sample(model.backbone, first, cond, model.interval, fresh)


@torch.no_grad()
def _pixels(model: OpenedModel, latents: Tensor, strict: bool = True) -> Tensor:
    """[B, *] -> uint8 [B, H, W, C] on the CPU."""
    images = model.codec.decode(one_image(latents.to(state_dtype(model.backbone))))
    if strict and not bool(images.isfinite().all()):
        raise DataError(
            "A picture is not finite: the weights have diverged, or the guidance is far too strong; try an earlier "
            "checkpoint, or less guidance."
        )
    return to_uint8(images).permute(0, 2, 3, 1).contiguous().cpu()


def _check(value: object, name: str, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigError(f"{name} must be a whole number, {least} or more, not {value!r}.")


def spoken(seconds: float) -> str:
    """A duration as one reads it."""
    return f"{1000 * seconds:.0f} ms" if seconds < 1 else f"{seconds:.1f} s"
