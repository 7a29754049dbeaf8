"""`flowanchor-sample`: draw images from a checkpoint into PNG files, a labelled grid, an .npz."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.progress import track
from torch import Tensor

from flowanchor.base.paths import from_here
from flowanchor.checkpoints import load_model
from flowanchor.checkpoints.load import LoadedModel
from flowanchor.errors import ConfigError
from flowanchor.generation.class_names import class_numbers
from flowanchor.generation.generator import Generator, Moment
from flowanchor.generation.prompts import read_prompts
from flowanchor.generation.sample_file import SampleFile
from flowanchor.generation.samplers import origin
from flowanchor.programs.checks import base_of_adapters, check_whole_numbers, choose_device, choose_dtype
from flowanchor.programs.commands import sample as main
from flowanchor.provenance import write_program_record
from flowanchor.reporting.grids import labelled_grid, save_grid
from flowanchor.reporting.pictures import FILMS, file_name, save_film, save_png
from flowanchor.request import Request

GRID = 64  # pixels of a tiny image on the grid, about


def sample(cfg: DictConfig) -> None:
    """Write PNG files, `grid.png` and, as it is asked for, a film and `samples.npz` (`images` uint8 [N, H, W, C],
    `labels` [N]): pictures into `out`, or into the run folder, everything else there."""
    if not cfg.checkpoint:
        raise ConfigError("No checkpoint was given: add checkpoint=PATH (a .ckpt file or a run folder).")
    check_whole_numbers(cfg, num_samples=(1, 64), batch_size=(1, 256), seed=0, grid_images=(1, 100), scale=(1, 4))
    if cfg.trajectory not in (None, *FILMS):
        raise ConfigError(f"trajectory={cfg.trajectory} is no kind of film: use {' or '.join(FILMS)}, or leave it out.")
    if cfg.npz not in (None, True, False):
        raise ConfigError(f"npz={cfg.npz} is neither true nor false.")
    folder = Path(HydraConfig.get().runtime.output_dir)
    pictures = folder if cfg.out is None else Path(str(cfg.out)).expanduser()
    device = choose_device(cfg.device)
    model = load_model(
        cfg.checkpoint, cfg.ema_profile, device, choose_dtype(cfg.dtype), base_of_adapters(cfg), base_lora=cfg.base_lora
    )
    request = model.backbone.conditioning.request(
        cfg.num_samples,
        class_numbers(_listed(cfg.classes), model.class_names),
        choose_prompts(cfg),
        cfg.negative,
        seed=cfg.seed,
    )
    generator = Generator.of(model, cfg.sampler, cfg.get("codec"), cfg.get("text_encoder"))
    # All prompts are encoded at once: a large encoder leaves the device to the network.
    request, generator.encoder = request.encoded(generator.encoder), None
    film = Film(generator, cfg.grid_images)
    if cfg.trajectory is not None:
        generator.watch = film.add
    chunks = generator.draw(request, cfg.seed, cfg.batch_size, cfg.size)
    write_program_record(folder, "sample", cfg, used=model.record())
    console = Console()
    console.print(f"sampler {generator.sampler.told()} ({origin(cfg.sampler)})", soft_wrap=True, markup=False)
    batches = -(-cfg.num_samples // cfg.batch_size)
    shows = Shows(request, model)
    npz = cfg.out is None if cfg.npz is None else cfg.npz
    facts = _facts(cfg, generator, model)
    shown: list[np.ndarray] = []  # only what the grid needs is kept; the rest goes to disk as it comes
    count = 0
    with SampleFile(folder / "samples.npz", cfg.num_samples, shows.stored()) if npz else nullcontext() as file:
        for chunk in track(chunks, "Sampling", batches, console=console):
            images = chunk.numpy()
            if file is not None:
                file.add(chunk)
            for image in images[: None if cfg.out else max(0, cfg.grid_images - count)]:
                name = file_name(count, cfg.num_samples, shows.word(count))
                place = pictures / name if cfg.out else folder / "images" / name
                save_png(place, image, {**facts, "index": count, **shows.facts(count)}, cfg.scale)
                count += 1
            shown.extend(images[: max(0, cfg.grid_images - len(shown))])
    options: dict[str, Any] = {
        "labels": shows.rows(len(shown)),
        "class_names": shows.names,
        "title": _title(facts, model),
        "scale": max(1, round(GRID / max(shown[0].shape[:2]))),
    }
    save_grid(pictures / "grid.png", np.stack(shown), **options)
    written = ["grid.png", f"{count} PNG files" if cfg.out else "images/*.png"]
    if cfg.trajectory is not None:
        name = f"trajectory.{cfg.trajectory}"
        save_film(pictures / name, [labelled_grid(frame, **options) for frame in film.frames()])
        written.append(name)
    written += ["samples.npz"] if npz and cfg.out is None else []
    more = f"; {from_here(folder)}/samples.npz" if npz and cfg.out is not None else ""
    console.print(
        f"{cfg.num_samples} images by {facts['sampler']}, nfe {facts['nfe']}, seed {cfg.seed}, "
        f"weights {model.ema}, checkpoint {model.digest}: {from_here(pictures)}/{', '.join(written)}{more}",
        soft_wrap=True,  # a path that is broken into two lines cannot be copied
        markup=False,
    )


@dataclass
class Film:
    """The way of the first images from noise to data, as images."""

    generator: Generator
    most: int
    parts: dict[int, list[np.ndarray]] = field(default_factory=dict)  # step -> [b, H, W, C] of each batch

    def add(self, moment: Moment) -> None:
        """Keep what is shown of a batch."""
        samples: Tensor = moment.samples[: max(0, self.most - moment.first)]
        if len(samples):
            self.parts.setdefault(moment.step, []).append(self.generator.images(samples).numpy())

    def frames(self) -> list[np.ndarray]:
        """The noise, the state after each step, the images, each [N, H, W, C]."""
        return [np.concatenate(parts) for _, parts in sorted(self.parts.items())]


class Shows:
    """What each image shows, for its name, its row in the grid, and its label in a file."""

    def __init__(self, request: Request, model: LoadedModel) -> None:
        self.numbers, self.prompts = request.numbers(), request.names()
        self.names = self.prompts or list(model.class_names)

    def stored(self) -> np.ndarray | None:
        """Labels of a file of samples; None: there are none."""
        return None if self.prompts else self.numbers

    def rows(self, count: int) -> np.ndarray | None:
        """Which name each of the first images has; a prompt that stands twice in a list has one row."""
        if self.numbers is None:
            return None
        numbers = self.numbers[:count]
        return np.asarray([self.prompts.index(self.prompts[n]) for n in numbers]) if self.prompts else numbers

    def word(self, index: int) -> str | None:
        """The name of its class, its number, or its prompt."""
        if self.numbers is None:
            return None
        number = int(self.numbers[index])
        return self.names[number] if number < len(self.names) else str(number)

    def facts(self, index: int) -> dict[str, Any]:
        """The same, for the file."""
        if self.numbers is None:
            return {}
        word, number = self.word(index), int(self.numbers[index])
        return {"prompt": word} if self.prompts else {"class": word, "label": number}


def _facts(cfg: DictConfig, generator: Generator, model: LoadedModel) -> dict[str, Any]:
    """What all images have in common: how they can be drawn again."""
    sampler = generator.sampler
    nfe = "adaptive" if sampler.nfe is None else sampler.nfe
    known = {"sampler": sampler.label, "nfe": nfe, "seed": cfg.seed, "weights": model.ema, "checkpoint": model.digest}
    return known | {"step": model.step} | ({} if cfg.negative is None else {"negative": str(cfg.negative)})


def _title(facts: dict[str, Any], model: LoadedModel) -> str:
    nfe = facts["nfe"]
    calls = "adaptive" if nfe == "adaptive" else f"{nfe} network evaluation{'s' if nfe != 1 else ''}"
    path = Path(model.path)
    run = path.parent.parent if path.parent.name == "checkpoints" else path.parent if path.stem == "model" else path
    return f"{run.stem if run.is_file() else run.name}: {facts['sampler']}, {calls}, seed {facts['seed']}"


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
