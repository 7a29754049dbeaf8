"""What a sweep compares: the validation loss, or the Frechet distance that eval.py measures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hydra import compose
from omegaconf import DictConfig, OmegaConf, open_dict

from flowanchor.errors import ConfigError
from flowanchor.programs.evaluate import evaluate


def check_score(cfg: DictConfig) -> None:
    """Raise `ConfigError` where `score` asks for what cannot be measured after the training."""
    if cfg.get("score") is None:
        return
    if not OmegaConf.is_dict(cfg.score) or not isinstance(cfg.score.get("nfe"), int):
        raise ConfigError("score= is one number for a sweep: write score.nfe=2 (hparams_search=optuna brings it).")
    if str(cfg.trainer.get("devices", 1)) != "1" or int(cfg.trainer.get("num_nodes", 1)) != 1:
        raise ConfigError("score= is measured by the process that trained: add trainer.devices=1, or leave score out.")


def measure_score(cfg: DictConfig, folder: Path) -> float:
    """The Frechet distance of the run in `folder` as `score` says; settings of eval.py may stand in it, too."""
    evaluation = compose("eval")
    with open_dict(evaluation):
        settings: Any = OmegaConf.to_container(cfg.score, resolve=True)
        evaluation.merge_with(OmegaConf.create({**settings, "checkpoint": str(folder)}))
    report = evaluate(evaluation, folder / "score")
    if report is None or report["results"][0]["fd"] is None:
        return float("nan")
    return float(report["results"][0]["fd"])
