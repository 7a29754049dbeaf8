"""CIFAR-10's two kinds of files, written here after their definitions; a pickle that would run code is refused."""

from __future__ import annotations

import pickle
import struct

import numpy as np
import pytest
import torch

from flowanchor.errors import ConfigError, DataError
from flowanchor.plugins.data.cifar10 import PARTS, CIFAR10DataModule


def write(root, kind: str, per_file: int = 20) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    folder = root / f"cifar-10-batches-{kind}"
    folder.mkdir(parents=True)
    draw, kept = np.random.default_rng(0), {}
    for name in [n for names in PARTS.values() for n in names]:
        pixels = draw.integers(0, 256, (per_file, 3072), dtype=np.uint8)
        labels = np.arange(per_file) % 10
        kept[name] = (pixels.reshape(-1, 3, 32, 32), labels)
        if kind == "bin":
            rows = np.concatenate([labels[:, None].astype(np.uint8), pixels], 1)
            (folder / f"{name}.bin").write_bytes(rows.tobytes())
        else:
            content = {b"data": pixels, b"labels": labels.tolist(), b"batch_label": name.encode()}
            (folder / name).write_bytes(pickle.dumps(content, protocol=2))
    return kept


def module(root, **settings) -> CIFAR10DataModule:
    return CIFAR10DataModule(str(root), batch_size=8, **settings)


@pytest.mark.parametrize("kind", ["bin", "py"])
def test_both_kinds_of_files(tmp_path, kind):
    kept = write(tmp_path, kind)
    data = module(tmp_path)
    images = data.images("train")
    assert len(images) == 100 and len(data.images("heldout")) == 20
    for number, name in enumerate(PARTS["train"]):
        for row in (0, 19):
            assert torch.equal(images[20 * number + row], torch.from_numpy(kept[name][0][row]))
            assert images.labels[20 * number + row] == kept[name][1][row]
    assert sorted(data.images("heldout").labels[:10].tolist()) == list(range(10))
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    assert batch.x1.shape == (8, 3, 32, 32) and batch.cond.shape == (8,)
    assert len(data.train_dataloader()) == 25, "mirrored copies count"


def test_without_labels(tmp_path):
    write(tmp_path, "bin")
    data = module(tmp_path / "cifar-10-batches-bin", num_classes=0)
    data.setup("fit")
    assert next(iter(data.train_dataloader())).cond is None


def as_published(pixels: np.ndarray, labels: list[int]) -> bytes:
    """A file as Python 2 and the NumPy of its time pickled it: byte strings, and NumPy's names of then."""

    def text(value: bytes) -> bytes:
        return b"U" + bytes([len(value)]) + value

    dtype = b"cnumpy\ndtype\n(" + text(b"u1") + b"K\x00K\x01tR(K\x03" + text(b"|") + b"NNN"
    dtype += b"J\xff\xff\xff\xff" * 2 + b"K\x00tb"
    empty = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\x00t" + text(b"b") + b"tR"
    content = b"T" + struct.pack("<I", pixels.size) + pixels.tobytes()
    shape = b"(M" + struct.pack("<H", len(pixels)) + b"M" + struct.pack("<H", 3072) + b"t"
    array = empty + b"(K\x01" + shape + dtype + b"\x89" + content + b"tb"
    numbers = b"](" + b"".join(b"K" + bytes([label]) for label in labels) + b"e"
    return b"\x80\x02}(" + text(b"data") + array + text(b"labels") + numbers + b"u."


def test_the_files_of_python_2(tmp_path):
    kept = write(tmp_path, "py")
    for name, (pixels, labels) in kept.items():
        path = tmp_path / "cifar-10-batches-py" / name
        path.write_bytes(as_published(pixels.reshape(-1, 3072), labels.tolist()))
    images = module(tmp_path).images("train")
    assert torch.equal(images[25], torch.from_numpy(kept["data_batch_2"][0][5]))
    assert images.labels[25] == kept["data_batch_2"][1][5]


def test_a_label_beyond_the_tenth_is_refused(tmp_path):
    write(tmp_path, "bin")
    path = tmp_path / "cifar-10-batches-bin" / "data_batch_4.bin"
    path.write_bytes(bytes([10]) + path.read_bytes()[1:])
    with pytest.raises(DataError, match="data_batch_4.bin is damaged .* labels up to 10"):
        module(tmp_path).setup("fit")


def test_a_malicious_pickle_runs_nothing(tmp_path):
    write(tmp_path, "py")
    trap = tmp_path / "trap"

    class Attack:
        def __reduce__(self):
            return (open, (str(trap), "w"))

    path = tmp_path / "cifar-10-batches-py" / "data_batch_3"
    path.write_bytes(pickle.dumps({b"data": Attack(), b"labels": []}, protocol=2))
    with pytest.raises(DataError, match=r"data_batch_3 is damaged .*it asks for \w+\.open"):
        module(tmp_path).setup("fit")
    assert not trap.exists()


@pytest.mark.parametrize("kind", ["bin", "py"])
def test_a_damaged_file_is_named(tmp_path, kind):
    write(tmp_path, kind)
    path = next((tmp_path / f"cifar-10-batches-{kind}").glob("data_batch_2*"))
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(DataError, match="data_batch_2.* is damaged"):
        module(tmp_path).setup("fit")


def test_settings(tmp_path):
    with pytest.raises(ConfigError, match="3 channels, size 32"):
        module(tmp_path, size=28)
    with pytest.raises(DataError, match="add data.download=true"):
        module(tmp_path).setup("fit")
