"""A picture is what every viewer shows of its file: right way up, at its own brightness, on white; for all readers."""

from __future__ import annotations

import io
import os
import struct
import zlib
from collections import Counter

import numpy as np
import pytest
from PIL import Image, features

from flowanchor.data.picture_files import EXTENSIONS, find_pictures
from flowanchor.data.pictures import FORMATS, PictureError, open_picture, picture_size
from flowanchor.encoding.buckets import fit
from flowanchor.encoding.caption_sources import open_captions
from flowanchor.encoding.crop import square as cropped
from flowanchor.encoding.images import CroppedImages
from flowanchor.encoding.plan import plan_captions
from flowanchor.encoding.sources import FolderSource
from flowanchor.errors import DataError
from flowanchor.metrics.reference import open_reference
from flowanchor.plugins.data.image_folder import ImageFolderDataModule

RAMP = np.tile(np.linspace(0, 255, 32).astype(np.uint8), (32, 1))
DRAW = np.random.default_rng(0)
NOISE = DRAW.integers(0, 256, (32, 32, 3), dtype=np.uint8)


def saved(image: Image.Image, kind: str = "PNG", **settings) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **settings)
    return stream.getvalue()


def png(width: int, height: int, depth: int, colour: int, rows: np.ndarray, clear: bytes = b"") -> bytes:
    """By hand: Pillow writes no colours of 16 bits."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    pixels = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
    parts = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    parts += chunk(b"tRNS", clear) if clear else b""
    return b"\x89PNG\r\n\x1a\n" + parts + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def read(content: bytes, mode: str = "RGB") -> np.ndarray:
    return np.asarray(open_picture(content, mode))


def by_every_reader(folder, side: int) -> list[np.ndarray]:
    """The first picture of `folder/a` by trainer, both encoders and the reference, gray [H, W] each."""
    (folder / "t.csv").write_text(
        "file,caption\n" + "".join(f"a/{p.name},x\n" for p in sorted((folder / "a").iterdir()))
    )
    source, table = FolderSource(folder), open_captions(str(folder / "t.csv"))
    files, _ = plan_captions(table, [(side, side)], 10)
    data = ImageFolderDataModule(str(folder), size=side, num_classes=1, batch_size=1)
    trained = data.images("train").images._images[0]  # of everything, before the split
    return [
        tensor.float().mean(0).numpy()
        for tensor in (
            trained,
            CroppedImages(source, cropped, [((side, side), np.arange(1))])[0].images[0],
            CroppedImages(table, fit, [(files[0].size, np.arange(1))])[0].images[0],
            next(open_reference(str(folder / "a"), (3, side, side)).chunks(1))[0],
        )
    ]


# ------------------------------------------------------------------------------------------------------------ the depth


@pytest.mark.parametrize(
    "name, content",
    [
        ("a.png", saved(Image.fromarray(RAMP.astype("uint16") * 257))),
        ("a.tif", saved(Image.fromarray(RAMP.astype("uint16") * 257), "TIFF")),
        ("b.tif", saved(Image.fromarray(RAMP.astype(">u2") * 257), "TIFF")),
        ("c.tif", saved(Image.fromarray(RAMP.astype("int32") * 257), "TIFF")),
        ("f.tif", saved(Image.fromarray(RAMP.astype("float32") / 255), "TIFF")),
        ("a.pgm", saved(Image.fromarray(RAMP.astype("int32") * 257), "PPM")),
        ("a.jp2", saved(Image.fromarray(RAMP.astype("uint16") * 257), "JPEG2000")),
        ("a.pfm", saved(Image.fromarray(RAMP.astype("float32") / 255), "PPM")),
        ("rgb.png", png(32, 32, 16, 2, np.repeat(RAMP[..., None], 3, 2).astype(">u2") * 257)),
        ("l.png", saved(Image.fromarray(RAMP))),
    ],
)
def test_a_ramp_stays_one_at_any_depth(tmp_path, name, content):
    """16 and 32 bits and floating point, by all four readers; cut off at 255 they would be white, or black."""
    if name.rpartition(".")[2] == "jp2" and "JPEG2000" not in Image.OPEN:
        pytest.skip("this Pillow reads no JPEG 2000")
    (tmp_path / "a").mkdir()
    for number in range(2):
        (tmp_path / "a" / f"{number}{name}").write_bytes(content)
    found = by_every_reader(tmp_path, 32)
    for pixels in (read(content, "L"), read(content)[..., 0], *found):
        np.testing.assert_array_equal(pixels, RAMP)


def test_the_upper_bits_are_taken_of_gray_as_of_colour():
    values = DRAW.integers(0, 65536, (8, 8), dtype=np.uint16)
    gray = read(saved(Image.fromarray(values)), "L")
    colour = read(png(8, 8, 16, 2, np.repeat(values[..., None], 3, 2).astype(">u2")))
    np.testing.assert_array_equal(gray, values >> 8)
    np.testing.assert_array_equal(colour, np.repeat(gray[..., None], 3, 2))


@pytest.mark.parametrize(
    "content, reason",
    [
        (saved(Image.fromarray(RAMP.astype("float32")), "TIFF"), r"values from 0 to 255, and floating-point .* 0 to 1"),
        (saved(Image.fromarray(np.full((8, 8), np.nan, np.float32)), "TIFF"), "values from nan to nan"),
        (saved(Image.fromarray(RAMP.astype("int32")), "TIFF"), "values from 0 to 255 in 32 bits, .* 16 bits"),
        (saved(Image.fromarray(RAMP.astype("int32") * 1000), "TIFF"), "values from 0 to 255000 in 32 bits"),
        (saved(Image.fromarray(RAMP.astype("int32") - 9), "TIFF"), "values from -9 to 246 in 32 bits"),
    ],
)
def test_values_of_which_nobody_knows_what_white_is_are_refused(content, reason):
    with pytest.raises(PictureError, match=reason):
        open_picture(content, "RGB")


def test_tiffs_of_twelve_bits_and_of_white_zero():
    pixels = DRAW.integers(0, 256, (8, 8), dtype=np.uint16)
    image = Image.fromarray(pixels * 257)
    negative = saved(image, "TIFF", tiffinfo={262: 0})
    found = read(negative, "L")
    assert np.array_equal(found, 255 - pixels)
    packed = bytearray()
    for first, second in (pixels * 16).reshape(-1, 2).tolist():
        packed += (first << 12 | second).to_bytes(3, "big")
    tags = [(256, 3, 1, 8), (257, 3, 1, 8), (258, 3, 1, 12), (259, 3, 1, 1), (262, 3, 1, 1), (273, 4, 1, 8),
            (277, 3, 1, 1), (278, 3, 1, 8), (279, 4, 1, len(packed))]  # fmt: skip
    entries = b"".join(struct.pack("<HHII", *tag) for tag in tags)
    twelve = b"II*\0" + struct.pack("<I", 8 + len(packed)) + packed + struct.pack("<H", len(tags)) + entries + bytes(4)
    np.testing.assert_array_equal(read(twelve, "L"), pixels)


def test_pictures_of_one_bit_and_palettes():
    np.testing.assert_array_equal(read(saved(Image.fromarray(RAMP > 99)), "L"), (RAMP > 99) * np.uint8(255))
    few = Image.fromarray(NOISE).quantize(16)
    np.testing.assert_array_equal(read(saved(few)), np.asarray(few.convert("RGB")))


def test_colours_of_other_spaces():
    """CMYK and YCbCr as Pillow turns them; CIELAB, which it does not: mid-gray, and a red."""
    image = Image.fromarray(NOISE)
    for mode, kind in (("CMYK", "JPEG"), ("CMYK", "TIFF"), ("YCbCr", "TIFF")):
        content = saved(image.convert(mode), kind)
        try:
            wanted = np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))
        except OSError:  # Pillow 12 cannot read the YCbCr that it writes into a TIFF file
            with pytest.raises(PictureError, match="cannot be read as an image"):
                read(content)
            continue
        np.testing.assert_array_equal(read(content), wanted)
    # By their definition: L 53.7 is Y 0.216; L 54.3, a 80.8, b 69.9 is D50's red, here in whole numbers.
    for lab, expected in (((137, 128, 128), (128, 128, 128)), ((138, 209, 198), (255, 0, 0))):
        found = read(saved(Image.new("LAB", (8, 8), lab), "TIFF"))[0, 0]
        assert np.abs(found.astype(int) - expected).max() <= 6, found


# ------------------------------------------------------------------------------------------------------- transparency


def test_transparency_is_laid_on_white(tmp_path):
    """A white square on nothing whose hidden colour is black: white all over; half of black is mid-gray."""
    pixels = np.zeros((8, 8, 4), np.uint8)
    pixels[2:6, 2:6] = 255
    square = Image.fromarray(pixels)
    half = Image.fromarray(np.dstack([np.zeros((8, 8, 3), np.uint8), np.full((8, 8), 128, np.uint8)]))
    for kind in ("PNG", "WEBP", "TIFF"):
        content = saved(square, kind, **({"lossless": True, "exact": True} if kind == "WEBP" else {}))
        assert read(content).min() == 255 and read(content, "L").min() == 255
    assert set(np.unique(read(saved(half)))) == {127}
    assert set(np.unique(read(saved(half.convert("LA")), "L"))) == {127}
    for clear in (0, b"\0" + b"\xff" * 255):  # of a palette: one colour, or the opacity of each
        palette = Image.new("P", (8, 8), 0)
        palette.putpalette([0, 0, 0, 9, 9, 9])
        assert read(saved(palette, transparency=clear)).min() == 255
    gif = Image.new("P", (8, 8), 0)
    gif.putpalette([0, 0, 0, 9, 9, 9])
    assert read(saved(gif, "GIF", transparency=0)).min() == 255
    (tmp_path / "a").mkdir()
    for number in range(2):
        (tmp_path / "a" / f"{number}.png").write_bytes(saved(square))
    assert all(found.min() == 255 for found in by_every_reader(tmp_path, 8))


def test_one_colour_of_sixteen_bits_that_stands_for_nothing():
    gray = np.full((8, 8), 1000, ">u2")
    gray[:, 4:] = 2000
    for colour, rows, clear in (
        (0, gray, struct.pack(">H", 1000)),
        (2, np.repeat(gray[..., None], 3, 2), struct.pack(">HHH", 1000, 1000, 1000)),
    ):
        found = read(png(8, 8, 16, colour, rows, clear))
        assert found[:, :4].min() == 255 and found[:, 4:].max() == 2000 >> 8


def test_opaque_pictures_keep_every_bit():
    for mode, kind in (("RGB", "PNG"), ("RGB", "JPEG"), ("L", "JPEG"), ("RGBA", "PNG"), ("P", "PNG"), ("RGB", "WEBP")):
        content = saved(Image.fromarray(NOISE).convert(mode), kind)
        for wanted in ("RGB", "L"):
            expected = Image.open(io.BytesIO(content)).convert(wanted)
            np.testing.assert_array_equal(read(content, wanted), np.asarray(expected))


# -------------------------------------------------------------------------------------------------------- orientation


def turned(orientation: int, kind: str = "PNG", **settings) -> bytes:
    """Green below blue, 24 x 48, as a camera stores it that was held otherwise."""
    image = Image.new("RGB", (24, 48), (0, 0, 255))
    image.paste((0, 160, 0), (0, 24, 24, 48))
    image.paste((200, 0, 0), (0, 0, 8, 8))
    back = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # Pillow's transpositions, each the inverse
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = image if orientation == 1 else image.transpose(Image.Transpose(back[orientation]))
    return saved(stored, kind, exif=exif, **settings)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "WEBP", "AVIF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_photos_stand_upright(kind, orientation):
    """All eight ways of EXIF, against the picture itself; and the size that is told before it is decoded."""
    if not features.check(kind.lower()) and kind in ("WEBP", "AVIF"):
        pytest.skip(f"this Pillow reads no {kind}")
    settings = {"JPEG": {"quality": 95}, "WEBP": {"lossless": True}}.get(kind, {})
    content = turned(orientation, kind, **settings)
    found = read(content)
    assert found.shape == (48, 24, 3) and picture_size(content) == (24, 48)
    assert np.abs(found.astype(int) - read(turned(1))).mean() < (4 if kind in ("JPEG", "AVIF") else 0.01)
    if kind != "TIFF":  # which Pillow always turns
        stored = Image.open(io.BytesIO(content)).size
        assert open_picture(content, "RGB", upright=False).size == stored


def test_photos_stand_upright_for_every_reader(tmp_path):
    (tmp_path / "a").mkdir()
    square = Image.new("RGB", (32, 32), (0, 0, 255))
    square.paste((0, 160, 0), (0, 16, 32, 32))
    exif = Image.Exif()
    exif[0x0112] = 6
    for number in range(2):
        square.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "a" / f"{number}.jpg", exif=exif, quality=95)
    for found in by_every_reader(tmp_path, 32):  # gray: 85 above 53, whole rows
        assert found[2:14].mean() > 80 and found[18:30].mean() < 60, found
    source = FolderSource(tmp_path)
    as_stored = CroppedImages(source, cropped, [((32, 32), np.arange(1))], upright=False)[0].images[0].float().mean(0)
    assert as_stored[:, 2:14].mean() > 80 and as_stored[:, 18:30].mean() < 60


def test_a_photo_goes_to_the_bucket_of_its_upright_size(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (64, 32), (9, 9, 9)).save(tmp_path / "0.jpg", exif=exif)
    (tmp_path / "t.csv").write_text("file,caption\n0.jpg,x\n")
    files, _ = plan_captions(open_captions(str(tmp_path)), [(24, 48), (48, 24)], 10)
    assert [file.size for file in files] == [(48, 24)]


def test_an_orientation_behind_the_pixels_of_a_png_counts_for_nobody():
    """To know it, all pixels would have to be decoded where a size is asked for."""
    exif = Image.Exif()
    exif[0x0112] = 6
    content, told = saved(Image.new("RGB", (24, 12))), exif.tobytes()[6:]
    chunk = struct.pack(">I", len(told)) + b"eXIf" + told + struct.pack(">I", zlib.crc32(b"eXIf" + told))
    late = content[:-12] + chunk + content[-12:]
    assert Image.open(io.BytesIO(late)).getexif()[0x0112] == 6
    assert read(late).shape == (12, 24, 3) and picture_size(late) == (24, 12)


def test_damaged_exif_leaves_a_picture_as_it_is():
    content = saved(Image.fromarray(NOISE), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff\xff")
    assert read(content).shape == (32, 32, 3) and picture_size(content) == (32, 32)


def test_of_several_pictures_the_first(tmp_path):
    frames = [Image.new("L", (8, 8), value) for value in (40, 90, 140)]
    for kind in ("GIF", "TIFF", "WEBP", "PNG"):
        found = read(saved(frames[0], kind, save_all=True, append_images=frames[1:]), "L")
        assert np.abs(found.astype(int) - 40).max() <= 2, kind


# ------------------------------------------------------------------------------------------------- which files are read


def test_extensions_are_those_that_pillow_knows_for_the_formats():
    Image.init()
    known = {name for name, kind in Image.registered_extensions().items() if kind in (*FORMATS, "MPO")}
    assert known <= set(EXTENSIONS), known - set(EXTENSIONS)
    assert {".jfif", ".jpe", ".gif", ".avif", ".jp2", ".webp"} <= set(EXTENSIONS)


def test_every_reader_finds_the_same_files_and_names_the_rest(tmp_path):
    """Links, loops, hidden files, macOS's, pipes, capitals and rare extensions."""
    content, jpeg = saved(Image.fromarray(NOISE)), saved(Image.fromarray(NOISE), "JPEG")
    for folder in ("a", "b", "elsewhere", "__MACOSX", ".ipynb_checkpoints", "a/.hidden"):
        (tmp_path / "set" / folder).mkdir(parents=True) if folder != "elsewhere" else (tmp_path / folder).mkdir()
    root = tmp_path / "set"
    wanted = [
        root / "a" / "0.jfif",
        root / "a" / "1.JPE",
        root / "a" / "2.PNG",
        root / "b" / "3.gif",
        root / "b" / "4.png",
    ]
    for path in wanted:
        path.write_bytes(jpeg if path.suffix.lower() in (".jfif", ".jpe") else content)
    for path in (tmp_path / "elsewhere" / "5.png", root / "__MACOSX" / "6.png", root / ".ipynb_checkpoints" / "7.png",
                 root / "a" / ".hidden" / "8.png", root / "a" / "._0.jfif", root / "a" / "x.heic"):  # fmt: skip
        path.write_bytes(content)
    (root / "a" / "extra").symlink_to(tmp_path / "elsewhere")
    (root / "a" / "loop").symlink_to(".")
    (root / "b" / "top").symlink_to("..")
    os.mkfifo(root / "a" / "pipe.png")
    expected = ["a/0.jfif", "a/1.JPE", "a/2.PNG", "a/extra/5.png", "b/3.gif", "b/4.png"]
    told = f"Not used, files in {root}: 1 .heic, {{hidden}} hidden, 1 that are no regular files."

    source = FolderSource(root)
    assert source.names == expected and source.class_names == ("a", "b")
    assert source.labels.tolist() == [0, 0, 0, 0, 1, 1]
    assert source.remarks == (told.format(hidden=4),)
    loose = FolderSource(root, labelled=False)
    assert loose.names == expected and loose.remarks == source.remarks
    for labelled in (True, False):
        data = ImageFolderDataModule(str(root), 8, num_classes=2 * labelled, labelled=labelled, batch_size=2)
        everything = data.images("train").images._images
        assert sorted(path.relative_to(root).as_posix() for path in everything.files) == expected
    assert [path.relative_to(root).as_posix() for path in open_reference(str(root), (3, 32, 32)).files] == expected


def test_what_the_trainer_and_the_reference_leave_out_is_printed(tmp_path, monkeypatch):
    lines: list[str] = []
    for module in ("plugins.data.image_folder", "metrics.reference_folder"):
        monkeypatch.setattr(f"flowanchor.{module}.rank_zero_info", lines.append)
    for name in ("0.png", "1.png"):
        (tmp_path / name).write_bytes(saved(Image.fromarray(NOISE)))
    (tmp_path / "2.heic").write_bytes(b"x")
    ImageFolderDataModule(str(tmp_path), 8, labelled=False, batch_size=1).images("train")
    open_reference(str(tmp_path), (3, 32, 32))
    assert lines == [f"Not used, files in {tmp_path}: 1 .heic."] * 2
    (tmp_path / "0.png").unlink()
    (tmp_path / "1.png").unlink()
    readers = (
        lambda: FolderSource(tmp_path, False),
        lambda: open_reference(str(tmp_path), (3, 32, 32)),
        lambda: ImageFolderDataModule(str(tmp_path), 8, labelled=False, batch_size=1).images("train"),
    )
    for refused in readers:
        with pytest.raises(DataError, match=r"no images in .*PNG, JPEG.* 1 \.heic"):
            refused()


def test_links_among_the_class_folders(tmp_path):
    """A class may be a link; two that are one folder, or one that holds all, are no classes."""
    (tmp_path / "set" / "a").mkdir(parents=True)
    (tmp_path / "far").mkdir()
    for path in (tmp_path / "set" / "a" / "0.png", tmp_path / "far" / "1.png"):
        path.write_bytes(saved(Image.fromarray(NOISE)))
    (tmp_path / "set" / "b").symlink_to(tmp_path / "far")
    (tmp_path / "set" / "loop").symlink_to(".")
    source = FolderSource(tmp_path / "set")
    assert source.class_names == ("a", "b") and source.names == ["a/0.png", "b/1.png"]
    (tmp_path / "set" / "c").symlink_to("a")
    with pytest.raises(DataError, match="class folders a and c of .*set are one folder"):
        FolderSource(tmp_path / "set")


def test_marks_tell_one_content_from_another(tmp_path):
    path, left_out = tmp_path / "0.png", Counter[str]()
    path.write_bytes(saved(Image.fromarray(NOISE)))
    before = find_pictures(tmp_path, left_out)[path]
    assert find_pictures(tmp_path)[path] == before and not left_out
    os.utime(path, ns=(1, 1))
    assert find_pictures(tmp_path)[path] != before
