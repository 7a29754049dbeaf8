"""Sums notice holes and flipped bits, in every kind of file that flowanchor writes weights into."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from flowanchor.base.seal import SUMS, check_folder, check_seal, check_zip, sums_of, write_sealed, write_sums


def flipped(raw: bytes, place: int, bit: int = 2) -> bytes:
    changed = bytearray(raw)
    changed[place] ^= 1 << bit
    return bytes(changed)


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {"a": torch.randn(40, 30), "b": torch.arange(5)}


def test_every_flipped_bit_of_a_sealed_file_is_noticed(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    file, copy = tmp_path / "a.safetensors", tmp_path / "copy.safetensors"
    write_sealed(file, tensors, {"step": "3"})
    assert check_seal(file) is None and torch.equal(load_file(file)["a"], tensors["a"])
    raw = file.read_bytes()
    for place in [*range(0, 400), *range(400, len(raw), 37)]:
        copy.write_bytes(flipped(raw, place))
        assert check_seal(copy) is not None or _marks_nothing(raw, place), place
    copy.write_bytes(raw[:-1])
    assert check_seal(copy) is not None


def _marks_nothing(raw: bytes, place: int) -> bool:
    """A bit in the very names that say that there is a digest: such a header has no metadata, or is refused."""
    start = raw.index(b'"__metadata__"')
    return start <= place < start + 100


def test_a_file_without_a_digest_is_not_accused(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    save_file(tensors, tmp_path / "theirs.safetensors")
    assert check_seal(tmp_path / "theirs.safetensors") is None


@pytest.mark.parametrize("content", [b"", b"12345678", b"\xff" * 64, (16).to_bytes(8, "little") + b"[" * 16])
def test_what_is_no_safetensors_file_is_told(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.safetensors").write_bytes(content)
    found = check_seal(tmp_path / "x.safetensors")
    assert found is None or "damaged" in found  # empty: nothing to compare; its reader refuses it


def test_holes_in_a_file_of_torch_save(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    file = tmp_path / "a.ckpt"
    torch.save({"weights": {"w": torch.randn(200, 200)}}, file)
    raw = file.read_bytes()
    assert check_zip(file) is None
    file.write_bytes(raw[:60_000] + bytes(65_536) + raw[125_536:])
    assert "not what was written" in str(check_zip(file))
    generator = np.random.default_rng(0)
    for _ in range(40):
        changed = bytearray(raw)
        for place in generator.integers(0, len(raw), 20):
            changed[place] ^= 1 << int(generator.integers(8))
        file.write_bytes(changed)
        assert check_zip(file) is not None
    for length in (0, 10, 4_000, len(raw) - 1):
        file.write_bytes(raw[:length])
        assert check_zip(file) is not None


def test_a_folder_is_checked_file_by_file_and_by_shares(tmp_path: Path) -> None:
    for name in ("__0_0.distcp", "__1_0.distcp", ".metadata"):
        (tmp_path / name).write_bytes(name.encode() * 50)
    assert check_folder(tmp_path) is None, "of a version that wrote no sums"
    write_sums(tmp_path, sums_of(tmp_path.iterdir()))
    assert check_folder(tmp_path) is None
    for spoil, word in (
        (lambda file: file.write_bytes(flipped(file.read_bytes(), 20)), "not what was written"),
        (lambda file: file.write_bytes(file.read_bytes()[:-1]), "cut off"),
        (lambda file: file.unlink(), "missing"),
    ):
        file = tmp_path / "__1_0.distcp"
        before = file.read_bytes()
        spoil(file)
        assert word in str(check_folder(tmp_path))
        found = [check_folder(tmp_path, share, 2) for share in range(2)]
        assert [bool(one) for one in found].count(True) == 1, "each file is looked at by one process"
        file.write_bytes(before)
    for text in ("[", "[1]", '{"a": 1}', '{"a": {"bytes": "x", "crc32": 0}}', json.dumps({"../../x": {}})):
        (tmp_path / SUMS).write_text(text)
        assert "damaged" in str(check_folder(tmp_path))
    (tmp_path / SUMS).write_text(json.dumps({"/etc/hostname": {"bytes": 1, "crc32": 1}}))
    assert "missing" in str(check_folder(tmp_path)), "names in the folder, and no paths"
