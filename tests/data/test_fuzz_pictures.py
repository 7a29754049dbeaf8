"""Pictures that a stranger or an accident made: each reads, or is told in one sentence; nothing is run."""

from __future__ import annotations

import io
import os
import shutil
import struct
import zipfile
import zlib
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from PIL import Image, features
from PIL.PngImagePlugin import PngInfo

from flowanchor.data.pictures import PIXELS, RATIO, SIDE, PictureError, open_picture, picture_size
from flowanchor.encoding.buckets import fit
from flowanchor.encoding.caption_sources import TableSource
from flowanchor.encoding.crop import center_crop, square
from flowanchor.encoding.images import CroppedImages
from flowanchor.encoding.plan import plan_captions
from flowanchor.encoding.sources import FolderSource
from flowanchor.errors import DataError
from flowanchor.metrics.reference import open_reference
from flowanchor.plugins.data.image_folder import FolderImages, ImageFolderDataModule


def picture(mode: str = "RGB", width: int = 24, height: int = 18) -> Image.Image:
    draw = np.random.default_rng(width)
    if mode == "I;16":
        return Image.fromarray(draw.integers(0, 65536, (height, width), dtype=np.uint16))
    return Image.fromarray(draw.integers(0, 256, (height, width, 3), dtype=np.uint8)).convert(mode)


def saved(image: Image.Image, kind: str, **settings) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **settings)
    return stream.getvalue()


def valid_pictures() -> dict[str, bytes]:
    text = PngInfo()
    text.add_text("Comment", "x" * 400, zip=True)
    text.add_itxt("Title", "y" * 400, zip=True)
    frames = [picture("P"), picture("P", 24, 18).rotate(90)]
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "described"
    found = {
        "rgb.png": saved(picture(), "PNG", pnginfo=text),
        "palette.png": saved(picture("P"), "PNG"),
        "alpha.png": saved(picture("RGBA"), "PNG"),
        "deep.png": saved(picture("I;16"), "PNG"),
        "plain.jpg": saved(picture(), "JPEG", exif=exif),
        "progressive.jpg": saved(picture(), "JPEG", progressive=True),
        "cmyk.jpeg": saved(picture("CMYK"), "JPEG"),
        "animated.gif.png": saved(frames[0], "GIF", save_all=True, append_images=frames[1:], comment=b"c" * 300),
        "raw.tif": saved(picture(), "TIFF", exif=exif),
        "packed.tiff": saved(picture(), "TIFF", compression="tiff_deflate"),
        "lzw.tiff": saved(picture("L"), "TIFF", compression="tiff_lzw"),
        "rgb.bmp": saved(picture(), "BMP"),
        "gray.pgm": saved(picture("L"), "PPM"),
        "text.ppm": b"P3\n# numbers\n5 4\n255\n" + b" ".join(b"%d" % (n * 4) for n in range(60)) + b"\n",
    }
    if features.check("webp"):
        found["lossy.webp"] = saved(picture(), "WEBP")
        found["lossless.webp"] = saved(picture("RGBA"), "WEBP", lossless=True)
    return found


def png_chunks(data: bytes) -> list[tuple[bytes, bytes]]:
    found, at = [], 8
    while at < len(data):
        length = int.from_bytes(data[at : at + 4], "big")
        found.append((data[at + 4 : at + 8], data[at + 8 : at + 8 + length]))
        at += 12 + length
    return found


def as_png(chunks: list[tuple[bytes, bytes]]) -> bytes:
    """With sums that are right, so that it is the content which is looked at."""
    parts = [struct.pack(">I", len(c)) + k + c + struct.pack(">I", zlib.crc32(k + c)) for k, c in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def header(width: int, height: int, depth: int = 8, color: int = 2, interlaced: int = 0) -> tuple[bytes, bytes]:
    return b"IHDR", struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, interlaced)


def lying_pngs() -> Iterator[tuple[str, bytes]]:
    """Headers that say something else than the pixels, and chunks that unpack to much."""
    chunks = png_chunks(valid_pictures()["rgb.png"])
    rest = chunks[1:]
    sides = (0, 1, 3, 24, 255, 10_000, 65_535, 1_000_000, 0x7FFFFFFF, 0xFFFFFFFF)
    for width in sides:
        for height in sides:
            yield f"{width} x {height}", as_png([header(width, height), *rest])
    for depth in (0, 1, 2, 4, 16, 255):
        for color in (0, 2, 3, 4, 6, 7):
            for interlaced in (0, 1, 9):
                yield f"depth {depth} {color} {interlaced}", as_png([header(24, 18, depth, color, interlaced), *rest])
    bomb = zlib.compress(bytes(200_000_000), 1)
    for kind in (b"zTXt", b"iTXt", b"iCCP"):
        before = b"key\0\1\0\0\0" if kind == b"iTXt" else b"key\0\0"
        yield f"bomb {kind!r}", as_png([chunks[0], (kind, before + bomb), *rest])
    yield "pixels that are a bomb", as_png([chunks[0], (b"IDAT", bomb), (b"IEND", b"")])
    yield "many texts", as_png([chunks[0], *[(b"zTXt", b"key\0\0" + zlib.compress(bytes(900_000)))] * 200, *rest])
    for kind in (b"PLTE", b"tRNS", b"gAMA", b"cHRM", b"pHYs", b"eXIf", b"acTL", b"fcTL", b"fdAT", b"sRGB", b"tIME"):
        for content in (b"", b"\xff" * 3, b"\xff" * 300):
            yield f"{kind!r} of {len(content)}", as_png([chunks[0], (kind, content), *rest])
    yield "no end", as_png(chunks[:-1])
    yield "pixels first", as_png([*rest, chunks[0]])
    yield "two headers", as_png([chunks[0], header(60_000, 60_000), *rest])


EPS = (
    b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 24 18\n%%EndComments\n(touched) (w) file closefile\nshowpage\n%%EOF\n"
)


def foreign_files() -> Iterator[tuple[str, bytes]]:
    """Contents that are no pictures of pixels, or are two things at once, under a picture's name."""
    png, stream = valid_pictures()["rgb.png"], io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("a.png", png)
    yield "EPS", EPS
    yield "EPS in DOS's wrapping", struct.pack("<IIIIIIIH", 0xC6D3D0C5, 30, len(EPS), 0, 0, 0, 0, 0xFFFF) + EPS
    yield "PostScript", b"%!PS\n(a) (w) file\n"
    yield "PDF", b"%PDF-1.4\n1 0 obj\n<< /Type /Catalog >>\nendobj\n"
    yield (
        "SVG",
        b"<?xml version='1.0'?><svg xmlns='http://www.w3.org/2000/svg'><image href='file:///etc/passwd'/></svg>",
    )
    yield "zip", stream.getvalue()
    yield "PNG and zip", png + stream.getvalue()
    yield "IM", b"Image type: RGB\r\nName: x\r\nImage size (x*y): 24*18\r\n".ljust(511, b"\0") + b"\x1a" + bytes(1296)
    yield "FPX", b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(2000)
    yield "WMF", b"\xd7\xcd\xc6\x9a" + bytes(200)
    yield "XBM", b"#define a_width 24\n#define a_height 18\nstatic char a_bits[] = {\n0x00\n};"
    yield "pickle", b"\x80\x02cos\nsystem\n(U\x04truetR."
    yield "HTML", b"<html>not found</html>"
    yield "empty", b""
    yield "zeros", bytes(100_000)
    yield "XPM", b'/* XPM */\nstatic char *x[] = {"24 18 1 1", "a c None"};'
    yield "PCX", b"\x0a\x05\x01\x08" + struct.pack("<HHHH", 0, 0, 65535, 65535) + bytes(116)
    yield (
        "GIF of 65535 x 65535",
        b"GIF89a" + struct.pack("<HHBBB", 65535, 65535, 0, 0, 0) + b",\0\0\0\0\1\0\1\0\0\2\2D\1\0;",
    )
    yield (
        "BMP of a negative height",
        b"BM" + struct.pack("<IIIIiiHHIIiiII", 54, 0, 54, 40, 9, -(1 << 31), 1, 24, 0, 0, 1, 1, 0, 0),
    )
    yield "PPM of many pixels", b"P6 99999 99999 255\n"
    yield "PPM of a number without end", b"P6 " + b"9" * 100_000
    yield "PNM of text", b"P3 24 18 255\n" + b"1" * 300_000
    yield "TIFF that points to itself", b"II*\0" + struct.pack("<IHI", 8, 0, 8)
    yield (
        "WebP of 16383 x 16383",
        b"RIFF" + struct.pack("<I", 22) + b"WEBPVP8L" + struct.pack("<IBI", 9, 0x2F, 0x0FFFFFFF) + b"\0" * 5,
    )


def damaged(hostile) -> Iterator[tuple[str, str, bytes]]:
    """Name of the file, what was done to it, content."""
    for number, (name, content) in enumerate(valid_pictures().items()):
        yield name, "whole", content
        for what, data in hostile.mutations(content, 60, number):
            yield name, what, data
    for what, data in (*lying_pngs(), *foreign_files()):
        yield "x.png", what, data


def test_every_reader_reads_or_tells(hostile, tmp_path):
    """Up to some 1,300 files, each by the trainer, by `encode.py` with classes and captions, and by the reference."""
    read, cases = 0, list(damaged(hostile))
    folder = tmp_path / "set" / "a"
    folder.mkdir(parents=True)
    table = tmp_path / "set" / "t.csv"
    for name, what, content in [("warm.png", "whole", valid_pictures()["rgb.png"]), *cases]:
        for old in folder.iterdir():
            old.unlink()
        (folder / name).write_bytes(content)
        table.write_text(f'file,caption\na/{name},"one"\n')
        told = {}

        def encoded(told=told):
            source = FolderSource(tmp_path / "set")
            batch = CroppedImages(source, square, [((16, 16), np.arange(1))])[0]
            told["encode"] = batch.unreadable or None
            assert len(batch.images) + len(batch.unreadable) == 1

        def captioned(told=told):
            source = TableSource(table)
            files, unreadable = plan_captions(source, [(16, 16), (16, 32)], 10)
            batch = CroppedImages(source, fit, [(files[0].size, np.arange(1))])[0] if files else None
            told["captions"] = unreadable or batch.unreadable or None

        def trained(name=name):
            images = FolderImages([folder / name], None, folder, 3, 8)
            assert images[0].shape == (3, 8, 8)

        def referred():
            reference = open_reference(str(folder), (3, 16, 16), crop=True)
            assert next(reference.chunks(1)).shape == (1, 3, 16, 16)

        case = f"{name}, {what}"
        for reader in (encoded, captioned):
            assert hostile.attempt(reader, tmp_path, case) is None
        sentences = [hostile.attempt(reader, tmp_path, case) for reader in (trained, referred)]
        for lines in told.values():
            for line in lines or ():
                hostile.check_sentence(line, case)
        verdicts = {told["encode"] is None, told["captions"] is None, *(s is None for s in sentences)}
        assert len(verdicts) == 1, f"{case}: the readers differ: {told}, {sentences}"
        assert what != "whole" or verdicts == {True}, f"{case}: {sentences}"
        read += verdicts == {True}
    assert len(cases) > 1200 * min(hostile.scale, 1) and 0.1 < read / len(cases) < 0.8


# ------------------------------------------------------------------------------------------------- what one must hold


def test_no_program_is_started_for_what_is_inside(hostile, tmp_path, monkeypatch):
    """Pillow draws PostScript by Ghostscript, whatever the file is called."""
    from PIL import EpsImagePlugin

    started = []
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *a, **k: started.append(a))
    for name, content in foreign_files():
        if name not in ("PNG and zip",):
            with pytest.raises(
                PictureError, match=r"^The file cannot be read as an image \(.*\): repair or remove it\.$"
            ):
                open_picture(content, "RGB")
    assert not started


def test_limits_are_told_before_a_pixel_is_decoded(monkeypatch):
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda *_: pytest.fail("decoded"))
    for width, height, reason in (
        (1, 1, "1 x 1 pixels: a side must have 4 at least"),
        (8000, 1, "8000 x 1 pixels: a side must have 4 at least"),
        (8000, 8, "8000 x 8 pixels: one side may be 100 times the other at most"),
        (12_000, 12_000, "12000 x 12000 pixels: 134,217,728 at most"),
    ):
        content = saved(Image.new("1", (width, height)), "PNG")
        assert len(content) < 30_000
        for look in (lambda data: open_picture(data, "RGB"), picture_size):
            with pytest.raises(PictureError, match=reason):
                look(content)
    assert SIDE * RATIO == 400 and picture_size(saved(Image.new("1", (400, 4)), "PNG")) == (400, 4)
    assert PIXELS == 134_217_728


def test_a_jpeg_of_many_passes_is_refused():
    """Each pass over all pixels takes some bytes of the file only."""
    plain = saved(Image.new("L", (6000, 5000), 90), "JPEG", progressive=True)
    last = plain[plain.rindex(b"\xff\xda") : -2]
    open_picture(plain, "RGB")
    with pytest.raises(PictureError, match="in 306 passes take too long"):
        open_picture(plain[:-2] + last * 300 + plain[-2:], "RGB")


def test_a_line_of_pixels_is_cut_before_it_is_scaled(hostile, tmp_path):
    """Scaled first, it would have had 2,048,000 x 256 pixels."""
    line = Image.new("RGB", (8000, 1), (9, 9, 9))
    for cut in (lambda: center_crop(line, 256), lambda: fit(line, (256, 256))):
        assert hostile.attempt(lambda cut=cut: torch.equal, tmp_path, "warm") is None
        assert hostile.attempt(cut, tmp_path, "8000 x 1") is None
        assert cut().size == (256, 256) and cut().getextrema() == ((9, 9),) * 3


def test_a_huge_picture_is_named_by_the_trainer(tmp_path):
    (tmp_path / "a").mkdir()
    Image.new("1", (20000, 10000)).save(tmp_path / "a" / "huge0.png")
    for number in (1, 2):
        shutil.copy(tmp_path / "a" / "huge0.png", tmp_path / "a" / f"huge{number}.png")
    data = ImageFolderDataModule(str(tmp_path), size=8, num_classes=1, batch_size=2)
    with pytest.raises(DataError, match=r"a/huge\d\.png cannot be read as an image \(.*200000000 pixels.*remove it"):
        next(iter(data.train_dataloader()))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="pipes in folders")
def test_pipes_and_devices_are_no_pictures(tmp_path):
    """Opened, they would be waited on for ever."""
    (tmp_path / "a").mkdir()
    for number in range(3):
        picture(width=16, height=16).save(tmp_path / "a" / f"{number}.png")
    os.mkfifo(tmp_path / "a" / "x.png")
    os.symlink("/dev/zero", tmp_path / "a" / "z.png")
    names = ["0.png", "1.png", "2.png"]
    assert [file.name for file in open_reference(str(tmp_path), (3, 16, 16)).files] == names
    for labelled in (True, False):
        data = ImageFolderDataModule(str(tmp_path), 8, num_classes=int(labelled), labelled=labelled, batch_size=2)
        assert len(data.images("train")) + len(data.images("heldout")) == 3
    assert FolderSource(tmp_path).names == [f"a/{name}" for name in names]
    (tmp_path / "t.csv").write_text('file,caption\na/x.png,b\n/dev/zero,c\na,d\na/0.png,e\n"a\0b",f\n')
    files, unreadable = plan_captions(TableSource(tmp_path / "t.csv"), [(16, 16)], 10)
    assert files[0].indices.tolist() == [3] and len(unreadable) == 4
    assert all("is no" in line for line in unreadable), unreadable


def test_names_that_are_no_text(tmp_path):
    """Bytes that are no UTF-8, and codes that a terminal would obey."""
    (tmp_path / "a").mkdir()
    for name in (b"\xe9.png", b"\x1b[2Jx.png", b"plain.png"):
        (tmp_path / "a" / os.fsdecode(name)).write_bytes(valid_pictures()["rgb.png"] if name != b"\xe9.png" else b"no")
    source = FolderSource(tmp_path)
    assert len(source.digest()) == 64
    batch = CroppedImages(source, square, [((16, 16), np.arange(3))])[0]
    assert batch.unreadable == ["a/\\udce9.png: cannot identify image file"]
    data = ImageFolderDataModule(str(tmp_path), size=8, num_classes=1, batch_size=2)
    assert len(data.images("train").digest()) == 64
    (tmp_path / os.fsdecode(b"\xff")).mkdir()
    with pytest.raises(DataError, match=r"class folder .*udcff is not UTF-8: rename it"):
        FolderSource(tmp_path)
