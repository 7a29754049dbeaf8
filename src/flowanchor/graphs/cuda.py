"""CUDA graphs of functions, which share one pool of memory and follow each other on one stream."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from flowanchor.graphs.capture import CaptureError, being_captured

Outputs = dict[str, Tensor]


class Graph(Protocol):
    """A function that was captured: `replay` computes `outputs` again, in the same tensors."""

    outputs: Outputs

    def replay(self) -> None: ...


class Graphs(Protocol):
    """What makes them."""

    def eager(self, rehearsal: bool) -> AbstractContextManager[list[str]]:
        """A region for a call that is not captured; of a rehearsal it lists, at its end, what could not be."""
        ...

    def capture(self, function: Callable[[], Outputs]) -> Graph:
        """Record a function without computing it; raises `CaptureError` where that is impossible."""
        ...


class CudaGraphs:
    """`torch.cuda.graph` on a device."""

    def __init__(self, device: torch.device) -> None:
        self.pool = torch.cuda.graph_pool_handle()
        self.stream = torch.cuda.Stream(device)

    @contextmanager
    def eager(self, rehearsal: bool) -> Iterator[list[str]]:
        """On the stream that will capture, which is where autograd then finds the accumulators of the gradients."""
        found: list[str] = []
        now = torch.cuda.current_stream()
        self.stream.wait_stream(now)
        with torch.cuda.stream(self.stream), _waits(found) if rehearsal else nullcontext():
            yield found
        now.wait_stream(self.stream)

    def capture(self, function: Callable[[], Outputs]) -> Graph:
        torch.cuda.synchronize()
        try:
            return _CudaGraph(self, function)
        except RuntimeError as error:
            said = str(error).strip().splitlines()[0]
            raise CaptureError(f"PyTorch could not capture it ({said}).") from error


class _CudaGraph:
    def __init__(self, graphs: CudaGraphs, function: Callable[[], Outputs]) -> None:
        self.graph = torch.cuda.CUDAGraph()
        # thread_local: threads that pin memory, write logs or watch collectives go on meanwhile.
        capture = torch.cuda.graph(
            self.graph, pool=graphs.pool, stream=graphs.stream, capture_error_mode="thread_local"
        )
        with being_captured(), capture:
            self.outputs = function()

    def replay(self) -> None:
        self.graph.replay()


@contextmanager
def _waits(found: list[str]) -> Iterator[None]:
    """Lists the lines that let the host wait for the device."""
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode(before)
    for warning in caught:
        if "synchronizing CUDA operation" in str(warning.message):
            found.append(f"{Path(warning.filename).name}:{warning.lineno} lets the host wait for the device")
        else:
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
