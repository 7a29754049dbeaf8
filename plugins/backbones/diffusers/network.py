"""A transformer of diffusers as a chain of stages, under its own names: what `backbone=diffusers` builds.

The network is diffusers' own, layer by layer; which class it is, and how that one is walked, a description says
(`description.Description`). Outside, time 0 is noise and 1 is data, and the prediction is the velocity.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from typing import Any, Literal, cast

import diffusers
import torch
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
from torch import Tensor, nn
from torch.nn import functional

from flowanchor.base.plain import bare
from flowanchor.conditioning import Text
from flowanchor.errors import ConfigError
from flowanchor.interfaces import Backbone, StageContext
from flowanchor.plugins.backbones.diffusers.description import PAGE, Description, description_of
from flowanchor.plugins.backbones.diffusers.exactness import exact, exact_times, with_end
from flowanchor.plugins.backbones.diffusers.walking import Link, Walk, first_call, values_of
from flowanchor.plugins.backbones.end_time import GATE, EndTime, required
from flowanchor.plugins.backbones.lora import (
    adapted_layers,
    adapter_parts,
    add_adapters,
    initialise_adapter,
    is_adapter,
    merge,
    stage_adapters,
    switch,
)
from flowanchor.plugins.backbones.lora_files import factors
from flowanchor.velocity import from_data, known_prediction, with_sample

# Of the arguments of diffusers' classes: none of these shows in the shapes of weights.
WITHIN_LAYERS = ("heads", "head_dim", "rope", "theta", "eps", "activation", "scale", "flip_sin_to_cos")


class DiffusersTransformer(Backbone):
    """Velocity network on samples [B, C, h, w], or [B, C, f, h, w] of a video; an image network takes one frame, too.

    State-dict keys are the stock network's, whose modules and parameters these are: `network` is that one.

    Args:
        stock: name of the class in diffusers; None: that of the description.
        settings: its arguments, as a `config.json` has them.
        description: how the class is walked; None: the registered one of its name.
        channels, frames, height, width: of the samples it draws unless told otherwise; None: the usual ones.
        text_len: tokens of the text that it reads; None: as released.
        condition_dropout: share of the conditions that training replaces by the null one.
        predicts: `v`: velocities; `x`: the data, from which the head makes velocities (`flowanchor.velocity`).
        tangent_smoothing: standard deviation, in units of t, over which the derivative of the time embedding is
            averaged; 0: the exact one (docs/wan.md says why).
        end_time: how it is told `r`: `auxiliary`, `decoupled` or `gated` (`plugins/backbones/end_time.py`), by a copy
            of the module that embeds the time; None: not at all.
        end_time_split: of `decoupled`: how many blocks, or which share of them, are conditioned on `t`; None: 5/7.
        end_time_gate: of `gated`: the weight of what `r` says.
        lora: `{rank, alpha, targets}`: train adapters only (`lora.add_adapters`); null, or a null rank: all weights.

    Raises `ConfigError` for a class that nobody describes or that this diffusers does not have, settings that it does
    not take, samples that do not fit, and attention that tangents would not see.
    """

    any_size = True
    network: Any  # the stock network, which shares its modules and parameters with this one
    description: Description
    conditioning: Text

    def __init__(
        self,
        stock: str | None = None,
        settings: Mapping[str, Any] | None = None,
        description: Description | None = None,
        channels: int | None = None,
        frames: int | None = None,
        height: int | None = None,
        width: int | None = None,
        text_len: int | None = None,
        condition_dropout: float = 0.0,
        predicts: Literal["v", "x"] = "v",
        lora: Mapping[str, Any] | None = None,
        tangent_smoothing: float = 0.0,
        end_time: str | None = None,
        end_time_split: float | None = None,
        end_time_gate: float = GATE,
    ) -> None:
        super().__init__()
        self.predicts = known_prediction(predicts, self)
        known = _described(stock, description)
        network = _built(known.stock, settings or {})
        known.check(network.config)
        if not 0 <= condition_dropout <= 1:
            raise ConfigError(f"backbone.condition_dropout={condition_dropout} must be a share between 0 and 1.")
        # Not registered: what it holds is the backbone's own, the same dictionaries under the same names.
        self.__dict__["network"], self.__dict__["description"] = network, known
        self._modules, self._parameters, self._buffers = network._modules, network._parameters, network._buffers
        lists = {
            group: [Link(block, known, group) for block in network.get_submodule(group)] for group in _groups(known)
        }
        self.__dict__["blocks"] = nn.ModuleList(link for links in lists.values() for link in links)
        self.__dict__["first"] = {group: links[0] for group, links in lists.items() if links}
        longest = {name: length if text_len is None else text_len for name, length in known.longest.items()}
        self.conditioning = Text(known.null(network.config), longest, condition_dropout)
        self.size_steps = known.size_steps
        self.sample_shape = self._shape(channels, frames, height, width)
        self._check_attention()
        self.tangent_smoothing = float(tangent_smoothing)
        if not 0 <= self.tangent_smoothing < 0.5 or (self.tangent_smoothing and not known.sinusoids):
            raise ConfigError(
                f"backbone.tangent_smoothing={tangent_smoothing} is a width in time, a small part of 1, and needs a "
                f"time that is embedded by a table of sinusoids{'' if known.sinusoids else ', which this one is not'}: "
                "use for example 0.01, or 0 for exact tangents."
            )
        self._tell_end(EndTime.of(end_time, end_time_split, end_time_gate, len(self.blocks), False))
        self._adapt(lora)
        self.initialise()

    def _tell_end(self, told: EndTime) -> None:
        """A second embedder beside that of the time, or later blocks that are told another time."""
        self.told_end, self.end_time, self.takes_end_time = told, told.way, told.way is not None
        embedder = self.network.get_submodule(self.description.time)
        self.r_embedder = deepcopy(embedder) if told.needs_embedder else None
        for link in self.blocks[told.first :]:
            cast(Link, link).late = True

    def _adapt(self, lora: Mapping[str, Any] | None) -> None:
        """Adapters, and which of them each stage switches."""
        known = self.description
        self.adapted = lora is not None and lora.get("rank") is not None
        if self.adapted:
            blocks = {
                f"{group}.{name}": block
                for group in known.blocks
                for name, block in self.network.get_submodule(group).named_children()
            }
            add_adapters(self, cast(Mapping[str, Any], lora), known.targets, blocks)
            if self.r_embedder is not None:
                self.r_embedder.requires_grad_(True)
        self.embed_adapters, *inner, self.head_adapters = stage_adapters(self.stage_modules())
        for link, layers in zip(self.blocks, inner, strict=True):
            cast(Link, link).adapters = layers

    def meaning(self) -> dict[str, Any]:
        """With the settings of the stock class whose names say that they count or scale something within a layer."""
        told = {
            f"settings.{name}": list(value) if isinstance(value, tuple) else value
            for name, value in self.network.config.items()
            if any(word in name for word in WITHIN_LAYERS) and not name.startswith("max_")
        }
        return {**super().meaning(), **self.told_end.meaning(), **told}

    def borrowed(self) -> set[str]:
        """With adapters: everything that they stand beside."""
        if not self.adapted:
            return set()
        return {name for name in self.state_dict() if not is_adapter(name) and not name.startswith("r_embedder.")}

    def copies(self) -> dict[str, str]:
        """The embedder of the end, gated, starts as that of the time."""
        names = [name for name in self.state_dict() if name.startswith("r_embedder.") and self.end_time == "gated"]
        return {name: f"{self.description.time}.{name.removeprefix('r_embedder.')}" for name in names}

    @contextmanager
    def without_adapters(self) -> Iterator[None]:
        with super().without_adapters():
            yield
        switch(tuple(adapted_layers(self).values()), True)  # as whoever runs the layers by himself expects them

    def lora_factors(
        self, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], source: object
    ) -> dict[str, tuple[Tensor, Tensor]]:
        known = self.description
        if known.pipeline is None:
            raise ConfigError(f"base_lora={source}: diffusers reads no LoRA files for {known.stock}.")
        return factors(known.pipeline, tensors, metadata, source)

    def merge(self) -> None:
        """Add the adapters to the weights that they stand beside, for good: `network` is a plain stock one then."""
        merge(self)
        self._adapt(None)

    def _shape(self, *sides: int | None) -> tuple[int, ...]:
        channels, frames, *size = sides
        known, wanted = self.description, self.description.channels(self.network.config)
        if channels not in (None, wanted):
            raise ConfigError(
                f"The samples have {channels} channels and this {known.stock} reads {wanted}: use the codec that it "
                "was trained with, or leave out backbone.channels."
            )
        usual = known.usual[-2:]
        shape = tuple(usual[axis] if side is None else side for axis, side in enumerate(size))
        if known.frames:
            frames = known.usual[0] if frames is None else frames
        elif frames not in (None, 1):
            raise ConfigError(f"{known.stock} draws images, and backbone.frames={frames}: leave it out.")
        found = (wanted, *(() if frames is None else (frames,)), *shape)
        self._check_size(found)
        return found

    def _check_size(self, shape: tuple[int, ...]) -> None:
        for side, step in zip(shape[-2:], self.size_steps, strict=True):
            if side < 1 or side % step:
                raise ConfigError(
                    f"Samples of {' x '.join(map(str, shape))} cannot be cut into the patches of "
                    f"{self.description.stock}: choose heights and widths that are multiples of "
                    f"{self.size_steps[0]} and {self.size_steps[1]}."
                )

    # ----------------------------------------------------------------------------------------------------- stages

    def embed(self, x: Tensor, t: Tensor, cond: Any, r: Tensor | None = None) -> tuple[Tensor, StageContext]:
        """x [B, C, *], t [B], a named tuple of text -> the joined tokens [B, N, D] and the context.

        Context: carried, as the description lists it; fixed, a `Walk` and all other values by name.
        """
        known = self.description
        self._check_attention()
        sample = self._sample(x)
        given, unmasked = self._condition(cond, x)
        told = required(r, self) if self.takes_end_time and self.adapters_on else None
        found = self._first(sample, t, given, told)
        lacking = [name for name in (*known.streams, *known.carried) if name not in found]
        if lacking:
            raise ConfigError(
                f"The first block of {known.stock} is not given {', '.join(lacking)} but {', '.join(found)}: correct "
                f"its description ({PAGE})."
            )
        streams = [found.pop(name) for name in known.streams]
        carried = tuple(found.pop(name) for name in known.carried)
        if self.end_time == "decoupled":
            late = dict(zip(known.carried, carried, strict=True)) if told is None else self._first(sample, told, given)
            carried = (*carried, *(late[name] for name in known.carried))
        lengths, framed = tuple(stream.shape[1] for stream in streams), sample.ndim < x.ndim
        walk = Walk(lengths, tuple(sample.shape), framed, unmasked, self.adapters_on)
        tokens = torch.cat(streams, 1) if len(streams) > 1 else streams[0].clone()
        context = StageContext(carried, (walk, found))
        return tokens, with_sample(context, x, t) if self.predicts == "x" else context

    def _first(self, sample: Tensor, t: Tensor, given: Any, r: Tensor | None = None) -> dict[str, Any]:
        """What the first block is called with at these times, and what else is kept, by name."""
        known, network = self.description, self.network
        embedder, width = network.get_submodule(known.time), self.tangent_smoothing * known.speed(network.config)
        low = sample.dtype.itemsize < 4 or torch.is_autocast_enabled(sample.device.type)
        switch(self.embed_adapters, self.adapters_on)
        with ExitStack() as regions:
            regions.enter_context(exact(sample))
            if low or width or self.takes_end_time:
                regions.enter_context(exact_times(embedder, known.level(network.config, t), width))
            if r is not None and self.r_embedder is not None:
                end = known.level(network.config, r)
                regions.enter_context(with_end(embedder, self.r_embedder, end, self.told_end.embedded, width))
            return first_call(network, known, self.__dict__["first"], known.inputs(network, sample, t, given))

    def head(self, tokens: Tensor, context: StageContext) -> Tensor:
        """The joined tokens -> velocity [B, C, *]."""
        walk, known = context.fixed[0], self.description
        switch(self.head_adapters, walk.adapted)
        with exact(tokens):
            own = tokens[:, -walk.lengths[-1] :]
            values = values_of(context, known, self.end_time == "decoupled")
            out = known.sign * known.head(self.network, own, values, walk.shape)
        out = out.unsqueeze(2) if walk.framed else out
        return from_data(out, context) if self.predicts == "x" else out

    def stage_modules(self) -> list[list[nn.Module]]:
        known = self.description
        before: list[nn.Module] = []
        after: list[nn.Module] = []
        for name, child in self._modules.items():
            if name in _groups(known) or child is None or next(child.parameters(), None) is None:
                continue
            called = child.children() if isinstance(child, (nn.ModuleDict, nn.ModuleList)) else [child]
            (after if name in known.ends else before).extend(called)
        return [before, *([cast(Link, link).block] for link in self.blocks), after]

    # ------------------------------------------------------------------------------------------------------ inputs

    def _sample(self, x: Tensor) -> Tensor:
        """x as the stock network's class takes it: without the frame of an image."""
        known, axes = self.description, 5 if self.description.frames else 4
        sample = x.squeeze(2) if x.ndim == 5 and axes == 4 and x.shape[2] == 1 else x
        if sample.ndim != axes or sample.shape[1] != self.sample_shape[0]:
            raise ConfigError(
                f"{known.stock} reads samples [B, {self.sample_shape[0]}, {'f, ' if known.frames else ''}h, w], and "
                f"these have shape {tuple(x.shape)}: use the data and the codec that it was trained with."
            )
        self._check_size(tuple(sample.shape[1:]))
        return sample

    def _condition(self, cond: Any, x: Tensor) -> tuple[Any, bool]:
        """The condition in the type of x, without masks filled up with zeros; and whether it has no padding."""
        null, longest = self.conditioning.null_text, self.conditioning.longest
        fields, stock = null._fields, self.description.stock
        if tuple(type(cond).__dict__.get("_fields", ())) != fields:
            raise ConfigError(
                f"{stock} is conditioned on text: pass a {type(null).__name__} with {', '.join(fields)}, each of a "
                "batch, from the text encoder that it was trained with."
            )
        found = {}
        for name, value, one in zip(fields, cond, null, strict=True):
            widths = one.shape[name in longest :]
            if value.shape[1 + (name in longest) :] != widths or value.ndim != one.ndim + 1:
                raise ConfigError(
                    f"{name} of the condition has shape {tuple(value.shape)}, and {stock} reads "
                    f"[{', '.join(['B', *(['L'] if name in longest else []), *map(str, widths)])}]: encode the prompts "
                    "with the text encoder that it was trained with."
                )
            if name in longest and value.shape[1] > longest[name]:
                raise ConfigError(
                    f"{name} of the condition has {value.shape[1]} tokens, and {stock} reads {longest[name]}: cut the "
                    "texts, or set backbone.text_len."
                )
            value = value.to(x.dtype) if value.is_floating_point() else value
            masked = name.startswith("mask") or name.replace("tokens", "mask") in fields
            if name in longest and not masked:
                value = functional.pad(value, [0, 0] * (value.ndim - 2) + [0, longest[name] - value.shape[1]])
            found[name] = value
        masks = [value for name, value in found.items() if name.startswith("mask")]
        unmasked = bool(masks) and self.description.masks_padding and all(bool(mask.all()) for mask in masks)
        return type(null)(**found), unmasked

    def _check_attention(self) -> None:
        """Tangents are taken where attention is PyTorch's own, and where no stage is hidden in a checkpoint."""
        active = _AttentionBackendRegistry.get_active_backend()[0]
        chosen = {processor._attention_backend for processor in _processors(self.network)} - {None}
        for backend in (active, *chosen):
            if backend != AttentionBackendName.NATIVE:
                raise ConfigError(
                    f"The attention backend {bare(str(getattr(backend, 'value', backend)))} of diffusers goes past the "
                    "tangents of attention: leave it at native (DIFFUSERS_ATTN_BACKEND, set_attention_backend), and "
                    "choose jvp/attention= here."
                )
        if self.network.is_gradient_checkpointing:
            raise ConfigError(
                "gradient_checkpointing of diffusers hides the stages from tangents: call "
                "network.disable_gradient_checkpointing(), and choose jvp.recompute= here."
            )

    # ---------------------------------------------------------------------------------------------- initialisation

    def initialise_stage(self, index: int) -> None:
        """Each layer as PyTorch makes it, norms of one, small tables; the last layer zero, so that training starts
        from v = 0."""
        stage = self.stage_modules()[index]
        for module in stage:
            parts, adapted = adapter_parts(module), set(adapted_layers(module).values())
            for layer in module.modules():
                if layer in adapted:
                    initialise_adapter(layer)
                elif layer not in parts:
                    _draw(layer)
        if index == 0:
            _draw_own(self)
            self._begin_end()
        if index > len(self.blocks):
            for name, parameter in self.network.get_submodule(self.description.last).named_parameters():
                if not is_adapter(f".{name}"):
                    nn.init.zeros_(parameter)

    def _begin_end(self) -> None:
        """The embedder of the end as that of the time (gated), or silent."""
        if self.r_embedder is None:
            return
        embedder = self.network.get_submodule(self.description.time)
        own = [value for name, value in embedder.named_parameters() if not is_adapter(f".{name}")]
        for target, value in zip(self.r_embedder.parameters(), own, strict=True):
            target.data.copy_(value.data)
        if self.end_time == "auxiliary":
            last = [layer for layer in self.r_embedder.modules() if isinstance(layer, nn.Linear)][-1]
            for parameter in last.parameters():
                nn.init.zeros_(parameter)


def _groups(description: Description) -> tuple[str, ...]:
    return (*description.lead, *description.blocks)


def _described(stock: str | None, description: Description | None) -> Description:
    if description is None:
        if stock is None:
            raise ConfigError(
                "backbone=diffusers needs to know which network: add initialise_from=FOLDER, one with its config.json "
                "and weights; or, from scratch, choose backbone/description= and backbone.settings={...}, the "
                "arguments of its class."
            )
        return description_of(stock)
    if stock not in (None, description.stock):
        raise ConfigError(
            f"backbone/description is that of {description.stock}, and the network is a {bare(stock)}: leave one of "
            "them out."
        )
    return description


def _listed(value: Any) -> Any:
    """Containers of a configuration as plain ones, which diffusers keeps."""
    if isinstance(value, Mapping):
        return {key: _listed(inner) for key, inner in value.items()}
    return [_listed(inner) for inner in value] if isinstance(value, Sequence) and not isinstance(value, str) else value


def _built(stock: str, settings: Mapping[str, Any]) -> Any:
    """The stock network; nothing of a folder is opened."""
    made = getattr(diffusers, stock, None)
    if made is None:
        raise ConfigError(f"diffusers {diffusers.__version__} has no {stock}: pip install --upgrade diffusers.")
    known = inspect.signature(made.__init__).parameters
    given = _listed(settings)
    unknown = [name for name in given if name not in known]
    if unknown:
        warnings.warn(
            f"{stock} of diffusers {diffusers.__version__} does not take {', '.join(map(bare, unknown))}, which its "
            "settings have: left out. Where the network is newer than that, pip install --upgrade diffusers.",
            stacklevel=4,
        )
    return made(**{name: value for name, value in given.items() if name in known})


def _processors(network: nn.Module) -> list[Any]:
    """Of attention, those that know a backend."""
    modules = (module.__dict__.get("processor") for module in network.modules())
    return [processor for processor in modules if "_attention_backend" in dir(type(processor))]


def _draw(layer: nn.Module) -> None:
    """The first values of a layer's own parameters."""
    if callable(reset := getattr(type(layer), "reset_parameters", None)):
        reset(layer)
    else:
        _draw_own(layer)


def _draw_own(layer: nn.Module) -> None:
    for name, parameter in layer._parameters.items():
        if parameter is None:
            continue
        if name.endswith("bias"):
            nn.init.zeros_(parameter)
        elif parameter.ndim < 2:
            nn.init.ones_(parameter)
        else:
            nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
