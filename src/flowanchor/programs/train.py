"""`flowanchor-train`: compose, build, fit. Re-running the same command resumes the run."""

from __future__ import annotations

import logging
from contextlib import nullcontext
from pathlib import Path
from typing import Any, cast

import lightning.pytorch as pl
import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from flowanchor.base.rank_zero import rank_zero_info, rank_zero_warn
from flowanchor.base.typed import instantiate
from flowanchor.callbacks.attached import callbacks_of
from flowanchor.callbacks.interruption import take_over
from flowanchor.checkpoints import initialise_student, latest_checkpoint
from flowanchor.checkpoints.frozen_base import keep_base
from flowanchor.checkpoints.lightning import use_run_checkpoints
from flowanchor.checkpoints.soundness import readable
from flowanchor.checkpoints.sources import weight_settings
from flowanchor.codecs.load import adopt_statistics, check_codec
from flowanchor.data.lightning import LightningData
from flowanchor.deferred import defer_loading, parameters_on_meta
from flowanchor.errors import ConfigError
from flowanchor.generation.samplers import check_sampler
from flowanchor.interfaces import Backbone
from flowanchor.jvp.compatibility import compile_options, set_products
from flowanchor.module import FlowModule
from flowanchor.programs.batch_arithmetic import check_batch
from flowanchor.programs.checks import check_whole_numbers
from flowanchor.programs.commands import train as main
from flowanchor.programs.next_step import after_training
from flowanchor.programs.rendezvous import check_meeting_point
from flowanchor.programs.resuming import EarlierPart
from flowanchor.programs.run_identity import RunIdentity
from flowanchor.programs.score import check_score, measure_score
from flowanchor.provenance import check_same_run
from flowanchor.strategies.abilities import abilities


def train(cfg: DictConfig) -> float | None:
    """Train one run in Hydra's output folder; returns what a sweep compares: `score`, else the validation loss."""
    use_program_log()
    check_whole_numbers(cfg, seed=0, threads=1, max_nonfinite_steps=(1, 10), log_every_n_steps=(0, 50))
    check_whole_numbers(cfg, trainer__max_steps=(-1, 3000))  # -1: no limit
    check_whole_numbers(cfg, data__batch_size=(1, 128), data__num_workers=0, data__repeat=1)
    check_batch(cfg)
    check_score(cfg)
    folder = Path(HydraConfig.get().runtime.output_dir)
    trained = latest_checkpoint(folder)
    resumed = None if cfg.trainer.fast_dev_run else trained
    earlier = None if resumed is None else EarlierPart.read(readable(resumed))
    if earlier is not None:
        plain = plain_config(cfg)
        check_same_run(folder, cfg, earlier.config, known=weight_settings(plain))
        if 0 < cfg.trainer.max_steps <= earlier.step:
            rank_zero_info(
                f"{folder} has already been trained for {earlier.step} steps; raise trainer.max_steps to go on."
            )
            return measure_score(cfg, folder) if cfg.score else None
    elif trained is not None:
        folder = folder / "fast_dev_run"  # a trial touches nothing of the run that lies here
    identity = RunIdentity(folder, cfg, earlier)
    pl.seed_everything(cfg.seed, workers=True, verbose=False)
    set_products(cfg.matmul_precision)
    if cfg.threads:
        torch.set_num_threads(cfg.threads)

    data = instantiate(cfg.data)
    adopt_statistics(cfg, data)
    check_codec(cfg, data)
    strategy = build_strategy(cfg)
    module = build_module(cfg, initialise=resumed is None, deferred=abilities(strategy).deferred_initialisation)
    check_samples(cfg, module.student, data)
    trainer = build_trainer(cfg, folder, module, strategy)
    callbacks_of(trainer).append(identity)
    try:
        identity.begin(trainer, module)
        trainer.fit(module, datamodule=LightningData(data), ckpt_path=resumed, weights_only=True)
        if (folder / "checkpoints" / "last.ckpt").exists():
            rank_zero_info(after_training(folder, trainer.global_step, trainer.callback_metrics))
        if cfg.score:
            return measure_score(cfg, folder)
    finally:
        identity.release()
    loss = trainer.callback_metrics.get("val/loss")
    return None if loss is None else float(loss)


def build_strategy(cfg: DictConfig) -> Any:
    """Lightning's name of a strategy, or a strategy that has agreed to the trainer's settings."""
    if "_target_" not in cfg.strategy:
        return cfg.strategy.name
    strategy = instantiate(cfg.strategy)
    abilities(strategy).check_precision(cfg.trainer.precision)
    return strategy


def build_module(cfg: DictConfig, initialise: bool = True, deferred: bool = False) -> FlowModule:
    """The student with its objective, velocity field, engine and optimizer; optionally started from other weights.

    `deferred`: its networks get their values later, when each process has its part of them.
    """
    objective = instantiate(cfg.objective, _convert_="all")  # before the student, whose values may not be drawn here
    student = build_student(cfg, deferred)
    with defer_loading() if deferred else nullcontext():
        velocity = instantiate(cfg.teacher)
    module = FlowModule(
        student=student,
        objective=objective,
        velocity=velocity,
        engine=instantiate(cfg.jvp),
        optimizer=instantiate(cfg.optimizer, _convert_="all"),
        config=plain_config(cfg),
        seed=cfg.seed,
        max_nonfinite_steps=cfg.max_nonfinite_steps,
        compile_options=compile_options(cfg.compile),
        cuda_graph=cfg.cuda_graph,
    )
    if student.borrowed() and not cfg.initialise_from:
        raise ConfigError(
            "Adapters need the weights that they adapt: add initialise_from=PATH (docs/few_step_lora.md)."
        )
    if cfg.base_lora and not cfg.initialise_from:
        raise ConfigError("base_lora is merged into the weights that a run starts from: add initialise_from=PATH.")
    if cfg.initialise_from and (initialise or student.borrowed()):
        initialise_student(student, plain_config(cfg)["initialise_from"], config=plain_config(cfg))
    keep_base(student, str(cfg.base_dtype), str(cfg.trainer.precision) in ("bf16-mixed", "bf16"), sharded=deferred)
    return module


def plain_config(cfg: DictConfig) -> dict[str, Any]:
    """All settings, as plain values."""
    return cast(dict[str, Any], OmegaConf.to_container(cfg, resolve=True))


def build_student(cfg: DictConfig, deferred: bool) -> Backbone:
    """The network, with its values or, where it can be given them stage by stage, without."""
    if deferred:
        with torch.random.fork_rng(devices=[]), parameters_on_meta():
            student = cast(Backbone, instantiate(cfg.backbone))
        if student.initialised_by_stage:
            return student
        rank_zero_warn(
            f"{type(student).__name__} is built whole on every process before it is sharded: let its constructor end "
            "with self.initialise() to save that memory (docs/distributed.md)."
        )
    return cast(Backbone, instantiate(cfg.backbone))


def check_samples(cfg: DictConfig, student: Backbone, data: Any) -> None:
    """Raise `ConfigError` where the network was built for other samples, or other classes, than the data has."""
    ours = tuple(student.sample_shape)
    theirs = (data.channels, data.size, data.size)
    if len(ours) == 3 and ours != theirs:  # a video has its own dimensions
        taken, given = (" x ".join(map(str, shape)) for shape in (ours, theirs))
        raise ConfigError(
            f"The backbone takes samples of {taken} and the data has {given}: leave out backbone.in_channels and "
            "backbone.input_size, which then follow data.channels and data.size."
        )
    classes = cfg.backbone.get("num_classes", student.conditioning.classes or data.num_classes)  # 0: may ignore labels
    if classes != data.num_classes:
        raise ConfigError(
            f"The backbone has {classes} classes and the data {data.num_classes}: leave out "
            "backbone.num_classes, which then follows data.num_classes."
        )


def build_trainer(cfg: DictConfig, folder: Path, module: FlowModule, strategy: Any) -> pl.Trainer:
    """Lightning's trainer with the callbacks and the logger of the config."""
    sampler = instantiate(cfg.sampler, _convert_="all")
    check_sampler(sampler, module.objective.kind, module.objective.interval)
    # Settings of a callback that was left out (callbacks=none) remain without a class.
    callbacks = [instantiate(item) for item in (cfg.callbacks or {}).values() if item and "_target_" in item]
    if cfg.ema and "_target_" in cfg.ema:
        callbacks.insert(0, instantiate(cfg.ema))
    loggers = [instantiate(item) for item in (cfg.logger or {}).values() if item]
    trainer = instantiate(
        cfg.trainer,
        strategy=strategy,
        callbacks=callbacks,
        logger=loggers or False,
        default_root_dir=str(folder),
        use_distributed_sampler=False,  # the data module shares each global batch among the processes
        inference_mode=False,  # validation computes tangents, which inference tensors refuse
        _convert_="all",
    )
    use_run_checkpoints(trainer)
    if trainer.num_devices * trainer.num_nodes > 1:
        check_meeting_point()
    return take_over(trainer)


def use_program_log() -> None:
    """What Lightning tells goes where the program's own lines go: to the screen, and into the run's train.log."""
    for name in ("lightning", "lightning.pytorch", "lightning.fabric"):
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.propagate = True


def _no_advertisement(record: logging.LogRecord) -> bool:
    return "Tip: For seamless" not in record.getMessage()


logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(_no_advertisement)

if __name__ == "__main__":
    main()
