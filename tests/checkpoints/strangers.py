"""A tiny checkpoint to spoil, in every form that is opened, and a canary that notices code of a file's choice."""

from __future__ import annotations

import copy
import functools
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

import flowanchor
from flowanchor.checkpoints.consolidated import write_consolidated
from flowanchor.checkpoints.huggingface import write_folder
from flowanchor.checkpoints.sharded import write_sharded
from flowanchor.errors import FlowAnchorError
from flowanchor.generation.opened import OpenedModel
from flowanchor.plugins.backbones.lightningdit import LightningDiT

SIZES = {"input_size": 4, "patch_size": 2, "in_channels": 1, "hidden_size": 16, "depth": 1, "num_heads": 2}
BACKBONE = {"_target_": "flowanchor.plugins.backbones.lightningdit.LightningDiT", **SIZES, "num_classes": 3}
INTERVAL = {"_target_": "flowanchor.plugins.objectives.intervals.expanded.ExpandedInterval"}
CONFIG = {
    "backbone": BACKBONE,
    "objective": {"interval": INTERVAL},
    "sampler": {"_target_": "flowanchor.plugins.samplers.consistency.ConsistencySampler", "steps": 2, "grid": None},
    "codec": {"_target_": "flowanchor.plugins.codecs.identity.Identity"},
    "data": {
        "_target_": "flowanchor.plugins.data.digits.DigitsDataModule", "channels": 1, "size": 8, "num_classes": 10,
        "batch_size": 64, "seed": 0,
    },
}  # fmt: skip


def checkpoint() -> dict[str, Any]:
    """The content of a checkpoint that can be sampled."""
    return copy.deepcopy(_checkpoint())


@functools.cache
def _checkpoint() -> dict[str, Any]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = LightningDiT(**SIZES, num_classes=3)  # type: ignore[arg-type]
        for parameter in network.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
    weights = {name: tensor.detach().clone() for name, tensor in network.state_dict().items()}
    return {
        "state_dict": {f"student.{name}": tensor for name, tensor in weights.items()},
        "ema": {"short": weights},
        "flowanchor": {"format": 1, "kind": "shortcut", "step": 7, "config": copy.deepcopy(CONFIG)},
    }


# ------------------------------------------------------------------------------------------------------------ its forms


def as_file(folder: Path, content: dict[str, Any]) -> Path:
    torch.save(content, folder / "a.ckpt")
    return folder / "a.ckpt"


def as_sharded(folder: Path, content: dict[str, Any]) -> Path:
    write_sharded(folder / "b.ckpt", content)
    return folder / "b.ckpt"


def as_safetensors(folder: Path, content: dict[str, Any]) -> Path:
    write_consolidated(folder / "c.safetensors", content["ema"]["short"], content["flowanchor"], "short")
    return folder / "c.safetensors"


def as_published(folder: Path, content: dict[str, Any]) -> Path:
    write_folder(folder / "d", content["ema"]["short"], content["flowanchor"], "short", "# card\n")
    return folder / "d"


FORMS: dict[str, Callable[[Path, dict[str, Any]], Path]] = {
    "file": as_file, "sharded": as_sharded, "safetensors": as_safetensors, "published": as_published,
}  # fmt: skip


# --------------------------------------------------------------------------------------------------------- opening them


def use(path: Path) -> torch.Tensor:
    """Open a file and draw one image with it."""
    model: OpenedModel = flowanchor.load(path)
    return model.sample(num_samples=1)


def refusal(action: Callable[[], Any]) -> str | None:
    """The sentence with which something is refused, None where it is not; any other error is raised."""
    try:
        action()
    except FlowAnchorError as error:
        sentence = str(error)
        assert sentence and "\n" not in sentence and sentence.isprintable(), repr(sentence)
        assert len(sentence) < 1000 and sentence.endswith("."), sentence
        return sentence
    return None


# --------------------------------------------------------------------------------------------------------------- canary

_ACTIONS = {
    "os.system", "os.mkdir", "os.exec", "os.fork", "os.posix_spawn", "os.spawn", "os.remove", "os.rename", "os.rmdir",
    "os.link", "os.symlink", "os.putenv", "os.kill", "subprocess.Popen", "socket.connect", "socket.getaddrinfo",
    "urllib.Request", "shutil.rmtree", "shutil.move", "webbrowser.open", "ctypes.dlopen", "pty.spawn",
}  # fmt: skip
_armed = False
_noticed: list[str] = []


def _listen(event: str, arguments: tuple[Any, ...]) -> None:
    if not _armed:
        return
    if event in _ACTIONS:
        _noticed.append(f"{event} {arguments!r}"[:200])
    elif event == "open":
        path, mode, flags = arguments
        writes = bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)) if isinstance(flags, int) else False
        if writes or (isinstance(mode, str) and set(mode) & set("wax+")):
            if "__pycache__" not in str(path) and str(path) != os.devnull:
                _noticed.append(f"open {path!r} {mode!r}")


sys.addaudithook(_listen)  # for good: Python has no way to take one off


@contextmanager
def canary(seconds: float = 10.0) -> Iterator[None]:
    """Fails where something is run, written, fetched or imported within it, or where it takes too long."""
    global _armed
    before, began = set(sys.modules), time.perf_counter()
    _noticed.clear()
    bytecode, sys.dont_write_bytecode = sys.dont_write_bytecode, True  # of modules that are imported late
    _armed = True
    try:
        yield
    finally:
        _armed = False
        sys.dont_write_bytecode = bytecode
    assert not _noticed, _noticed
    new = {name for name in set(sys.modules) - before if not name.startswith(_EXPECTED) or name == "flowanchor.setup"}
    assert not new, new
    assert time.perf_counter() - began < seconds


# What opening and sampling imports by itself, the first time.
_EXPECTED = (
    "flowanchor", "torch", "hydra", "omegaconf", "numpy", "diffusers", "transformers", "lightning", "yaml", "antlr4",
    "encodings", "safetensors", "scipy", "sklearn", "joblib", "threadpoolctl", "webdataset",
)  # fmt: skip
