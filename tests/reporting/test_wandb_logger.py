"""One wandb run per training: kept by a resume, ended by the next job of a sweep."""

from __future__ import annotations

import pytest
from lightning.pytorch.loggers import WandbLogger

from flowanchor.reporting import wandb_logger
from flowanchor.reporting.wandb_logger import RunWandbLogger, run_id


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_X_SAVE_REQUIREMENTS", "false")  # a list of all packages, for each run


def test_a_resume_finds_its_run_and_another_folder_has_another(tmp_path):
    first, again, other = run_id(tmp_path / "a"), run_id(tmp_path / "a"), run_id(tmp_path / "b")
    assert first == again != other and len(first) == 8


def test_a_job_ends_its_run(tmp_path):
    pytest.importorskip("wandb")
    ids = []
    for name in ("a", "b", "a"):  # two jobs of a sweep in one process, and a resume of the first
        logger = RunWandbLogger(str(tmp_path / name), offline=True, project="p", name=name)
        assert isinstance(logger, WandbLogger)
        logger.log_metrics({"x": 1.0}, step=0)
        ids.append(logger.experiment.id)
        logger.finalize("success")
    assert ids[0] == ids[2] != ids[1]
    assert wandb_logger.run_id(tmp_path / "a") == ids[0]
    assert len(list((tmp_path / "b" / "wandb").glob("offline-run-*"))) == 1
