"""Images become files of latents, once each, the same whoever makes them and however often they are interrupted."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

from flowanchor.base.noise import sample_noise
from flowanchor.encoded.manifest import LatentManifest
from flowanchor.encoding import encoder as module
from flowanchor.encoding.crop import center_crop
from flowanchor.encoding.encoder import Encoder
from flowanchor.encoding.latents import Encoding, Latents
from flowanchor.encoding.sources import open_source
from flowanchor.errors import ConfigError, DataError
from flowanchor.interfaces import Codec, Posterior

ENCODING = Encoding(image_size=16, shard_size=10)
CLASSES, PER_CLASS = ("ant", "bee", "cat"), 8


class Halving(Codec):
    """Averages 2 x 2 pixels; the log-variance is what is left of them."""

    name, downsampling, latent_channels = "halving", 2, 3

    def decode(self, latents: Tensor) -> Tensor:
        return F.interpolate(latents, scale_factor=2)

    def encode(self, images: Tensor) -> Tensor:
        return self.posterior(images).mean

    def posterior(self, images: Tensor) -> Posterior:
        mean = F.avg_pool2d(images, 2)
        return Posterior(mean, (F.avg_pool2d(images.square(), 2) - mean.square() + 0.01).log())


class Overflowing(Halving):
    """One value is lost where an image is bright."""

    def posterior(self, images: Tensor) -> Posterior:
        mean = F.avg_pool2d(images, 2)
        mean[mean.mean((1, 2, 3)) > 0.5, 0, 0, 0] = float("inf")
        return Posterior(mean)


def make_image(index: int, label: int) -> bytes:
    draw = np.random.default_rng((index, label))
    height, width = draw.integers(20, 40, 2)
    pixels = draw.integers(0, 120, (height, width, 3)) + 40 * label
    buffer = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """24 JPEGs in three class folders."""
    for label, name in enumerate(CLASSES):
        (tmp_path / "images" / name).mkdir(parents=True)
        for index in range(PER_CLASS):
            (tmp_path / "images" / name / f"{index}.jpg").write_bytes(make_image(index, label))
    return tmp_path / "images"


@pytest.fixture
def tars(images: Path, tmp_path: Path) -> Path:
    """The same images in the same order, in two tars of jpg and cls."""
    files = [(path, label) for label, name in enumerate(CLASSES) for path in sorted((images / name).iterdir())]
    folder = tmp_path / "tars"
    folder.mkdir()
    for number, part in enumerate((files[:10], files[10:])):
        with tarfile.open(folder / f"{number}.tar", "w") as tar:
            for path, label in part:
                key = f"{path.parent.name}_{path.stem}"
                add_member(tar, f"{key}.jpg", path.read_bytes())
                add_member(tar, f"{key}.cls", str(label).encode())
    return folder


def add_member(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    header = tarfile.TarInfo(name)
    header.size = len(content)
    tar.addfile(header, io.BytesIO(content))


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def latents_of(root, encoding: Encoding = ENCODING, codec: Codec | None = None) -> Latents:
    return Latents(open_source(str(root)), codec or Halving(), encoding)


def encode(
    root, out: Path, encoding: Encoding = ENCODING, codec=None, processes: int = 1, **settings
) -> LatentManifest:
    """All processes' parts, one after the other."""
    form = latents_of(root, encoding, codec)
    out.mkdir(exist_ok=True)
    manifest = None
    for process in reversed(range(processes)):
        encoder = Encoder(form, out, *form.plan(), 4, process=process, processes=processes, **settings)
        said = form.settings("None", 4)
        encoder.record.claim(said)
        list(encoder.encode(encoder.pending()))
        manifest = encoder.complete(said)
    assert manifest is not None
    return manifest


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}


def expected(images: Path, index: int, flip: bool, seed: int = 0) -> torch.Tensor:
    """The latents of one image, by hand."""
    path = sorted(images.rglob("*.jpg"))[index]
    pixels = pil_to_tensor(center_crop(Image.open(path).convert("RGB"), 16))[None].float() / 127.5 - 1
    posterior = Halving().posterior(pixels.flip(-1) if flip else pixels)
    noise = sample_noise(seed, [index], (3, 8, 8), draw=int(flip)).float()
    return (posterior.mean + (posterior.logvar / 2).exp() * noise)[0]


# -------------------------------------------------------------------------------------------------------- what is made


def test_the_released_layout(images, tmp_path):
    manifest = encode(images, tmp_path / "out")
    names = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert names == [f"latents_rank00_shard00{i}.safetensors" for i in range(3)]
    assert [shard.count for shard in manifest.shards] == [10, 10, 4]
    for index in (0, 9, 13, 23):  # as the authors' loader reads one sample
        with safe_open(tmp_path / "out" / names[index // 10], "pt", device="cpu") as file:
            row = index % 10
            assert file.get_slice("labels")[row : row + 1].item() == index // 8
            assert file.get_slice("labels").get_dtype() == "I64"
            for name, flip in (("latents", False), ("latents_flip", True)):
                torch.testing.assert_close(file.get_slice(name)[row], expected(images, index, flip))


def test_statistics_are_those_of_all_latents(images, tmp_path):
    encode(images, tmp_path / "out")
    values = [load_file(path) for path in sorted((tmp_path / "out").glob("*.safetensors"))]
    everything = torch.cat([v[name] for v in values for name in ("latents", "latents_flip")]).double()
    stored = torch.load(tmp_path / "out" / "latents_stats.pt", weights_only=True)
    assert stored["mean"].shape == stored["std"].shape == (1, 3, 1, 1)
    torch.testing.assert_close(stored["mean"].double(), everything.mean((0, 2, 3), keepdim=True))
    std = everything.std((0, 2, 3), keepdim=True, correction=0)
    torch.testing.assert_close(stored["std"].double(), std, rtol=1e-6, atol=0)


def test_the_manifest(images, tmp_path):
    manifest = encode(images, tmp_path / "out")
    assert manifest == LatentManifest.read(tmp_path / "out")
    assert (manifest.count, manifest.shape, manifest.num_classes) == (24, (3, 8, 8), 3)
    assert manifest.class_names == ("ant", "bee", "cat") and manifest.flips and manifest.unreadable == ()
    assert manifest.codec == {"name": "halving", "digest": "halving"}


def test_tars_with_an_index(images, tmp_path):
    out = tmp_path / "out"
    encode(images, out, replace(ENCODING, layout="webdataset", shuffle=True))
    index = json.loads((out / "index.json").read_text())
    assert index["__kind__"] == "wids-shard-index-v1"
    assert sum(shard["nsamples"] for shard in index["shardlist"]) == 24
    order = []
    for shard in index["shardlist"]:
        assert (out / shard["url"]).stat().st_size == shard["filesize"]
        with tarfile.open(out / shard["url"]) as tar:
            members = {m.name: tar.extractfile(m).read() for m in tar}
        keys = [name.removesuffix(".npy") for name in members if name.endswith(".npy")]
        assert len(keys) == shard["nsamples"]
        for key in keys:
            values = torch.from_numpy(np.load(io.BytesIO(members[f"{key}.npy"]), allow_pickle=False))
            torch.testing.assert_close(values[0], expected(images, int(key), False))
            torch.testing.assert_close(values[1], expected(images, int(key), True))
            assert int(members[f"{key}.cls"]) == int(key) // 8
        order += [int(key) for key in keys]
    assert sorted(order) == list(range(24)) and order != sorted(order)


def test_moments_and_no_flips(images, tmp_path):
    manifest = encode(images, tmp_path / "out", replace(ENCODING, values="moments", flips=False))
    stored = load_file(tmp_path / "out" / manifest.shards[0].file)
    assert set(stored) == {"latents", "labels"} and stored["latents"].shape == (10, 6, 8, 8)
    mean, logvar = stored["latents"][3].chunk(2)
    noise = sample_noise(0, [3], (3, 8, 8)).float()[0]
    torch.testing.assert_close(mean + (logvar / 2).exp() * noise, expected(images, 3, False))
    assert manifest.shape == (3, 8, 8)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_the_bytes(images, tmp_path, dtype):
    manifest = encode(images, tmp_path / "out", replace(ENCODING, dtype=dtype))
    stored = load_file(tmp_path / "out" / manifest.shards[0].file)["latents"]
    assert stored.dtype == getattr(torch, dtype)
    torch.testing.assert_close(stored[0].float(), expected(images, 0, False), rtol=1e-2, atol=1e-2)


# ---------------------------------------------------------------------------------------- the same, whoever makes it


@pytest.mark.parametrize("layout", ["safetensors", "webdataset"])
def test_two_processes_make_the_same_files(images, tmp_path, layout):
    encoding = replace(ENCODING, layout=layout)
    encode(images, tmp_path / "one", encoding)
    encode(images, tmp_path / "two", encoding, processes=2)
    one, two = contents(tmp_path / "one"), contents(tmp_path / "two")
    if layout == "webdataset":  # the set is named after its folder
        one["index.json"] = one["index.json"].replace(b'"one"', b'"two"')
    assert one == two


def test_folder_and_tars_make_the_same_latents(images, tars, tmp_path):
    encode(images, tmp_path / "a")
    encode(tars, tmp_path / "b")
    for path in (tmp_path / "a").glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()
    encode(f"{tars}/{{0..1}}.tar", tmp_path / "c")
    assert LatentManifest.read(tmp_path / "c").shards == LatentManifest.read(tmp_path / "b").shards


def test_an_interrupted_run_goes_on(images, tmp_path):
    encode(images, tmp_path / "whole")
    form, out = latents_of(images), tmp_path / "out"
    out.mkdir()
    said = form.settings("None", 4)
    encoder = Encoder(form, out, *form.plan(), 4)
    encoder.record.claim(said)
    first = encoder.encode(encoder.pending())
    next(first)
    assert encoder.complete(said) is None and not (out / "manifest.json").exists()
    before = (out / encoder.files[0].file).stat().st_mtime_ns
    encode(images, out)
    assert contents(out) == contents(tmp_path / "whole")
    assert (out / encoder.files[0].file).stat().st_mtime_ns == before, "the finished file was made again"


def test_a_file_that_is_gone_or_cut_is_made_again(images, tmp_path):
    manifest = encode(images, tmp_path / "out")
    before = contents(tmp_path / "out")
    (tmp_path / "out" / manifest.shards[1].file).unlink()
    cut = tmp_path / "out" / manifest.shards[2].file
    cut.write_bytes(cut.read_bytes()[:-100])
    assert manifest.missing(tmp_path / "out") == [manifest.shards[1].file, manifest.shards[2].file]
    encode(images, tmp_path / "out")
    assert contents(tmp_path / "out") == before


def test_other_settings_are_refused(images, tmp_path):
    encode(images, tmp_path / "out")
    with pytest.raises(ConfigError, match=r"other settings \(seed was 0 and is 1\)"):
        encode(images, tmp_path / "out", replace(ENCODING, seed=1))
    shutil.copy(images / "ant" / "0.jpg", images / "ant" / "9.jpg")
    with pytest.raises(ConfigError, match="images was "):
        encode(images, tmp_path / "out")


# --------------------------------------------------------------------------------------------------- replaced images


def test_a_replaced_image_is_encoded_again_and_no_other_file(images, tars, tmp_path):
    """By the sizes and times of the files; the set is then the one that is made of the new images at once."""
    for root in (images, tars):
        out = tmp_path / f"out_{root.name}"
        before = encode(root, out)
        times = {shard.file: (out / shard.file).stat().st_mtime_ns for shard in before.shards}
        if root is images:
            (root / "bee" / "3.jpg").write_bytes(make_image(77, 1))
        else:
            (root / "0.tar").write_bytes((root / "0.tar").read_bytes())  # written anew
        (out / "manifest.json").unlink()
        after = encode(root, out)
        made = [file for file, time in times.items() if (out / file).stat().st_mtime_ns != time]
        assert made == [before.shards[number].file for number in ((1,) if root is images else (0,))]
        assert after.shards == encode(root, tmp_path / f"anew_{root.name}").shards
        assert before.source["files"] != after.source["files"]


def test_replaced_images_of_a_half_made_set(images, tmp_path):
    """Two processes, of which the first made its files of the old images: no file of the set has any."""
    form, out = latents_of(images), tmp_path / "out"
    out.mkdir()
    first = Encoder(form, out, *form.plan(), 4, process=0, processes=2)
    first.record.claim(form.settings("None", 4))
    assert len(list(first.encode(first.pending()))) == 2
    for path in images.rglob("*.jpg"):
        path.write_bytes(make_image(99, 0))
    encode(images, out, processes=2)
    encode(images, tmp_path / "anew")
    assert contents(out) == contents(tmp_path / "anew")


def test_a_repaired_image_is_taken_by_the_same_command(images, tmp_path):
    bad, whole = images / "bee" / "3.jpg", (images / "bee" / "3.jpg").read_bytes()
    bad.write_bytes(whole[:300])
    (images / "cat" / "7.jpg").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"Once they are repaired, the same command makes .*shard001.*shard002.* again"):
        encode(images, tmp_path / "out", max_unreadable=1)
    bad.write_bytes(whole)
    (images / "cat" / "7.jpg").write_bytes(whole)
    assert encode(images, tmp_path / "out").count == 24


def test_sets_that_do_not_say_what_their_images_were_like_stay(images, tmp_path):
    """As an earlier version made them: without sizes and times, and without turning photos."""
    encode(images, tmp_path / "out", replace(ENCODING, upright=False))
    for path in (tmp_path / "out" / ".encoding").glob("*.json"):
        content = json.loads(path.read_text())
        if isinstance(content, dict):
            path.write_text(json.dumps({k: v for k, v in content.items() if k not in ("stamp", "upright")}))
    (images / "bee" / "3.jpg").write_bytes(make_image(77, 1))
    with pytest.raises(ConfigError, match="upright was False and is True"):
        encode(images, tmp_path / "out")
    form = latents_of(images, replace(ENCODING, upright=False))
    assert Encoder(form, tmp_path / "out", *form.plan()).pending() == []


def test_the_folder_is_claimed_without_hard_links(images, tmp_path, monkeypatch):
    """File systems of USB sticks, Windows shares and containers have none."""
    from flowanchor.encoding import record

    monkeypatch.setattr("os.link", lambda *_: pytest.fail("a hard link"))
    encode(images, tmp_path / "out")
    claimed = record.EncodingRecord(tmp_path / "claimed")
    claimed.claim({"seed": 0})
    claimed.claim({"seed": 0})
    with pytest.raises(ConfigError, match="seed was 0 and is 1"):
        claimed.claim({"seed": 1})
    monkeypatch.setattr(record, "PATIENCE", 0.1)
    (claimed.folder / "settings.json").write_text('{"se')
    with pytest.raises(DataError, match=r"settings\.json is damaged: delete it"):
        claimed.claim({"seed": 0})


def test_a_claim_that_is_being_written_is_waited_for(tmp_path):
    from threading import Timer

    from flowanchor.encoding.record import EncodingRecord

    record = EncodingRecord(tmp_path)
    record.folder.mkdir()
    path = record.folder / "settings.json"
    path.touch()
    writing = Timer(0.2, path.write_text, ['{"seed": 0}'])
    writing.start()
    record.claim({"seed": 0})
    writing.join()


# ------------------------------------------------------------------------------------------------------------ bad input


def test_pictures_of_one_colour_are_told_early_and_by_their_reason(images, tmp_path):
    for path in images.rglob("*.jpg"):
        Image.new("RGB", (20, 20), (255, 0, 0)).save(path, quality=100)
    with (
        pytest.warns(
            UserWarning, match=r"All latents of latents_rank00_shard000\.safetensors have one value in channel"
        ),
        pytest.raises(DataError, match=r"Channel \d of all latents has the one value .* pictures of one flat colour"),
    ):
        encode(images, tmp_path / "out", replace(ENCODING, values="moments"))


def test_unreadable_images_are_listed_and_counted(images, tmp_path):
    whole = encode(images, tmp_path / "whole")
    bad = images / "bee" / "3.jpg"
    bad.write_bytes(bad.read_bytes()[:300])
    (images / "cat" / "7.jpg").write_text("no image")
    manifest = encode(images, tmp_path / "out", max_unreadable=2)
    assert manifest.count == 22 and [shard.count for shard in manifest.shards] == [10, 9, 3]
    assert [name.split(":")[0] for name in manifest.unreadable] == ["bee/3.jpg", "cat/7.jpg"]
    stored = load_file(tmp_path / "out" / manifest.shards[1].file)
    kept = [index for index in range(10, 20) if index != 11]
    assert stored["labels"].tolist() == [index // 8 for index in kept]
    reference = load_file(tmp_path / "whole" / whole.shards[1].file)
    torch.testing.assert_close(stored["latents"][1:], reference["latents"][2:])


def test_too_many_unreadable_images_stop_it(images, tmp_path):
    for name in ("bee/3", "cat/7"):
        (images / f"{name}.jpg").write_text("no image")
    with pytest.raises(DataError, match=r"2 images cannot be read.*max_unreadable=2.*now 1.*shard001.*shard002"):
        encode(images, tmp_path / "out", max_unreadable=1)
    with pytest.raises(DataError, match=r"1 images cannot be read \(bee/3\.jpg: "):
        encode(images, tmp_path / "other", max_unreadable=0)


def test_latents_that_are_not_finite_name_the_image(images, tmp_path):
    Image.new("RGB", (20, 20), (255, 255, 255)).save(images / "cat" / "5.jpg")
    with pytest.raises(DataError, match=r"latents of cat/5\.jpg are not finite"):
        encode(images, tmp_path / "out", codec=Overflowing())


def test_a_disk_that_would_be_full_is_noticed_first(images, tmp_path, monkeypatch):
    form = latents_of(images)
    encoder = Encoder(form, tmp_path, *form.plan())
    needed = 24 * (2 * 3 * 8 * 8 * 4 + 8)
    for free in (needed - 1, needed):
        monkeypatch.setattr(module.shutil, "disk_usage", lambda _, free=free: shutil._ntuple_diskusage(free, 0, free))
        if free < needed:
            with pytest.raises(DataError, match="make room"):
                encoder.check_disk(encoder.pending())
        else:
            encoder.check_disk(encoder.pending())


def test_a_disk_that_is_full_loses_nothing(images, tmp_path, monkeypatch):
    from flowanchor.encoding import writers

    save, calls = writers.save_tensors, []

    def full(*arguments, **settings):
        calls.append(1)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        save(*arguments, **settings)

    monkeypatch.setattr(writers, "save_tensors", full)
    with pytest.raises(DataError, match="The disk is full.*shard001"):
        encode(images, tmp_path / "out")
    encode(images, tmp_path / "out")
    assert len(calls) == 4, "the first file was kept"


@pytest.mark.parametrize(
    "spoil, sentence",
    [
        (lambda tar: tar.write_bytes(tar.read_bytes()[:9000]), r"1\.tar is (truncated|damaged)"),
        (lambda tar: tar.write_bytes(b"no tar" * 200), r"1\.tar is damaged"),
    ],
)
def test_a_damaged_tar_is_named(tars, spoil, sentence):
    spoil(tars / "1.tar")
    with pytest.raises(DataError, match=sentence):
        open_source(str(tars))


@pytest.mark.parametrize(
    "members, settings, sentence",
    [
        ({"a.jpg": b"x"}, {}, r"Sample a of .*x\.tar has no \.cls"),
        ({"a.jpg": b"x", "a.cls": b"dog"}, {}, r"a\.cls of .*x\.tar holds 'dog'"),
        ({"a.jpg": b"x", "a.cls": b"7"}, {"num_classes": 7}, r"Sample a of .*x\.tar has label 7"),
        ({"a.txt": b"x"}, {}, r"no images in .*x\.tar"),
    ],
)
def test_bad_samples_of_tars(tmp_path, members, settings, sentence):
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for name, content in members.items():
            add_member(tar, name, content)
    with pytest.raises(DataError, match=sentence):
        open_source(str(tmp_path / "x.tar"), **settings)


def test_what_lies_beside_tars_is_told(tars):
    (tars / "train").mkdir()
    (tars / "notes.txt").touch()
    (tars / "._0.tar").write_bytes(b"\0\5\x16\7")  # macOS's
    source = open_source(str(tars))
    assert len(source) == 24
    assert source.remarks == (f"Not used, files in {tars} beside the tars: 1 .txt, 1 folders, 1 hidden.",)


def test_a_preview_is_no_second_image(tmp_path):
    """A GIF is an image where its key has no other; the images stay in the tar's order."""
    picture = make_image(0, 0)
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for name in ("a.gif", "a.cls", "b.gif", "b.jpg", "b.cls", "c.jpg", "c.cls"):
            add_member(tar, name, b"0" if name.endswith("cls") else picture)
    source = open_source(str(tmp_path))
    assert source.names == ["x.tar/a", "x.tar/b", "x.tar/c"]
    assert source.remarks == ("Not used, files in the tars: 1 .gif.",)


def test_sources_that_are_none(tmp_path, images):
    (tmp_path / "images.tar.gz").write_bytes(b"\x1f\x8b")
    with pytest.raises(DataError, match=r"images\.tar\.gz is neither a folder nor a plain \.tar: unpack it"):
        open_source(str(tmp_path / "images.tar.gz"))
    with pytest.raises(ConfigError, match="data.root=FOLDER"):
        open_source(None)
    with pytest.raises(DataError, match="no folder"):
        open_source(str(tmp_path / "nowhere"))
    (images / "dog").mkdir()
    with pytest.raises(DataError, match="no images in the class folder .*dog"):
        open_source(str(images))
    assert open_source(str(images), labelled=False).num_classes == 0
    (images / "dog").rmdir()
    with pytest.raises(DataError, match="has 3 classes, but data.num_classes=4"):
        open_source(str(images), num_classes=4)
