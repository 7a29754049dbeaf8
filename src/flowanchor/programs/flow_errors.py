"""`eval.py flow_error=true`: what the network still knows of the flow, on held-out data."""

from __future__ import annotations

from typing import Any

from omegaconf import DictConfig
from rich.table import Table

from flowanchor.checkpoints import LoadedModel, load_model
from flowanchor.data.base import FlowDataModule
from flowanchor.errors import ConfigError
from flowanchor.jumps.guidance import Guidance
from flowanchor.metrics.flow_error import TIMES, Probe, Teacher, teacher_network
from flowanchor.programs.checks import choose_dtype


def check_flow_error(cfg: DictConfig) -> None:
    """Raise `ConfigError` for a teacher that nothing asks."""
    if cfg.flow_teacher is not None and not cfg.flow_error:
        raise ConfigError("flow_teacher= is the network that flow_error=true compares with: add flow_error=true.")


def measure_flow(cfg: DictConfig, model: LoadedModel, data: FlowDataModule, device: str) -> dict[str, Any]:
    """`teacher`, `samples` and a line per time (`flowanchor.metrics.flow_error.FlowError`), of `num_samples` held-out
    samples at most, with the noise of `seed`."""
    loader = data.val_dataloader()
    if not len(loader):
        raise ConfigError("flow_error=true needs held-out samples, and this data has none: raise data.heldout.")
    probe = Probe.of(loader, cfg.num_samples, cfg.seed)
    teacher: Teacher | None = None
    if cfg.flow_teacher is not None:
        taught = load_model(cfg.flow_teacher, None, device, choose_dtype(cfg.dtype))
        asked = taught.interval if taught.kind == "shortcut" else None
        teacher = teacher_network(taught.backbone, asked, guidance_of(model))
    lines = probe.measure(model.backbone, model.interval, TIMES, teacher)
    samples = sum(len(batch.x1) for batch in probe.batches)
    return {"teacher": cfg.flow_teacher, "samples": samples, "lines": [line.as_dict() for line in lines]}


def guidance_of(model: LoadedModel) -> Guidance:
    """That of the run's teacher; none where it had none."""
    settings = model.config.get("teacher")
    known = settings if isinstance(settings, dict) else {}
    found = [known.get(f"guidance_{name}", default) for name, default in (("scale", 1), ("low", 0), ("high", 1))]
    scale, low, high = (float(value) for value in found)
    return Guidance(scale, low, high)


def flow_table(found: dict[str, Any]) -> Table:
    """A row per time."""
    table = Table(title=f"velocities of the flow branch, {found['samples']} held-out samples")
    names = {"t": "t", "error": "from the data's", "from_teacher": "from the teacher's", "cosine": "cosine with it"}
    shown = [name for name in names if any(line[name] is not None for line in found["lines"])]
    for name in shown:
        table.add_column(names[name], justify="right")
    for line in found["lines"]:
        table.add_row(*(f"{line[name]:.4g}" for name in shown))
    return table
