"""Short trainings in this process, and what is measured of them: what forgetting.py, stability.py and growth.py share.

A run is composed, built and fitted as train.py does it, and scored as eval.py does it; only the start of a program for
each is left out. A record is written after every row, and rows that are in it are not measured again.
"""

from __future__ import annotations

import json
import logging
import math
import statistics
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from harness import ROOT, commit, machine, write_json

sys.path.insert(0, str(ROOT / "src"))

from flowanchor import compose
from flowanchor.base.typed import instantiate
from flowanchor.callbacks.attached import callback_of, callbacks_of
from flowanchor.callbacks.forgetting import Forgetting
from flowanchor.data.base import FlowDataModule
from flowanchor.data.lightning import LightningData
from flowanchor.ema import EMA
from flowanchor.errors import DataError, NonFiniteLossError
from flowanchor.generation.generator import Generator
from flowanchor.interfaces import Backbone, Codec, Interval, Sampler
from flowanchor.metrics.evaluator import Evaluator
from flowanchor.metrics.frechet import frechet_distance
from flowanchor.programs.train import build_module, build_strategy, build_trainer

TEACHERS = {"digits": "digits_teacher", "fashion_mnist": "fashion_teacher"}
STUDENTS = {"digits": "digits_facm", "fashion_mnist": "fashion_facm"}
ALONE = (
    "callbacks=none", "logger=none", "trainer.limit_val_batches=0",
    "+trainer.enable_progress_bar=false", "+trainer.enable_checkpointing=false", "ema.snapshot_every=null",
    "jvp.recompute=false",
)  # fmt: skip


class Watch(pl.Callback):
    """The norm of the gradients before they are clipped, and CPU seconds, of every step."""

    def __init__(self) -> None:
        self.norms: list[float] = []
        self.seconds: list[float] = []
        self._begun = 0.0

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        self._begun = time.process_time()

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self.seconds.append(time.process_time() - self._begun)
        norm = trainer.callback_metrics.get("train/grad_norm")
        if norm is not None:
            self.norms.append(float(norm))


@dataclass
class Fitted:
    """A trained student with its averages in place of its weights, or None in its place where it broke."""

    student: Backbone | None
    interval: Interval
    sampler: Sampler
    watch: Watch
    forgetting: Forgetting | None = None


def fit(folder: Path, *words: str, forgetting: Forgetting | None = None, ends: bool = True) -> Fitted:
    """Train what a command line says, without log or files; the averages of the first profile are what comes back.

    `ends`: with a checkpoint in `folder`, so that another run can start from it or be taught by it.
    """
    on = () if any(word.startswith("trainer.accelerator=") for word in words) else ("trainer.accelerator=cpu",)
    cfg = compose(*words, *ALONE, *on)
    pl.seed_everything(cfg.seed, workers=True, verbose=False)
    torch.set_num_threads(1)
    data = instantiate(cfg.data)
    module = build_module(cfg)
    trainer = build_trainer(cfg, folder, module, build_strategy(cfg))
    watch = Watch()
    callbacks_of(trainer).extend([watch, *([] if forgetting is None else [forgetting])])
    sampler: Sampler = instantiate(cfg.sampler, _convert_="all")
    student: Backbone | None = module.student
    try:
        trainer.fit(module, datamodule=LightningData(data))
        if ends:
            trainer.save_checkpoint(folder / "checkpoints" / "last.ckpt")
    except NonFiniteLossError:
        student = None
    ema = callback_of(trainer, EMA)
    if student is not None and ema is not None:
        student.load_state_dict(ema.averages(module, ema.default))
    return Fitted(None if student is None else student.eval(), module.objective.interval, sampler, watch, forgetting)


@dataclass
class Judge:
    """Frechet distances on one data set, on the features of metric=small."""

    data: FlowDataModule
    samples: int
    evaluator: Evaluator = field(init=False)
    codec: Codec = field(init=False)

    def __post_init__(self) -> None:
        self.evaluator = Evaluator(compose(program="eval").metric, self.data)
        self.codec = instantiate(compose().codec)

    def distance(self, student: Backbone, interval: Interval, sampler: Sampler, nfe: int, seed: int = 0) -> float:
        """Of balanced classes; infinite where a sample is not finite."""
        request = student.conditioning.request(self.samples, None, None, None, "balanced", seed)
        generator = Generator(student, interval, sampler.with_nfe(nfe), self.codec)
        chunks = (chunk.permute(0, 3, 1, 2) for chunk in generator.draw(request, seed, 250))
        try:
            found = self.evaluator.collect(chunks, self.evaluator.wanted(self.samples))
        except DataError:
            return math.inf
        return float(frechet_distance(found.features.gaussian(), self.evaluator.reference.features))

    def mean(self, student: Backbone, interval: Interval, sampler: Sampler, nfe: int, sets: int) -> float:
        """Over sets of samples, whose noise all networks share."""
        return statistics.fmean(self.distance(student, interval, sampler, nfe, seed) for seed in range(sets))


class Record:
    """Rows in a file, written after each."""

    def __init__(self, path: Path, about: Mapping[str, Any], quick: bool = False) -> None:
        self.path, self.commit = path, commit()
        self.content: dict[str, Any] = {"machine": machine(), "about": dict(about), "rows": []}
        if path.is_file() and not quick:
            kept = json.loads(path.read_text())
            if kept["about"] != json.loads(json.dumps(about)):
                sys.exit(f"{path} was measured with {kept['about']}, and this is {about}: move it away, or use those.")
            self.content = kept

    def find(self, **what: Any) -> dict[str, Any] | None:
        """The row with these entries."""
        rows: Sequence[dict[str, Any]] = self.content["rows"]
        return next((row for row in rows if all(row.get(key) == value for key, value in what.items())), None)

    def add(self, row: dict[str, Any]) -> None:
        """With the commit beside it where that is no longer the record's."""
        later = {} if self.commit == self.content["machine"]["commit"] else {"commit": self.commit}
        self.content["rows"].append({**finite(row), **later})
        self.save()

    def save(self) -> None:
        write_json(self.path, self.content)


def finite(value: Any) -> Any:
    """Numbers with five digits; None for those that are not finite."""
    if isinstance(value, Mapping):
        return {key: finite(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(entry) for entry in value]
    if isinstance(value, float):
        return float(f"{value:.5g}") if math.isfinite(value) else None
    return value


def spread(values: Sequence[float | None], digits: int = 2) -> str:
    """Mean ± standard deviation of those that are there."""
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    mean = f"{statistics.fmean(known):.{digits}f}"
    return mean if len(known) == 1 else f"{mean} ± {statistics.stdev(known):.{digits}f}"


def measured_by(content: Mapping[str, Any], command: str) -> str:
    """Who measured it: the last sentence under a table."""
    about = content["machine"]
    later = dict.fromkeys(row["commit"] for row in content["rows"] if "commit" in row)
    return (
        f"`{command}` on {about['cpu']}, {about['cores']} cores, one thread, torch {about['torch']}, {about['date']}, "
        f"commit {about['commit']}{''.join(f', later rows {one}' for one in later)}."
    )


def quiet() -> None:
    """Lightning's messages for each of many short runs are no news."""
    for name in ("lightning.pytorch", "lightning.fabric", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
