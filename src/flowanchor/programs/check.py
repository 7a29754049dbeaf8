"""`flowanchor check`: what this machine has, and what a training would need, before any of it is started."""

from __future__ import annotations

import os
import platform
import re
import shutil
import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from importlib.metadata import PackageNotFoundError, requires, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import torch
import yaml
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from flowanchor.base.plugins import own_conf
from flowanchor.base.typed import instantiate
from flowanchor.base.version import VERSION
from flowanchor.checkpoints.find import find_checkpoint
from flowanchor.conditioning import Text
from flowanchor.deferred import defer_loading, parameters_on_meta
from flowanchor.errors import FlowAnchorError
from flowanchor.interfaces import Backbone, Batch, Objective, VelocityField
from flowanchor.jvp.attention.operator import Opaque
from flowanchor.jvp.chain import Chain
from flowanchor.jvp.compatibility import is_low
from flowanchor.jvp.memory_plan import StepOfShapes
from flowanchor.optimizer_settings import kept_bytes
from flowanchor.programs.composing import compose
from flowanchor.programs.launch import LIBRARY_WARNINGS
from flowanchor.recompute import FORMS, HostMemory

GB = 1e9
WEIGHTS = ("*.safetensors", "*.pt", "*.pth", "*.ckpt")
PATHS = ("teacher.checkpoint", "initialise_from", "base_lora", "codec.weights", "text_encoder.weights", "data.root")


def main(words: Sequence[str] | None = None) -> None:
    """`check` tells about the machine, `check train KEY=VALUE ...` about a training on it."""
    words = sys.argv[1:] if words is None else list(words)
    for message in LIBRARY_WARNINGS:
        warnings.filterwarnings("ignore", message=message)
    try:
        for line in machine() if not words else needs(words[1:]):
            print(line, flush=True)
    except FlowAnchorError as error:
        print(f"Error: {error}", file=sys.stderr)
        sys.exit(1)


# -------------------------------------------------------------------------------------------------------- the machine


def machine() -> Iterator[str]:
    """PyTorch, devices, kernels, extras, codecs, text encoders, weights that lie around."""
    yield f"flowanchor {VERSION}, Python {platform.python_version()}, {platform.system()} {platform.machine()}"
    yield f"torch {torch.__version__}, CUDA {torch.version.cuda or 'not in this build'}"
    yield ""
    yield "Devices"
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count()
    yield f"  cpu: {cores} cores, half of the memory for a run: {HostMemory().room(0) / GB:.1f} GB"
    if not torch.cuda.is_available():
        yield "  cuda: none that PyTorch can use"
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        capability = ".".join(map(str, torch.cuda.get_device_capability(index)))
        name = torch.cuda.get_device_name(index)
        yield f"  cuda:{index}: {name} ({capability}), {free / GB:.1f} of {total / GB:.1f} GB free"
    yield ""
    yield "Kernels"
    fused = torch.cuda.is_available() and find_spec("triton") is not None
    kernel = "the fused Triton kernel" if fused else "plain PyTorch (the kernel needs CUDA and triton)"
    yield f"  jvp/attention=auto: {kernel}"
    compiler = next((name for name in ("c++", "g++", "clang++") if shutil.which(name)), None)
    built = f"{compiler} is here" if compiler else "no C++ compiler is here, which it needs on a CPU"
    yield f"  compile=true: {built}"
    yield ""
    yield "Extras"
    for extra, missing in extras().items():
        yield f"  {extra}: " + (
            "installed" if not missing else f'pip install "flowanchor[{extra}]" ({", ".join(missing)})'
        )
    for group in ("codec", "text_encoder"):
        yield ""
        yield f"{group}="
        for name, wanted in _weights_wanted(group):
            yield f"  {name}: " + (f"give {group}.weights=PATH" if wanted else "no file to give")
    yield ""
    yield "Weights found"
    found = list(_weights())
    yield from found or ["  none here, in the Hugging Face cache or in PyTorch's"]


def extras() -> dict[str, list[str]]:
    """Each optional extra of the installed package, with the distributions that it lacks."""
    found: dict[str, list[str]] = {}
    try:
        lines = requires("flowanchor") or []
    except PackageNotFoundError:  # a checkout that nobody has installed
        lines = []
    for line in lines:
        match = re.match(r"([\w.-]+)(?:\[[^]]*\])?[^;]*;.*extra == ['\"]([\w-]+)['\"]", line)
        if match is None or match[2] == "dev":
            continue
        missing = found.setdefault(match[2], [])
        if match[1] != "flowanchor" and not _installed(match[1]):
            missing.append(match[1])
    return found


def _installed(name: str) -> bool:
    try:
        return bool(version(name))
    except PackageNotFoundError:
        return False


def _weights_wanted(group: str) -> Iterator[tuple[str, bool]]:
    for file in sorted((own_conf() / group).glob("*.yaml")):
        content = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
        yield file.stem, "weights" in content


def _weights() -> Iterator[str]:
    """Runs and files of this folder, and what the caches of other libraries hold."""
    here = Path.cwd()
    for run in sorted({path.parent.parent for path in here.glob("outputs/train/**/checkpoints/last.ckpt")}):
        yield f"  run   {run.relative_to(here)}"
    for file in sorted(path for kind in WEIGHTS for path in here.glob(kind)):
        yield f"  file  {file.name} ({file.stat().st_size / GB:.2f} GB)"
    home = Path(os.environ.get("HF_HOME", Path.home() / ".cache" / "huggingface")) / "hub"
    for folder in sorted(home.glob("models--*")):
        yield f"  hub   {folder.name.removeprefix('models--').replace('--', '/')}"
    for file in sorted(path for kind in WEIGHTS for path in (Path(torch.hub.get_dir()) / "checkpoints").glob(kind)):
        yield f"  torch {file} ({file.stat().st_size / GB:.2f} GB)"


# ------------------------------------------------------------------------------------------------------- a training


def needs(overrides: Sequence[str]) -> Iterator[str]:
    """What `flowanchor train OVERRIDES` reads, and what one process of it holds; nothing is trained or written."""
    cfg = compose(*overrides)
    with torch.random.fork_rng(devices=[]), parameters_on_meta():
        student = cast(Backbone, instantiate(cfg.backbone))
    objective = cast(Objective, instantiate(cfg.objective, _convert_="all"))
    objective.check(student)
    trained = sum(p.numel() for p in student.parameters() if p.requires_grad)
    whole = sum(p.numel() for p in student.parameters())
    yield "Network"
    shape = " x ".join(map(str, student.sample_shape))
    size = f"{whole / 1e6:.2f} M parameters, {trained / 1e6:.2f} M trained"
    yield f"  {type(student).__name__}: {size}; samples of {shape}"
    yield f"  conditioned on {student.conditioning.described()}"
    yield ""
    yield "Files"
    yield from _files(cfg)
    yield ""
    yield from _memory(cfg, student, objective)


def _files(cfg: DictConfig) -> Iterator[str]:
    count = 0
    for key in PATHS:
        value = OmegaConf.select(cfg, key, default="")
        if value == "" or OmegaConf.is_config(value):
            continue
        if value is None:
            required = key in ("teacher.checkpoint", "data.root")
            if required or key.endswith(".weights"):
                count += 1
                yield f"  {key}: not given" + ("; add it" if required else ", so no sample grids")
            continue
        count += 1
        yield f"  {key}={value}: {'found' if _is_there(key, str(value)) else 'NOT FOUND'}"
    if not count:
        yield "  none: the data comes with its library"


def _is_there(key: str, value: str) -> bool:
    if key not in ("teacher.checkpoint", "initialise_from", "base_lora"):
        return Path(value).expanduser().exists()
    try:
        return find_checkpoint(value).exists()
    except FlowAnchorError:
        return False


def _memory(cfg: DictConfig, student: Backbone, objective: Objective) -> Iterator[str]:
    """Bytes of one process that is not sharded."""
    velocity, note = _velocity(cfg)
    batch_size, make = int(cfg.data.batch_size), instantiate(cfg.optimizer, _convert_="all")
    parts = {
        "weights": _bytes(student),
        "teacher": _bytes(velocity),
        "gradients": _bytes(student, trained=True),
        "optimizer": kept_bytes(make, (p for p in student.parameters() if p.requires_grad)),
        "averages": _averages(cfg) * 4 * sum(p.numel() for p in student.parameters()),
    }
    device = torch.device("cuda" if torch.cuda.is_available() and cfg.trainer.accelerator != "cpu" else "cpu")
    yield f"Memory of one process, {batch_size} samples, precision {cfg.trainer.precision}, unsharded"
    if note:
        yield f"  ({note})"
    for name, size in parts.items():
        if size:
            yield f"  {name:<10} {_size(size)}"
    kept = sum(parts.values())
    room = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else HostMemory().room(0)
    for label, engine in _engines(cfg, objective):
        try:
            step = _step(cfg, student, objective, velocity, engine, batch_size, device)
        except Exception as error:  # noqa: BLE001 - an objective that reads values has no plan
            yield f"  a step, {label}: cannot be planned ({type(error).__name__}: {error})"
            continue
        fits = "fits" if kept + step <= room else "DOES NOT FIT"
        yield f"  a step, {label}: {_size(step)}, together {_size(kept + step)}: {fits} ({_size(room)} here)"
    yield "Several devices, sharded: docs/memory.md."


def _velocity(cfg: DictConfig) -> tuple[VelocityField, str]:
    """The teacher with its weights left in their file; that of the data where there is no such file."""
    try:
        with defer_loading():
            return instantiate(cfg.teacher), ""
    except Exception as error:  # noqa: BLE001 - Hydra's wrapper around what is not there
        cause = next((link for link in _causes(error) if isinstance(link, FlowAnchorError)), None)
        if cause is None:
            raise
        return instantiate(compose("teacher=none").teacher), f"planned without its teacher: {cause}"


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def _engines(cfg: DictConfig, objective: Objective) -> Iterator[tuple[str, Any]]:
    engine = instantiate(cfg.jvp)
    if objective.kind == "flow":  # it asks for no tangent
        yield "forward and backward", engine
    elif isinstance(engine, Chain):
        for form in FORMS:
            chosen = " (as it is set)" if engine.recompute == form else ""
            yield f"jvp.recompute={str(form).lower()}{chosen}", Chain(form, Opaque(engine.attention))
    else:
        yield f"jvp={type(engine).__name__}", engine


def _step(
    cfg: DictConfig, student: Backbone, objective: Objective, velocity: VelocityField, engine: Any, size: int,
    device: torch.device,
) -> int:  # fmt: skip
    """Bytes that forward and backward hold at most, by running them on shapes."""
    shapes = StepOfShapes(student, objective, velocity)
    batch = Batch(torch.zeros(size, *student.sample_shape), _condition(student, size))
    times = objective.draw(size)
    low = is_low(str(cfg.trainer.precision))
    with torch.autocast(device.type, torch.bfloat16, enabled=low):
        return shapes.peak(engine, batch, torch.zeros_like(batch.x1), times, times.t, 0)


def _condition(student: Backbone, size: int) -> Any:
    """What a batch is conditioned on at most: labels, texts as long as the network reads."""
    conditioning = student.conditioning
    if isinstance(conditioning, Text):
        null = conditioning.null_text
        fields = (
            value.new_zeros(conditioning.longest[name], *value.shape[1:]) if name in conditioning.longest else value
            for name, value in null._asdict().items()
        )
        longest = type(null)(*fields)
        return conditioning.batch([longest] * size)
    return torch.zeros(size, dtype=torch.int64) if conditioning.classes else None


def _averages(cfg: DictConfig) -> int:
    """How many averages of the weights are kept."""
    given = [cfg.ema.get(key) for key in ("sigma_rel", "decay")] if cfg.ema and "_target_" in cfg.ema else []
    return sum(len(value) if OmegaConf.is_list(value) else value is not None for value in given)


def _bytes(network: nn.Module, trained: bool = False) -> int:
    tensors: Iterable[Tensor] = (p for p in network.parameters() if p.requires_grad or not trained)
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _size(count: float) -> str:
    return f"{count / GB:.2f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"


if __name__ == "__main__":
    main()
