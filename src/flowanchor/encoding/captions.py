"""Latents of captioned images, each file of one size, with the embeddings of their captions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from flowanchor.base.dtypes import DTYPES
from flowanchor.base.files import write_tensors
from flowanchor.encoded.captions import NEGATIVE, CaptionFile, stored
from flowanchor.encoded.manifest import CaptionManifest
from flowanchor.encoding.buckets import MULTIPLE, Size, bucket_sizes, fit
from flowanchor.encoding.caption_sources import CaptionedSource
from flowanchor.encoding.form import Form
from flowanchor.encoding.images import ImageBatch
from flowanchor.encoding.plan import PlannedFile, plan_captions
from flowanchor.encoding.record import FinishedShard
from flowanchor.encoding.writers import CaptionWriter, Rows, disk_space
from flowanchor.errors import ConfigError
from flowanchor.interfaces import Codec
from flowanchor.text.base import KINDS, TextEncoder


@dataclass(frozen=True)
class CaptionEncoding:
    """What is made of captioned images; every field shows in the result.

    Attributes:
        image_size, max_ratio, multiple: of the sizes (`bucket_sizes`, which raises for what they cannot be).
        dtype: of stored latents and embeddings.
        shard_size: images per file.
        negative: the negative prompt, whose embeddings stand beside the files.
        sizes: height and width of the images.
    """

    image_size: int = 1024
    max_ratio: float = 2.0
    multiple: int = MULTIPLE
    dtype: str = "float32"
    shard_size: int = 1_000
    negative: str = ""
    sizes: list[Size] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "sizes", bucket_sizes(self.image_size, self.max_ratio, self.multiple))


class Captioned(Form):
    """The posterior's mean, normalised, [C, F, h, w] of each image (F: frames), and its captions' embeddings.

    Args:
        source: images and captions.
        codec, text: on their devices.
        encoding: what is made of them.
    """

    manifest = CaptionManifest
    lack = "cannot be read or have no caption"
    crop = staticmethod(fit)

    def __init__(self, source: CaptionedSource, codec: Codec, text: TextEncoder, encoding: CaptionEncoding) -> None:
        self.captioned = self.source = source
        self.codec, self.text, self.encoding, self.dtype = codec, text, encoding, encoding.dtype

    def settings(self, codec_dtype: str, batch_size: int) -> dict[str, Any]:
        e = self.encoding
        return {
            "images": self.source.digest(),
            "codec": self.codec.fingerprint(),
            "text_encoder": self.text.fingerprint(),
            "image_size": e.image_size,
            "max_ratio": e.max_ratio,
            "multiple": e.multiple,
            "codec_dtype": codec_dtype,
            "dtype": e.dtype,
            "shard_size": e.shard_size,
            "batch_size": batch_size,
            "negative": e.negative,
        }

    def plan(self, on_image: Callable[[], None] = lambda: None) -> tuple[list[PlannedFile], list[str]]:
        files, unreadable = plan_captions(self.captioned, self.encoding.sizes, self.encoding.shard_size, on_image)
        return files, [*self.captioned.uncaptioned, *unreadable]

    def stored_shape(self, size: Size) -> tuple[int, ...]:
        return (self.channels, 1, *(side // self.codec.downsampling for side in size))

    def values(self, pixels: Tensor, indices: np.ndarray) -> Tensor:
        found = self.codec.encode(pixels)
        return found[:, :, None] if found.ndim == 4 else found

    def rows(self, batch: ImageBatch) -> Rows:
        rows = batch.indices.tolist()
        captions = [self.captioned.captions[row] for row in rows]
        texts = [[self._stored(text) for text in self.text.encode(found)] for found in captions]
        names = [self.source.names[row] for row in rows]
        return super().rows(batch)._replace(names=names, captions=captions, texts=texts)

    def _known(self, text: Any) -> Any:
        """A text of a kind that the files hold."""
        if text._fields not in KINDS:
            kinds = "; ".join(", ".join(fields) for fields in KINDS)
            raise ConfigError(
                f"text_encoder={self.text.name} gives {', '.join(text._fields)}, and files of captions hold one of: "
                f"{kinds} (flowanchor.text.base). Let it give one of these."
            )
        return text

    def _stored(self, text: Any) -> Any:
        found = self._known(text)._asdict()
        kept = {name: value.to(DTYPES[self.dtype]) for name, value in found.items() if value.is_floating_point()}
        return text._replace(**kept)

    def stamp(self, file: PlannedFile) -> str:
        """Of its images, and of its size: a replaced picture may belong to another one."""
        height, width = file.size
        return f"{height} x {width} {super().stamp(file)}"

    def writer(self, draft: Path) -> CaptionWriter:
        return CaptionWriter(draft)

    def complete(
        self, out: Path, finished: Sequence[FinishedShard], unreadable: Sequence[str], source: dict[str, Any]
    ) -> CaptionManifest:
        """Beside the files stand the embeddings of the negative prompt."""
        with disk_space(out / NEGATIVE):
            negative = self._known(self.text.encode_negative(self.encoding.negative))
            write_tensors(
                out / NEGATIVE,
                {stored("text", field): value.contiguous() for field, value in negative._asdict().items()},
            )
        shards = tuple(found.shard for found in finished)
        shapes = [CaptionFile(out / shard.file).shape for shard in shards]
        return CaptionManifest(
            count=sum(shard.count for shard in shards),
            shape=(shapes[0][0], shapes[0][1]),
            text_width=self.text.width,
            shards=shards,
            sizes=tuple((height, width) for _, _, height, width in shapes),
            codec={"name": self.codec.name, "digest": source["codec"]},
            text_encoder={"name": self.text.name, "digest": source["text_encoder"]},
            negative=self.encoding.negative,
            unreadable=tuple(unreadable),
            source=source,
        )
