"""`flowanchor-sample`: draw images from a checkpoint into an .npz and a labelled grid."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.progress import track

from flowanchor.checkpoints import LoadedModel, load_model
from flowanchor.codecs.load import load_codec
from flowanchor.errors import ConfigError
from flowanchor.metrics.protocol import make_labels
from flowanchor.metrics.sample_file import SampleFile
from flowanchor.programs.checks import base_of_adapters, check_whole_numbers, choose_device, choose_dtype
from flowanchor.programs.commands import sample as main
from flowanchor.provenance import write_program_record
from flowanchor.reporting.grids import save_grid
from flowanchor.sampling import build_sampler, generate
from flowanchor.sampling.prompts import encode_prompts, load_text_encoder, read_prompts, sample_shape


def sample(cfg: DictConfig) -> None:
    """Write `samples.npz` (`images` uint8 [N, H, W, C], `labels` [N]) and `grid.png` into the run folder."""
    if not cfg.checkpoint:
        raise ConfigError("No checkpoint was given: add checkpoint=PATH (a .ckpt file or a run folder).")
    check_whole_numbers(cfg, num_samples=(1, 64), batch_size=(1, 256), seed=0, grid_images=(1, 100))
    folder = Path(HydraConfig.get().runtime.output_dir)
    device = choose_device(cfg.device)
    model = load_model(cfg.checkpoint, cfg.ema_profile, device, choose_dtype(cfg.dtype), base_of_adapters(cfg))
    sampler = build_sampler(cfg.sampler, model)
    codec = load_codec(model, cfg.get("codec"))
    prompts = choose_prompts(cfg, model)
    labels = choose_labels(cfg, model) if prompts is None else None
    asked = labels
    if prompts is not None:
        encoder = load_text_encoder(model, cfg.get("text_encoder")).to(device)
        asked = encode_prompts(encoder, model.backbone, prompts, cfg.negative)
        del encoder  # a large one leaves the device to the network
    write_program_record(folder, "sample", cfg, used=model.record())
    chunks = generate(
        model.backbone,
        model.interval,
        sampler,
        codec.to(device),
        asked,
        cfg.seed,
        cfg.batch_size,
        device,
        cfg.num_samples,
        shape=sample_shape(model.backbone, cfg.size, codec.downsampling),
        finite=True,
    )
    console = Console()
    batches = -(-cfg.num_samples // cfg.batch_size)
    stored = None if labels is None else labels.numpy()
    shown: list[np.ndarray] = []  # only what the grid needs is kept; the rest goes to disk as it comes
    with SampleFile(folder / "samples.npz", cfg.num_samples, stored) as file:
        for chunk in track(chunks, "Sampling", batches, console=console):
            file.add(chunk)
            shown.extend(chunk.numpy()[: max(0, cfg.grid_images - len(shown))])
    names: list[str] = []
    if prompts is not None:
        names = list(dict.fromkeys(prompts))
        stored = np.asarray([names.index(prompt) for prompt in prompts])
    rows = None if stored is None else stored[: len(shown)]
    save_grid(folder / "grid.png", np.stack(shown), labels=rows, class_names=names)
    nfe = "adaptive" if sampler.nfe is None else sampler.nfe
    console.print(
        f"{cfg.num_samples} images by {getattr(sampler, 'label', type(sampler).__name__)}, nfe {nfe}, seed {cfg.seed}, "
        f"weights {model.ema}, checkpoint {model.digest}: {folder}/samples.npz, grid.png",
        soft_wrap=True,  # a path that is broken into two lines cannot be copied
    )


def choose_prompts(cfg: DictConfig, model: LoadedModel) -> list[str] | None:
    """A prompt for every sample, those of `prompt` and `prompts` in turn; None for a network without text."""
    listed = [] if cfg.prompt is None else list(cfg.prompt) if OmegaConf.is_list(cfg.prompt) else [str(cfg.prompt)]
    if cfg.prompts is not None:
        listed += read_prompts(cfg.prompts)
    if not hasattr(model.backbone, "text_dim"):
        if listed:
            raise ConfigError("This network is not conditioned on text: leave out prompt= and prompts=.")
        return None
    if cfg.classes is not None:
        raise ConfigError("This network is conditioned on text: use prompt= instead of classes=.")
    if not listed:
        raise ConfigError('This network is conditioned on text: add prompt="what to draw", or prompts=FILE.')
    return [listed[i % len(listed)] for i in range(cfg.num_samples)]


def choose_labels(cfg: DictConfig, model: LoadedModel) -> torch.Tensor | None:
    """Labels [N]: the listed classes in turn, or every class in turn; None for an unconditional network."""
    classes = model.backbone.num_classes
    if not classes:
        if cfg.classes is not None:
            raise ConfigError("This network was trained without classes: remove classes=.")
        return None
    if cfg.classes is None:
        return make_labels("balanced", cfg.num_samples, classes, cfg.seed)
    wanted = list(cfg.classes) if OmegaConf.is_list(cfg.classes) else [cfg.classes]
    if not wanted or not all(isinstance(c, int) and 0 <= c < classes for c in wanted):
        raise ConfigError(
            f"classes={cfg.classes} must be whole numbers between 0 and {classes - 1}, for example classes=[0,1]."
        )
    return torch.tensor(wanted).repeat(-(-cfg.num_samples // len(wanted)))[: cfg.num_samples]


if __name__ == "__main__":
    main()
