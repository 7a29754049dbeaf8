"""`flowanchor-eval`: quality of a checkpoint's samples at several numbers of network evaluations."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from flowanchor.base.paths import from_here
from flowanchor.base.trusted import build
from flowanchor.base.typed import instantiate
from flowanchor.checkpoints import LoadedModel, load_model
from flowanchor.conditioning import Text
from flowanchor.data.base import FlowDataModule
from flowanchor.errors import ConfigError, FlowAnchorError
from flowanchor.generation.generator import Generator, sample_shape
from flowanchor.generation.prompts import read_prompts
from flowanchor.generation.samplers import sampler_settings
from flowanchor.interfaces import Codec, Sampler
from flowanchor.metrics.evaluator import Evaluator
from flowanchor.metrics.partial_results import PartialResults
from flowanchor.metrics.presentation import finite_or_none, quality_plot, results_table
from flowanchor.metrics.protocol import parse_nfe
from flowanchor.metrics.reference import open_reference
from flowanchor.metrics.reference_base import Shape
from flowanchor.metrics.repeats import mean_line, repeated_seed
from flowanchor.metrics.storage import write_whole
from flowanchor.programs.checks import base_of_adapters, check_whole_numbers, choose_dtype
from flowanchor.programs.commands import evaluate as main
from flowanchor.programs.evaluation import Draw, Evaluation
from flowanchor.programs.flow_errors import check_flow_error, flow_table, measure_flow
from flowanchor.programs.next_step import command
from flowanchor.programs.processes import Processes
from flowanchor.provenance import write_program_record
from flowanchor.reporting.runs import find_runs
from flowanchor.request import Request, make_labels


def evaluate(cfg: DictConfig, folder: Path) -> dict[str, Any] | None:
    """Evaluate as conf/eval.yaml says; writes metrics.json and quality.png into `folder` and returns the report.

    Of several processes the first one does; the others return None.
    """
    budgets = check_settings(cfg)
    processes = Processes.join(cfg.device)
    console = Console(quiet=not processes.first)
    model = load_model(
        cfg.checkpoint,
        cfg.ema_profile,
        processes.device,
        choose_dtype(cfg.dtype),
        base_of_adapters(cfg),
        base_lora=cfg.base_lora,
    )
    listed = None if cfg.prompts is None else read_prompts(cfg.prompts)
    requests = [
        model.backbone.conditioning.request(
            cfg.num_samples, None, listed, cfg.negative, cfg.protocol, repeated_seed(cfg.seed, repeat)
        )
        for repeat in range(cfg.repeats)
    ]
    generator = Generator.of(model, cfg.sampler, cfg.get("codec"), cfg.get("text_encoder"))
    samplers = [generator.sampler if nfe is None else generator.sampler.with_nfe(nfe) for nfe in budgets]
    with processes.first_alone():
        evaluator = build_evaluator(cfg, model, generator.codec, processes.device)
    if evaluator.metric.reads_prompts and listed is None:
        raise ConfigError("metric=t2i compares images with prompts, and this network reads none: use metric=inception.")
    floor_n = evaluator.floor_size(cfg.num_samples)
    key = identity(cfg, model, generator, evaluator, requests[0]) if processes.first else None
    store = PartialResults(folder, processes.agree(key))
    run = Evaluation(cfg, model, generator, requests, evaluator, processes, store, folder, console, floor_n)
    if cfg.num_samples < evaluator.metric.biased_below:
        console.print(
            f"{evaluator.label} of {cfg.num_samples:,} samples is biased upwards: compare it with the same number "
            "only; published values have num_samples=50000."
        )
    if floor_n is None and evaluator.heldout is not None:
        console.print(
            f"{evaluator.heldout} held-out images are too few for a floor: raise data.heldout, if there is one."
        )
    if processes.first:
        store.begin(cfg.restart)
        evaluator.reference  # noqa: B018 (looked at, and its errors told, before anything is generated)
        run.floor = None if floor_n is None else evaluator.floor(cfg.num_samples)
        write_program_record(folder, "eval", cfg, used=model.record())
    processes.wait()
    results = measure_all(run, samplers, console)
    if not processes.first:
        return None
    floor = None if run.floor is None else run.floor.as_dict()
    flow = {"flow": measure_flow(cfg, model, flow_data(cfg, model), processes.device)} if cfg.flow_error else {}
    report: dict[str, Any] = finite_or_none({"settings": run.settings(), "floor": floor, "results": results, **flow})
    write_whole(folder / "metrics.json", (json.dumps(report, indent=2, allow_nan=False) + "\n").encode())
    quality_plot(report, folder / "quality.png")
    console.print(results_table(report))
    if flow:
        console.print(flow_table(report["flow"]))
    console.print(f"metrics.json and quality.png are in {folder}", soft_wrap=True)
    return report


def evaluate_all(cfg: DictConfig, folder: Path) -> None:
    """Every run below `runs`, each into its own folder; one that cannot be measured does not stop the others.

    Raises:
        ConfigError: at the end, where some could not be measured, and for settings that leave no choice.
    """
    if cfg.checkpoint is not None:
        raise ConfigError("checkpoint= is one run and runs= are many: leave one of them out.")
    found = find_runs(list(cfg.runs) if OmegaConf.is_list(cfg.runs) else [cfg.runs])
    failed = []
    for number, run in enumerate(found, 1):
        one = OmegaConf.merge(cfg, {"checkpoint": str(run.folder), "runs": None})
        assert isinstance(one, DictConfig)
        print(f"Run {number} of {len(found)}: {from_here(run.folder)}", flush=True)
        try:
            evaluate(one, run.folder / "evaluations" / folder.name)
        except FlowAnchorError as error:
            print(f"  {error}", flush=True)
            failed.append(str(from_here(run.folder)))
    if failed:
        raise ConfigError(f"{len(failed)} of {len(found)} runs could not be measured: {', '.join(failed)}.")
    names = [str(path) for path in cfg.runs] if OmegaConf.is_list(cfg.runs) else [str(cfg.runs)]
    runs = names[0] if len(names) == 1 else f"[{','.join(names)}]"
    print(f"Side by side: {command('report', f'runs={runs}')}")


def measure_all(run: Evaluation, samplers: list[Sampler], console: Console) -> list[dict[str, Any]]:
    """One line per sampler, those of an earlier run taken over; an empty list but for the first process."""
    results, processes = [], run.processes
    whose = "" if processes.count == 1 else f" (this process, 1 of {processes.count})"
    with _progress(console) as progress:
        for sampler in samplers:
            lines = []
            for repeat, request in enumerate(run.requests):
                draw = Draw(sampler, repeated_seed(run.cfg.seed, repeat), repeat, request)
                line = processes.agree(run.finished(draw) if processes.first else None)
                if line is not None:
                    console.print(f"{draw.name}: measured by an earlier run (restart=true measures again)")
                else:
                    which = f", set {draw.repeat + 1} of {run.cfg.repeats}" if run.cfg.repeats > 1 else ""
                    name = f"{sampler.label}, NFE {sampler.nfe}{which}{whose}"
                    task = progress.add_task(name, total=None)

                    def show(done: int, total: int, task: Any = task) -> None:
                        progress.update(task, completed=done, total=total)

                    run.generate(draw, show)
                    line = run.score(draw) if processes.first else None
                if line is not None and processes.first:
                    lines.append(line)
            if lines:
                results.append(mean_line(lines))
    return results


def check_settings(cfg: DictConfig) -> list[int | None]:
    """The numbers of network evaluations; raises `ConfigError` for a setting that cannot be used."""
    if not cfg.checkpoint:
        raise ConfigError(
            "Which model? Add checkpoint=PATH, the run folder or the .ckpt file that a training left "
            "(for example checkpoint=outputs/train/NAME)."
        )
    budgets = parse_nfe(OmegaConf.to_container(cfg.nfe) if OmegaConf.is_config(cfg.nfe) else cfg.nfe)
    check_whole_numbers(cfg, num_samples=(1, 1000), repeats=(1, 5), batch_size=(1, 250), seed=0, metric__seed=0)
    check_whole_numbers(cfg, metric__steps=(1, 400), metric__neighborhood=(1, 3), save_every=(1, 5000))
    check_whole_numbers(cfg, metric__kid_subsets=(1, 100), metric__kid_subset_size=(2, 250))
    check_whole_numbers(cfg, metric__isc_splits=(1, 10), metric__feature_limit=(100, 10_000))
    make_labels(cfg.protocol, cfg.num_samples, 0, cfg.seed)  # told before anything is read
    if cfg.reference is not None and (cfg.get("data") is not None or cfg.data_overrides):
        raise ConfigError("reference= takes the place of the data: leave out data= and data_overrides, or reference=.")
    check_flow_error(cfg)
    return budgets


def flow_data(cfg: DictConfig, model: LoadedModel) -> FlowDataModule:
    """The data in the network's own space: encoded where it is a network of latents."""
    shape = tuple(model.backbone.sample_shape)
    if len(shape) != 3 or isinstance(model.backbone.conditioning, Text):
        raise ConfigError("flow_error=true is for networks of images with classes or none: leave it out.")
    return load_data(cfg, model, (shape[0], shape[1], shape[2]))


def build_evaluator(cfg: DictConfig, model: LoadedModel, codec: Codec, device: str) -> Evaluator:
    """The metric with its reference: the one that is named (no data is looked for then), or the data's train split."""
    shape = image_shape(model, codec, cfg.size)
    if cfg.reference is None:
        if isinstance(model.backbone.conditioning, Text):
            raise ConfigError(
                "A network of text has no images of its own to be compared with: add reference=FOLDER of images "
                "(metric=t2i, metric=inception, or metric=random to try the program)."
            )
        if codec.latent_channels is not None and cfg.get("data") is None:
            raise ConfigError(
                "The checkpoint was trained on latents, which are no images to compare with: add reference=FOLDER or "
                "reference=FILE.npz (images, or statistics of Inception's features)."
            )
        return Evaluator(cfg.metric, load_data(cfg, model, shape), device, cfg.batch_size)
    reference = open_reference(str(cfg.reference), shape, bool(cfg.reference_crop), cfg.metric.get("cache_dir"))
    return Evaluator(cfg.metric, None, device, cfg.batch_size, reference)


def image_shape(model: LoadedModel, codec: Codec, size: str | None = None) -> Shape:
    """Channels, height and width of the decoded samples; raises `ConfigError` for videos, which no metric reads."""
    channels, *frames, height, width = sample_shape(model.backbone, size, codec.downsampling)
    if frames and frames[0] > 1:
        raise ConfigError(f"This network draws {frames[0]} frames, and images are measured: use one with frames=1.")
    pixels = codec.downsampling
    return (channels if codec.latent_channels is None else 3, height * pixels, width * pixels)


def identity(
    cfg: DictConfig, model: LoadedModel, generator: Generator, evaluator: Evaluator, request: Request
) -> dict[str, Any]:
    """Everything that a line of the report depends on, but its sampler's number of evaluations."""
    named = ("num_samples", "protocol", "seed", "batch_size", "save_samples")
    prompts = request.identity()
    if prompts is not None and generator.encoder is not None:
        prompts.append(generator.encoder.fingerprint())
    return {
        **{name: cfg[name] for name in named},
        "metric": OmegaConf.to_container(cfg.metric, resolve=True),
        "sampler": sampler_settings(cfg.sampler, model),
        "checkpoint": model.digest,
        **({"sources": model.sources} if model.sources else {}),
        "ema": model.ema,
        "codec": [generator.codec.fingerprint(), OmegaConf.to_container(cfg.codec) if cfg.get("codec") else None],
        "extractor": evaluator.extractor_digest,
        "reference": evaluator.source.digest,
        "prompts": prompts,
        "size": cfg.size,
        "dtype": cfg.dtype,
    }


def load_data(cfg: DictConfig, model: LoadedModel, drawn: Shape) -> FlowDataModule:
    """The data of the training run, unless the command line names another; `data_overrides` change single settings."""
    chosen = cfg.get("data")
    named = model.config.get("data") or {} if chosen is None else OmegaConf.to_container(chosen, resolve=True)
    settings: dict[str, Any] = dict(named)  # type: ignore[arg-type]
    if "_target_" not in settings:
        raise ConfigError(
            f"{model.path} was imported and knows no data of its own: add data=OPTION, the images to compare with."
        )
    unknown = sorted(key for key in cfg.data_overrides if key not in settings)
    if unknown:
        raise ConfigError(
            f"data_overrides has {', '.join(map(str, unknown))}, which this data does not know: it has "
            f"{', '.join(key for key in settings if key != '_target_')}."
        )
    typed: Any = OmegaConf.to_container(cfg.data_overrides, resolve=True)
    if chosen is None:
        data = build(settings, "data", model.path, typed)
    else:
        data = instantiate({**settings, **typed})
    sample = (data.channels, data.size, data.size)
    if sample != tuple(drawn):
        raise ConfigError(
            f"The checkpoint draws {' x '.join(map(str, drawn))} samples and the data "
            f"has {' x '.join(map(str, sample))}: leave out data=..., or evaluate a checkpoint trained on this data."
        )
    return data


def _progress(console: Console) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, TextColumn("left"), TimeRemainingColumn(), console=console)


def evaluate_run(cfg: DictConfig) -> float | None:
    """Print the table; returns the Frechet distance at the smallest NFE, for sweeps."""
    folder = Path(HydraConfig.get().runtime.output_dir)
    if cfg.runs:
        evaluate_all(cfg, folder)
        return None
    report = evaluate(cfg, folder)
    if report is None:
        return None
    return min(report["results"], key=lambda line: line["nfe"] or 0)["fd"]


if __name__ == "__main__":
    main()
