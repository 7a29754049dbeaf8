"""How a stock pipeline of diffusers takes a few-step LoRA: the names it reads, the grid it walks, lines of a card."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import diffusers
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers import loaders as stock_loaders
from peft.tuners.lora import LoraLayer
from torch import Tensor

from flowanchor.base.rank_zero import rank_zero_warn
from flowanchor.base.trusted import build
from flowanchor.checkpoints.format import DescribedWeights
from flowanchor.errors import CheckpointError
from flowanchor.generation.samplers import check_sampler
from flowanchor.interfaces import Backbone, Interval, Sampler
from flowanchor.plugins.backbones.diffusers.network import DiffusersTransformer
from flowanchor.plugins.backbones.diffusers.pipelines import Pipeline
from flowanchor.plugins.backbones.wan import Wan
from flowanchor.plugins.samplers.consistency import ConsistencySampler

LOADED = "transformer."  # before every name that a loader has read

_CARD = """\
---
library_name: diffusers
{front}tags:
- lora
---
# A LoRA for {steps}

Distilled by flowanchor from {base}. {told} Licence: {licence}.

```python
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, {pipeline}

pipe = {pipeline}.from_pretrained("{base}", torch_dtype=torch.bfloat16)
{loads}pipe.scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained("path/of/this/folder/scheduler")
image = pipe("a red fox in the snow", {arguments})
```

{more}
"""


@dataclass(frozen=True)
class Exported:
    """A network with adapters, as its stock pipeline knows it.

    Args:
        stock: its class in diffusers.
        settings: the arguments of that.
        asked: the argument of the pipeline by which it is called once per step, as it was in training.
    """

    stock: str
    settings: Mapping[str, Any]
    pipeline: Pipeline
    asked: str

    @classmethod
    def of(cls, backbone: Backbone, file: object) -> Exported:
        """Raises `CheckpointError` for a network without adapters, and for one whose pipeline reads no LoRA files."""
        if not isinstance(backbone, (DiffusersTransformer, Wan)):
            raise CheckpointError(
                f"{file} holds a {type(backbone).__name__}, and format=lora writes adapters of a backbone=diffusers or "
                "wan: use format=huggingface."
            )
        if not backbone.borrowed():
            raise CheckpointError(
                f"{file} has no adapters (backbone.lora.rank): write its weights by format=transformer or "
                "format=huggingface."
            )
        if isinstance(backbone, Wan):
            return cls("WanTransformer3DModel", backbone.settings, backbone.pipeline, backbone.pipeline.unguided)
        known, config = backbone.description, backbone.network.config
        if known.pipeline is None:
            raise CheckpointError(
                f"{file} holds adapters of a {known.stock}, whose pipeline reads no LoRA files in diffusers "
                f"{diffusers.__version__}: write the whole network, merged, by format=transformer."
            )
        pipeline = known.drawn_by(config)
        assert pipeline is not None
        return cls(known.stock, config, pipeline, known.asked(config))

    def network(self) -> Any:
        """A plain stock network without values."""
        made: Any = getattr(diffusers, self.stock)
        with torch.device("meta"):
            known = inspect.signature(made.__init__).parameters
            return made(**{name: value for name, value in self.settings.items() if name in known})

    def card(self, about: Mapping[str, Any], grid: Grid | None, file: str) -> str:
        """README.md of the folder."""
        base = about["base_model"] or "path/of/the/base"
        loads = 'pipe.load_lora_weights("path/of/this/folder")\n'
        arguments, more, steps = self.asked, "", "ordinary sampling"
        if grid is not None:
            arguments, more = f"{grid.arguments(self.pipeline)}, {self.asked}", grid.warning(self.pipeline)
            steps = f"{len(grid.levels)} step{'s' * (len(grid.levels) > 1)}"
        told = f"`{file}` has rank {about['rank']}, its scale is in its weights."
        if about["base_lora"]:
            scale = about["base_lora_scale"]
            told += f" The base has `{about['base_lora']}` merged into it, {scale:g} times: load both."
            loads = (
                f'pipe.load_lora_weights("path/of/{about["base_lora"]}", adapter_name="base")\n'
                'pipe.load_lora_weights("path/of/this/folder", adapter_name="steps")\n'
                f'pipe.set_adapters(["base", "steps"], [{scale:g}, 1.0])\n'
            )
        card = _CARD.format(
            front="" if not about["base_model"] else f"base_model: {base}\n", steps=steps, base=base, told=told,
            loads=loads, licence=about["licence"], pipeline=self.pipeline.name, arguments=arguments, more=more,
        )  # fmt: skip
        if grid is not None:
            return card
        return "".join(line for line in card.splitlines(keepends=True) if "cheduler" not in line)


@dataclass(frozen=True)
class Grid:
    """The noise levels of a few jumps to the data.

    Args:
        levels: 1 - t of each step, falling from 1.
        shift: of uniform levels, as diffusers has it; None: named one by one.
        uniform: whether the pipeline makes uniform levels itself.
    """

    levels: tuple[float, ...]
    shift: float | None
    uniform: bool

    @property
    def named(self) -> bool:
        """Whether a call of the pipeline must name the levels."""
        if self.uniform:
            return self.shift is None
        return len(self.levels) > 2 and self.shift != 1

    def scheduler(self) -> Any:
        """Jump to the data, return with fresh noise: what the network was trained for."""
        settings: dict[str, Any] = {"shift": 1.0}
        if self.uniform and self.shift is not None:
            settings["shift"] = self.shift
        elif not self.uniform and len(self.levels) > 1:
            settings["shift_terminal"] = self.levels[-1]
        return FlowMatchEulerDiscreteScheduler(stochastic_sampling=True, **settings)

    def told(self) -> dict[str, Any]:
        """For the metadata."""
        return {"steps": len(self.levels), "sigmas": list(self.levels), "shift": self.shift, "sampler": "consistency"}

    def arguments(self, pipeline: Pipeline) -> str:
        """By which the pipeline walks this grid."""
        return f"sigmas={list(self.levels)}" if self.named else f"num_inference_steps={len(self.levels)}"

    def warning(self, pipeline: Pipeline) -> str:
        """What goes wrong otherwise."""
        lines = ["Guidance is part of the weights: a higher scale over-saturates, and costs a second call per step."]
        if self.uniform and not self.named:
            lines.append(
                "The scheduler shifts what it is given: pass no `sigmas=`. Other numbers of steps work as well."
            )
        elif not self.uniform:
            lines.append(
                "The pipeline's own scheduler ends its grid beside zero, where the last step does nothing; this one is "
                f"for {len(self.levels)} step{'s' * (len(self.levels) > 1)}: for other numbers write another "
                "(`steps=` of convert.py)."
            )
        lines.append(
            "The noise between steps is drawn by the global generator: `torch.manual_seed` before each call repeats it."
        )
        return "\n".join(lines)


def grid_of(given: DescribedWeights, exported: Exported, steps: int | None) -> Grid | None:
    """The grid of the run's sampler; None for adapters that are no shortcut, which any scheduler may sample.

    Raises `CheckpointError` where no stock pipeline walks it.
    """
    if given.meta["kind"] != "shortcut":
        return None
    settings = given.meta["config"].get("sampler")
    own = cast(Sampler, build(settings, "sampler", given.file)) if settings else ConsistencySampler()
    interval = build(given.meta["config"]["objective"]["interval"], "objective.interval", given.file)
    check_sampler(own, given.meta["kind"], cast(Interval, interval))
    plain = isinstance(own, ConsistencySampler) and not (own.boundaries or own.kept_noise or own.kept_noise_h)
    if not plain:
        rank_zero_warn(
            f"{given.file} is sampled by {own.told()}, which no stock scheduler does: the one beside the LoRA jumps to "
            "the data and returns with fresh noise."
        )
    sampler = own if isinstance(own, ConsistencySampler) and not own.boundaries else ConsistencySampler(own.nfe)
    sampler = sampler if steps is None else sampler.with_nfe(steps)
    if sampler.guidance.scale != 1:
        raise CheckpointError(
            f"{given.file} is sampled with guidance (sampler.guidance_scale={sampler.guidance.scale:g}), and a "
            "few-step LoRA is called once per step: train it with a guided teacher and sampler.guidance_scale=1."
        )
    levels = tuple(1 - float(t) for t in sampler.times[:-1])
    shift = None if sampler.grid is not None else (1 / sampler.timestep_shift if sampler.timestep_shift else 1.0)
    grid = Grid(levels, shift, exported.pipeline.uniform)
    if levels[0] != 1 or (grid.named and not exported.pipeline.takes_levels):
        raise CheckpointError(
            f"{given.file} is sampled at the noise levels {', '.join(f'{one:.4g}' for one in levels)}, and "
            f"{exported.pipeline.name} cannot be told them: write it for one or two steps (steps=2), train with "
            "sampler.timestep_shift=0, or write the whole network by format=diffusers."
        )
    return grid


def checked_by_stock(tensors: Mapping[str, Tensor], exported: Exported, file: object) -> None:
    """Raise `CheckpointError` unless the stock loader puts all of these adapters where they belong, scale 1."""
    loader: Any = getattr(stock_loaders, exported.pipeline.loader)
    stock = exported.network()
    takes = inspect.signature(loader.load_lora_into_transformer).parameters
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # nothing is copied into a network without values
            found, *rest = loader.lora_state_dict(dict(tensors), return_lora_metadata=True)
            more = {"metadata": rest[-1], "network_alphas": rest[0] if len(rest) > 1 else None}
            loader.load_lora_into_transformer(
                found, transformer=stock, **{name: value for name, value in more.items() if name in takes}
            )
    except Exception as error:  # loaders raise whatever meets a name that they do not know
        raise CheckpointError(
            f"{file}: {exported.pipeline.name} of diffusers {diffusers.__version__} would not load these adapters "
            f"({type(error).__name__}: {error}), so no LoRA file is written: use format=transformer."
        ) from error
    layers = {name: layer for name, layer in stock.named_modules() if isinstance(layer, LoraLayer)}
    scales = {scale for layer in layers.values() for scale in layer.scaling.values()}
    read = {
        f"{exported.pipeline.exported(name)}.lora_{part}.weight": found.get(f"{LOADED}{name}.lora_{part}.weight")
        for name in layers
        for part in "AB"
    }
    lost = sorted(
        name for name, value in tensors.items() if (there := read.get(name)) is None or not torch.equal(there, value)
    )
    if lost or len(read) != len(tensors) or scales != {1.0}:
        raise CheckpointError(
            f"{file}: {exported.pipeline.name} of diffusers {diffusers.__version__} would not load these adapters as "
            f"they are ({len(lost)} of {len(tensors)} lost{', such as ' + lost[0] if lost else ''}; scales "
            f"{sorted(scales)}), so no LoRA file is written: use format=transformer."
        )
