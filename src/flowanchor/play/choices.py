"""What can be chosen for a model: samplers that it can be asked by, whether it can be guided, names of its classes."""

from __future__ import annotations

from typing import NamedTuple

import torch

from flowanchor.base import trusted
from flowanchor.base.registry import current_name, registered
from flowanchor.conditioning import Text
from flowanchor.errors import ConfigError, FlowAnchorError
from flowanchor.generation.opened import OpenedModel
from flowanchor.generation.samplers import beneath, check_sampler
from flowanchor.interfaces import Sampler

JUMPS, FLOW_STEPS = 8, 100  # steps that the page offers at most


class Choice(NamedTuple):
    """A sampler that a model can be drawn with."""

    target: str  # its class
    kind: str  # "shortcut" or "flow"
    steps: int  # those it begins with
    most: int  # steps that are offered


def choices(model: OpenedModel) -> dict[str, Choice]:
    """Samplers of the package and of installed plugin packages that fit a model, its own first."""
    own = model.config.get("sampler") or {}
    first = current_name(own["_target_"]) if own.get("_target_") else ""
    found: dict[str, Choice] = {}
    for target in sorted(registered("sampler"), key=lambda name: (name != first, name)):
        settings = own if target == first else {"_target_": target}
        try:
            sampler: Sampler = trusted.build(settings, "sampler", model.path)
            check_sampler(sampler, model.kind, model.interval)
        except FlowAnchorError:  # it does not fit this network, or needs settings that only its user knows
            continue
        most = FLOW_STEPS if sampler.kind == "flow" else JUMPS
        usual = 32 if sampler.kind == "flow" else 2
        times = next((len(own[name]) for name in ("times", "grid") if isinstance(own.get(name), list)), None)
        begun = int(times or own.get("steps") or sampler.nfe or usual) if target == first else usual
        found.setdefault(_name(target), Choice(target, sampler.kind, max(1, min(begun, most)), most))
    if not found:
        raise ConfigError(f"{model.path}: no sampler that is installed here can draw with this network.")
    return found


def own_choice(model: OpenedModel) -> str:
    """The one that a model is drawn with unless somebody chooses."""
    return next(iter(choices(model)))


def flow_choice(model: OpenedModel) -> str | None:
    """One that follows the flow in small steps; None where none fits."""
    return next((name for name, choice in choices(model).items() if choice.kind == "flow"), None)


def build(model: OpenedModel, name: str, steps: int | None, guidance: float | None) -> Sampler:
    """The sampler of that name, with the settings of the checkpoint where it is the checkpoint's own.

    Raises `ConfigError` for a name that is not offered, and for what the sampler refuses.
    """
    offered = choices(model)
    if name not in offered:
        raise ConfigError(f"There is no sampler '{name}' for this network: choose one of {', '.join(offered)}.")
    target, own = offered[name].target, model.config.get("sampler") or {}
    mine = bool(own.get("_target_")) and current_name(own["_target_"]) == target
    chosen = {"steps": steps, "guidance_scale": guidance}
    given = {key: value for key, value in chosen.items() if value is not None}
    settings = beneath(own, given) if mine else {"_target_": target}
    sampler: Sampler = trusted.build(settings, "sampler", model.path, given)
    check_sampler(sampler, model.kind, model.interval)
    return sampler


def can_be_guided(model: OpenedModel) -> bool:
    """Whether a network knows what stands for no condition."""
    conditioning = model.backbone.conditioning
    if isinstance(conditioning, Text):
        return True
    try:
        conditioning.null(torch.zeros(1, dtype=torch.long))
    except ConfigError:
        return False
    return True


def class_names(model: OpenedModel) -> list[str]:
    """What a user calls the classes: their names where the checkpoint has them, else their numbers."""
    count = model.backbone.conditioning.classes
    return list(model.class_names) or [str(number) for number in range(count)]


def _name(target: str) -> str:
    """`package.samplers.consistency.ConsistencySampler` is called consistency."""
    return target.rpartition(".")[0].rpartition(".")[2] or target
