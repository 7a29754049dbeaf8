"""Small trainings, with the step as it is or replayed by the stand-in, and everything that they leave."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.utils import instantiate
from torch import Tensor
from torch.utils.data import DataLoader

import flowanchor.conf
from flowanchor.ema import EMA
from flowanchor.graphs.stand_in import StandIn
from flowanchor.interfaces import Backbone, Batch, Interval, Objective
from flowanchor.jvp import Chain
from flowanchor.module import FlowModule
from flowanchor.plugins.backbones.dit import DiT
from flowanchor.plugins.backbones.lightningdit import LightningDiT
from flowanchor.plugins.backbones.sit import SiT
from flowanchor.plugins.backbones.wan import Wan
from flowanchor.plugins.backbones.wan_experts import WanExperts
from flowanchor.plugins.teachers.data import DataVelocity
from flowanchor.text.base import Tokens

CONF = str(Path(next(iter(flowanchor.conf.__path__))).resolve())
WAN = {
    "in_channels": 1, "height": 4, "width": 4, "num_attention_heads": 2, "attention_head_dim": 12, "ffn_dim": 16,
    "num_layers": 1, "freq_dim": 8, "text_dim": 6, "text_len": 7,
}  # fmt: skip
DIT = {"input_size": 4, "in_channels": 1, "hidden_size": 16, "depth": 1, "num_heads": 2, "num_classes": 3}
BACKBONES: dict[str, Callable[[str | None], Backbone]] = {
    "lightningdit": lambda end: LightningDiT(4, 2, 1, 16, 1, 2, num_classes=3, end_time=end),
    "sit": lambda end: SiT(**DIT, end_time=end),
    "dit": lambda end: DiT(**DIT, end_time=end),
    "wan": lambda end: Wan.from_preset("nano", **WAN, condition_dropout=0.1, end_time=end),
    "wan_experts": lambda end: WanExperts(boundary=0.5, preset="nano", **WAN, end_time=end),
}


@cache
def _settings(overrides: tuple[str, ...]) -> Any:
    GlobalHydra.instance().clear()
    with initialize_config_dir(CONF, version_base=None):
        return compose("train", overrides=list(overrides)).objective


def objective(*overrides: str) -> Objective:
    """As `train.py` builds it."""
    return instantiate(_settings(overrides), _convert_="all")


def backbone(name: str = "lightningdit", interval: Interval | None = None) -> Backbone:
    """As an interval needs it; away from its first weights, where much of it would do nothing."""
    torch.manual_seed(0)
    told = None if interval is None or not interval.needs_end_time else interval.end_time or "auxiliary"
    network = BACKBONES[name](told)
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return network


def batch_for(network: Backbone, size: int = 4, seed: int = 3, length: int = 5) -> Batch:
    """Random samples; a text network gets texts of `length`."""
    generator = torch.Generator().manual_seed(seed)
    x1 = torch.randn(size, *network.sample_shape, generator=generator)
    if network.conditioning.classes:
        return Batch(x1, torch.arange(size) % network.conditioning.classes)
    return Batch(x1, Tokens(torch.randn(size, length, WAN["text_dim"], generator=generator)))


class Record(pl.Callback):
    """What every batch logged."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        logged = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("train/")}
        self.rows.append({**logged, "returned": float(outputs["loss"])})


def fit(
    folder: Path,
    graphs: bool,
    goal: Sequence[str] = ("objective=facm",),
    network: str = "lightningdit",
    engine: Any = None,
    velocity: Any = None,
    batches: Sequence[Batch] | None = None,
    steps: int = 6,
    guarded: bool = False,
    fused: bool = True,
    module_settings: dict[str, Any] | None = None,
    callbacks: Sequence[pl.Callback] = (),
    checkpoint: Path | None = None,
    goal_object: Objective | None = None,
    on: str = "cpu",
    record: bool = True,
    **trainer_settings: Any,
) -> dict[str, Any]:
    """Train; `steps` optimizer steps on `batches`, again and again. Returns rows, weights, averages, moments."""
    loss = goal_object or objective(*goal)
    student = backbone(network, loss.interval)
    batches = [batch_for(student, seed=seed) for seed in range(4)] if batches is None else batches

    def optimizer(parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.AdamW(parameters, lr=3e-3, weight_decay=0.1, fused=fused)

    module = FlowModule(
        student, loss, velocity or DataVelocity(), engine or Chain(), optimizer,
        **{"cuda_graph": graphs, **(module_settings or {})},
    )  # fmt: skip
    stand_in = StandIn([*student.parameters(), *loss.parameters()], guarded)
    if graphs and on == "cpu":
        module.make_graphs = lambda: stand_in
    seen, averages = Record(), EMA(sigma_rel=0.2)
    trainer = pl.Trainer(
        **{
            "max_steps": steps, "max_epochs": -1, "accelerator": on, "devices": 1, "logger": False,
            "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False,
            "default_root_dir": folder, "num_sanity_val_steps": 0, "inference_mode": False, "gradient_clip_val": 1.0,
            "log_every_n_steps": 2, "use_distributed_sampler": False, **trainer_settings,
            "callbacks": [averages, *([seen] if record else []), *callbacks],
        }
    )  # fmt: skip
    loader = DataLoader(batches, batch_size=None)  # type: ignore[arg-type]
    validation = loader if trainer_settings.get("val_check_interval") else None
    trainer.fit(module, loader, validation, ckpt_path=checkpoint, weights_only=True)
    return {
        "rows": seen.rows,
        "weights": {name: value.clone() for name, value in module.state_dict().items()},
        "averages": {name: value.clone() for name, value in next(iter(averages._shadows.values())).items()},
        "updates": averages.updates,
        "optimizer": trainer.optimizers[0].state_dict(),
        "skipped": module.nonfinite_steps,
        "captured": stand_in.captured,
        "replayed": stand_in.replayed,
        "trainer": trainer,
        "module": module,
    }


def differences(ours: Any, theirs: Any, where: str = "") -> list[str]:
    """Where two runs, or parts of them, are not the same bits."""
    if isinstance(ours, Tensor):
        same = torch.equal(ours, theirs) or bool(((ours == theirs) | (ours.isnan() & theirs.isnan())).all())
        return [] if same else [where]
    if isinstance(ours, dict):
        if ours.keys() != theirs.keys():
            return [f"{where}: {ours.keys() ^ theirs.keys()}"]
        return [found for key in ours for found in differences(ours[key], theirs[key], f"{where}.{key}")]
    if isinstance(ours, list):
        if len(ours) != len(theirs):
            return [f"{where}: {len(ours)} and {len(theirs)}"]
        pairs = enumerate(zip(ours, theirs, strict=True))
        return [found for i, pair in pairs for found in differences(*pair, f"{where}[{i}]")]
    both_nan = isinstance(ours, float) and ours != ours and theirs != theirs
    return [] if ours == theirs or both_nan else [where]


KEPT = ("rows", "weights", "averages", "updates", "optimizer", "skipped")


def assert_equal_runs(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    found = [where for part in KEPT for where in differences(ours[part], theirs[part], part)]
    assert not found, found[:5]
