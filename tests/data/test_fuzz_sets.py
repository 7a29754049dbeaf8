"""Latents, their descriptions and tables that a stranger or an accident made: read, or told in one sentence."""

from __future__ import annotations

import json
import os
import pickle
import struct
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save, save_file

from flowanchor.base.tables import read_captions
from flowanchor.encoded.captions import NEGATIVE
from flowanchor.encoded.manifest import CaptionManifest, LatentManifest, Shard
from flowanchor.encoding.caption_sources import open_captions
from flowanchor.errors import DataError
from flowanchor.plugins.data.captioned import CaptionedDataModule
from flowanchor.plugins.data.latents import LatentsDataModule

# ------------------------------------------------------------------------------------------------------------- latents


def raw_tensors(header: bytes | dict, body: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def tensor_files(hostile) -> Iterator[tuple[str, bytes]]:
    """Latents [4, 2, 4, 4] that are none."""
    content = {
        "latents": torch.randn(4, 2, 4, 4),
        "latents_flip": torch.randn(4, 2, 4, 4),
        "labels": torch.arange(4) % 3,
    }
    changes: dict[str, dict[str, Any]] = {
        "no labels": {"labels": None}, "complex": {"latents": torch.ones(4, 2, 4, 4, dtype=torch.complex64)},
        "whole": {"latents": torch.ones(4, 2, 4, 4, dtype=torch.int64)},
        "bytes": {"latents": torch.ones(4, 2, 4, 4, dtype=torch.uint8)},
        "mirrored whole": {"latents_flip": torch.ones(4, 2, 4, 4, dtype=torch.int32)},
        "float labels": {"labels": torch.ones(4)},
        "bfloat labels": {"labels": torch.ones(4, dtype=torch.bfloat16)}, "label 3": {"labels": torch.arange(4)},
        "negative": {"labels": torch.tensor([0, 1, -1, 0])},
        "labels [4, 1]": {"labels": torch.zeros(4, 1, dtype=torch.int64)},
        "five labels": {"labels": torch.zeros(5, dtype=torch.int64)},
        "no images": {key: value[:0] for key, value in content.items()},
        "flat": {"latents": torch.ones(4, 32)}, "nan": {"latents": torch.full((4, 2, 4, 4), float("nan"))},
        "float8": {"latents": torch.ones(4, 2, 4, 4).to(torch.float8_e4m3fn)},
        "booleans": {"labels": torch.ones(4, dtype=torch.bool)},
        "a name with codes": {"\x1b[2J" * 200: torch.ones(1), "labels": None},
    }  # fmt: skip
    for what, change in changes.items():
        yield what, save({key: value for key, value in {**content, **change}.items() if value is not None})
    one = {"dtype": "F32", "shape": [4, 2, 4, 4], "data_offsets": [0, 512]}
    for key, value in (("shape", [10**12, 2, 4, 4]), ("shape", [2**62, 4]), ("shape", [-4, 2, 4, 4]), ("shape", "x"),
    ("dtype", "X"),
                       ("data_offsets", [0, 2**62]), ("data_offsets", [512, 0]),
                       ("data_offsets", [-1, 511])):  # fmt: skip
        yield f"{key} {value}", raw_tensors({"latents": {**one, key: value}}, bytes(512))
    yield "nested", raw_tensors(b"[" * 100_000)
    yield "a header of 2^60 bytes", struct.pack("<Q", 1 << 60)
    yield "no text", raw_tensors(b"\xff" * 64)
    yield "nothing", b""
    yield "a pickle", pickle.dumps(hostile.Explosive())


def test_latents(hostile, tmp_path):
    content = {
        "latents": torch.randn(4, 2, 4, 4),
        "latents_flip": torch.randn(4, 2, 4, 4),
        "labels": torch.arange(4) % 3,
    }

    def read():
        data = LatentsDataModule(str(tmp_path), 2, 4, 3, batch_size=2, statistics={"multiplier": 1.0})
        data.setup("fit")
        assert [len(batch.x1) for batch in data.train_dataloader()] == [2, 2]

    def too_few():
        """A set that is too small is the sampler's to tell, without the file's name."""
        try:
            read()
        except DataError as error:
            raise DataError(f"{error} x.safetensors") from error

    hostile.attempt_all(tmp_path / "x.safetensors", save(content), tensor_files(hostile), too_few, 120, 5)
    (tmp_path / "x.safetensors").unlink()
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "x.safetensors")
        assert "no .safetensors files in" in hostile.attempt(read, tmp_path, "a pipe")


def strange_values(whole: dict[str, Any]) -> Iterator[tuple[str, bytes]]:
    """A description in which each value is, in turn, of another kind."""
    values: tuple[Any, ...] = (None, "x", -1, 1.5, True, [], {}, [[]], 10**30, "\x1b[2J\n", ["x"] * 3)
    for key in whole:
        yield f"no {key}", json.dumps({k: v for k, v in whole.items() if k != key}).encode()
        for value in values:
            yield f"{key} = {str(value)[:10]!r}", json.dumps({**whole, key: value}).encode()
    for key in whole["shards"][0]:
        for value in values:
            yield (
                f"shards' {key} = {str(value)[:10]!r}",
                json.dumps({**whole, "shards": [{**whole["shards"][0], key: value}]}).encode(),
            )
    for text in (
        b"",
        b"[]",
        b"null",
        b"1",
        b"{",
        b"[" * 200_000,
        b'{"a":' * 100_000,
        b"\xff",
        b"9" * 9999,
        b'{"shape": NaN}',
    ):
        yield f"{text[:9]!r}", text


def test_manifests(hostile, tmp_path):
    shard = Shard("x.tar", 4, 100, "0" * 64)
    whole = asdict(
        LatentManifest("safetensors", "sample", (2, 4, 4), 4, True, "float32", 8, 3, ("a",), {"name": "x"}, 0, (shard,))
    )
    path, read = tmp_path / "manifest.json", lambda: LatentManifest.read(tmp_path)
    hostile.attempt_all(path, json.dumps(whole).encode(), strange_values(whole), read, 60, 6)


@pytest.fixture
def captioned(tmp_path, write_captions):
    """A set of two images."""
    texts = [[torch.ones(2, 8)], [torch.ones(3, 8), torch.zeros(1, 8)]]
    shard = write_captions(
        tmp_path / "c.safetensors", torch.randn(2, 3, 1, 4, 4), texts, ["a", "b"], [["x"], ["y", "z"]]
    )
    save_file({"text": torch.ones(3, 8)}, tmp_path / NEGATIVE)
    CaptionManifest(2, (3, 1), 8, (shard,), ((4, 4),), {"name": "i"}, {"name": "t"}, "").write(tmp_path)
    return tmp_path


def read_captioned(folder: Path) -> None:
    data = CaptionedDataModule(str(folder), 3, 1, 4, 4, 8, batch_size=2)
    data.setup("fit")
    data.fixed_prompts(2)
    assert [batch.x1.shape for batch in data.train_dataloader()] == [(2, 3, 1, 4, 4)]


def test_captioned_sets(hostile, captioned):
    path = captioned / "c.safetensors"
    whole = path.read_bytes()
    parts = {"latents": torch.randn(2, 3, 1, 4, 4), "text": torch.ones(6, 8), "text_start": torch.tensor([0, 2, 5, 6]),
             "caption_start": torch.tensor([0, 1, 3])}  # fmt: skip
    told = {"samples": json.dumps({"names": ["a", "b"], "captions": [["x"], ["y", "z"]]})}

    def cases() -> Iterator[tuple[str, bytes]]:
        for name, values in (("text_start", ([0, 2, 5, 99], [0, 5, 2, 6], [1, 2, 5, 6], [0, 2, 6], [], [-1, 2, 5, 6],
        [0, 10**15, 5, 6])),
                             ("caption_start", ([0, 0, 3], [0, 1], [0, 1, 9], [0, 3, 1], [], [0, 1, 2]))):  # fmt: skip
            for value in values:
                yield f"{name} {value}", save({**parts, name: torch.tensor(value, dtype=torch.int64)}, told)
        for name in parts:
            yield f"no {name}", save({k: v for k, v in parts.items() if k != name}, told)
            yield f"{name} complex", save({**parts, name: parts[name].to(torch.complex64)}, told)
            yield f"{name} flat", save({**parts, name: parts[name].reshape(-1, 1)}, told)
        for text in (
            "",
            "{}",
            "[",
            "[" * 100_000,
            "null",
            '{"captions": 3}',
            '{"captions": [["x"]]}',
            '{"captions": [[], [1]]}',
        ):
            yield f"captions {text[:9]!r}", save(parts, {"samples": text})
        yield "no captions", save(parts)
        yield "three images", save({**parts, "latents": torch.randn(3, 3, 1, 4, 4)}, told)

    def named():
        try:
            read_captioned(captioned)
        except DataError as error:  # sizes that do not fit the manifest are told with the folder's name
            raise DataError(f"{error} c.safetensors") from error

    hostile.attempt_all(path, whole, cases(), named, 80, 7)
    path.write_bytes(whole)
    negative = captioned / NEGATIVE
    lies = [("none", b""), ("flat", save({"text": torch.ones(3)})), ("whole", save({"text": torch.ones(3, 8).long()}))]
    lies += [("another", save({"x": torch.ones(3, 8)}))]
    hostile.attempt_all(negative, negative.read_bytes(), iter(lies), lambda: read_captioned(captioned), 30, 8)


def test_manifests_of_captions(hostile, captioned):
    path = captioned / "manifest.json"
    read = lambda: CaptionManifest.read(captioned)  # noqa: E731
    hostile.attempt_all(path, path.read_bytes(), strange_values(json.loads(path.read_text())), read, 40, 9)


# -------------------------------------------------------------------------------------------------------------- tables


def test_tables(hostile, tmp_path):
    lines = b"\n".join(b'{"file": "%d.png", "caption": ["a", "b %d"]}' % (n, n) for n in range(6))
    rows = b"file,caption\n" + b"\n".join(b'%d.png,"a, %d"' % (n, n) for n in range(6))

    def cases(valid: bytes, comma: bool) -> Iterator[tuple[str, bytes]]:
        yield "latin 1", valid + b"\n7.png,caf\xe9" if comma else valid + b'\n{"file": "7.png", "caption": "caf\xe9"}'
        yield "a mark", b"\xef\xbb\xbf" + valid
        yield "UTF-16", valid.decode().encode("utf-16")
        yield "nothing", b""
        yield "zeros", bytes(100_000)
        yield "a zero", valid + b'\n7.png,"a\0b"'
        yield "an open quote", valid + b'\n7.png,"' + b"x" * 200_000
        yield "a long field", valid + b"\n7.png," + b"x" * 200_000
        yield "a long line", valid + b"\n" + b"x" * 20_000_000
        yield "many columns", b",".join([b"file,caption"] * 50_000) + b"\n1.png" + b",x" * 100_000
        yield "more cells", valid + b"\n7.png,a,b,c,d"
        yield "fewer cells", valid + b"\n7.png"
        yield "codes", b"\x1b[2J,\x07\n1,2"
        for text in (
            "[" * 100_000, '{"a":' * 100_000, "9" * 9999, "1", "null", "[]", '"x"', "{}",
            '{"file": 3, "caption": 4}', '{"file": null, "caption": null}',
            '{"file": "../../../etc/passwd", "caption": "x"}', '{"file": "\\ud800", "caption": "\\ud800"}',
            '{"file": "\\u0000", "caption": "' + "[" * 50_000 + '"}', '{"file": "' + "x" * 9000 + '", "caption": "x"}',
            '{"file": "/dev/zero", "caption": "x"}', '{"file": ".", "caption": [[["x"]]]}',
        ):  # fmt: skip
            yield f"line {text[:20]!r} {len(text)}", valid + b"\n" + text.encode()

    for name, valid in (("x.jsonl", lines), ("x.csv", rows)):
        for old in tmp_path.iterdir():
            old.unlink()

        def read(name=name):
            source = open_captions(str(tmp_path / name))
            source.digest()
            for index in range(len(source)):
                with pytest.raises(OSError):
                    source.read(index)
            assert isinstance(read_captions(tmp_path / name), list)

        hostile.attempt_all(tmp_path / name, valid, cases(valid, name == "x.csv"), read, 60, 10)


@pytest.mark.parametrize(
    "name, content, sentence",
    [
        ("x.csv", b"file,caption\na,b\nc,caf\xe9\n", r"Row \d of .*x\.csv cannot be read \(not UTF-8\)"),
        ("x.csv", b"file,caption\na,b\nc," + b"x" * 140_000, r"Row 2 of .*x\.csv cannot be read \(.*field larger than"),
        ("x.jsonl", b'{"file": "a", "caption": "b"}\n{"file', r"Row 2 of .*x\.jsonl cannot be read \(JSONDecodeError"),
        ("x.jsonl", b'{"file": "a", "caption": "b"}\n' + b"[" * 99_999, r"Row 2 of .* cannot be read \(RecursionError"),
    ],
)
def test_a_row_that_cannot_be_read_is_told_with_its_number(tmp_path, name, content, sentence):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=sentence):
        open_captions(str(tmp_path / name))


def test_a_byte_order_mark_is_none_of_the_columns(tmp_path):
    (tmp_path / "x.csv").write_bytes(b"\xef\xbb\xbffile,caption\na,b\n")
    assert open_captions(str(tmp_path)).captions == [("b",)]
