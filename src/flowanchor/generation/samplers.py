"""The sampler of a model: the one of its training, or another, checked against what the network has learned."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from omegaconf import OmegaConf

from flowanchor.base.trusted import build
from flowanchor.errors import ConfigError
from flowanchor.interfaces import Backbone, Interval, Sampler

_TIMES = ("times", "grid")  # explicit times of the steps, and their older name


def build_sampler(settings: Any, model: Any) -> Sampler:
    """A sampler from a config group, checked against what the loaded model was trained for.

    A group without `_target_` (`sampler=from_checkpoint`) takes the sampler that the checkpoint was trained with, and
    lays the settings that are not null over it (`beneath`).
    """
    chosen = _given(settings)
    if "_target_" in chosen:  # the user's own choice
        from flowanchor.base.typed import instantiate  # a model is opened and sampled without Hydra

        sampler: Sampler = instantiate(chosen, _convert_="all")
    else:
        own = model.config.get("sampler")
        if not own:
            raise ConfigError(
                f"{model.path} does not say how it is sampled: add for example sampler=flow sampler.steps=20 "
                "sampler.guidance_scale=4."
            )
        sampler = build(beneath(own, chosen), "sampler", model.path, chosen)
    check_sampler(sampler, model.kind, model.interval)
    return sampler


def sampler_settings(settings: Any, model: Any) -> dict[str, Any]:
    """What `build_sampler` builds from, for a record: the checkpoint's settings under those that were chosen."""
    chosen = _given(settings)
    return chosen if "_target_" in chosen else {**beneath(model.config.get("sampler") or {}, chosen), **chosen}


def beneath(own: Any, chosen: Mapping[str, Any]) -> Any:
    """A checkpoint's settings of its sampler that stay where others are chosen.

    Explicit times are those of one number of steps, without a shift: where other times, another number or a shift are
    chosen, they go, or what was chosen would do nothing.
    """
    if not isinstance(own, dict):
        return own
    times = [own[name] for name in _TIMES if isinstance(own.get(name), list)]
    counted = chosen.get("steps") is None or any(len(listed) == chosen["steps"] for listed in times)
    if counted and not {*_TIMES, "timestep_shift"} & set(chosen):
        return own
    return {name: value for name, value in own.items() if name not in _TIMES}


def origin(settings: Any) -> str:
    """Where a sampler's settings come from, in words."""
    chosen = _given(settings)
    if "_target_" in chosen:
        return "as chosen here"
    return f"from the checkpoint, with {', '.join(chosen)} as chosen here" if chosen else "from the checkpoint"


def _given(settings: Any) -> dict[str, Any]:
    typed: Any = OmegaConf.to_container(settings, resolve=True) if OmegaConf.is_config(settings) else dict(settings)
    return {key: value for key, value in typed.items() if value is not None}


def network_calls(sampler: Sampler, backbone: Backbone) -> int | None:
    """Calls of this network per sample: guidance makes two of an evaluation, unless it is an input."""
    return sampler.nfe if backbone.takes_guidance else sampler.network_calls


def check_sampler(sampler: Sampler, kind: str, interval: Interval) -> None:
    """Raise `ConfigError` for a sampler that asks the network what it never learned."""
    if sampler.needs_end and not interval.tells_end:
        raise ConfigError(
            f"sampler=meanflow asks for averages between any two times, and {type(interval).__name__} cannot tell the "
            "network where they end: use sampler=consistency, or train with objective/interval=auxiliary."
        )
    if sampler.needs_anchor and not interval.separates:
        raise ConfigError(
            f"sampler=jump_flow also asks for instantaneous velocities, and {type(interval).__name__} tells the "
            "network the same as for a jump: use sampler=consistency, or train with objective/interval=expanded."
        )
    if sampler.kind == "shortcut" and kind == "flow":
        raise ConfigError(
            "This network was trained as a flow model and has no shortcut to jump along: use sampler=flow, "
            "or distil it first with objective=facm teacher=checkpoint teacher.checkpoint=PATH."
        )
