"""Pictures of what the student draws while it trains."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
from torch.distributed.tensor import DTensor

from flowanchor.base.rank_zero import rank_zero_warn
from flowanchor.callbacks.attached import callback_of, trained
from flowanchor.conditioning import Text
from flowanchor.data.base import FlowDataModule
from flowanchor.data.lightning import data_of
from flowanchor.ema import EMA
from flowanchor.errors import ConfigError
from flowanchor.generation.generator import Generator
from flowanchor.interfaces import Codec, Sampler
from flowanchor.reporting.grids import join, labelled_grid, save_picture
from flowanchor.request import Request, Texts


class SampleGrid(pl.Callback):
    """Every `every_n_steps`, and at the end, writes `samples/step_00001000.png` into the run folder.

    One grid per number of network evaluations, side by side; a row per class. Noise and labels are the same every time,
    so that two pictures differ by training alone. Drawn with the averaged weights, where there are any.

    Args:
        sampler:       what draws the samples, with its budget replaced by each of `nfe`.
        codec:         maps samples to pixels.
        every_n_steps: optimizer steps between two pictures.
        nfe:           budgets; one that the sampler cannot have is left out.
        per_class:     images per row.
        max_classes:   rows at most: classes, spread, or prompts of the data; an unlabelled network gets as many rows.
        seed, batch_size: of the generation.
    """

    def __init__(
        self,
        sampler: Sampler,
        codec: Codec,
        every_n_steps: int = 500,
        nfe: Sequence[int] = (1, 2, 4),
        per_class: int = 4,
        max_classes: int = 10,
        seed: int = 0,
        batch_size: int = 64,
    ) -> None:
        if every_n_steps < 1 or per_class < 1 or max_classes < 1 or batch_size < 1:
            raise ConfigError(
                "callbacks.sample_grid needs positive every_n_steps, per_class, max_classes and batch_size."
            )
        self.sampler, self.codec, self.every_n_steps = sampler, codec, every_n_steps
        self.per_class, self.max_classes, self.seed, self.batch_size = per_class, max_classes, seed, batch_size
        self.samplers: dict[int, Sampler] = {}
        for budget in nfe:
            if int(budget) < 1:
                raise ConfigError(f"callbacks.sample_grid.nfe has {budget}: use whole numbers from 1, such as [1,2,4].")
            try:
                self.samplers[int(budget)] = sampler.with_nfe(int(budget))
            except ConfigError as error:
                rank_zero_warn(f"No sample grid at nfe={budget}: {error}")
        self._latest = -1
        if not codec.usable:
            rank_zero_warn(
                f"No sample grids: codec={codec.name} was not told its weights; add codec.weights=FILE to see samples."
            )
            self.samplers = {}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        shape: tuple[int, ...] = trained(pl_module).student.sample_shape
        image = shape if len(shape) == 3 else (shape[0], *shape[2:]) if len(shape) == 4 and shape[1] == 1 else ()
        if self.samplers and self.codec.latent_channels is None and (not image or image[0] not in (1, 3)):
            rank_zero_warn(
                f"No sample grids: samples of {' x '.join(map(str, shape))} are no images; choose the codec that they "
                "are latents of (codec=vavae, codec=sd_vae)."
            )
            self.samplers = {}

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step % self.every_n_steps == 0:
            self._draw(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._draw(trainer, pl_module)

    # ---------------------------------------------------------------------------------------------------- drawing

    def _draw(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        step = trainer.global_step
        if step in (0, self._latest) or not self.samplers:
            return
        self._latest = step
        # A sharded network needs all of its ranks to run; any other draws on the first one alone.
        if not (_sharded(pl_module.student) or trainer.is_global_zero):
            return
        request, names = self._request(trainer, pl_module)
        images = self.images(trainer, pl_module, request)
        if not trainer.is_global_zero:
            return
        titles = [f"{nfe} step{'s' if nfe > 1 else ''}" for nfe in images]
        picture = join([labelled_grid(x, columns=self.per_class, row_names=names) for x in images.values()], titles)
        path = Path(trainer.default_root_dir) / "samples" / f"step_{step:08d}.png"
        save_picture(picture, path)
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_image("samples", np.asarray(picture), step, dataformats="HWC")
            elif isinstance(logger, WandbLogger):
                logger.log_image("samples", [picture], step=step)

    def images(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, request: Request
    ) -> dict[int, np.ndarray[Any, Any]]:
        """NFE -> uint8 [N, H, W, C]. Leaves weights, mode and random state as it found them."""
        student, interval = trained(pl_module).student, trained(pl_module).objective.interval
        ema = callback_of(trainer, EMA)
        device = pl_module.device
        training = student.training
        self.codec.to(device)
        drawn = {}
        # Sharded in mixed precision, the parameters are gathered in bfloat16 and need activations to match.
        precision = trainer.precision_plugin.forward_context if _sharded(student) else nullcontext
        with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.no_grad():
            student.eval()
            try:
                with ema.swapped(pl_module) if ema is not None else nullcontext(), precision():
                    for nfe, sampler in self.samplers.items():
                        generator = Generator(student, interval, sampler, self.codec, strict=False)
                        drawn[nfe] = torch.cat(list(generator.draw(request, self.seed, self.batch_size))).numpy()
            finally:
                student.train(training)
                self.codec.to("cpu")  # a large one leaves the device to the training
        return drawn

    def _request(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> tuple[Request, list[str]]:
        """What is drawn, the same every time, and the names of the rows."""
        data, rows, columns = data_of(trainer), self.max_classes, range(self.per_class)
        ours = isinstance(data, FlowDataModule)
        conditioning = trained(pl_module).student.conditioning
        if isinstance(conditioning, Text) and ours:
            known = data.fixed_prompts(rows)
            prompts = [prompt for prompt in known for _ in columns]
            return Texts(conditioning, len(prompts), prompts, known=known), list(known)
        if not conditioning.classes:
            return conditioning.request(rows * self.per_class), []
        rows = min(conditioning.classes, rows)
        shown = [row * conditioning.classes // rows for row in range(rows)]
        names = data.class_names if ours else ()
        request = conditioning.request(rows * self.per_class, [label for label in shown for _ in columns])
        return request, [names[label] if label < len(names) else str(label) for label in shown]


def _sharded(network: Any) -> bool:
    return any(isinstance(p, DTensor) for p in network.parameters())
