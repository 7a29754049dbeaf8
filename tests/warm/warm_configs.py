"""Within tests, a process reads and parses each file of the configuration once, however often it composes.

Composing is much of what a small run costs, and a program composes twice. A file that has changed is read again, and
whoever asks for one gets a copy of their own.
"""

from __future__ import annotations

import copy
import dataclasses
import os
from typing import Any

from hydra._internal.core_plugins.importlib_resources_config_source import ImportlibResourcesConfigSource as Source
from hydra.plugins.config_source import ConfigResult

_read = Source._read_config
_known: dict[tuple[Any, ...], ConfigResult] = {}


def _read_once(self: Source, resource: Any) -> ConfigResult:
    if not isinstance(resource, os.PathLike):
        return _read(self, resource)
    found = os.stat(resource)
    key = str(resource), self.path, self.provider, found.st_mtime_ns, found.st_size, found.st_ino
    if key not in _known:
        _known[key] = _read(self, resource)
    return dataclasses.replace(
        _known[key], config=copy.deepcopy(_known[key].config), header=dict(_known[key].header or {})
    )


def read_once() -> None:
    """From now on, in this process."""
    Source._read_config = _read_once
