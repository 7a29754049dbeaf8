"""`flowanchor-encode`: images into files of latents, resumable and by any number of processes."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig
from rich.console import Console

from flowanchor.base.reading import shown
from flowanchor.encoded.manifest import MANIFEST, Manifest
from flowanchor.encoding.encoder import Encoder, Encoding
from flowanchor.encoding.plan import LAYOUTS
from flowanchor.encoding.record import STAMP, compare
from flowanchor.encoding.sources import Source, open_source
from flowanchor.encoding.writers import DTYPES
from flowanchor.errors import ConfigError
from flowanchor.interfaces import Codec
from flowanchor.programs.checks import check_whole_numbers, own_device
from flowanchor.programs.commands import encode as main
from flowanchor.programs.encode_captions import encode_captions
from flowanchor.programs.progress import counter

VALUES = ("sample", "moments")
SHARD_SIZE = 10_000  # as released
REPORT_EVERY = 1.0  # seconds


def encode(cfg: DictConfig) -> None:
    """Write the files, `latents_stats.pt` and `manifest.json` into `out`."""
    if "_target_" in cfg.data:
        return encode_captions(cfg)
    check_settings(cfg)
    out = Path(cfg.out).expanduser()
    process, processes = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    console = Console(quiet=process > 0)
    encoding = read_encoding(cfg)
    codec: Codec = instantiate(cfg.codec, _convert_="all").eval().to(own_device(cfg.device))
    if encoding.image_size % codec.downsampling:
        raise ConfigError(f"image_size={encoding.image_size} is no multiple of {codec.downsampling}: use 256 or 512.")
    if not codec.usable:
        raise ConfigError(f"codec={codec.name} has no weights to encode with: add codec.weights=FILE.")
    console.print(f"Reading the names of the images in {shown(cfg.data.root)} ...", markup=False)
    source = open_source(cfg.data.root, cfg.data.labelled, cfg.data.num_classes)
    for remark in source.remarks:
        console.print(remark, markup=False)
    settings = {**encoding.__dict__, "codec": codec.fingerprint(), "codec_dtype": str(cfg.codec.get("dtype"))}
    settings |= {"images": source.digest(), "batch_size": cfg.batch_size}

    torch.backends.cudnn.deterministic = True  # two runs make the same files
    encoder = Encoder(
        source, codec, encoding, out, cfg.batch_size, cfg.num_workers, process, processes, cfg.max_unreadable
    )
    manifest = Manifest.read(out)
    if manifest is not None:
        compare(manifest.source, settings, out)
        unchanged = manifest.source.get(STAMP) in (None, source.stamp())  # None: an older set does not say
        if unchanged and not encoder.missing(manifest):
            console.print(f"{shown(out)} is complete already: {describe(manifest)}.", markup=False, soft_wrap=True)
            return
        if not unchanged:
            console.print(f"Images in {shown(cfg.data.root)} were replaced: their files are made again.", markup=False)
        (out / MANIFEST).unlink(missing_ok=True)  # until its files are there again
    out.mkdir(parents=True, exist_ok=True)
    encoder.record.claim(settings)
    manifest = run(encoder, source, settings, console)
    if manifest is not None:
        for name in manifest.unreadable:
            console.print(f"Left out, unreadable: {name}", markup=False)
        console.print(f"{shown(out)}: {describe(manifest)}.", markup=False, soft_wrap=True)


def run(encoder: Encoder, source: Source, settings: dict[str, Any], console: Console) -> Manifest | None:
    """Encode this process' files; the first process waits for the others and completes the set."""
    pending = encoder.pending()
    encoder.check_disk(pending)
    total = sum(len(shard.indices) for shard in pending)
    if encoder.own(pending) != encoder.own(encoder.shards):
        console.print(f"Going on: {len(source) - total:,} of {len(source):,} images are encoded already.")
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


def check_settings(cfg: DictConfig) -> None:
    """Raise `ConfigError` for a setting that cannot be used."""
    if not cfg.out:
        raise ConfigError("Where to? Add out=FOLDER for the encoded set.")
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
        if cfg[key] not in allowed:
            raise ConfigError(f"{key}={cfg[key]} is not known: use one of {', '.join(allowed)}.")
    if not isinstance(cfg.upright, bool):
        raise ConfigError(f"upright={cfg.upright} is neither true nor false: leave it out to turn photos upright.")
    if cfg.format == "webdataset" and cfg.dtype == "bfloat16":
        raise ConfigError("dtype=bfloat16 cannot be stored in .npy files: use dtype=float16, or format=safetensors.")


def read_encoding(cfg: DictConfig) -> Encoding:
    """What is to be made, with the layout's default for `shuffle`."""
    shuffle = cfg.format == "webdataset" if cfg.shuffle is None else bool(cfg.shuffle)
    return Encoding(
        layout=cfg.format,
        values=cfg["values"],
        image_size=cfg.image_size,
        flips=bool(cfg.flips),
        dtype=cfg.dtype,
        shard_size=cfg.shard_size or SHARD_SIZE,
        shuffle=shuffle,
        seed=cfg.seed,
        upright=cfg.upright,
    )


def describe(manifest: Manifest) -> str:
    """One line about a complete set."""
    size = sum(shard.bytes for shard in manifest.shards)
    flips = ", plain and mirrored" if manifest.flips else ""
    left_out = f", {len(manifest.unreadable)} unreadable" if manifest.unreadable else ""
    return (
        f"{manifest.count:,} images{flips} as latents {' x '.join(map(str, manifest.shape))} ({manifest.values}, "
        f"{manifest.dtype}) in {len(manifest.shards)} files, {size / 1e9:.2f} GB{left_out}"
    )


if __name__ == "__main__":
    main()
