"""`flowanchor-encode`: images, with or without captions, into files of latents, resumable and by several processes."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from rich.console import Console

from flowanchor.base.dtypes import DTYPES
from flowanchor.base.processes import this_process
from flowanchor.base.reading import shown
from flowanchor.base.typed import instantiate
from flowanchor.encoded.manifest import MANIFEST, Manifest
from flowanchor.encoding.caption_sources import open_captions
from flowanchor.encoding.captions import Captioned, CaptionEncoding
from flowanchor.encoding.encoder import Encoder
from flowanchor.encoding.form import Form
from flowanchor.encoding.latents import Encoding, Latents
from flowanchor.encoding.plan import LAYOUTS
from flowanchor.encoding.record import STAMP, compare
from flowanchor.encoding.sources import open_source
from flowanchor.errors import ConfigError, DataError
from flowanchor.interfaces import Codec
from flowanchor.programs.checks import check_whole_numbers, own_device
from flowanchor.programs.commands import encode as main
from flowanchor.programs.progress import counter
from flowanchor.text.base import TextEncoder

VALUES = ("sample", "moments")
SHARD_SIZE = 10_000  # as released
CAPTIONS_SHARD_SIZE = 1_000  # a file is held in memory: latents of 1024 x 1024 are 1 MB each, a long text's 8 MB
REPORT_EVERY = 1.0  # seconds


def encode(cfg: DictConfig) -> None:
    """Write the files, what stands beside them, and `manifest.json` into `out`."""
    if not cfg.out:
        raise ConfigError("Where to? Add out=FOLDER for the encoded set.")
    process, processes = this_process()
    console = Console(quiet=process > 0)
    form = read_captioned(cfg) if "_target_" in cfg.data else read_latents(cfg, console)
    for remark in form.source.remarks:
        console.print(remark, markup=False)
    settings = form.settings(str(cfg.codec.get("dtype")), cfg.batch_size)
    out = Path(cfg.out).expanduser()
    if is_complete(form, out, settings, cfg.data.root, console):
        return
    with counter(console) as progress:
        task = progress.add_task("Reading sizes", total=len(form.source), visible=False)
        files, left_out = form.plan(lambda: progress.update(task, advance=1, visible=True))
    if not files:
        first = f" (the first: {left_out[0]})" if left_out else ""
        raise DataError(f"{cfg.data.root} has no image that can be read and has a caption{first}: check data.root.")
    out.mkdir(parents=True, exist_ok=True)
    encoder = Encoder(
        form, out, files, left_out, cfg.batch_size, cfg.num_workers, process, processes, cfg.max_unreadable
    )
    torch.backends.cudnn.deterministic = True  # two runs make the same files
    encoder.record.claim(settings)
    manifest = run(encoder, settings, console)
    if manifest is not None:
        for name in manifest.unreadable:
            console.print(f"Left out: {name}", markup=False)
        console.print(f"{shown(out)}: {manifest.describe()}.", markup=False, soft_wrap=True)


def is_complete(form: Form, out: Path, settings: dict[str, Any], root: str, console: Console) -> bool:
    """Whether the folder holds the whole set already; if not, its manifest is gone until its files are there again."""
    manifest = form.manifest.read(out)
    if manifest is None:
        return False
    compare(manifest.source, settings, out)
    unchanged = manifest.source.get(STAMP) in (None, form.source.stamp())  # None: an older set does not say
    if unchanged and not manifest.missing(out):
        console.print(f"{shown(out)} is complete already: {manifest.describe()}.", markup=False, soft_wrap=True)
        return True
    if not unchanged:
        console.print(f"Images in {shown(root)} were replaced: their files are made again.", markup=False)
    (out / MANIFEST).unlink(missing_ok=True)
    return False


def run(encoder: Encoder, settings: dict[str, Any], console: Console) -> Manifest | None:
    """Encode this process' files; the first process waits for the others and completes the set."""
    pending = encoder.pending()
    encoder.check_disk(pending)
    images, total = (sum(len(file.indices) for file in files) for files in (encoder.files, pending))
    if encoder.own(pending) != encoder.own(encoder.files):
        console.print(f"Going on: {images - total:,} of {images:,} images are encoded already.")
    with counter(console) as progress:
        task = progress.add_task("Encoding", total=total)
        done, reported = 0, 0.0

        def count(images: int) -> None:
            nonlocal done, reported
            done += images
            if time.monotonic() - reported > REPORT_EVERY:
                reported = time.monotonic()
                show()

        def show() -> None:
            if encoder.process:
                encoder.record.report(encoder.process, done)
            else:
                others = (encoder.record.reported(process) for process in range(1, encoder.processes))
                progress.update(task, completed=done + sum(others))

        encoder.on_images = count
        encoder.record.report(encoder.process, 0)
        for finished in encoder.encode(pending):
            show()
            left_out = f", {len(finished.unreadable)} unreadable" if finished.unreadable else ""
            progress.print(f"{finished.shard.file}: {finished.shard.count:,} images{left_out}", markup=False)
        if encoder.process:
            return None
        while (manifest := encoder.complete(settings)) is None:
            show()
            time.sleep(0.2)
        progress.update(task, completed=total)
    return manifest


# --------------------------------------------------------------------------------------------------- what is to be made


def read_latents(cfg: DictConfig, console: Console) -> Latents:
    """Latents alone, as the settings say; raises `ConfigError` for one that cannot be used."""
    check_whole_numbers(
        cfg,
        image_size=(1, 256),
        shard_size=(1, 10_000),
        batch_size=(1, 64),
        num_workers=0,
        seed=0,
        max_unreadable=0,
        data__num_classes=(1, 1000),
    )
    for key, allowed in (("format", LAYOUTS), ("values", VALUES), ("dtype", tuple(DTYPES))):
        check_choice(cfg, key, allowed)
    if not isinstance(cfg.upright, bool):
        raise ConfigError(f"upright={cfg.upright} is neither true nor false: leave it out to turn photos upright.")
    if cfg.format == "webdataset" and cfg.dtype == "bfloat16":
        raise ConfigError("dtype=bfloat16 cannot be stored in .npy files: use dtype=float16, or format=safetensors.")
    encoding = Encoding(
        layout=cfg.format,
        values=cfg["values"],
        image_size=cfg.image_size,
        flips=bool(cfg.flips),
        dtype=cfg.dtype,
        shard_size=cfg.shard_size or SHARD_SIZE,
        shuffle=cfg.format == "webdataset" if cfg.shuffle is None else bool(cfg.shuffle),
        seed=cfg.seed,
        upright=cfg.upright,
    )
    codec = open_codec(cfg, multiple=True)
    console.print(f"Reading the names of the images in {shown(cfg.data.root)} ...", markup=False)
    return Latents(open_source(cfg.data.root, cfg.data.labelled, cfg.data.num_classes), codec, encoding)


def read_captioned(cfg: DictConfig) -> Captioned:
    """Latents with captions, as the settings say; raises `ConfigError` for one that cannot be used."""
    check_whole_numbers(
        cfg, image_size=(1, 1024), shard_size=(1, 1000), batch_size=(1, 16), num_workers=0, max_unreadable=0
    )
    check_choice(cfg, "dtype", tuple(DTYPES))
    if cfg.upright is not True:
        raise ConfigError("upright=true is the only way for pictures with captions: leave it out.")
    if cfg.get("text_encoder") is None:
        raise ConfigError("Captions need a text encoder: add text_encoder=umt5 text_encoder.weights=FOLDER.")
    encoding = CaptionEncoding(
        image_size=cfg.image_size,
        max_ratio=cfg.captions.max_ratio,
        multiple=cfg.captions.multiple,
        dtype=cfg.dtype,
        shard_size=cfg.shard_size or CAPTIONS_SHARD_SIZE,
        negative=cfg.captions.negative,
    )
    codec = open_codec(cfg)
    text: TextEncoder = instantiate(cfg.text_encoder, _convert_="all").eval().to(own_device(cfg.device))
    return Captioned(open_captions(cfg.data.root, cfg.captions.file, cfg.captions.caption), codec, text, encoding)


def open_codec(cfg: DictConfig, multiple: bool = False) -> Codec:
    """The codec, on the device of this process."""
    codec: Codec = instantiate(cfg.codec, _convert_="all").eval().to(own_device(cfg.device))
    if multiple and cfg.image_size % codec.downsampling:
        raise ConfigError(f"image_size={cfg.image_size} is no multiple of {codec.downsampling}: use 256 or 512.")
    if not codec.usable:
        raise ConfigError(f"codec={codec.name} has no weights to encode with: add codec.weights=FILE.")
    return codec


def check_choice(cfg: DictConfig, key: str, allowed: tuple[str, ...]) -> None:
    """Raise `ConfigError` for a setting that is none of a few words."""
    if cfg[key] not in allowed:
        raise ConfigError(f"{key}={cfg[key]} is not known: use one of {', '.join(allowed)}.")


if __name__ == "__main__":
    main()
