"""`encode.py` as users type it: killed, started again, by two processes, and with mistakes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

PROGRAM = Path(__file__).parents[2] / "src" / "encode.py"
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
SETTINGS = ["codec=identity", "image_size=8", "batch_size=2", "num_workers=0", "shard_size=40"]


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("images")
    draw = np.random.default_rng(0)
    for label in ("cat", "dog"):
        (root / label).mkdir()
        for index in range(200):
            Image.fromarray(draw.integers(0, 255, (24, 30, 3)).astype(np.uint8)).save(root / label / f"{index:03d}.png")
    return root


def encode(folder: Path, *words: str, launcher: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *launcher, str(PROGRAM), *SETTINGS, *words]
    return subprocess.run(command, cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, timeout=120)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_killed_and_run_again_by_two_processes(images, tmp_path):
    whole = encode(tmp_path, f"data.root={images}", "out=whole")
    assert whole.returncode == 0, whole.stderr
    assert "400 images, plain and mirrored" in whole.stdout and "images/s" in whole.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["whole"], "nothing else is left behind"

    command = [sys.executable, str(PROGRAM), *SETTINGS, f"data.root={images}", "out=killed"]
    started = subprocess.Popen(command, cwd=tmp_path, env=ENVIRONMENT, stdout=subprocess.DEVNULL)
    latest = time.monotonic() + 60
    while time.monotonic() < latest and not list((tmp_path / "killed").glob("*shard001.safetensors")):
        time.sleep(0.005)
    os.kill(started.pid, signal.SIGKILL)
    started.wait()
    assert not (tmp_path / "killed" / "manifest.json").exists(), "it was killed too late to test anything"

    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    again = encode(tmp_path, f"data.root={images}", "out=killed", launcher=torchrun)
    assert again.returncode == 0, again.stderr
    assert "images are encoded already" in again.stdout
    assert {k: v for k, v in contents(tmp_path / "killed").items() if not k.endswith(".partial")} == contents(
        tmp_path / "whole"
    )

    third = encode(tmp_path, f"data.root={images}", "out=killed")
    assert third.returncode == 0 and "is complete already" in third.stdout
    other = encode(tmp_path, f"data.root={images}", "out=killed", "values=moments")
    assert other.returncode == 1 and "Error: killed holds an encoding with other settings (values was" in other.stderr


@pytest.mark.parametrize(
    "words, sentence",
    [
        ([], "Error: Where to? Add out=FOLDER"),
        (["out=x"], "Error: Which images? Add data.root=FOLDER"),
        (["out=x", "format=zip"], "Error: format=zip is not known: use one of safetensors, webdataset."),
        (["out=x", "format=webdataset", "dtype=bfloat16"], "Error: dtype=bfloat16 cannot be stored in .npy files"),
        (["out=x", "upright=sometimes"], "Error: upright=sometimes is neither true nor false"),
        (["out=x", "codec=vavae"], "Error: image_size=8 is no multiple of 16"),
        (["out=x", "codec=vavae", "image_size=16", "data.root=."], "Error: codec=vavae has no weights"),
    ],
)
def test_mistakes(command, capsys, words, sentence):
    with pytest.raises(SystemExit) as exit:
        command("encode", *SETTINGS[:-1], *words)
    assert exit.value.code == 1
    assert sentence in capsys.readouterr().err


def test_replaced_images_are_encoded_again_by_the_same_command(command, tmp_path, capsys):
    """Complete or not: what is there afterwards is made of the new images, and a photo stands upright."""
    exif = Image.Exif()
    exif[0x0112] = 6

    def write(number: int) -> None:
        (tmp_path / "a").mkdir(exist_ok=True)
        pixels = np.random.default_rng(number).integers(0, 255, (8, 8, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(tmp_path / "a" / "0.png", exif=exif)
        Image.fromarray(pixels[::-1]).save(tmp_path / "a" / "1.png")

    def encoded(out: str, *words: str) -> tuple[bytes, str]:
        command("encode", *SETTINGS, f"data.root={tmp_path}", f"out={out}", "data.labelled=false", *words)
        return (tmp_path / out / "latents_rank00_shard000.safetensors").read_bytes(), capsys.readouterr().out

    write(0)
    first, _ = encoded("out")
    assert encoded("out") == (first, encoded("out")[1]) and "complete already" in encoded("out")[1]
    assert encoded("stored", "upright=false")[0] != first
    write(1)
    second, said = encoded("out")
    assert "were replaced: their files are made again" in " ".join(said.split()) and second != first
    assert second == encoded("anew")[0]
    shutil.rmtree(tmp_path / "out" / ".encoding")  # whoever tidies up loses what tells which files are concerned
    assert encoded("out")[0] == second
    write(2)
    assert encoded("out")[0] == encoded("third")[0] != second


WITHOUT = "no encoder"


@pytest.mark.parametrize(
    "row, words, sentence",
    [
        ({"caption": "a"}, [WITHOUT], "Error: Captions need a text encoder: add text_encoder=umt5"),
        ({"caption": "a"}, ["image_size=10"], "Error: image_size=10 is no multiple of 8: use for example 8."),
        ({"caption": "a"}, ["upright=false"], "Error: upright=true is the only way for pictures with captions"),
        ({"caption": "a"}, ["codec=wan_vae"], "Error: codec=wan_vae has no weights to encode with"),
        ({"caption": "a"}, ["text_encoder=umt5"], "Error: text_encoder=umt5 needs its weights"),
        ({"text": "a"}, [], "Error: Row 1 of images/captions.jsonl has no columns 'file' and 'caption'"),
        (
            {"caption": " "},
            [],
            "Error: images has no image that can be read and has a caption (the first: 0.png: no caption)",
        ),
        ({"caption": "a", "file": "1.png"}, [], "has a caption (the first: 1.png: [Errno 2] No such file"),
    ],
)
def test_mistakes_with_captions(command, tmp_path, capsys, row, words, sentence):
    (tmp_path / "images").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "images" / "0.png")
    (tmp_path / "images" / "captions.jsonl").write_text(json.dumps({"file": "0.png", **row}))
    encoder = [] if WITHOUT in words else ["text_encoder=minilm"]
    settings = ["data=captions", "data.root=images", *encoder, "captions.multiple=8", "out=x"]
    words = [word for word in words if word != WITHOUT]
    with pytest.raises(SystemExit) as exit:
        command("encode", *SETTINGS, *settings, *words)
    assert exit.value.code == 1
    assert sentence in " ".join(capsys.readouterr().err.split())
