"""A CSV log that survives a resume."""

from __future__ import annotations

import csv
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter

from flowanchor.base.files import replacing


class _AppendingWriter(ExperimentWriter):
    """Keeps the rows of an earlier part of the run; drops those that the resumed part logs again."""

    def __init__(self, log_dir: str) -> None:
        super().__init__(log_dir)
        self._continuing = False
        file = Path(self.metrics_file_path)
        if file.is_file():
            with file.open(newline="", encoding="utf-8") as lines:
                self.metrics_keys = list(csv.DictReader(lines).fieldnames or [])
            self._continuing = bool(self.metrics_keys)

    def _check_log_dir_exists(self) -> None:  # Lightning's deletes the metrics of the earlier part here
        pass

    def log_metrics(self, metrics_dict: dict[str, float], step: int | None = None) -> None:
        if self._continuing and step is not None:
            self._continuing = False
            self._drop_from(step, validation=_is_validation(metrics_dict))
        super().log_metrics(metrics_dict, step)

    def _drop_from(self, step: int, validation: bool) -> None:
        """A killed run may have logged beyond the checkpoint that it resumes from.

        Where it resumes with the validation of a step, what was logged of the training in that step stays.
        """
        file = Path(self.metrics_file_path)
        with file.open(newline="", encoding="utf-8") as lines:
            numbered = [row for row in csv.DictReader(lines) if row.get("step", "").isdigit()]
        kept = [
            row
            for row in numbered
            if int(row["step"]) < step or (validation and int(row["step"]) == step and not _is_validation(row))
        ]
        with replacing(file) as draft, draft.open("w", newline="", encoding="utf-8") as lines:
            writer = csv.DictWriter(lines, fieldnames=self.metrics_keys, extrasaction="ignore")
            writer.writeheader()
            writer.writerows(kept)


def _is_validation(row: Mapping[str, Any]) -> bool:
    return any(name.startswith("val/") and value not in ("", None) for name, value in row.items())


class AppendingCSVLogger(CSVLogger):
    """Writes `<save_dir>/csv/metrics.csv`, one row per logged step; a resumed run continues the same file.

    Lightning's logger starts another `version_N` folder, or deletes the file. Each row is on disk once it is logged.
    """

    def __init__(self, save_dir: str, folder: str = "csv") -> None:
        super().__init__(save_dir=save_dir, name="", version=folder, flush_logs_every_n_steps=1)

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        if self._experiment is None:
            os.makedirs(self.root_dir, exist_ok=True)
            self._experiment = _AppendingWriter(log_dir=self.log_dir)
        return self._experiment
