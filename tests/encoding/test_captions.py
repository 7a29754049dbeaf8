"""Captions: sources, buckets, and files that are the same whoever makes them, killed or not."""

from __future__ import annotations

import io
import json
import math
import os
import pickle
import shutil
import signal
import subprocess
import sys
import tarfile
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from flowanchor.encoded.captions import CaptionFile
from flowanchor.encoded.manifest import CaptionManifest
from flowanchor.encoding.buckets import bucket_sizes, fit, nearest
from flowanchor.encoding.caption_sources import open_captions
from flowanchor.encoding.captions import Captioned, CaptionEncoding
from flowanchor.encoding.encoder import Encoder
from flowanchor.encoding.plan import HEADER, plan_captions
from flowanchor.errors import ConfigError, DataError
from flowanchor.plugins.codecs.identity import Identity
from flowanchor.plugins.data.captioned import CaptionedDataModule
from flowanchor.text.base import MaskedTokens, PooledTokens, TextEncoder, Tokens, TwoTexts

ENCODING = CaptionEncoding(image_size=40, max_ratio=1.5, multiple=8, shard_size=5, negative="bad")
SIZES = {"wide": (48, 32), "tall": (32, 48), "square": (40, 40)}  # width, height
ROOT = Path(__file__).parents[2]


def picture(number: int) -> Image.Image:
    size = list(SIZES.values())[number % 3]
    draw = np.random.default_rng(number)
    return Image.fromarray(draw.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


def caption(number: int) -> str | list[str]:
    return [f"picture {number}", f"number {number}"] if number % 4 == 0 else f"picture {number}"


def as_table(folder: Path, kind: str = "jsonl") -> Path:
    folder.mkdir()
    for number in range(24):
        picture(number).save(folder / f"{number:02d}.png")
    if kind == "jsonl":
        rows = [json.dumps({"file": f"{n:02d}.png", "caption": caption(n)}) for n in range(24)]
    else:
        rows = ["file,caption", *(f'{n:02d}.png,"picture {n}"' for n in range(24))]
    (folder / f"table.{kind}").write_text("\n".join(rows))
    return folder


def as_tars(folder: Path) -> Path:
    folder.mkdir()
    for part in range(2):
        with tarfile.open(folder / f"{part}.tar", "w") as tar:
            for number in range(12 * part, 12 * part + 12):
                stream = io.BytesIO()
                picture(number).save(stream, "PNG")
                text = ("json", json.dumps({"caption": caption(number)})) if part else ("txt", f"picture {number}")
                for name, content in (
                    (f"{number:02d}.png", stream.getvalue()),
                    (f"{number:02d}.{text[0]}", text[1].encode()),
                ):
                    header = tarfile.TarInfo(name)
                    header.size = len(content)
                    tar.addfile(header, io.BytesIO(content))
    return folder


class Letters(TextEncoder):
    """One embedding per letter."""

    name, width = "letters", 4

    def encode(self, prompts):
        return [
            Tokens(torch.tensor([[ord(c), i, 1, 0] for i, c in enumerate(p)], dtype=torch.float32).reshape(-1, 4))
            for p in prompts
        ]

    def fingerprint(self):
        return "letters"


@pytest.mark.parametrize("make", [as_table, lambda folder: as_table(folder, "csv"), as_tars])
def test_sources(make, tmp_path):
    source = open_captions(str(make(tmp_path / "data")))
    assert len(source) == 24 and not source.uncaptioned
    assert source.captions[5] == ("picture 5",)
    with Image.open(io.BytesIO(source.read(5))) as image:
        assert np.array_equal(np.asarray(image), np.asarray(picture(5)))
    if make is not as_tars and source.names[0].endswith("png") and len(source.captions[0]) > 1:
        assert source.captions[0] == ("picture 0", "number 0")


def test_images_without_a_caption_are_named(tmp_path):
    folder = as_table(tmp_path / "data")
    rows = [json.dumps({"file": f"{n:02d}.png", "caption": "" if n in (3, 7) else "x"}) for n in range(24)]
    (folder / "table.jsonl").write_text("\n".join(rows))
    source = open_captions(str(folder))
    assert source.uncaptioned == ["03.png: no caption", "07.png: no caption"] and len(source) == 22
    with pytest.raises(DataError, match=r"2 images .* no caption \(03.png: no caption; .*max_unreadable=2 .*now 1"):
        form = Captioned(source, Identity(), Letters(), ENCODING)
        Encoder(form, tmp_path, *form.plan(), max_unreadable=1)


def test_bad_sources(tmp_path):
    with pytest.raises(ConfigError, match="data.root=FOLDER"):
        open_captions(None)
    with pytest.raises(DataError, match="There is no folder"):
        open_captions(str(tmp_path / "nowhere"))
    with pytest.raises(DataError, match="0 tables .* and 0 tars"):
        open_captions(str(tmp_path))
    folder = as_table(tmp_path / "data")
    with pytest.raises(DataError, match="names no image under 'image' .it has file, caption."):
        open_captions(str(folder), file="image")
    with (folder / "table.jsonl").open("a") as file:
        file.write('\n{"file": "00.png", "caption": "again"}')
    with pytest.raises(DataError, match="table.jsonl lists the image 00.png twice"):
        open_captions(str(folder))


@pytest.mark.parametrize("side, ratio", [(1024, 2.0), (512, 1.5), (64, 1.0)])
def test_buckets(side, ratio):
    sizes = bucket_sizes(side, ratio)
    assert (side, side) in sizes
    for height, width in sizes:
        assert height % 16 == width % 16 == 0 and (width, height) in sizes
        assert max(height / width, width / height) <= ratio + 1e-6
        assert abs(math.log(height * width / side**2)) < 0.15
    if ratio == 1:
        assert sizes == [(64, 64)]


def test_images_go_to_the_nearest_ratio_and_fill_it():
    sizes = [(32, 48), (48, 32), (40, 40)]
    assert nearest((600, 900), sizes) == (32, 48) and nearest((501, 500), sizes) == (40, 40)
    image = Image.new("RGB", (100, 100), (255, 0, 0))
    image.paste((0, 0, 255), (0, 40, 100, 60))
    fitted = fit(image, (16, 32))
    assert fitted.size == (32, 16)
    middle = np.asarray(fitted)[8]
    assert (middle[:, 2] > 200).all(), "the centre stays"
    assert fit(picture(0), (32, 48)).tobytes() == picture(0).tobytes(), "an image of that size is taken as it is"


def test_bad_sizes():
    with pytest.raises(ConfigError, match="no multiple of 16: use for example 992"):
        bucket_sizes(1000)
    with pytest.raises(ConfigError, match="at least 1"):
        bucket_sizes(64, 0.5)


def encode(out: Path, source, process: int = 0, processes: int = 1, stop_after: int | None = None):
    form = Captioned(source, Identity(), Letters(), ENCODING)
    encoder = Encoder(form, out, *form.plan(), 2, process=process, processes=processes)
    settings = form.settings("None", 2)
    out.mkdir(exist_ok=True)
    encoder.record.claim(settings)
    for number, _ in enumerate(encoder.encode(encoder.pending()), 1):
        if number == stop_after:
            return None
    return None if process else encoder.complete(settings)


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}


def test_one_two_and_interrupted_processes_make_the_same_files(tmp_path):
    source = open_captions(str(as_table(tmp_path / "data")))
    manifest = encode(tmp_path / "one", source)
    assert manifest.count == 24 and set(manifest.sizes) == {(32, 48), (48, 32), (40, 40)} and manifest.shape == (3, 1)
    encode(tmp_path / "two", source, 1, 2)
    assert encode(tmp_path / "two", source, 0, 2) == manifest
    encode(tmp_path / "stopped", source, stop_after=2)
    (tmp_path / "stopped" / "captions-00003.safetensors.partial").write_bytes(b"cut off")
    assert encode(tmp_path / "stopped", source) == manifest
    (tmp_path / "stopped" / "captions-00003.safetensors.partial").unlink(missing_ok=True)
    assert content(tmp_path / "one") == content(tmp_path / "two") == content(tmp_path / "stopped")
    assert CaptionManifest.read(tmp_path / "one") == manifest
    torch.testing.assert_close(
        load_file(tmp_path / "one" / "negative.safetensors")["text"], Letters().encode(["bad"])[0].tokens
    )


def test_replaced_pictures_go_to_the_files_of_their_size(tmp_path):
    """Which pictures a file holds follows from all their sizes: what was made of other ones is made again."""
    folder = as_table(tmp_path / "data")
    before = encode(tmp_path / "out", open_captions(str(folder)))
    picture(1).save(folder / "00.png")  # tall, and was wide
    source = open_captions(str(folder))
    (tmp_path / "out" / "manifest.json").unlink()
    after = encode(tmp_path / "out", source)
    assert after.shards != before.shards and after.source["files"] != before.source["files"]
    assert content(tmp_path / "out") == content_of_new(tmp_path, source)


def content_of_new(folder: Path, source) -> dict[str, bytes]:
    encode(folder / "anew", source)
    return content(folder / "anew")


def test_a_disk_that_would_be_full_is_noticed_first(tmp_path, monkeypatch):
    form = Captioned(open_captions(str(as_table(tmp_path / "data"))), Identity(), Letters(), ENCODING)
    encoder = Encoder(form, tmp_path, *form.plan())
    needed = 8 * (2 * 32 * 48 + 40 * 40) * 3 * 4
    for free in (needed, 2 * needed):
        monkeypatch.setattr(shutil, "disk_usage", lambda _, free=free: shutil._ntuple_diskusage(free, 0, free))
        if free == needed:
            with pytest.raises(DataError, match="make room"):
                encoder.check_disk(encoder.pending())
        else:
            encoder.check_disk(encoder.pending())


def test_what_is_in_a_file(tmp_path):
    source = open_captions(str(as_table(tmp_path / "data")))
    manifest = encode(tmp_path / "out", source)
    seen = {}
    for shard, size in zip(manifest.shards, manifest.sizes, strict=True):
        file = CaptionFile(tmp_path / "out" / shard.file)
        for row, captions in enumerate(file.texts()):
            latent = file.latents([row])[0]
            assert latent.shape == (3, 1, *size) and file.captions(row) == len(captions)
            for number, text in enumerate(captions):
                torch.testing.assert_close(file.text(row, number)["tokens"], Letters().encode([text])[0].tokens)
            seen[captions[0]] = latent
    assert sorted(seen) == sorted(f"picture {n}" for n in range(24))
    pixels = torch.from_numpy(np.asarray(picture(0)).copy()).permute(2, 0, 1).float() / 127.5 - 1
    torch.testing.assert_close(seen["picture 0"][:, 0], pixels)


def test_pixels_are_encoded_as_they_come(tmp_path, monkeypatch):
    """A file of a thousand large images would not fit memory undone: no more than a batch is read ahead."""
    source, events = open_captions(str(as_table(tmp_path / "data"))), []
    encoding = CaptionEncoding(image_size=48, max_ratio=1, shard_size=24)

    def read(index, count=None, real=source.read):
        events.append(1)
        return real(index, count)

    class Watching(Identity):
        def encode(self, images):
            events.append(-len(images))
            return super().encode(images)

    monkeypatch.setattr(source, "read", read)
    form = Captioned(source, Watching(), Letters(), encoding)
    files, _ = form.plan()
    events.clear()
    encoder = Encoder(form, tmp_path / "out", files, batch_size=4)
    (tmp_path / "out").mkdir()
    encoder.record.claim({})
    assert [finished.shard.count for finished in encoder.encode(encoder.pending())] == [24]
    ahead = np.cumsum(events)
    assert ahead[-1] == 0 and ahead.max() == 4, ahead


@pytest.mark.parametrize("make", [as_table, as_tars])
def test_sizes_are_told_by_the_beginning_of_a_file(make, tmp_path, monkeypatch):
    """A header is read, and the whole file only where the header is longer."""
    source, asked = open_captions(str(make(tmp_path / "data"))), []

    def read(index, count=None, real=source.read):
        asked.append(count)
        return real(index, count)

    monkeypatch.setattr(source, "read", read)
    sizes = [(32, 48), (48, 32), (48, 48)]
    whole = plan_captions(source, sizes, shard_size=24)
    assert asked == [HEADER] * 24
    monkeypatch.setattr("flowanchor.encoding.plan.HEADER", 20)  # of a PNG: the signature, and less than the size
    again = plan_captions(source, sizes, shard_size=24)
    assert asked[24:] == [20, None] * 24
    assert [(f.size, f.indices.tolist()) for f in whole[0]] == [(f.size, f.indices.tolist()) for f in again[0]]
    assert len(source.read(0, 20)) == 20 and source.read(0, 20) == source.read(0)[:20]


def test_the_program_on_two_processes(tmp_path):
    """The command of the documentation, with a real text encoder; run again, it has nothing to do."""
    folder = as_table(tmp_path / "data")
    words = [
        "data=captions", f"data.root={folder}", "codec=identity", "text_encoder=minilm", "image_size=64",
        "num_workers=0", "shard_size=6", f"out={tmp_path / 'out'}",
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    program = [str(ROOT / "src" / "encode.py"), *words]
    done = subprocess.run(
        [sys.executable, *launcher, *program], env=environment, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stdout + done.stderr
    manifest = CaptionManifest.read(tmp_path / "out")
    assert manifest.count == 24 and manifest.text_width == 384 and len(set(manifest.sizes)) >= 3
    again = subprocess.run([sys.executable, *program], env=environment, capture_output=True, text=True, timeout=200)
    assert again.returncode == 0 and "already: 24 captioned images in 3 sizes" in again.stdout
    other = subprocess.run(
        [sys.executable, *program, "image_size=48"], env=environment, capture_output=True, text=True, timeout=200
    )
    assert (
        other.returncode != 0
        and "holds an encoding with other settings (image_size was 64 and is 48)" in other.stderr.replace("\n", " ")
    )


KILLED = """
import os, signal
from flowanchor.encoding import encoder as files
from flowanchor.programs.encode import main

finished, digest = [], files.sha256

def kill(path):
    finished.append(path)
    if len(finished) == 3:
        os.truncate(path, path.stat().st_size // 2)
        os.kill(os.getpid(), signal.SIGKILL)
    return digest(path)

files.sha256 = kill
main()
"""


def test_killed_in_the_middle_of_a_file_and_started_again(tmp_path):
    """The command, by SIGKILL; what it goes on to make is, byte for byte, what it makes undisturbed."""
    folder = as_table(tmp_path / "data")
    words = [
        "data=captions", f"data.root={folder}", "codec=identity", "text_encoder=minilm", "image_size=64",
        "num_workers=0", "shard_size=4",
    ]  # fmt: skip
    (tmp_path / "killed.py").write_text(KILLED)

    def run(program: Path, out: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(program), *words, f"out={tmp_path / out}"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)

    killed = run(tmp_path / "killed.py", "again")
    assert killed.returncode == -signal.SIGKILL, killed.stdout + killed.stderr
    left = content(tmp_path / "again")
    assert len([name for name in left if name.endswith(".safetensors")]) == 2 and "manifest.json" not in left
    for out in ("again", "whole"):
        done = run(ROOT / "src" / "encode.py", out)
        assert done.returncode == 0, done.stdout + done.stderr
    assert content(tmp_path / "again") == content(tmp_path / "whole")
    assert {
        name: content(tmp_path / "whole")[name] for name in left if name.endswith(".safetensors")
    }.items() <= left.items()


class Several(Letters):
    """The letters, in one of the other kinds; nothing may be drawn is said in another way than what is to be drawn."""

    def __init__(self, kind) -> None:
        super().__init__()
        self.kind = kind

    def encode(self, prompts):
        return [self.made(prompt, 0.0) for prompt in prompts]

    def encode_negative(self, prompt):
        return self.made(prompt, 0.5)

    def made(self, prompt, offset):
        tokens = Letters.encode(self, [prompt])[0].tokens + offset
        mask = torch.arange(len(tokens)) != 1
        fields = {
            "tokens": tokens[:, None].expand(-1, 2, -1) if self.kind is MaskedTokens else tokens,
            "mask": mask,
            "pooled": torch.full((5,), len(prompt) + offset),
            "tokens_2": tokens[::2, :3],
            "mask_2": ~mask[::2],
        }
        return self.kind(**{name: fields[name] for name in self.kind._fields})


@pytest.mark.parametrize("kind", [MaskedTokens, PooledTokens, TwoTexts])
def test_texts_of_more_than_tokens(kind, tmp_path):
    """Written, and brought to a network as they were: masks, vectors, a second text; and the negative prompt's."""
    source, encoder = open_captions(str(as_table(tmp_path / "data"))), Several(kind)
    encoding = CaptionEncoding(40, 1, 8, dtype="bfloat16", shard_size=24, negative="bad")
    form = Captioned(source, Identity(), encoder, encoding)
    runner = Encoder(form, tmp_path / "out", *form.plan(), batch_size=3)
    (tmp_path / "out").mkdir()
    for _ in runner.encode(runner.pending()):
        pass
    assert runner.complete(form.settings("float32", 3)) is not None
    data = CaptionedDataModule(str(tmp_path / "out"), 3, 1, 40, 40, 4, batch_size=24)
    assert type(data.null_condition) is kind
    for ours, wanted in zip(data.null_condition, encoder.encode_negative("bad"), strict=True):
        assert torch.equal(ours, wanted)
    data.setup("fit")
    examples = data.examples("train")
    prompts = data.fixed_prompts(24)
    assert len(prompts) == 24
    for prompt, text in prompts.items():
        for ours, wanted in zip(text, encoder.encode([prompt])[0], strict=True):
            exact = wanted.bfloat16().float() if wanted.is_floating_point() else wanted
            assert ours.dtype == exact.dtype and torch.equal(ours, exact)
    batch = pickle.loads(pickle.dumps(examples.__getitems__(list(range(24)))))  # as a worker hands it over
    assert type(batch.cond) is kind and all(len(value) == 24 for value in batch.cond)
    if "mask" in kind._fields:
        first = source.captions[0][0]
        assert batch.cond.mask.dtype == torch.bool and batch.cond.mask[:, len("picture 10") :].sum() == 0
        assert batch.cond.mask[1].sum() == len(source.captions[1][0]) - 1, first


def test_texts_that_no_file_holds(tmp_path):
    Odd = namedtuple("Odd", "words")
    encoder = Several(Odd)
    encoder.encode = lambda prompts: [Odd(torch.ones(2, 4)) for _ in prompts]
    form = Captioned(open_captions(str(as_table(tmp_path / "data"))), Identity(), encoder, ENCODING)
    runner = Encoder(form, tmp_path, *form.plan())
    with pytest.raises(ConfigError, match="gives words, and files of captions hold one of: tokens; tokens, mask;"):
        next(iter(runner.encode(runner.pending())))
