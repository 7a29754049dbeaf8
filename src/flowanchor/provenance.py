"""What a run folder records of its run: the resolved configuration, and where the numbers came from.

`config.yaml` and `provenance.json` belong to the training, and are written when its first step is about to be made. A
resume keeps what is known of the earlier parts: it is added to `provenance.json` under `resumed`, with what it changed.
Programs that only use a run write `<program>.config.yaml` and `<program>.provenance.json`, wherever they land.
"""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import yaml
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from flowanchor.base.files import read_note, write_json, write_whole
from flowanchor.base.moved import current_name
from flowanchor.base.rank_zero import rank_zero_only
from flowanchor.errors import ConfigError

CONFIG = "config.yaml"
PROVENANCE = "provenance.json"
RESUMED = "resumed"  # the entry of the later parts
HYDRA = ".hydra"  # as Hydra itself would write it before anything is known

# What makes a run this run: continuing it with another of these would mix two experiments in one folder.
IDENTITY = ("backbone", "objective", "data", "teacher", "optimizer._target_", "base_lora_scale")
# Part of them, and yet free: a run that was stopped by bad samples goes on with a higher limit, and how a teacher is
# kept follows the trainer's precision.
FREE = ("data.max_bad", "teacher.dtype", "teacher.precision")

# Settings that came later, with what a run without them was trained with.
_LATER = {
    "objective.shortcut.weight_reduction": "mean",
    "objective.weight.reduction": "mean",
    "objective.shortcut.norm": "rms",
    "objective.interval.told": "end",
    "backbone.end_time_gate": 0.25,
    "backbone.guidance_cond": False,
    "backbone.time_scale": 1.0,
    "objective.shortcut.warmup": "tangent",
    "backbone.predicts": "v",
    "backbone.tangent_smoothing": 0.0,
    "base_lora_scale": 1.0,
    "base_dtype": "float32",
    "backbone.lora": {"rank": None, "alpha": None, "targets": None},
    "sampler.timestep_shift": 0.0,
    "sampler.final_euler": False,
}

# Settings that change nothing that is computed.
_NEUTRAL = ("name", "debug")

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
def write_run_record(folder: str | Path, cfg: DictConfig, step: int = 0, **more: Any) -> None:
    """Record in `folder`, on the first process only, that a training goes on from `step` with the settings of `cfg`.

    `more`: what else is recorded of this part. Raises `ConfigError` if the folder cannot be written.
    """
    folder = Path(folder)
    parts = [
        part for part in read_parts(folder) if part.get("step", 0) < step
    ]  # later ones were lost, or are made anew
    first, *later = [*parts, {**provenance(), "step": step, **more}]
    record = {key: value for key, value in first.items() if key != RESUMED}
    with _writing(folder):
        write_whole(folder / CONFIG, OmegaConf.to_yaml(cfg, resolve=True))
        write_json(folder / PROVENANCE, {**record, RESUMED: later} if later else record)
        if HydraConfig.initialized():
            own = HydraConfig.instance().cfg
            contents = {"config": cfg, "hydra": own, "overrides": HydraConfig.get().overrides.task}
            for name, content in contents.items():
                write_whole(folder / HYDRA / f"{name}.yaml", OmegaConf.to_yaml(content))


@rank_zero_only
def write_program_record(folder: str | Path, program: str, cfg: DictConfig, **more: Any) -> None:
    """Record what a program did in `folder` that trains nothing, under its own name; else as `write_run_record`."""
    folder = Path(folder)
    with _writing(folder):
        write_whole(folder / f"{program}.{CONFIG}", OmegaConf.to_yaml(cfg, resolve=True))
        write_json(folder / f"{program}.{PROVENANCE}", {**provenance(), **more})


def read_parts(folder: str | Path) -> list[dict[str, Any]]:
    """What is recorded of the parts of a run, the first one first; an empty list without a readable record."""
    found = read_note(Path(folder) / PROVENANCE)
    if found is None:
        return []
    later = found.get(RESUMED)
    return [found, *(part for part in (later if isinstance(later, list) else []) if isinstance(part, dict))]


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        raise unwritable(folder, error) from error


def unwritable(folder: Path, error: OSError) -> ConfigError:
    """What to tell where a run folder cannot be written."""
    reason = (error.strerror or str(error)).lower()
    return ConfigError(
        f"The output folder {folder} cannot be written ({reason}): choose another one with hydra.run.dir=FOLDER."
    )


def check_same_run(
    folder: str | Path, cfg: DictConfig, theirs: Mapping[str, Any] | None = None, known: Collection[str] = ()
) -> None:
    """Raise `ConfigError` if `folder` holds another run: one with another backbone, objective, data set or teacher.

    Args:
        theirs: the settings of that run, as its checkpoint says; None: as its config.yaml does.
        known: settings that are compared elsewhere, by more than their text.
    """
    theirs = _recorded(Path(folder)) if theirs is None else theirs
    if theirs is None:
        return
    ours = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(ours, dict)
    changed = [key for key in differences(theirs, ours) if f"{key}.".startswith(tuple(f"{p}." for p in IDENTITY))]
    changed = [key for key in changed if key not in (*known, *FREE)]
    if "data.batch_size" in changed and _joint_batch(theirs) == _joint_batch(ours) is not None:
        changed.remove("data.batch_size")  # per process: the same batch, shared by another number of processes
    if changed:
        listed = ", ".join(changed[:5]) + (f" and {len(changed) - 5} more" if len(changed) > 5 else "")
        raise ConfigError(
            f"The folder {folder} holds a run with other settings ({listed}): pick another name=NAME for this run, "
            "or repeat the settings of that one to resume it."
        )


def _recorded(folder: Path) -> dict[str, Any] | None:
    path = folder / CONFIG
    if not path.is_file():
        return None
    try:
        recorded = OmegaConf.to_container(OmegaConf.load(path))
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise ConfigError(
            f"{path} cannot be read as the record of a run: pick another folder with name=NAME, or remove that file."
        ) from error
    return {str(key): value for key, value in recorded.items()} if isinstance(recorded, dict) else {}


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
        "overrides": list(HydraConfig.get().overrides.task) if HydraConfig.initialized() else sys.argv[1:],
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


def differences(theirs: Any, ours: Any, key: str = "") -> dict[str, tuple[Any, Any]]:
    """Settings that differ: dotted name -> theirs, ours; None where there is none."""
    if isinstance(theirs, Mapping) and isinstance(ours, Mapping):
        found: dict[str, tuple[Any, Any]] = {}
        for name in dict.fromkeys([*theirs, *ours]):
            if key or name not in _NEUTRAL:
                inner = f"{key}.{name}" if key else str(name)
                found |= differences(theirs.get(name, _LATER.get(inner)), ours.get(name), inner)
        return found
    theirs, ours = (None if value == {} else value for value in (theirs, ours))  # version 0.1 wrote {} for null
    same = theirs == ours or _one_place(theirs, ours) or (key.endswith("_target_") and _one_class(theirs, ours))
    return {} if same else {key: (theirs, ours)}


def _one_class(theirs: Any, ours: Any) -> bool:
    return isinstance(theirs, str) and isinstance(ours, str) and current_name(theirs) == current_name(ours)


def _one_place(theirs: Any, ours: Any) -> bool:
    """Whether two texts are a file or folder of this machine, spelled in two ways (relative, absolute, by a link)."""
    if not (isinstance(theirs, str) and isinstance(ours, str)):
        return False
    try:
        there, here = (os.path.realpath(os.path.expanduser(path)) for path in (theirs, ours))
        return os.path.exists(here) and there == here
    except (OSError, ValueError):
        return False
