"""What a run folder records of its run: the resolved configuration, and where the numbers came from."""

from __future__ import annotations

import json
import platform
import shlex
import subprocess
import sys
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from omegaconf import DictConfig, OmegaConf

from flowanchor.errors import ConfigError

CONFIG = "config.yaml"
PROVENANCE = "provenance.json"

# What makes a run this run: continuing it with another of these would mix two experiments in one folder.
IDENTITY = ("backbone", "objective", "data", "teacher")

# Packages that the numbers of a run can depend on.
PACKAGES = (
    "flowanchor",
    "torch",
    "torchvision",
    "lightning",
    "torchmetrics",
    "torch-fidelity",
    "torchdiffeq",
    "hydra-core",
    "omegaconf",
    "numpy",
    "scikit-learn",
    "safetensors",
)


@rank_zero_only
def write_run_record(folder: str | Path, cfg: DictConfig) -> None:
    """Write config.yaml (resolved) and provenance.json into `folder`, on the first process only.

    Raises `ConfigError` if the folder cannot be written.
    """
    folder = Path(folder)
    record = json.dumps(provenance(), indent=2) + "\n"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / CONFIG).write_text(OmegaConf.to_yaml(cfg, resolve=True))
        (folder / PROVENANCE).write_text(record)
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise ConfigError(
            f"The output folder {folder} cannot be written ({reason}): choose another one with hydra.run.dir=FOLDER."
        ) from error


def check_same_run(folder: str | Path, cfg: DictConfig) -> None:
    """Raise `ConfigError` if `folder` holds another run: one with another backbone, objective, data set or teacher."""
    path = Path(folder) / CONFIG
    if not path.is_file():
        return
    try:
        recorded = OmegaConf.to_container(OmegaConf.load(path))
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise ConfigError(
            f"{path} cannot be read as the record of a run: pick another folder with name=NAME, or remove that file."
        ) from error
    ours = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(ours, dict)
    theirs = recorded if isinstance(recorded, dict) else {}
    changed = [key for part in IDENTITY for key in _differences(theirs.get(part), ours.get(part), part)]
    if "data.batch_size" in changed and _joint_batch(theirs) == _joint_batch(ours) is not None:
        changed.remove("data.batch_size")  # per process: the same batch, shared by another number of processes
    if changed:
        listed = ", ".join(changed[:5]) + (f" and {len(changed) - 5} more" if len(changed) > 5 else "")
        raise ConfigError(
            f"The folder {folder} holds a run with other settings ({listed}): pick another name=NAME for this run, "
            "or repeat the settings of that one to resume it."
        )


def _joint_batch(settings: Any) -> int | None:
    """Samples per batch over all processes; None where the settings do not say."""
    try:
        trainer = settings["trainer"]
        return int(settings["data"]["batch_size"]) * int(trainer["devices"]) * int(trainer.get("num_nodes", 1))
    except (KeyError, TypeError, ValueError):  # devices: auto, or a list
        return None


def provenance() -> dict[str, Any]:
    """Git revision and state, package versions, Python, command line and date, as plain values."""
    revision, dirty = git_state(Path(__file__).parent)
    return {
        "git_revision": revision,
        "git_dirty": dirty,
        "packages": {name: _version(name) for name in PACKAGES},
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def git_state(folder: Path) -> tuple[str | None, bool | None]:
    """Revision of the checkout that holds `folder`, and whether it has uncommitted changes; None without a checkout.

    An installed package may lie inside somebody else's repository (a .venv in a project): a folder that git ignores or
    does not track says nothing about this code, so it counts as no checkout.
    """
    tracked = _git(folder, "ls-files", "--error-unmatch", "--", ".")
    revision = _git(folder, "rev-parse", "HEAD") if tracked else None
    if not revision:
        return None, None
    changes = _git(folder, "status", "--porcelain")
    return revision.strip(), bool(changes) if changes is not None else None


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _differences(theirs: Any, ours: Any, key: str) -> list[str]:
    if isinstance(theirs, dict) and isinstance(ours, dict):
        names = dict.fromkeys([*theirs, *ours])
        return [found for name in names for found in _differences(theirs.get(name), ours.get(name), f"{key}.{name}")]
    return [] if theirs == ours else [key]
