"""Where a run lands: the command line alone names its folder, so that the same command finds it again and resumes.

conf/hydra/default.yaml uses these resolvers:

- `${flowanchor.run_name:NAME,OVERRIDES}` is NAME where the user gave one (`name=...`), else a readable slug of the
  overrides plus eight digits of their hash;
- `${flowanchor.digest:OVERRIDES}` is the hash alone, for the folder of a sweep.

Neither depends on the order of the overrides or needs quoting in a shell or in Hydra.

conf/backbone/ uses `${flowanchor.described:PATH,KEY}`: a setting of the network whose weights lie at PATH.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf, read_write

from flowanchor.base.paths import folder_name

UNNAMED = "default"  # the folder of a run without overrides
MAX_SLUG = 60  # characters; the hash keeps longer ones apart

# Settings that do not change what is computed: they keep the folder.
_NEUTRAL = {"debug", "name"}


def digest(overrides: Iterable[str]) -> str:
    """Eight hexadecimal digits of the overrides, whatever their order."""
    relevant = sorted(str(line) for line in overrides if _key(str(line)) not in _NEUTRAL)
    return hashlib.sha256("\n".join(relevant).encode()).hexdigest()[:8]


def run_name(name: str | None, overrides: Iterable[str]) -> str:
    """Folder name of one run: the user's name, or for example `objective-facm_seed-1_0fb1c2d3`."""
    if name is not None:
        return "/".join(folder_name(part) for part in str(name).split("/") if part.strip("."))
    lines = sorted(str(line) for line in overrides if _key(str(line)) not in _NEUTRAL)
    if not lines:
        return UNNAMED
    return f"{_slug(lines)}_{digest(lines)}"


def swept_name(swept: str, overrides: Iterable[str]) -> str:
    """Folder name of one job of a sweep: what the sweep varies and nothing else, for example `seed-1_depth-4`."""
    keys = swept.split(";")
    lines = [str(line) for line in overrides if _key(str(line)) in keys]
    return _slug(sorted(lines, key=lambda line: keys.index(_key(line)))) or UNNAMED


def first_given(*values: Any) -> Any:
    """The first value that is not null."""
    return next((value for value in values if value is not None), None)


def described(path: Any, key: str) -> Any:
    """A setting of the network in a checkpoint, or in a folder that a format opens in place; null for none."""
    if path is None:
        return None
    from flowanchor.checkpoints.description import described_network  # with PyTorch, which `--help` does without
    from flowanchor.checkpoints.find import find_checkpoint
    from flowanchor.checkpoints.read import read_checkpoint

    file = find_checkpoint(path)
    network, _ = described_network(read_checkpoint(file)["flowanchor"]["config"], file)
    return network.get(key)


def register_resolvers() -> None:
    """Make both names known to OmegaConf; calling it again changes nothing."""
    OmegaConf.register_new_resolver("flowanchor.described", described, replace=True)
    OmegaConf.register_new_resolver("flowanchor.digest", digest, replace=True)
    OmegaConf.register_new_resolver("flowanchor.run_name", run_name, replace=True)
    OmegaConf.register_new_resolver("flowanchor.swept_name", swept_name, replace=True)
    OmegaConf.register_new_resolver("flowanchor.first_given", first_given, replace=True)


class OneSweepFolder(Callback):
    """Settles the folder of a sweep before its jobs start.

    Each job is composed anew, from its own overrides, wherever its launcher runs it: left to itself, it would find a
    folder of its own for the whole sweep.
    """

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        overrides = config.hydra.overrides.hydra
        own = {_key(line) for line in overrides}
        with read_write(overrides):
            if "hydra.sweep.dir" not in own:
                overrides.append(f"hydra.sweep.dir='{config.hydra.sweep.dir}'")
            if "hydra.sweep.subdir" not in own:
                swept = ";".join(self._swept(config))
                name = f"${{flowanchor.swept_name:'{swept}',${{hydra.overrides.task}}}}"
                overrides.append(f'hydra.sweep.subdir="${{hydra.job.num}}_{name}"')

    @staticmethod
    def _swept(config: DictConfig) -> list[str]:
        """Keys with several values on the command line, and those that a sweeper searches."""
        lines = [str(line) for line in config.hydra.overrides.task]
        parsed = OverridesParser.create().parse_overrides(lines)
        typed = [_key(line) for line, override in zip(lines, parsed, strict=True) if override.is_sweep_override()]
        searched = config.hydra.sweeper.get("params") or {}
        return [*typed, *(str(key) for key in searched if str(key) not in typed)]


def _key(override: str) -> str:
    return override.split("=", 1)[0].lstrip("+~")


def _slug(lines: list[str]) -> str:
    parts = []
    for line in lines:
        key, _, value = line.lstrip("+~").partition("=")
        short = re.split(r"[./@]", key)[-1]  # backbone.depth=4 reads "depth-4"
        parts.append(re.sub(r"[^\w.]+", "-", f"{short}-{value}").strip("-."))
    return "_".join(parts)[:MAX_SLUG].rstrip("-._")
