"""A stock forward that is run, not copied, up to its first block; and its blocks as stages.

A *shell* is the network with a stand-in in the place of its blocks: the stand-in stops the stock forward, and what it
was called with is what the stages need. So padding, positions, refiners and masks are the installed diffusers' own.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from flowanchor.errors import ConfigError
from flowanchor.interfaces import StageContext
from flowanchor.plugins.backbones.diffusers.description import PAGE, Description
from flowanchor.plugins.backbones.diffusers.exactness import exact


@dataclass(frozen=True)
class Walk:
    """What is the same in all stages: first of `StageContext.fixed`, before the named values."""

    lengths: tuple[int, ...]  # tokens of each stream
    shape: tuple[int, ...]  # of the sample, [B, C, *]
    framed: bool  # whether the sample is an image that came with an axis of one frame
    unmasked: bool  # whether blocks make a mask of the condition's padding alone, and there is none


def values_of(context: StageContext, description: Description) -> dict[str, Any]:
    """Everything that `embed` found, by name; a network that predicts the data carries more behind it."""
    return {**context.fixed[1], **dict(zip(description.carried, context.carried, strict=False))}


class _Arrived(Exception):
    """The stock forward has reached its first block."""

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        super().__init__()
        self.given = args, kwargs


class _Stop(nn.Module):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        raise _Arrived(args, kwargs)


class _Pass(nn.Module):
    """Stands for blocks that will be stages of their own: hands the tokens on, and notes what it was called with."""

    def __init__(self, link: Link, seen: dict[str, Any]) -> None:
        super().__init__()
        self.__dict__["link"], self.__dict__["seen"] = link, seen

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        link: Link = self.__dict__["link"]
        given = link.named(args, kwargs)
        tokens = given.pop(link.parameters_of_block[0])
        carried = link.__dict__["description"].carried  # which the first of the blocks is called with, too
        own = {f"{link.group}.{name}": value for name, value in given.items() if name not in carried}
        self.__dict__["seen"].update(own)
        self.__dict__["seen"][f"{link.group}.length"] = tokens.shape[1]
        return tokens


class Link(nn.Module):
    """A stock block as a stage. It is not registered in the backbone: its block is, where the stock network has it."""

    def __init__(self, block: nn.Module, description: Description, group: str) -> None:
        super().__init__()
        self.block, self.group = block, group
        self.__dict__["description"] = description
        self.__dict__["signature"] = inspect.signature(type(block).forward)
        kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
        self.parameters_of_block = [p.name for p in self._signature.parameters.values() if p.kind in kinds][1:]
        self.renames = dict(description.renames.get(group, {}))

    @property
    def _signature(self) -> inspect.Signature:
        found: inspect.Signature = self.__dict__["signature"]
        return found

    def named(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """What the block was called with, by the names of its own parameters."""
        bound = self._signature.bind_partial(None, *args, **kwargs).arguments
        return {name: value for name, value in bound.items() if name in self.parameters_of_block}

    def forward(self, tokens: Tensor, context: StageContext) -> Tensor:
        """All tokens [B, N, D] -> all tokens."""
        description: Description = self.__dict__["description"]
        walk: Walk = context.fixed[0]
        values = values_of(context, description)
        with exact(tokens), _without_masks(walk.unmasked):
            if self.group in description.lead:
                return self._alone(tokens, values, description)
            if "joined" in self.renames:
                return self._joined(tokens, values, description)
            return self._streams(tokens, values, description, walk)

    def _alone(self, tokens: Tensor, values: Mapping[str, Any], description: Description) -> Tensor:
        """The sample's own tokens, which come first, through a block that knows no text."""
        length = values[f"{self.group}.length"]
        given = {}
        for name in self.parameters_of_block[1:]:
            if name in description.carried:
                given[name] = values[name]
            elif f"{self.group}.{name}" in values:
                given[name] = values[f"{self.group}.{name}"]
        return torch.cat([self.block(tokens[:, :length], **given), tokens[:, length:]], 1)

    def _joined(self, tokens: Tensor, values: Mapping[str, Any], description: Description) -> Tensor:
        """One sequence of all streams."""
        one = self.renames["joined"]
        names = (name for name in description.streams if name != one and name in self.parameters_of_block)
        others: dict[str, Any] = dict.fromkeys(names)
        out: Tensor = self.block(**{one: tokens}, **others, **self._given(values, description.streams))
        return out

    def _streams(self, tokens: Tensor, values: Mapping[str, Any], description: Description, walk: Walk) -> Tensor:
        before = dict(zip(description.streams, tokens.split(walk.lengths, 1), strict=True))
        out = self.block(**before, **self._given(values, description.streams))
        if description.out is None:
            return torch.cat([out], 1) if out is tokens else out
        after = dict(zip(description.out, out, strict=True))
        # A last block that leaves the text out hands it on, so that the sequence keeps its length.
        return torch.cat([before[name] if after[name] is None else after[name] for name in description.streams], 1)

    def _given(self, values: Mapping[str, Any], streams: tuple[str, ...]) -> dict[str, Any]:
        names = {name: self.renames.get(name, name) for name in self.parameters_of_block if name not in streams}
        return {name: values[found] for name, found in names.items() if found in values}


def first_call(network: nn.Module, description: Description, links: Mapping[str, Link], inputs: Any) -> dict[str, Any]:
    """What the first block is called with by the stock forward, and what is kept on the way to it, by name.

    Args:
        links: the first block of each list.
        inputs: of the stock forward.
    """
    seen: dict[str, Any] = {}
    with _listening(network, description, seen):
        try:
            _shell(network, description, links, seen)(**inputs, return_dict=False)
        except _Arrived as arrived:
            return {**links[description.blocks[0]].named(*arrived.given), **seen}
    raise ConfigError(
        f"{type(network).__name__} called no block of {description.blocks[0]}: correct its description ({PAGE})."
    )


def _shell(network: nn.Module, description: Description, links: Mapping[str, Link], seen: dict[str, Any]) -> nn.Module:
    """The network with stand-ins for its blocks. Made anew for each call: what it shares may have been replaced."""
    shell = copy.copy(network)
    shell._modules = dict(network._modules)
    for group in description.lead:
        shell._modules[group] = nn.ModuleList([_Pass(links[group], seen)])
    shell._modules[description.blocks[0]] = nn.ModuleList([_Stop()])
    return shell


@contextmanager
def _listening(network: nn.Module, description: Description, seen: dict[str, Any]) -> Iterator[None]:
    """A region in which the outputs of children that are to be kept are noted."""

    def listener(name: str, index: int | None) -> Callable[..., None]:
        def listen(module: nn.Module, given: Any, out: Any) -> None:
            seen[name] = out if index is None else out[index]

        return listen

    handles = [
        network.get_submodule(child).register_forward_hook(listener(name, index))
        for name, (child, index) in description.kept.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _NoMask(TorchFunctionMode):
    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = dict(kwargs or {})
        if func is functional.scaled_dot_product_attention:
            if len(args) > 3:
                args = (*args[:3], None, *args[4:])
            given.pop("attn_mask", None)
        return func(*args, **given)


def _without_masks(unmasked: bool) -> AbstractContextManager[Any]:
    """A region in which attention has no mask, where a block would make one that leaves nothing out.

    With a mask the scores of the tangent are held whole in memory.
    """
    return _NoMask() if unmasked else nullcontext()
