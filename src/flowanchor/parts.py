"""A training put together in Python, and what its checkpoints say about themselves so that they open alone."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, cast

import yaml
from torch import nn

from flowanchor.base.plain import plain
from flowanchor.base.plugins import own_conf
from flowanchor.errors import ConfigError, FlowAnchorError
from flowanchor.interfaces import Backbone, Interval, Objective
from flowanchor.plain_network import PlainNetwork

Described = str | Mapping[str, Any] | Callable[..., Any]


def build_network(
    network: Callable[..., Any] | nn.Module, sample_shape: Sequence[int] | None, classes: int
) -> tuple[Backbone, dict[str, Any]]:
    """The network, and how a checkpoint describes it.

    Raises `ConfigError` for a backbone that is built already: nothing says what it was built with.
    """
    if isinstance(network, Backbone) and not isinstance(network, PlainNetwork):
        name = type(network).__name__
        raise ConfigError(
            f"Give the class with its arguments, not a network: network=partial({name}, ...), so that its checkpoints "
            "say what they need to be opened."
        )
    made = network if isinstance(network, nn.Module) else network()
    if isinstance(made, PlainNetwork):
        return made, {"_target_": _name(type(made.network))}
    if isinstance(made, Backbone):
        return made, described(network, "network")
    if not isinstance(made, nn.Module):
        raise ConfigError(f"network= gives {made!r}, which is no torch.nn.Module.")
    if sample_shape is None:
        raise ConfigError(
            f"{type(made).__name__} does not say what it draws: add sample_shape=(channels, height, width)."
        )
    return PlainNetwork(made, sample_shape, classes), {"_target_": _name(type(made))}


def configuration(
    network: dict[str, Any], objective: Objective, sampler: Described | None, codec: Described
) -> dict[str, Any]:
    """What a checkpoint keeps of a training: network, interval, sampler, codec.

    `sampler`: None: `consistency` for what has learned a shortcut, `flow` for the others.
    """
    drawn = sampler or ("consistency" if objective.kind == "shortcut" else "flow")
    return {
        "backbone": network,
        "objective": {"interval": _interval(objective.interval)},
        "sampler": described(drawn, "sampler"),
        "codec": described(codec, "codec"),
    }


def described(given: Described, group: str) -> dict[str, Any]:
    """`{_target_: ..., argument: ...}` of an option's name, a mapping, a class or a `functools.partial` of one.

    Raises `ConfigError` for what is none of these, and for arguments that are no plain values.
    """
    if isinstance(given, str):
        return _option(group, given)
    if isinstance(given, Mapping):
        return dict(given)
    function, arguments = given, {}
    if isinstance(given, partial):
        function = given.func
        arguments = dict(inspect.signature(function).bind_partial(*given.args, **given.keywords).arguments)
    if not callable(function) or not hasattr(function, "__qualname__"):
        raise ConfigError(f"{group}={given!r}: give the name of an option, a class, or partial(CLASS, argument=...).")
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            arguments.update(arguments.pop(name, {}))
    try:
        values = plain(_listed(arguments), f"{group}=", ConfigError)
    except FlowAnchorError as error:
        raise ConfigError(f"A checkpoint cannot keep what {group} is made with: {error}") from error
    return {"_target_": _name(function), **cast(dict[str, Any], values)}


def _interval(interval: Interval) -> dict[str, Any]:
    return {"_target_": _name(type(interval)), **_listed(vars(interval))}


def _option(group: str, name: str) -> dict[str, Any]:
    file = own_conf() / group / f"{name}.yaml"
    if not file.is_file():
        known = sorted(other.stem for other in file.parent.glob("*.yaml"))
        raise ConfigError(f"Unknown option '{name}' for {group}: choose one of {', '.join(known)}.")
    return cast(dict[str, Any], yaml.safe_load(file.read_text(encoding="utf-8")))


def _name(function: Any) -> str:
    return f"{function.__module__}.{function.__qualname__}"


def _listed(value: Any) -> Any:
    """Tuples as lists, as a checkpoint keeps them."""
    if isinstance(value, Mapping):
        return {key: _listed(inner) for key, inner in value.items()}
    return [_listed(inner) for inner in value] if isinstance(value, (list, tuple)) else value
