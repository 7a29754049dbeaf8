"""`flowanchor-sample`: draw images from a checkpoint into an .npz and a labelled grid."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.progress import track

from flowanchor.checkpoints import load_model
from flowanchor.errors import ConfigError
from flowanchor.generation.generator import Generator
from flowanchor.generation.prompts import read_prompts
from flowanchor.generation.sample_file import SampleFile
from flowanchor.programs.checks import base_of_adapters, check_whole_numbers, choose_device, choose_dtype
from flowanchor.programs.commands import sample as main
from flowanchor.provenance import write_program_record
from flowanchor.reporting.grids import save_grid


def sample(cfg: DictConfig) -> None:
    """Write `samples.npz` (`images` uint8 [N, H, W, C], `labels` [N]) and `grid.png` into the run folder."""
    if not cfg.checkpoint:
        raise ConfigError("No checkpoint was given: add checkpoint=PATH (a .ckpt file or a run folder).")
    check_whole_numbers(cfg, num_samples=(1, 64), batch_size=(1, 256), seed=0, grid_images=(1, 100))
    folder = Path(HydraConfig.get().runtime.output_dir)
    device = choose_device(cfg.device)
    model = load_model(cfg.checkpoint, cfg.ema_profile, device, choose_dtype(cfg.dtype), base_of_adapters(cfg))
    request = model.backbone.conditioning.request(
        cfg.num_samples, _listed(cfg.classes), choose_prompts(cfg), cfg.negative, seed=cfg.seed
    )
    generator = Generator.of(model, cfg.sampler, cfg.get("codec"), cfg.get("text_encoder"))
    # All prompts are encoded at once: a large encoder leaves the device to the network.
    request, generator.encoder = request.encoded(generator.encoder), None
    chunks = generator.draw(request, cfg.seed, cfg.batch_size, cfg.size)
    write_program_record(folder, "sample", cfg, used=model.record())
    console = Console()
    batches = -(-cfg.num_samples // cfg.batch_size)
    numbers, names = request.numbers(), request.names()
    shown: list[np.ndarray] = []  # only what the grid needs is kept; the rest goes to disk as it comes
    with SampleFile(folder / "samples.npz", cfg.num_samples, None if names else numbers) as file:
        for chunk in track(chunks, "Sampling", batches, console=console):
            file.add(chunk)
            shown.extend(chunk.numpy()[: max(0, cfg.grid_images - len(shown))])
    if names and numbers is not None:  # a prompt that stands twice in a list has one row
        numbers = np.asarray([names.index(names[number]) for number in numbers])
    rows = None if numbers is None else numbers[: len(shown)]
    save_grid(folder / "grid.png", np.stack(shown), labels=rows, class_names=names)
    sampler = generator.sampler
    nfe = "adaptive" if sampler.nfe is None else sampler.nfe
    console.print(
        f"{cfg.num_samples} images by {sampler.label}, nfe {nfe}, seed {cfg.seed}, "
        f"weights {model.ema}, checkpoint {model.digest}: {folder}/samples.npz, grid.png",
        soft_wrap=True,  # a path that is broken into two lines cannot be copied
    )


def choose_prompts(cfg: DictConfig) -> list[str] | None:
    """Those of `prompt` and of the file `prompts`; None where neither is given."""
    listed = [str(prompt) for prompt in _listed(cfg.prompt) or []]
    if cfg.prompts is not None:
        listed += read_prompts(cfg.prompts)
    return listed or None


def _listed(value: Any) -> list[Any] | None:
    return None if value is None else list(value) if OmegaConf.is_list(value) else [value]


if __name__ == "__main__":
    main()
