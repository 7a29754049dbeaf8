"""Tars that a stranger or an accident made: each reads as a whole, or is told in one sentence."""

from __future__ import annotations

import gzip
import io
import json
import lzma
import os
import pickle
import struct
import tarfile
from collections.abc import Iterator
from functools import cache, partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from flowanchor.data.encoded import StoredLatents
from flowanchor.data.tar_members import NAMES
from flowanchor.data.tar_plan import TarPlan
from flowanchor.data.tar_reader import count_samples, decode_array, read_shard
from flowanchor.encoded.statistics import LatentStatistics
from flowanchor.encoding.caption_sources import TarCaptions, open_captions
from flowanchor.encoding.sources import TarSource, open_source
from flowanchor.errors import DataError
from flowanchor.plugins.data.webdataset import TarBatches

SHAPE = (2, 4, 4)


def block(name: bytes, size: int | bytes, kind: bytes = b"0", **fields: bytes) -> bytes:
    """A header with the right sum, whatever it says."""
    data = bytearray(512)
    told = size if isinstance(size, bytes) else b"%011o\0" % size
    places = {"name": (0, 100), "mode": (100, 8), "uid": (108, 8), "gid": (116, 8), "size": (124, 12),
              "linkname": (157, 100), "magic": (257, 8), "prefix": (345, 155)}  # fmt: skip
    values = {"name": name, "mode": b"0000644\0", "size": told, "magic": b"ustar\x0000", **fields}
    for field, value in values.items():
        start, width = places[field]
        data[start : start + width] = value[:width].ljust(width, b"\0")
    data[156:157] = kind
    data[148:156] = b" " * 8
    data[148:156] = b"%06o\0 " % sum(data)
    return bytes(data)


def member(name: bytes, content: bytes, kind: bytes = b"0", **fields: bytes) -> bytes:
    return block(name, len(content), kind, **fields) + content + bytes(-len(content) % 512)


def records(**values: bytes) -> bytes:
    """An extended header's content."""
    found = b""
    for key, value in values.items():
        body = b" %s=%s\n" % (key.replace("_", ".").encode(), value)
        length = len(body) + 1
        while len(str(length)) + len(body) != length:
            length += 1
        found += str(length).encode() + body
    return found


def array(values: np.ndarray | None = None, **settings) -> bytes:
    stream = io.BytesIO()
    np.save(stream, np.ones((2, *SHAPE), np.float32) if values is None else values, **settings)
    return stream.getvalue()


def described(description: str, content: bytes = b"", version: bytes = b"\1\0") -> bytes:
    """A .npy file whose header says this."""
    text = description.encode() + b"\n"
    return b"\x93NUMPY" + version + struct.pack("<H" if version[0] == 1 else "<I", len(text)) + text + content


@cache
def png() -> bytes:
    stream = io.BytesIO()
    Image.fromarray(np.arange(192, dtype=np.uint8).reshape(8, 8, 3)).save(stream, "PNG")
    return stream.getvalue()


def sample(key: bytes = b"0", **files: bytes | None) -> bytes:
    content = {"png": png(), "cls": b"1", "json": b'{"caption": "a"}', "npy": array(), **files}
    return b"".join(member(key + b"." + name.encode(), data) for name, data in content.items() if data is not None)


END = bytes(1024)
WHOLE = sample(b"0") + sample(b"d/1") + sample(b"2") + END


def crafted() -> Iterator[tuple[str, bytes]]:
    """Tars whose sums are right, and which lie, or hold something else than files."""
    sizes = (b"77777777777", b"-0000000001", b"-0000001000", b"0x10", b"1_0", b" 10", b"", b"9", b"\x80" + b"\xff" * 11,
             b"\xff" * 12, b"\x80" + bytes(3) + b"\x10" + bytes(7), b"00000000000", b"\xb2" * 11)  # fmt: skip
    for number, size in enumerate(sizes):
        yield f"size {size!r}", sample(b"0") + block(b"1.png", size) + png().ljust(1024, b"\0") + sample(b"2") + END
        yield f"first size {size!r}", block(b"1.png", size) + bytes(1024) + sample(b"2") + END
        for kind in b"Lx5gV":
            made = block(b"x", size, bytes([kind])) + bytes(1024)
            yield f"size {number} of {chr(kind)}", sample(b"0") + made + sample(b"2") + END
    for kind in range(256):
        if kind % 3 == 0 or 32 < kind < 127:
            extra = member(b"1.png", png(), bytes([kind]), linkname=b"/etc/passwd")
            yield f"kind {bytes([kind])!r}", sample(b"0") + extra + sample(b"2") + END
            empty = block(b"1.png", 0, bytes([kind]))
            yield f"empty kind {bytes([kind])!r}", sample(b"0") + empty + sample(b"2") + END
    for name in (b"../../up.png", b"/etc/absolute.png", b"", b".", b"..", b"/", b"d/", b".png", b"a" * 100,
                 b"\xff\xfe.png", b"\x1b[2J.png", b"a\nb.png", b"a.b.c.png", b"__meta__", b"\xc3\xa9.png"):  # fmt: skip
        for prefix in (b"", b"..", b"p" * 155):
            yield f"name {name!r} below {prefix[:3]!r}", sample(b"0") + member(name, png(), prefix=prefix) + END
    for magic in (b"ustar  \0", b"", b"tar", b"\xff" * 8):
        yield f"magic {magic!r}", member(b"0.png", png(), magic=magic, prefix=b"\1\2\3") + sample(b"1") + END
    for what, content in (
        ("path", records(path=b"1.png")), ("long path", records(path=b"x" * 5000 + b".png")),
        ("path of bytes", records(path=b"\xff\x1b.png")), ("size", records(size=b"3")),
        ("huge size", records(size=b"9" * 19)), ("size without end", records(size=b"9" * 5000)),
        ("negative size", records(size=b"-512")), ("size in other digits", records(size="²".encode())),
        ("sparse", records(GNU_sparse_major=b"1", GNU_sparse_minor=b"0", GNU_sparse_realsize=b"9" * 15)),
        ("sparse map", records(GNU_sparse_map=b"0,1," * 500)), ("no length", b"path=1.png\n"),
        ("zero length", b"0 a=b\n"),
        ("long length", b"9" * 4000 + b" a=b\n"), ("length beyond", b"99 a=b\n"), ("length of itself", b"2 "),
        ("digits", b"1" * 60_000), ("blanks", b" " * 60_000), ("many", records(comment=b"x") * 20_000),
        ("charset", records(hdrcharset=b"BINARY", path=b"\xe9.png")), ("mtime", records(mtime=b"nan", uid=b"-1")),
    ):  # fmt: skip
        for kind in b"xgX":
            yield f"pax {chr(kind)} {what}", member(b"h", content, bytes([kind])) + sample(b"0") + sample(b"2") + END
    yield "long names in a row", member(b"L", b"x" * 200 + b".png\0", b"L") * 3000 + sample(b"0") + END
    yield "extended headers in a row", member(b"x", records(path=b"a.png"), b"x") * 3000 + sample(b"0") + END
    yield "a long name of many bytes", member(b"L", b"x" * (NAMES + 1), b"L") + sample(b"0") + END
    yield "a long name of 8 GB", block(b"L", 8 * 10**9, b"L") + sample(b"0") + END
    yield (
        "a link to a link",
        block(b"1.png", 0, b"1", linkname=b"2.png") + block(b"2.png", 0, b"2", linkname=b"1.png") + END,
    )
    yield "two tars in one", WHOLE + sample(b"9") + END
    yield "text behind the end", WHOLE + b"signed by somebody"
    yield "zeros behind the end", WHOLE + bytes(100_000)
    yield "no file", END
    yield "nothing", b""
    yield "half a header", WHOLE[:300]
    yield "a key twice", sample(b"0") + sample(b"1") + sample(b"0") + END
    yield "the same files in a row", sample(b"0") * 2 + END
    yield "two images", sample(b"0", jpg=png()) + END
    yield "dots", sample(b"1.5") + sample(b"2.5") + END
    for kind, pack in (("gzip", partial(gzip.compress, compresslevel=1)), ("xz", partial(lzma.compress, preset=0))):
        yield f"{kind}", pack(WHOLE)
        yield f"{kind}, cut", pack(WHOLE)[:-20]
        yield f"{kind}, a bomb", pack(block(b"0.png", 2 * 10**9) + bytes(60_000_000))
        yield f"{kind}, a name that is a bomb", pack(block(b"L", 60_000_000, b"L") + bytes(60_000_000))


def contents(hostile) -> Iterator[tuple[str, dict[str, bytes]]]:
    """What the files of a sample may hold."""
    shape = "'fortran_order': False, 'shape': "
    body = np.ones((2, *SHAPE), np.float32).tobytes()
    arrays = {
        "objects": array(np.array([hostile.Explosive()], dtype=object)), "a pickle": pickle.dumps(hostile.Explosive()),
        "10^12 rows": described(f"{{'descr': '<f4', {shape}(1000000000000, 2, 4, 4)}}", body),
        "rows without end": described(f"{{'descr': '<f4', {shape}(10**5000,)}}", body),
        "a long number": described(f"{{'descr': '<f4', {shape}({'9' * 4000},)}}", body),
        "negative": described(f"{{'descr': '<f4', {shape}(-1, 2, 4, 4)}}", body),
        "two negatives": described(f"{{'descr': '<f4', {shape}(-2, -2, 4, 4)}}", body),
        "zero rows": array(np.ones((0, *SHAPE), np.float32)), "a number": array(np.float32(1)),
        "columns": array(np.asfortranarray(np.ones((2, *SHAPE), np.float32))),
        "structured": array(np.zeros(2, dtype=[("a", "<f4", SHAPE)])), "text": array(np.array(["a" * 9] * 2)),
        "complex": array(np.ones((2, *SHAPE), np.complex64)), "whole": array(np.ones((2, *SHAPE), np.int64)),
        "unsigned": array(np.ones((2, *SHAPE), np.uint8)), "booleans": array(np.ones((2, *SHAPE), bool)),
        "dates": array(np.zeros((2, *SHAPE), "datetime64[s]")), "cut": array()[:-7], "longer": array() + b"x",
        "no header": b"\x93NUMPY\1\0", "nothing": b"", "one row": array(np.ones((1, *SHAPE), np.float32)),
        "another shape": array(np.ones((2, 9, 9), np.float32)), "nested": described("(" * 9000),
        "code": described("__import__('os').system('touch x')"),
        "many sides": described(f"{{'descr': '<f4', {shape}{(1,) * 900}}}", body),
        "version 2": array().replace(b"NUMPY\1\0", b"NUMPY\2\0"),
        "version 9": array().replace(b"NUMPY\1\0", b"NUMPY\t\0"),
        "a wide type": described(f"{{'descr': '|V2000000000', {shape}(1,)}}", body),
        "a type of lists": described(f"{{'descr': {'[' * 200 + ']' * 200}, {shape}(1,)}}", body),
        "big-endian": array(np.ones((2, *SHAPE), ">f4")), "double": array(np.full((2, *SHAPE), 1e300)),
        "not finite": array(np.full((2, *SHAPE), np.nan, np.float32)),
    }  # fmt: skip
    yield from ((f"npy: {name}", {"npy": content}) for name, content in arrays.items())
    labels = ("²", "٣", "5" * 5000, "999999999", "-1", "", " ", "1.0", "1e3", "0x1", "1_0", "+1", "1\n", "\t2 ", "1 2",
              "None", "９", "18446744073709551617", "\ufeff1", "1\0", "2" * 100_000, "\x1b[2J")  # fmt: skip
    yield from ((f"cls: {text[:9]!r}", {"cls": text.encode()}) for text in labels)
    yield "cls: latin 1", {"cls": b"\xb2"}
    texts = (
        b"", b"null", b"[]", b"{", b"[" * 100_000, b'{"a":' * 50_000, b'{"caption": 1}',
        b'{"caption": ["a", 2, [], "b"]}',
        b'{"caption": "\\ud800"}', b'{"caption": "' + b"x" * 200_000 + b'"}', b"\xff\xfe{\0}\0", b'{"caption": NaN}',
        b'\xef\xbb\xbf{"caption": "a"}', b"9" * 5000, b'{"caption": "[[[[[["}',
        b'{"caption": "a", "caption": "b"}', b"\xe9",
    )  # fmt: skip
    yield from ((f"json: {text[:16]!r}", {"json": text}) for text in texts)


def readers(path: Path):
    """The three that read tars; what they read is the number of samples."""
    batches = TarBatches(
        [str(path)], TarPlan([4], 1, 0, 1, 1, 1, 0), StoredLatents(SHAPE, "sample", LatentStatistics(), 0), True, 3, 0
    )

    def classes() -> int:
        source = TarSource([path])
        source.digest()
        return sum(len(source.read(index)) > 0 for index in range(len(source)))

    def captions() -> int:
        source = TarCaptions([path])
        source.digest()
        return sum(len(source.read(index)) > 0 for index in range(len(source)))

    def trainer() -> int:
        samples = list(read_shard(str(path)))
        for one in samples:
            assert batches._batch([one], 0, np.zeros(1, dtype=np.int64)).x1.shape == (1, *SHAPE)
        return len(samples)

    return {"classes": classes, "captions": captions, "trainer": trainer}


def attempts(hostile, path: Path, case: str) -> dict[str, int | str]:
    """What each reader reads, or says."""
    found: dict[str, int | str] = {}
    for name, read in readers(path).items():
        counted: list[int] = []
        sentence = hostile.attempt(
            lambda counted=counted, read=read: counted.append(read()), path.parent, f"{name}: {case}"
        )
        assert sentence is None or path.name in sentence, f"{case}: {sentence}"
        found[name] = counted[0] if sentence is None else sentence
    return found


@pytest.fixture
def tar(hostile, tmp_path):
    path = tmp_path / "x.tar"
    path.write_bytes(WHOLE)
    assert attempts(hostile, path, "whole") == {"classes": 3, "captions": 3, "trainer": 3}
    return path


def test_every_reader_reads_or_tells(hostile, tar):
    """Some 600 tars, each by `encode.py` with classes and captions, and by the trainer."""
    cases = [*crafted(), *((what, sample(b"0") + sample(b"1", **files) + END) for what, files in contents(hostile))]
    cases += [(what, data) for what, data in hostile.mutations(WHOLE, 150, 1)]
    told = set()
    for what, data in cases:
        tar.write_bytes(data)
        told |= {f"{name} {isinstance(found, str)}" for name, found in attempts(hostile, tar, what).items()}
    assert len(told) == 6 and len(cases) > 450
    assert not hostile.TRACE.exists()


@pytest.mark.parametrize("kind", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_a_tar_that_ends_early_is_none(hostile, tar, kind):
    """Cut at every block, by nobody is it taken for a shorter one."""
    with tarfile.open(tar, "w", format=kind) as made:
        for number in range(3):
            for extension, content in (("png", png()), ("cls", b"1"), ("json", b'{"caption": "a"}'), ("npy", array())):
                info = tarfile.TarInfo(
                    f"{'long' * 40 if number == 1 and kind != tarfile.USTAR_FORMAT else ''}{number}.{extension}"
                )
                info.size = len(content)
                made.addfile(info, io.BytesIO(content))
        end = made.offset
    whole = tar.read_bytes()
    for size in range(0, end + 2049, 512):
        tar.write_bytes(whole[:size])
        found = attempts(hostile, tar, f"cut at {size}")
        if size >= end + 512:  # one of the two blocks of zeros is enough
            assert set(found.values()) == {3}, found
        else:
            assert all("is truncated" in str(sentence) for sentence in found.values()), (size, found)


def test_what_lies_in_a_compressed_tar_is_trained_on(tar):
    """It is unpacked while it is read; a bomb is not."""
    for pack in (gzip.compress, lzma.compress):
        tar.write_bytes(pack(WHOLE))
        assert [found.key for found in read_shard(str(tar))] == ["0", "d/1", "2"]
        with pytest.raises(DataError, match=r"x\.tar is compressed, .* decompress it"):
            open_source(str(tar))
        tar.write_bytes(pack(block(b"0.npy", 2 * 10**9) + bytes(10_000)))
        with pytest.raises(DataError, match=r"cannot be read to its end .*a member of 2\.0 GB"):
            list(read_shard(str(tar)))


# ------------------------------------------------------------------------------------------- nothing is lost in silence


def test_a_key_that_is_there_twice(tmp_path):
    def refused(content: bytes, sentence: str, read=open_source) -> None:
        (tmp_path / "x.tar").write_bytes(content)
        with pytest.raises(DataError, match=sentence):
            read(str(tmp_path))

    for read in (open_source, open_captions):
        refused(
            sample(b"a") + sample(b"b") + sample(b"a") + END, r"x\.tar holds a\.png twice: keys must be unique", read
        )
        refused(sample(b"a", jpg=png()) + END, r"two images of one key, a\.png and a\.jpg: leave one out", read)
        refused(
            sample(b"1.5") + sample(b"3") + END, r"holds 1\.5\.png, which is no image: .* write the key without", read
        )
    refused(member(b"a.cls", b"1") + sample(b"a") + END, r"holds a\.cls twice")
    refused(sample(b"a") * 2 + END, r"x\.tar holds a\.png twice", lambda root: list(read_shard(f"{root}/x.tar")))


def test_what_is_not_used_is_told(tmp_path):
    extra = {"mask.png": png(), "gif": b"GIF89a", "txt": b"a"}
    link = block(b"l.png", 0, b"2", linkname=b"a.png")
    (tmp_path / "x.tar").write_bytes(
        sample(b"a", npy=None, **extra) + sample(b"b", npy=None, cls=b"3") + member(b"c.cls", b"0") + link + END
    )
    source = open_source(str(tmp_path))
    assert source.names == ["x.tar/a", "x.tar/b"] and source.labels.tolist() == [1, 3]
    assert source.remarks == (
        "Not used, files in the tars: 1 .cls without an image, 1 .gif, 2 .json, 1 .mask.png, 1 .txt, 1 links.",
        "2 of 4 classes have no image: 0, 2.",
    )
    assert open_captions(str(tmp_path)).remarks == (
        "Not used, files in the tars: 3 .cls, 1 .gif, 1 .mask.png, 1 links.",
    )


def test_tars_of_one_name_in_two_folders(tmp_path):
    for folder in ("x", "y"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "0.tar").write_bytes(sample(b"a") + END)
    for read in (open_source, open_captions):
        assert read(f"{tmp_path}/{{x,y}}/0.tar").names == ["x/0.tar/a", "y/0.tar/a"]
        with pytest.raises(DataError, match=r"The tar .*x/0\.tar is there twice: name it once"):
            read(f"{tmp_path}/{{x,x}}/0.tar")


@pytest.mark.parametrize(
    "text, sentence",
    [
        ("²", r"a\.cls of .*x\.tar holds '²' and must hold a label"),
        ("5" * 5000, r"holds '5{20}\.\.\.' and must hold a label"),
        ("-1", "holds '-1'"),
        ("  ", "holds ''"),
        (b"\xb2", "holds '\ufffd'"),
        ("999999999", "Sample a of .*x.tar has label 999999999, more than a million classes: is that a label?"),
    ],
)
def test_labels_that_are_none(tmp_path, text, sentence):
    content = text if isinstance(text, bytes) else text.encode()
    (tmp_path / "x.tar").write_bytes(sample(b"a", cls=content) + END)
    with pytest.raises(DataError, match=sentence):
        open_source(str(tmp_path))


@pytest.mark.parametrize("dtype", ["complex64", "int64", "uint8", "bool"])
def test_latents_are_floating_point_numbers(dtype):
    with pytest.raises(ValueError, match=f"its array holds {dtype}, not floating-point numbers"):
        decode_array(array(np.ones((2, *SHAPE), dtype)))
    for kind in ("float16", "float32", "float64"):
        assert decode_array(array(np.ones((2, *SHAPE), kind))).shape == (2, *SHAPE)


def test_an_index_is_held_against_the_tars(hostile, tar):
    """Numbers that an index states decide how much memory the order takes."""
    entry = {"url": "x.tar", "nsamples": 3}
    good = {"shardlist": [entry]}
    for case in (
        b"", b"[]", b"null", b"{}", b"\xff", b"[" * 100_000, b'{"shardlist": 3}', b'{"shardlist": [1]}',
        b'{"shardlist": [{}]}', *(
            json.dumps({"shardlist": [{**entry, key: value}]}).encode()
            for key, value in (("nsamples", -1), ("nsamples", 1.5), ("nsamples", "3"), ("nsamples", None), ("url", 3),
                               ("nsamples", True), ("nsamples", 10**12), ("nsamples", 10**30), ("url", "y.tar"))
        ),
    ):  # fmt: skip
        (tar.parent / "index.json").write_bytes(case)
        said = hostile.attempt(lambda: count_samples([str(tar)], None), tar.parent, f"index {case[:60]!r}")
        assert said is not None and "index.json" in said, case[:60]
    (tar.parent / "index.json").write_text(json.dumps(good))
    assert count_samples([str(tar)], None) == [3]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="pipes in folders")
def test_a_pipe_is_no_tar(tmp_path):
    os.mkfifo(tmp_path / "x.tar")
    for read in (open_source, open_captions, lambda root: list(read_shard(f"{root}/x.tar"))):
        with pytest.raises(DataError, match=r"x\.tar cannot be read \(.*is no regular file\)"):
            read(str(tmp_path))
