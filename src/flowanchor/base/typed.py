"""What a user typed, built: the one place where Hydra instantiates. What a file says goes through `trusted`."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from typing import Any

from hydra.errors import InstantiationException
from hydra.utils import instantiate as hydra_instantiate

from flowanchor.base.causes import chain
from flowanchor.errors import ConfigError, FlowAnchorError


def instantiate(settings: Any, **options: Any) -> Any:
    """`hydra.utils.instantiate`, but for its wrapper around errors: one of ours comes out as it is.

    Raises:
        ConfigError: settings that a class does not have, or lacks; a class that cannot be imported.
        InstantiationException: any other error of a constructor, which is its cause.
    """
    try:
        return hydra_instantiate(settings, **options)
    except InstantiationException as wrapped:
        link = next((link for link in chain(wrapped) if isinstance(link, FlowAnchorError)), None)
        sentence = misfit(wrapped) if link is None else None
        if link is None and sentence is None:
            raise
        cause = wrapped.__cause__
    if link is not None:
        raise link  # outside of the handler, whose exception holds it as its cause
    raise ConfigError(sentence) from cause


def misfit(error: InstantiationException, arguments: Sequence[str] = ()) -> str | None:
    """What the configuration did wrong: unknown or missing settings, targets that cannot be imported; None: nothing.

    `arguments`: of the command line; a setting that stands there is wrong even if it is refused further inside.
    """
    where = re.search(r"full_key: (\S+)", str(error))
    key = where.group(1) if where else None
    target = re.search(r"target '([^']+)'", str(error))
    name = target.group(1) if target else "its target"
    cause = error.__cause__
    if cause is None or str(error).startswith("Error locating target"):
        if target is None:
            return f"{_one_line(str(error)).rstrip('.')}."
        root = list(chain(error))[-1]
        place = f"{key}._target_" if key else "A _target_"
        reason = _one_line(str(root))
        return f"{place} names {name}, which cannot be imported ({reason}): correct the name or install its package."
    if isinstance(cause, TypeError):
        # Raised by the call itself, not inside the constructor: the keywords do not fit.
        direct = cause.__traceback__ is not None and cause.__traceback__.tb_next is None
        short = ".".join(itertools.dropwhile(str.islower, name.split("."))) or name.rsplit(".", 1)[-1]
        unexpected = re.search(r"unexpected keyword argument '([^']+)'", str(cause))
        if unexpected is not None:
            wrong = unexpected.group(1)
            setting = f"{key}.{wrong}" if key else wrong
            if not direct and not any(text.split("=")[0].lstrip("+") == setting for text in arguments):
                return None
            return f"Unknown setting {setting}: {short} has no argument {wrong}; remove it, or see {name}."
        absent = re.search(r"missing \d+ required .*arguments?: (.*)$", str(cause))
        if absent is not None and direct:
            return f"{key or short} lacks {absent.group(1)}, which {short} requires: set it on the command line."
    return None


def _one_line(text: str) -> str:
    return " ".join(text.split())
