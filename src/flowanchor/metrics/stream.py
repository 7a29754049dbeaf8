"""Generated images as a dataset that holds one chunk of them at a time."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.utils.data import Dataset


class StreamedImages(Dataset[Tensor]):
    """Images that are made while they are read, in order, chunk by chunk.

    torch-fidelity reads item 0 once to look at it and then everything in order, in the reading process
    (`save_cpu_ram=True`); a chunk is let go as soon as the next one is asked for.

    Args:
        chunks: gives the iterator of uint8 chunks [b, H, W, C]; called when the first image is asked for.
        length: number of images over all chunks.
        on_chunk: called with every chunk once, in order (a progress bar, a file).
    """

    def __init__(
        self, chunks: Callable[[], Iterator[Tensor]], length: int, on_chunk: Callable[[Tensor], None] | None = None
    ) -> None:
        self._make, self._length, self._on_chunk = chunks, length, on_chunk
        self._chunks: Iterator[Tensor] | None = None
        self._chunk: Tensor | None = None
        self._start = self._stop = 0
        self.seconds = 0.0  # spent on making the images

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Tensor:
        if not 0 <= index < self._length:
            raise IndexError(index)
        if index < self._start:
            raise RuntimeError(f"streamed images are read in order: {index} was asked for after {self._start}")
        while index >= self._stop:
            self._advance()
        assert self._chunk is not None
        image = self._chunk[index - self._start].permute(2, 0, 1)  # [C, H, W]
        return image.clone(memory_format=torch.contiguous_format)  # a view would keep the whole chunk alive

    def _advance(self) -> None:
        self._chunk = None  # let go before the next one is made
        started = time.perf_counter()
        if self._chunks is None:
            self._chunks = self._make()
        chunk = next(self._chunks, None)
        self.seconds += time.perf_counter() - started
        if chunk is None:
            raise RuntimeError(f"{self._length} images were announced, {self._stop} were generated")
        self._chunk, self._start = chunk, self._stop
        self._stop += len(chunk)
        if self._on_chunk is not None:
            self._on_chunk(chunk)
