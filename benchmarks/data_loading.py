"""How fast encoded data is read, against a loader that opens the file for each sample, as the released one does.

    python benchmarks/data_loading.py            # two minutes, 2.4 GB of made-up latents; refreshes docs/data.md
    python benchmarks/data_loading.py --quick    # shows that it runs, the figures mean nothing

Latents [32, 16, 16] in float32 with their mirrored ones, 10,000 per file as released. One worker each, batches of 256,
warm cache: a loader is started, its first batches are thrown away, then it is timed; the loaders take turns.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from harness import RESULTS, ROOT, machine, markdown, refresh, write_json

sys.path.insert(0, str(ROOT / "src"))

from flowanchor.encoded.manifest import Shard
from flowanchor.encoded.statistics import LatentStatistics
from flowanchor.encoding.writers import Rows, open_writer, write_index
from flowanchor.plugins.data.latents import LatentsDataModule
from flowanchor.plugins.data.webdataset import WebDatasetDataModule

SHAPE, CLASSES, BATCH, WARM = (32, 16, 16), 1000, 256, 4
BARS = {"data=latents": 3.0, "data=webdataset": 2.0}
PER_SAMPLE = "a file opened per sample"


class OpenedPerSample(Dataset):
    """The released loader's way: a map of samples to files, and one `safe_open` for each sample."""

    def __init__(self, folder: Path) -> None:
        self.places = []
        for path in sorted(folder.glob("*.safetensors")):
            with safe_open(path, framework="pt") as file:
                count = file.get_slice("labels").get_shape()[0]
            self.places += [(str(path), row) for row in range(count)]
        content = torch.load(folder / "latents_stats.pt", weights_only=True)
        self.mean, self.std = content["mean"], content["std"]

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        path, row = self.places[index]
        with safe_open(path, framework="pt", device="cpu") as file:
            name = "latents" if np.random.uniform(0, 1) > 0.5 else "latents_flip"
            latents, labels = file.get_slice(name), file.get_slice("labels")
            latent, label = latents[row : row + 1], labels[row : row + 1]
        latent = (latent - self.mean) / self.std
        return latent.squeeze(0), label.squeeze(0)


def write(folder: Path, layout: str, count: int, shard_size: int) -> Path:
    """Made-up latents in one of the layouts."""
    folder.mkdir()
    draw, shards = torch.Generator().manual_seed(0), []
    for number, start in enumerate(range(0, count, shard_size)):
        name = f"shard-{number:06d}.tar" if layout == "webdataset" else f"latents_rank00_shard{number:03d}.safetensors"
        writer = open_writer(layout, folder / name, SHAPE[0])
        for first in range(start, min(start + shard_size, count), 1000):
            rows = np.arange(first, min(first + 1000, start + shard_size, count))
            writer.add(Rows(rows, torch.randn(len(rows), 2, *SHAPE, generator=draw), rows % CLASSES))
        writer.close()
        shards.append(Shard(name, writer.count, (folder / name).stat().st_size, ""))
    if layout == "webdataset":
        write_index(folder, folder.name, shards)
    LatentStatistics((0.0,) * SHAPE[0], (1.0,) * SHAPE[0]).write(folder / "latents_stats.pt")
    return folder


def loaders(latents: Path, tars: Path) -> dict[str, Any]:
    """Functions that make a fresh loader."""
    settings: dict[str, Any] = {"channels": SHAPE[0], "size": SHAPE[1], "num_classes": CLASSES, "batch_size": BATCH}
    modules = {
        "data=latents": LatentsDataModule(str(latents), num_workers=1, **settings),
        "data=webdataset": WebDatasetDataModule(str(tars), num_workers=1, **settings),
    }
    for module in modules.values():
        module.setup("fit")
    released = OpenedPerSample(latents)
    made: dict[str, Any] = {PER_SAMPLE: lambda: DataLoader(released, BATCH, shuffle=True, num_workers=1)}
    return {**made, **{name: module.train_dataloader for name, module in modules.items()}}


def rate(loader: Any, batches: int) -> float:
    """Samples per second of one started loader."""
    stream: Iterator[Any] = iter(loader)
    for _ in islice(stream, WARM):
        pass
    start = time.perf_counter()
    seen = sum(len(batch[0]) for batch in islice(stream, batches))
    return seen / (time.perf_counter() - start)


def measure(rounds: int, count: int, shard_size: int) -> dict[str, list[float]]:
    """Samples per second by loader and round."""
    folder = Path(tempfile.mkdtemp(prefix="flowanchor_data_"))
    try:
        made = loaders(
            write(folder / "latents", "safetensors", count, shard_size),
            write(folder / "tars", "webdataset", count, shard_size),
        )
        batches = count // BATCH - WARM
        for make in made.values():  # once, so that every file is in the page cache
            rate(make(), batches)
        found: dict[str, list[float]] = {name: [] for name in made}
        for _ in range(rounds):
            for name, make in made.items():
                found[name].append(rate(make(), batches))
        return found
    finally:
        shutil.rmtree(folder)


def table(found: dict[str, list[float]], about: dict[str, Any]) -> str:
    """The medians, and the median over the rounds of each loader's ratio to the released way."""
    rows = []
    for name, rates in found.items():
        ratios = [ours / theirs for ours, theirs in zip(rates, found[PER_SAMPLE], strict=True)]
        ratio, spread = statistics.median(ratios), f"{min(ratios):.1f} to {max(ratios):.1f}"
        bar = BARS.get(name)
        met = "" if bar is None else "yes" if ratio >= bar else "**no**"
        wanted = "" if bar is None else f">= {bar:g}"
        rows.append([name, f"{statistics.median(rates):,.0f}", f"{ratio:.1f}", spread, wanted, met])
    note = (
        f"Latents 32 x 16 x 16, float32, one worker, batches of {BATCH}, warm cache, {len(found[PER_SAMPLE])} rounds "
        f"in turn. Measured by `python benchmarks/data_loading.py` on {about['cpu']}, torch {about['torch']}, "
        f"{about['date']}, commit {about['commit']}."
    )
    return "\n\n".join([markdown(("loader", "samples/s", "ratio", "in the rounds", "bar", "met"), rows), note])


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure how fast encoded data is read.")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help="few samples, one round; refreshes nothing")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    count, shard_size = (2 * BATCH * (WARM + 2), 2000) if arguments.quick else (10_000, 5_000)
    found = measure(1 if arguments.quick else arguments.rounds, count, shard_size)
    about = machine()
    text = table(found, about)
    print(text)
    if not arguments.quick:
        write_json(RESULTS / "data_cpu.json", {"machine": about, "samples_per_second": found})
        refresh(ROOT / "docs" / "data.md", "data table", text)


if __name__ == "__main__":
    main()
