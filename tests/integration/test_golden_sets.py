"""Encoded sets, byte for byte as the first version that wrote them: tests/golden/encoded.json.

    python -m pytest tests/integration/test_golden_sets.py        compares
    WRITE_GOLDEN=1 python -m pytest ...                        writes, for a new kind of set; never to make a test pass

The pictures are BMP files, the codecs and the text encoder exact, and times are set, so that digests hold everywhere.
Statistics are sums of floats, whose last digits are a machine's own: they are compared to six digits.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

GOLDEN = Path(__file__).parents[1] / "golden" / "encoded.json"
TIME = 1_700_000_000  # seconds; of every file that is encoded
EXACT = ["codec._target_=exact_encoders.EveryOther"]
LETTERS = "+text_encoder._target_=exact_encoders.Letters"
TEXTS = ["data=captions", LETTERS, "captions.multiple=8", "captions.negative=no"]
SHAPES = ((24, 30), (40, 20), (33, 33), (20, 40), (70, 64))  # height, width

SETS: dict[str, list[str]] = {
    "folder": ["data.root=pictures"],
    "folder, drawn, tars": ["data.root=pictures", *EXACT, "format=webdataset", "seed=3"],
    "folder, moments": ["data.root=pictures", *EXACT, "values=moments", "flips=false", "dtype=float16", "shuffle=true"],
    "folder, without labels, as stored": ["data.root=pictures", "data.labelled=false", "upright=false", "seed=1"],
    "folder with a broken picture": ["data.root=broken", "dtype=bfloat16", "max_unreadable=1"],
    "tars": ["data.root=tars", *EXACT, "data.num_classes=3"],
    "tars, moments, tars": ["data.root=tars", *EXACT, "format=webdataset", "values=moments", "shuffle=false"],
    "table": [*TEXTS, "data.root=table"],
    "table with pictures left out": [*TEXTS, "data.root=broken_table", *EXACT, "dtype=bfloat16"],
    "captioned tars, squares": [*TEXTS, "data.root=captioned_tars", "captions.max_ratio=1", "captions.caption=text"],
}


def picture(number: int) -> bytes:
    """A BMP file, whose bytes no compression decides."""
    pixels = np.random.default_rng(number).integers(0, 256, (*SHAPES[number % len(SHAPES)], 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "BMP")
    return stream.getvalue()


def captions(number: int) -> str | list[str]:
    return [f"picture {number}", f"a number: {number}"] if number % 4 == 0 else f"picture {number}, Größe"


def write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    os.utime(path, (TIME, TIME))


def write_tar(path: Path, members: dict[str, bytes]) -> None:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name, content in members.items():
            header = tarfile.TarInfo(name)
            header.size = len(content)
            tar.addfile(header, io.BytesIO(content))
    write(path, stream.getvalue())


@pytest.fixture
def sources(tmp_path: Path) -> None:
    """Folders to encode, in the current one."""
    for number in range(13):
        content = picture(number)
        for root in ("pictures", "broken"):
            write(tmp_path / root / "abc"[number % 3] / f"{number}.bmp", content)
        for root in ("table", "broken_table"):
            write(tmp_path / root / f"{number}.bmp", content)
    for number in (3, 7):
        write(tmp_path / "broken" / "abc"[number % 3] / f"{number}.bmp", b"" if number == 3 else picture(number))
    write(tmp_path / "broken_table" / "5.bmp", b"")
    for root in ("table", "broken_table"):
        said = {n: "" if root == "broken_table" and n in (2, 9) else captions(n) for n in range(13)}
        rows = [json.dumps({"file": f"{n}.bmp", "caption": text}) for n, text in said.items()]
        write(tmp_path / root / "captions.jsonl", "\n".join(rows).encode())
    for part, numbers in enumerate((range(8), range(8, 13))):
        labelled = {f"{n:02d}.bmp": picture(n) for n in numbers} | {f"{n:02d}.cls": b"%d" % (n % 3) for n in numbers}
        write_tar(tmp_path / "tars" / f"{part}.tar", labelled)
        texts = {f"{n:02d}.json": json.dumps({"text": captions(n)}).encode() for n in numbers}
        write_tar(tmp_path / "captioned_tars" / f"{part}.tar", {f"{n:02d}.bmp": picture(n) for n in numbers} | texts)


def rounded(value: Any) -> Any:
    """To six digits, as text."""
    if isinstance(value, dict):
        return {key: rounded(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [rounded(inner) for inner in value]
    return f"{value:.6g}" if isinstance(value, float) else value


def digests(folder: Path) -> dict[str, str]:
    """sha256 of each file of a set, and of what is recorded about each, whatever is being made of them."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_dir() or path.name.startswith("process-"):  # how far a process was: for a progress bar
            continue
        content = path.read_bytes()
        if path.suffix == ".pt":
            statistics = torch.load(path, weights_only=True)
            content = json.dumps(rounded({key: value.tolist() for key, value in statistics.items()})).encode()
        elif path.parent.name == ".encoding":
            content = json.dumps(rounded(json.loads(content))).encode()
        found[path.relative_to(folder).as_posix()] = hashlib.sha256(content).hexdigest()
    return found


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("name", SETS)
def test_a_set_is_what_it_always_was(name, processes, sources, command, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent / "exact"))
    words = ["codec=identity", "image_size=16", "batch_size=2", "num_workers=0", "shard_size=5", "out=set", *SETS[name]]
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    for process in reversed(range(processes)):  # the first one waits for the others
        monkeypatch.setenv("RANK", str(process))
        folder = command("encode", *words)
    found = digests(folder / "set")
    golden = json.loads(GOLDEN.read_text(encoding="utf-8")) if GOLDEN.exists() else {}
    if os.environ.get("WRITE_GOLDEN"):
        GOLDEN.write_text(json.dumps(golden | {name: found}, indent=1) + "\n", encoding="utf-8")
    else:
        assert found == golden[name]
