"""From prompts to what a text-conditioned network is asked with, and to the size of what it draws."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from flowanchor.base.tables import is_table, read_captions, read_lines
from flowanchor.checkpoints.trusted import build
from flowanchor.errors import ConfigError
from flowanchor.interfaces import Backbone
from flowanchor.text.base import TextEncoder, pad_embeddings

if TYPE_CHECKING:
    from flowanchor.checkpoints import LoadedModel

SHOWN = 80  # characters of a prompt in a warning


def load_text_encoder(model: LoadedModel, chosen: Any = None) -> TextEncoder:
    """The encoder of a network's prompts: the one of its training, or `chosen` (a config group) in its place.

    Raises `ConfigError` where neither is known.
    """
    if chosen is not None and "_target_" in chosen:
        from hydra.utils import instantiate

        encoder: TextEncoder = instantiate(chosen, _convert_="all")
        return encoder.eval()
    settings = model.config.get("text_encoder")
    if not settings or "_target_" not in settings:
        raise ConfigError(
            f"{model.path} does not say how its prompts are encoded: add text_encoder=umt5 text_encoder.weights=FOLDER."
        )
    found: TextEncoder = build(settings, "text_encoder", model.path)
    return found.eval()


def read_prompts(path: str | Path) -> list[str]:
    """Prompts of a file, one per line, or of a CSV or JSONL table: the first caption of every row.

    Raises `ConfigError` without a file or without prompts, `DataError` for a table without the column `caption` and for
    a line that cannot be read.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise ConfigError(f"There is no file {path}: prompts= names a file with one prompt per line, or a table.")
    found = read_captions(path) if is_table(path) else list(read_lines(path))
    if not found:
        raise ConfigError(f"{path} holds no prompts: write one per line.")
    return found


def encode_prompts(encoder: TextEncoder, backbone: Backbone, prompts: Sequence[str], negative: str | None) -> Tensor:
    """Embeddings [N, L, D]; the network is told those of the negative prompt, where there is one.

    Where a network reads fewer tokens than the encoder, longer prompts are cut, with a warning.
    """
    asked = [*prompts, negative or ""]
    texts = encoder.encode(asked)
    width = getattr(backbone, "text_dim", encoder.width)
    if encoder.width != width:
        raise ConfigError(
            f"text_encoder={encoder.name} has {encoder.width} channels and the network reads {width}: use the encoder "
            "that it was trained with."
        )
    longest = getattr(backbone, "text_len", max(map(len, texts)))
    for prompt in dict.fromkeys(one for one, text in zip(asked, texts, strict=True) if len(text) > longest):
        shown = prompt if len(prompt) <= SHOWN else f"{prompt[:SHOWN]}..."
        warnings.warn(
            f"This network reads {longest} tokens of a prompt; the rest of '{shown}' is cut off.", stacklevel=2
        )
    texts = [text[:longest] for text in texts]
    backbone.set_null_context(texts[-1])
    return pad_embeddings(texts[:-1], len(texts[-1]))


def sample_shape(backbone: Backbone, size: str | Sequence[int] | None, downsampling: int) -> tuple[int, ...]:
    """Shape of one sample for images of a size, `"1024x768"` (width x height) or (height, width); None: the network's.

    Raises `ConfigError` for a network of one size, and for sizes that its patches do not divide.
    """
    if size is None:
        return tuple(backbone.sample_shape)
    if isinstance(size, str):
        numbers = size.lower().split("x")
        if len(numbers) != 2 or not all(number.strip().isdigit() for number in numbers):
            raise ConfigError(f"size={size} is no size: write width x height, for example size=1024x768.")
        width, height = (int(number) for number in numbers)
    else:
        height, width = (int(number) for number in size)
    if not backbone.any_size:
        raise ConfigError(f"This {type(backbone).__name__} draws one size only: leave out size=.")
    patch = getattr(backbone, "patch_size", (1, 1, 1))
    for side, step in ((height, downsampling * patch[-2]), (width, downsampling * patch[-1])):
        if side < step or side % step:
            raise ConfigError(f"size={width}x{height}: both sides must be multiples of {step}, and {side} is not.")
    return (*backbone.sample_shape[:-2], height // downsampling, width // downsampling)
