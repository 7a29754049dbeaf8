"""`flowanchor-eval`: quality of a checkpoint's samples at several numbers of network evaluations."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor

from flowanchor.data.base import FlowDataModule
from flowanchor.errors import ConfigError
from flowanchor.interfaces import Codec, Sampler
from flowanchor.metrics.evaluator import Evaluator, Scores
from flowanchor.metrics.presentation import finite_or_none, quality_plot, results_table
from flowanchor.metrics.protocol import make_labels, parse_nfe
from flowanchor.metrics.sample_file import SampleFile
from flowanchor.metrics.stream import StreamedImages
from flowanchor.programs.checks import check_whole_numbers, choose_device
from flowanchor.programs.launch import program
from flowanchor.provenance import write_run_record

if TYPE_CHECKING:
    from flowanchor.checkpoints import LoadedModel


def evaluate(cfg: DictConfig, folder: Path) -> dict[str, Any]:
    """Evaluate as conf/eval.yaml says; writes metrics.json and quality.png into `folder` and returns the report."""
    from flowanchor.checkpoints import load_model
    from flowanchor.codecs.load import load_codec
    from flowanchor.sampling import build_sampler

    if not cfg.checkpoint:
        raise ConfigError(
            "Which model? Add checkpoint=PATH, the run folder or the .ckpt file that a training left "
            "(for example checkpoint=outputs/train/NAME)."
        )
    budgets = parse_nfe(OmegaConf.to_container(cfg.nfe) if OmegaConf.is_config(cfg.nfe) else cfg.nfe)
    check_whole_numbers(cfg, num_samples=(1, 1000), batch_size=(1, 250), seed=0, metric__seed=0)
    check_whole_numbers(cfg, metric__steps=(1, 400), metric__neighborhood=(1, 3))
    check_whole_numbers(cfg, metric__kid_subsets=(1, 100), metric__kid_subset_size=(2, 250))
    make_labels(cfg.protocol, cfg.num_samples, 0, cfg.seed)  # told before anything is read
    device = choose_device(cfg.device)
    model = load_model(cfg.checkpoint, ema=cfg.ema_profile, device=device)
    sampler = build_sampler(cfg.sampler, model)
    samplers = [sampler if nfe is None else sampler.with_nfe(nfe) for nfe in budgets]
    data = load_data(cfg, model)
    codec = load_codec(model, cfg.get("codec")).to(device)
    evaluator = Evaluator(cfg.metric, data, device, cfg.batch_size)

    console = Console()
    run = Evaluation(cfg, model, codec, evaluator, evaluator.floor(cfg.num_samples), device, folder)
    results = []
    with _progress(console) as progress:
        for sampler in samplers:
            task = progress.add_task(f"{_label(sampler)}, NFE {sampler.nfe}", total=cfg.num_samples)
            results.append(run.measure(sampler, partial(progress.advance, task)))
    report = finite_or_none({"settings": run.settings(), "floor": run.floor.as_dict(), "results": results})
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.json").write_text(json.dumps(report, indent=2, allow_nan=False) + "\n")
    quality_plot(report, folder / "quality.png")
    console.print(results_table(report))
    console.print(f"metrics.json and quality.png are in {folder}", soft_wrap=True)
    return report


def load_data(cfg: DictConfig, model: LoadedModel) -> FlowDataModule:
    """The data of the training run, unless the command line names another; `data_overrides` change single settings."""
    from flowanchor.checkpoints.trusted import instantiate_trusted

    chosen = cfg.get("data")
    named = model.config["data"] if chosen is None else OmegaConf.to_container(chosen, resolve=True)
    settings: dict[str, Any] = dict(named)  # type: ignore[arg-type]
    unknown = sorted(key for key in cfg.data_overrides if key not in settings)
    if unknown:
        raise ConfigError(
            f"data_overrides has {', '.join(map(str, unknown))}, which this data does not know: it has "
            f"{', '.join(key for key in settings if key != '_target_')}."
        )
    settings.update(OmegaConf.to_container(cfg.data_overrides, resolve=True))  # type: ignore[arg-type]
    data = instantiate_trusted(settings) if chosen is None else instantiate(settings)
    sample = (data.channels, data.size, data.size)
    trained = model.config["data"]
    if sample[:2] != (trained["channels"], trained["size"]):
        raise ConfigError(
            f"The checkpoint draws {trained['channels']} x {trained['size']} x {trained['size']} samples and the data "
            f"has {' x '.join(map(str, sample))}: leave out data=..., or evaluate a checkpoint trained on this data."
        )
    return data


@dataclass(frozen=True)
class Evaluation:
    """One checkpoint under one metric: what all lines of the report share."""

    cfg: DictConfig
    model: LoadedModel
    codec: Codec
    evaluator: Evaluator
    floor: Scores
    device: str
    folder: Path

    def measure(self, sampler: Sampler, advance: Callable[[int], Any]) -> dict[str, Any]:
        """Generate, stream to the extractor, score: one line of the report."""
        from flowanchor.sampling import generate

        cfg, model, count = self.cfg, self.model, self.cfg.num_samples
        labels = make_labels(cfg.protocol, count, model.backbone.num_classes, cfg.seed)
        with ExitStack() as stack:
            file = None
            if cfg.save_samples:
                path = self.folder / "samples" / f"nfe{sampler.nfe or _label(sampler)}.npz"
                file = stack.enter_context(SampleFile(path, count, None if labels is None else labels.numpy()))

            def on_chunk(chunk: Tensor) -> None:
                advance(len(chunk))
                if file is not None:
                    file.add(chunk)

            chunks = partial(generate, model.backbone, model.interval, sampler, self.codec, labels, cfg.seed)
            images = StreamedImages(partial(chunks, cfg.batch_size, self.device, count), count, on_chunk)
            found = self.evaluator.features(images)
        scores = self.evaluator.score_features(found)
        same_n = scores.n == self.floor.n
        return {
            "sampler": _label(sampler),
            "nfe": sampler.nfe,
            "network_calls": getattr(sampler, "network_calls", sampler.nfe),
            **scores.as_dict(),
            "fd_at_floor_n": scores.fd if same_n else self.evaluator.frechet_at(found, self.floor.n),
            "floor": self.floor.fd,
            "floor_n": self.floor.n,
            "protocol": cfg.protocol,
            "seed": cfg.seed,
            "ema": model.ema,
            "checkpoint_hash": model.digest,
            "seconds": images.seconds,  # of generation
        }

    def settings(self) -> dict[str, Any]:
        """What all lines of the report have in common."""
        cfg, model = self.cfg, self.model
        return {
            "checkpoint": str(model.path),
            "checkpoint_hash": model.digest,
            "step": model.step,
            "ema": model.ema,
            "kind": model.kind,
            "data": self.evaluator.data.name,
            "metric": self.evaluator.label,
            "metric_settings": OmegaConf.to_container(cfg.metric, resolve=True),
            "reference": {"split": "train", "n": len(self.evaluator.reference)},
            "sampler": OmegaConf.to_container(cfg.sampler, resolve=True),
            "num_samples": cfg.num_samples,
            "protocol": cfg.protocol,
            "seed": cfg.seed,
            "batch_size": cfg.batch_size,
        }


def _label(sampler: Sampler) -> str:
    return getattr(sampler, "label", type(sampler).__name__)


def _progress(console: Console) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, TextColumn("left"), TimeRemainingColumn(), console=console)


@program("eval")
def main(cfg: DictConfig) -> float | None:
    """Print the table; returns the Frechet distance at the smallest NFE, for sweeps."""
    folder = Path(HydraConfig.get().runtime.output_dir)
    write_run_record(folder, cfg)
    report = evaluate(cfg, folder)
    return min(report["results"], key=lambda line: line["nfe"] or 0)["fd"]
