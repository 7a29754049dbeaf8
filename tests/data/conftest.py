"""Small encoded sets in both layouts, written without the project's own writers."""

from __future__ import annotations

import importlib.util
import io
import json
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from flowanchor.base.files import sha256
from flowanchor.encoded.manifest import Shard
from flowanchor.encoding.writers import CaptionWriter, Rows
from flowanchor.text.base import Tokens

SHAPE = (2, 4, 4)


def latent(index: int, flip: bool) -> torch.Tensor:
    """The latents of one sample, told apart by their values: [2, 4, 4]."""
    values = torch.randn(SHAPE, generator=torch.Generator().manual_seed(2 * index + flip))
    values[0, 0, 0], values[0, 0, 1] = index / 100, -1.0 if flip else 1.0
    return values


@pytest.fixture
def write_captions() -> Callable[..., Shard]:
    """`write_captions(path, latents, texts, names, captions)`: one file of captioned latents."""

    def write(path: Path, latents: torch.Tensor, texts: list, names: list[str], captions: list) -> Shard:
        writer = CaptionWriter(path)
        rows = np.arange(len(latents))
        told = [[Tokens(text) if isinstance(text, torch.Tensor) else text for text in sample] for sample in texts]
        writer.add(Rows(rows, latents, np.zeros_like(rows), names, captions, told))
        writer.close()
        return Shard(path.name, writer.count, path.stat().st_size, sha256(path))

    return write


def write_statistics(folder: Path, mean: float = 0.5, std: float = 2.0) -> None:
    torch.save(
        {"mean": torch.full((1, 2, 1, 1), mean), "std": torch.full((1, 2, 1, 1), std)}, folder / "latents_stats.pt"
    )


@pytest.fixture
def write_latents(tmp_path: Path) -> Callable[..., Path]:
    """`write_latents([5, 8], classes=3)`: files of so many samples; returns their folder."""

    def write(counts: list[int], classes: int = 3, dtype: torch.dtype = torch.float32, name: str = "latents") -> Path:
        folder, index = tmp_path / name, 0
        folder.mkdir()
        for number, count in enumerate(counts):
            rows = range(index, index + count)
            content = {
                "latents": torch.stack([latent(i, False) for i in rows]).to(dtype),
                "latents_flip": torch.stack([latent(i, True) for i in rows]).to(dtype),
                "labels": torch.tensor([i % classes for i in rows]),
            }
            save_file(content, folder / f"latents_rank00_shard{number:03d}.safetensors")
            index += count
        write_statistics(folder)
        return folder

    return write


def add_member(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    header = tarfile.TarInfo(name)
    header.size = len(content)
    tar.addfile(header, io.BytesIO(content))


@pytest.fixture
def write_tars(tmp_path: Path) -> Callable[..., Path]:
    """`write_tars([5, 8])`: tars of so many samples; `spoil(index, files)` may change a sample's files."""

    def write(counts: list[int], classes: int = 3, spoil=None, name: str = "tars", index_file: bool = True) -> Path:
        folder, index = tmp_path / name, 0
        folder.mkdir()
        for number, count in enumerate(counts):
            with tarfile.open(folder / f"shard-{number:06d}.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
                for i in range(index, index + count):
                    buffer = io.BytesIO()
                    np.save(buffer, torch.stack([latent(i, False), latent(i, True)]).numpy())
                    files = {"npy": buffer.getvalue(), "cls": str(i % classes).encode()}
                    if spoil is not None:
                        spoil(i, files)
                    for extension, content in files.items():
                        add_member(tar, f"{i:08d}.{extension}", content)
            index += count
        if index_file:
            shards = [{"url": f"shard-{n:06d}.tar", "nsamples": count} for n, count in enumerate(counts)]
            (folder / "index.json").write_text(json.dumps({"shardlist": shards}))
        write_statistics(folder)
        return folder

    return write


@pytest.fixture
def samples() -> Callable[..., list[tuple[int, bool]]]:
    """`samples(batch)`: which samples a batch holds, and which of them mirrored (statistics: mean 0.5, std 2)."""

    def read(batch) -> list[tuple[int, bool]]:
        raw = batch.x1 * 2.0 + 0.5
        found = [(round(float(row[0, 0, 0]) * 100), float(row[0, 0, 1]) < 0) for row in raw]
        for (index, flip), row in zip(found, raw, strict=True):
            torch.testing.assert_close(row, latent(index, flip), rtol=0, atol=1e-5)
        return found

    return read


@pytest.fixture(
    scope="session", params=[pytest.param(0.15, id="some"), pytest.param(1.0, id="all", marks=pytest.mark.slow)]
)
def hostile(request: pytest.FixtureRequest) -> ModuleType:
    """Runs readers on files of strangers (hostile.py): all that were made by hand, and so many that chance damaged."""
    spec = importlib.util.spec_from_file_location("hostile_files", Path(__file__).with_name("hostile.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["hostile_files"] = module
    spec.loader.exec_module(module)
    module.scale *= request.param
    return module
