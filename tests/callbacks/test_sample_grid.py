"""Sample grids: what is drawn, with which weights, and that training does not notice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader

from flowanchor.callbacks.sample_grid import SampleGrid
from flowanchor.conditioning import Classes
from flowanchor.ema import EMA
from flowanchor.errors import ConfigError
from flowanchor.interfaces import Backbone, Batch, StageContext
from flowanchor.plugins.codecs.identity import Identity
from flowanchor.plugins.codecs.kl import KLCodec
from flowanchor.plugins.objectives.intervals.plain import PlainInterval
from flowanchor.plugins.samplers.consistency import ConsistencySampler


class Dot(Backbone):
    """Predicts a constant image; the class decides how bright."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList()
        self.sample_shape, self.classes = (1, 6, 6), classes
        if classes:
            self.conditioning = Classes(classes)
        self.level = nn.Parameter(torch.zeros(()))
        self.calls_in_training_mode = 0

    def embed(self, x: Tensor, t: Tensor, cond: Any, r: Tensor | None = None) -> tuple[Tensor, StageContext]:
        return x, StageContext((t,), (cond,))

    def head(self, tokens: Tensor, context: StageContext) -> Tensor:
        t, cond = context.carried[0], context.fixed[0]
        aim = self.level + (0.0 if cond is None else (cond / max(1, self.classes - 1)).view(-1, 1, 1, 1))
        return (aim - tokens) / (1 - t.view(-1, 1, 1, 1)).clamp(min=1e-3)  # jumps to the level, from any time

    def predict(self, x: Tensor, t: Tensor, cond: Any, r: Tensor | None = None) -> Tensor:
        self.calls_in_training_mode += self.training
        return super().predict(x, t, cond, r)


class Module(pl.LightningModule):
    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        self.student = Dot(classes)
        self.objective = nn.Module()
        self.objective.interval = PlainInterval()  # type: ignore[assignment]
        self.draws: list[float] = []

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        self.draws.append(torch.rand(()).item())
        return (self.student.level - 1) ** 2

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.2)

    def train_dataloader(self) -> DataLoader:
        return DataLoader(
            [Batch(torch.zeros(1, 6, 6))], batch_size=1, collate_fn=lambda items: Batch(items[0].x1[None])
        )


def train(folder: Path, *callbacks: pl.Callback, classes: int = 3) -> Module:
    torch.manual_seed(0)
    return train_module(folder, Module(classes), *callbacks)


def train_module(folder: Path, module: Module, *callbacks: pl.Callback) -> Module:
    pl.Trainer(
        max_steps=5, max_epochs=-1, default_root_dir=folder, callbacks=list(callbacks), accelerator="cpu", logger=False,
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
    ).fit(module)  # fmt: skip
    return module


def grid(**options: Any) -> SampleGrid:
    options = {"codec": Identity(), "every_n_steps": 2, "nfe": [1, 2, 4], "per_class": 2, **options}
    return SampleGrid(ConsistencySampler(), **options)


def test_files_and_undisturbed_training(tmp_path: Path) -> None:
    module = train(tmp_path, grid())
    assert sorted(p.name for p in (tmp_path / "samples").iterdir()) == [
        "step_00000002.png", "step_00000004.png", "step_00000005.png",  # the last because training ends there
    ]  # fmt: skip
    plain = train(tmp_path / "plain")
    assert module.draws == plain.draws  # the random stream of training is untouched
    assert torch.equal(module.student.level, plain.student.level)
    assert module.student.training and module.student.calls_in_training_mode == 0
    picture = Image.open(tmp_path / "samples/step_00000005.png")
    assert picture.width > picture.height  # three grids side by side


def test_draws_with_averaged_weights_and_all_classes(tmp_path: Path) -> None:
    seen: dict[int, np.ndarray] = {}

    class Looking(SampleGrid):
        def images(self, *args: Any) -> dict[int, np.ndarray]:
            seen.update(super().images(*args))
            return seen

    ema = EMA(decay=0.9)
    module = train(tmp_path, ema, Looking(ConsistencySampler(), Identity(), every_n_steps=5, nfe=[1, 2], per_class=2))
    average = float(ema.averages(module, ema.default)["level"])
    assert abs(average - module.student.level.item()) > 0.2  # the two can be told apart
    expected = [min(255, round((average + c / 2 + 1) * 127.5)) for c in (0, 0, 1, 1, 2, 2)]
    for nfe in (1, 2):
        assert seen[nfe].shape == (6, 6, 6, 1)
        np.testing.assert_allclose(seen[nfe].mean(axis=(1, 2, 3)), expected, atol=1)


def test_unlabelled_network_and_impossible_budget(tmp_path: Path) -> None:
    sampler = ConsistencySampler(grid=[0.0, 0.5])  # an explicit grid has its own budget
    with pytest.warns(UserWarning, match="nfe=1"):
        callback = SampleGrid(sampler, Identity(), every_n_steps=5, nfe=[1, 2], per_class=2, max_classes=3)
    assert list(callback.samplers) == [2]
    train(tmp_path, callback, classes=0)
    assert (tmp_path / "samples/step_00000005.png").is_file()
    with pytest.raises(ConfigError, match="every_n_steps"):
        SampleGrid(sampler, Identity(), every_n_steps=0)


def test_loggers_get_the_picture(tmp_path: Path) -> None:
    from lightning.pytorch.loggers import TensorBoardLogger
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = TensorBoardLogger(tmp_path, name="tensorboard", version="")
    pl.Trainer(
        max_steps=2, max_epochs=-1, default_root_dir=tmp_path, callbacks=[grid()], accelerator="cpu", logger=logger,
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
    ).fit(Module())  # fmt: skip
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [image.step for image in events.Images("samples")] == [2]


def test_latents_without_their_codec_are_not_drawn(tmp_path: Path) -> None:
    module = Module()
    module.student.sample_shape = (4, 6, 6)
    with pytest.warns(UserWarning, match="samples of 4 x 6 x 6 are no images; choose the codec"):
        train_module(tmp_path, module, grid())
    assert not (tmp_path / "samples").exists()


def test_a_codec_without_weights_draws_nothing(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="add codec.weights=FILE to see samples"):
        callback = grid(codec=KLCodec("vavae", 32, 16))
    train(tmp_path, callback)
    assert not (tmp_path / "samples").exists()
