"""`encode.py data=captions`: captioned images into latents and text embeddings, resumable, by several processes."""

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
from flowanchor.encoded.captions import CaptionManifest
from flowanchor.encoded.manifest import MANIFEST
from flowanchor.encoding.buckets import bucket_sizes
from flowanchor.encoding.caption_sources import open_captions
from flowanchor.encoding.captions import CaptionEncoder, plan
from flowanchor.encoding.record import STAMP, compare
from flowanchor.encoding.writers import DTYPES
from flowanchor.errors import ConfigError, DataError
from flowanchor.interfaces import Codec
from flowanchor.programs.checks import check_whole_numbers, own_device
from flowanchor.programs.progress import counter
from flowanchor.text.base import TextEncoder

SHARD_SIZE = 1_000  # a file is held in memory: latents of 1024 x 1024 are 1 MB each, a long text's embeddings 8 MB


def encode_captions(cfg: DictConfig) -> None:
    """Write the files, `negative.safetensors` and `manifest.json` into `out`."""
    check_settings(cfg)
    out = Path(cfg.out).expanduser()
    process, processes = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    console = Console(quiet=process > 0)
    sizes = bucket_sizes(cfg.image_size, cfg.captions.max_ratio, cfg.captions.multiple)
    codec: Codec = instantiate(cfg.codec, _convert_="all").eval().to(own_device(cfg.device))
    if not codec.usable:
        raise ConfigError(f"codec={codec.name} has no weights to encode with: add codec.weights=FILE.")
    text: TextEncoder = instantiate(cfg.text_encoder, _convert_="all").eval().to(own_device(cfg.device))
    source = open_captions(cfg.data.root, cfg.captions.file, cfg.captions.caption)
    for remark in source.remarks:
        console.print(remark, markup=False)
    settings: dict[str, Any] = {
        "images": source.digest(), "codec": codec.fingerprint(), "text_encoder": text.fingerprint(),
        "image_size": cfg.image_size, "max_ratio": cfg.captions.max_ratio, "multiple": cfg.captions.multiple,
        "codec_dtype": str(cfg.codec.get("dtype")), "dtype": cfg.dtype, "shard_size": cfg.shard_size or SHARD_SIZE,
        "batch_size": cfg.batch_size, "negative": cfg.captions.negative,
    }  # fmt: skip
    manifest = CaptionManifest.read(out)
    if manifest is not None:
        compare(manifest.source, settings, out)
        unchanged = manifest.source.get(STAMP) in (None, source.stamp())  # None: an older set does not say
        if unchanged and all((out / shard.file).is_file() for shard in manifest.shards):
            console.print(f"{shown(out)} is complete already: {describe(manifest)}.", markup=False, soft_wrap=True)
            return
        if not unchanged:
            console.print(f"Images in {shown(cfg.data.root)} were replaced: their files are made again.", markup=False)
        (out / MANIFEST).unlink(missing_ok=True)
    with counter(console) as progress:
        task = progress.add_task("Reading sizes", total=len(source))
        files, unreadable = plan(source, sizes, settings["shard_size"], lambda: progress.advance(task))
    left_out = [*source.uncaptioned, *unreadable]
    if not files:
        raise DataError(
            f"{cfg.data.root} has no image that can be read and has a caption"
            f"{f' (the first: {left_out[0]})' if left_out else ''}: check data.root."
        )
    out.mkdir(parents=True, exist_ok=True)
    encoder = CaptionEncoder(
        source, codec, text, out, files, left_out, cfg.dtype, cfg.batch_size, cfg.num_workers, process, processes,
        cfg.max_unreadable,
    )  # fmt: skip
    torch.backends.cudnn.deterministic = True  # two runs make the same files
    encoder.record.claim(settings)
    manifest = run(encoder, settings, cfg.captions.negative, console)
    if manifest is not None:
        for name in manifest.unreadable:
            console.print(f"Left out: {name}", markup=False)
        console.print(f"{shown(out)}: {describe(manifest)}.", markup=False, soft_wrap=True)


def run(encoder: CaptionEncoder, settings: dict[str, Any], negative: str, console: Console) -> CaptionManifest | None:
    """Encode this process' files; the first process waits for the others and completes the set."""
    pending = encoder.pending()
    own = [file for file in encoder.files if file.number % encoder.processes == encoder.process]
    if len(pending) < len(own):
        console.print(f"Going on: {len(own) - len(pending)} of {len(own)} files are there already.")
    with counter(console) as progress:
        task = progress.add_task("Encoding", total=sum(len(file.indices) for file in pending))
        encoder.on_images = lambda images: progress.advance(task, images)
        for finished in encoder.encode(pending):
            progress.print(f"{finished.shard.file}: {finished.shard.count:,} images", markup=False)
        if encoder.process:
            return None
        while (manifest := encoder.complete(settings, negative)) is None:
            time.sleep(0.2)
    return manifest


def check_settings(cfg: DictConfig) -> None:
    """Raise `ConfigError` for a setting that cannot be used."""
    if not cfg.out:
        raise ConfigError("Where to? Add out=FOLDER for the encoded set.")
    check_whole_numbers(cfg, image_size=(1, 1024), shard_size=(1, 1000), batch_size=(1, 16), num_workers=0)
    check_whole_numbers(cfg, max_unreadable=0)
    if cfg.dtype not in DTYPES:
        raise ConfigError(f"dtype={cfg.dtype} is not known: use one of {', '.join(DTYPES)}.")
    if cfg.upright is not True:
        raise ConfigError("upright=true is the only way for pictures with captions: leave it out.")
    if "_target_" not in (cfg.get("text_encoder") or {}):
        raise ConfigError("Captions need a text encoder: add text_encoder=umt5 text_encoder.weights=FOLDER.")


def describe(manifest: CaptionManifest) -> str:
    """One line about a complete set."""
    sizes = sorted(set(manifest.sizes))
    size = sum(shard.bytes for shard in manifest.shards)
    left_out = f", {len(manifest.unreadable)} left out" if manifest.unreadable else ""
    return (
        f"{manifest.count:,} captioned images in {len(sizes)} sizes ({manifest.shape[0]} channels), "
        f"{len(manifest.shards)} files, {size / 1e9:.2f} GB{left_out}"
    )
