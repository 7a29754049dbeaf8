"""The shapes of a network that a file describes, before anything as large as the network is made.

A description may ask for a billion layers. The network is first built without values, and building stops where it has
grown far beyond the weights that are there to fill it.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.overrides import TorchFunctionMode

from flowanchor.base.plain import bare
from flowanchor.base.trusted import build
from flowanchor.deferred import parameters_on_meta
from flowanchor.errors import CheckpointError, FlowAnchorError
from flowanchor.interfaces import Backbone
from flowanchor.weights import shape_of

SLACK_TENSORS, SLACK_NUMBERS = 2_000, 20_000_000  # what any network may have beyond its weights: tables
SHORT = 256  # of a table along one side: the product of three is still small
SAMPLE = 2**27  # numbers of one sample; a video of 81 frames in 720p has 5 million in a latent space of 16 channels


TOO_LARGE = "the network that is described is far larger than the weights in the file: do not use it."


class Size:
    """How many tensors and numbers a network may have: some more than its weights."""

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        self.tensors = 2 * len(weights) + SLACK_TENSORS
        self.numbers = 2 * sum(shape_of(weights, name).numel() for name in weights) + SLACK_NUMBERS


class TooLarge(CheckpointError):
    """A description of a network that the weights cannot fill."""


def outline(settings: Any, source: object, *weights: Mapping[str, Tensor]) -> Backbone:
    """The network without values; raises `CheckpointError` where it cannot be built, or is far larger than `weights`.

    Leaves random numbers as they were.
    """
    limits = [Size(some) for some in weights]
    numbers, tensors = sum(one.numbers for one in limits), sum(one.tensors for one in limits)
    # A constructor that looks at its values needs some: then they are made, within the same bounds.
    attempts: list[Callable[[], AbstractContextManager[Any]]] = [_all_on_meta, parameters_on_meta, nullcontext]
    for attempt in attempts:
        try:
            with torch.random.fork_rng(devices=[]), _counted(tensors, numbers), attempt():
                network = cast(Backbone, build(settings, "backbone", source))
            break
        except FlowAnchorError as error:
            unforeseen = error.__cause__ is not None and not isinstance(error.__cause__, FlowAnchorError)
            if attempt is attempts[-1] or not unforeseen:
                raise
            if _largest(settings) > numbers:  # from here on, what it asks for is made
                raise TooLarge(f"{source}: backbone: {TOO_LARGE}") from error
    shape = network.sample_shape
    if not all(isinstance(side, int) and side > 0 for side in shape) or math.prod(shape) > SAMPLE:
        raise CheckpointError(
            f"{source} describes samples of {bare(' x '.join(map(str, shape)))}: do not use this file."
        )
    return network


def _largest(settings: Any) -> float:
    """The largest number in a description."""
    if isinstance(settings, (dict, list)):
        inner = settings.values() if isinstance(settings, dict) else settings
        return max((_largest(one) for one in inner), default=0)
    return abs(settings) if isinstance(settings, (int, float)) else 0


class _NoValues(TorchFunctionMode):
    """What networks do most while they are built, for tensors without values: on its own way there PyTorch imports its
    compiler, which takes seconds. Nothing draws first values, and short tables of positions get values."""

    FILL = frozenset((Tensor.fill_, Tensor.normal_, Tensor.uniform_, Tensor.zero_))

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = dict(kwargs or {})
        if function in self.FILL or getattr(function, "__module__", None) == "torch.nn.init":
            tensor = args[0] if args else given.get("tensor")
            if isinstance(tensor, Tensor) and tensor.is_meta:
                return tensor
        short = bool(args) and all(isinstance(one, int) and abs(one) <= SHORT for one in args)
        if function is torch.arange and short and set(given) <= {"dtype"}:
            given["device"] = "cpu"
        return function(*args, **given)


@contextmanager
def _all_on_meta() -> Iterator[None]:
    with torch.device("meta"), _NoValues(), parameters_on_meta():
        yield


@contextmanager
def _counted(tensors: int, numbers: int) -> Iterator[None]:
    """Within it a network that gets more parameters and buffers than allowed is `TooLarge`."""
    left = [tensors, numbers, 20 * tensors]
    own = threading.get_ident()

    def count(module: nn.Module, name: str, found: Tensor | nn.Module | None) -> None:
        if found is None or threading.get_ident() != own:
            return
        if isinstance(found, Tensor):
            left[0] -= 1
            left[1] -= found.numel()
        left[2] -= 1
        if min(left) < 0:
            raise TooLarge(TOO_LARGE)

    kinds = ("parameter", "buffer", "module")
    handles = [getattr(torch_module, f"register_module_{kind}_registration_hook")(count) for kind in kinds]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
