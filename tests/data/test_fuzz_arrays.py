"""Files of arrays that a stranger or an accident made: read, or told in one sentence."""

from __future__ import annotations

import gzip
import io
import pickle
import struct
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from flowanchor.metrics.reference import open_reference
from flowanchor.plugins.data.cifar10 import CIFAR10DataModule
from flowanchor.plugins.data.fashion_mnist import FashionMNISTDataModule

# ---------------------------------------------------------------------------------------------------- a reference .npz


def npy(description: str, body: bytes = b"", version: int = 1) -> bytes:
    text = description.encode() + b"\n"
    return b"\x93NUMPY" + bytes([version, 0]) + struct.pack("<H" if version == 1 else "<I", len(text)) + text + body


def plain(shape: Any, kind: str = "|u1", body: bytes = b"") -> bytes:
    return npy(f"{{'descr': '{kind}', 'fortran_order': False, 'shape': {shape}}}", body)


def zipped(packed: int = zipfile.ZIP_STORED, **members: bytes) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", packed, compresslevel=1) as archive:
        for name, content in members.items():
            archive.writestr(f"{name}.npy", content)
    return stream.getvalue()


def references(hostile) -> Iterator[tuple[str, bytes]]:
    images, eye = np.zeros((3, 8, 8, 3), np.uint8).tobytes(), np.eye(2).tobytes()
    deflated, bzip = zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2
    for shape in (
        (10**12, 8, 8, 3),
        (10**30, 8, 8, 3),
        (-3, 8, 8, 3),
        (4, 8, 8, 3),
        (3, 8, 8),
        (3,),
        (),
        (0, 8, 8, 3),
        (2**63, 8, 8, 3),
    ):
        for packed in (zipfile.ZIP_STORED, deflated, bzip):
            yield f"images {shape} {packed}", zipped(packed, arr_0=plain(shape, body=images))
    for kind in ("|O", "<c16", "|V2000000000", "<U400000000", "<f8", "<M8[s]", "x", "|b1"):
        yield f"images of {kind}", zipped(arr_0=plain((3, 8, 8, 3), kind, images))
        yield f"statistics of {kind}", zipped(mu=plain((2,), kind, eye), sigma=plain((2, 2), kind, eye))
    for mean, covariance in (((10**6,), (10**6, 10**6)), ((2,), (10**9, 10**9)), ((0,), (0, 0)), ((), ()), ((2, 2),
    (2, 2)),
                             ((9_999,), (9_999, 9_999)), ((-2,), (-2, -2)), ((3,), (2, 2))):  # fmt: skip
        for packed in (zipfile.ZIP_STORED, deflated):
            made = zipped(packed, mu=plain(mean, "<f8", eye), sigma=plain(covariance, "<f8", eye))
            yield f"statistics {mean} {covariance}", made
    yield (
        "a bomb of statistics",
        zipped(deflated, mu=plain((2,), "<f8", eye[:16]), sigma=plain((2, 2), "<f8", bytes(300_000_000))),
    )
    yield "a bomb of a header", zipped(deflated, arr_0=npy(" " * 100_000_000, version=2))
    yield "a nested header", zipped(arr_0=npy("(" * 9_000))
    yield "objects", zipped(mu=pickle.dumps(hostile.Explosive()), sigma=pickle.dumps(hostile.Explosive()))
    stream = io.BytesIO()
    np.savez(stream, mu=np.array([hostile.Explosive()], dtype=object), sigma=np.eye(1))
    yield "pickled objects", stream.getvalue()
    locked = bytearray(zipped(arr_0=plain((3, 8, 8, 3), body=images)))
    for at in (6, locked.rindex(b"PK\1\2") + 8):
        locked[at] |= 1
    yield "encrypted", bytes(locked)
    strange = bytearray(zipped(arr_0=plain((3, 8, 8, 3), body=images)))
    strange[8], strange[strange.rindex(b"PK\1\2") + 10] = 97, 97
    yield "packed in an unknown way", bytes(strange)
    yield "nothing", b""
    yield "an empty zip", zipped()
    yield "no npy", zipped(arr_0=b"text")
    yield "a name with codes", zipped(**{"\x1b[2J": b"x", "a\nb": b"y", "z" * 5000: b"z"})


def test_references(hostile, tmp_path):
    images = np.random.default_rng(0).integers(0, 255, (3, 8, 8, 3), dtype=np.uint8)
    for number, save_as in enumerate((np.savez, np.savez_compressed)):
        stream = io.BytesIO()
        save_as(stream, arr_0=images, mu=np.zeros(2), sigma=np.eye(2))

        def read():
            reference = open_reference(str(tmp_path / "x.npz"), (3, 8, 8))
            assert sum(len(chunk) for chunk in reference.chunks(2)) in (0, reference.n)
            assert reference.gaussian is None or np.isfinite(reference.gaussian.covariance).all()

        crafted = references(hostile) if number == 0 else ()  # the same ones, whatever the valid file is
        hostile.attempt_all(tmp_path / "x.npz", stream.getvalue(), crafted, read, 120, number)


# ------------------------------------------------------------------------------------------------ IDX files and CIFAR's


def test_idx_files(hostile, tmp_path):
    valid = struct.pack(">IIII", 0x803, 4, 28, 28) + bytes(range(256)) * 12 + bytes(64)

    def cases() -> Iterator[tuple[str, bytes]]:
        for sides in ((0, 28, 28), (5, 28, 28), (3, 28, 28), (2**32 - 1,) * 3, (2**31, 2, 1), (10**6, 28, 28)):
            yield f"{sides}", struct.pack(">IIII", 0x803, *sides) + valid[16:]
        yield "no sizes", valid[:7]
        yield "nothing", b""

    data = FashionMNISTDataModule(str(tmp_path), batch_size=2)
    path = tmp_path / "train-images-idx3-ubyte"

    def read():
        assert data._idx(path.name, 3).ndim == 3

    hostile.attempt_all(path, valid, cases(), read, 60, 1)
    path.unlink()
    packed = ((what, gzip.compress(data)) for what, data in cases())
    bomb = gzip.compress(struct.pack(">IIII", 0x803, 4, 28, 28) + bytes(200_000_000), compresslevel=1)
    huge = gzip.compress(struct.pack(">IIII", 0x803, 3_000_000, 28, 28) + bytes(10_000_000))
    cut = ("cut", gzip.compress(valid)[:-9])
    lies = iter([*packed, ("a bomb", bomb), ("sizes of a bomb", huge), cut, ("text", b"\x1f\x8b text")])
    hostile.attempt_all(path.with_name(f"{path.name}.gz"), gzip.compress(valid), lies, read, 60, 2)


def pickles(hostile) -> Iterator[tuple[str, bytes]]:
    content = {b"data": np.zeros((2, 3072), np.uint8), b"labels": [1, 2]}
    for protocol in range(0, 3):
        yield f"protocol {protocol}", pickle.dumps(content, protocol)
    for key, value in (
        (b"data", hostile.Explosive()), (b"labels", hostile.Explosive()), (b"data", np.zeros((2, 3072), np.float64)),
        (b"data", [[1] * 3072] * 2),
        (b"data", np.zeros((3072, 2), np.uint8).T), (b"data", np.array([hostile.Explosive()], dtype=object)),
        (b"labels", ["1", "2"]),
        (b"labels", [1, 10]), (b"labels", [-1, 1]), (b"labels", [10**30, 1]), (b"labels", [1.0, 2.0]),
        (b"labels", None),
        (b"labels", [[[1] * 9] * 9] * 9), (b"labels", np.array([1, 2], np.uint8)), (b"data", np.dtype("V9")),
        (b"data", b"x"),
        (b"data", np.zeros((2, 3072), dtype=[("a", np.uint8)])), (b"data", print), (b"data", Path("/")),
        (b"data", np.uint8(1)),
    ):  # fmt: skip
        yield f"{key!r} {str(value)[:20]!r}", pickle.dumps({**content, key: value}, 2)
    laughs = "[]"
    for _ in range(40):
        laughs = f"[{laughs}]"
    shared: Any = [1]
    for _ in range(30):
        shared = [shared] * 10
    yield "labels that refer to each other", pickle.dumps({**content, b"labels": shared}, 2)
    yield "room for 4 billion objects", b"\x80\x02}r\xff\xff\xff\xff."
    yield "room by a text", b"}p4000000000\n."
    yield "bytes without end", b"\x80\x04\x8e" + struct.pack("<Q", 1 << 40) + b"x."
    yield "a frame without end", b"\x80\x04\x95" + struct.pack("<Q", 1 << 60) + b"}."
    yield "a list", pickle.dumps([1, 2], 2)
    yield "a number of many digits", b"I" + b"9" * 100_000 + b"\n."
    ndarray = b"\x80\x02cnumpy\nndarray\n(J\xff\xff\xff\x7fK\x40tR."
    yield "an array of 100 GB", ndarray
    yield "made by new", b"\x80\x02cnumpy\nndarray\n(J\xff\xff\xff\x7fK\x40t\x81."
    yield "attributes of what is called", b"\x80\x02c_codecs\nencode\n}U\x08__dict__U\x01xsb."
    yield "another encoding", b"\x80\x02c_codecs\nencode\nX\x01\0\0\0aX\x03\0\0\0bz2\x86R."
    yield "a module of many names", b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x04true\x85R."
    yield "nested", b"(" * 100_000 + b"."
    yield "nothing", b""


def test_pickles_of_cifar(hostile, tmp_path):
    data = CIFAR10DataModule(str(tmp_path), batch_size=2)
    valid = pickle.dumps({b"data": np.arange(6144).astype(np.uint8).reshape(2, 3072), b"labels": [1, 2]}, 2)
    hostile.attempt_all(tmp_path / "data_batch_1", valid, pickles(hostile), lambda: data._file("data_batch_1"), 150, 3)


def test_binary_files_of_cifar(hostile, tmp_path):
    data = CIFAR10DataModule(str(tmp_path), batch_size=2)
    valid = (b"\1" + bytes(3072)) * 3
    lies = iter(
        [("nothing", b""), *((f"{n} bytes", valid[:n]) for n in range(1, 4000, 400)), ("label", b"\x0a" + valid[1:])]
    )
    hostile.attempt_all(tmp_path / "test_batch.bin", valid, lies, lambda: data._file("test_batch"), 40, 4)
