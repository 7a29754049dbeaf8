"""Which format knows a path: in what order they are asked, what a package adds, what becomes of one that is broken."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from flowanchor.checkpoints import load_model
from flowanchor.checkpoints.find import find_checkpoint
from flowanchor.checkpoints.format import Choices
from flowanchor.checkpoints.formats import format_of, formats, in_place
from flowanchor.checkpoints.inspection import inspect_file
from flowanchor.errors import CheckpointError

THEIRS = """
from pathlib import Path

import torch

from flowanchor.checkpoints.format import DescribedWeights, Format

SIZES = {"input_size": 4, "in_channels": 1, "patch_size": 2, "hidden_size": 8, "depth": 1, "num_heads": 2}


class Folder(Format):
    name = "theirs"

    def recognises(self, path):
        return (path / "theirs.txt").is_file()

    def read(self, path, choices):
        from flowanchor.plugins.backbones.lightningdit import LightningDiT

        backbone = {"_target_": "flowanchor.plugins.backbones.lightningdit.LightningDiT", **SIZES}
        interval = {"_target_": "flowanchor.plugins.objectives.intervals.plain.PlainInterval"}
        config = {"backbone": backbone, "objective": {"interval": interval}}
        meta = {"format": 1, "kind": "flow", "step": 0, "config": config}
        return DescribedWeights(path, LightningDiT(**SIZES).state_dict(), meta, ema="ema")


class File(Folder):
    name = "file"
    in_place = True

    def recognises(self, path):
        return path.suffix == ".safetensors" and b"theirs" in path.read_bytes()
"""


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Somebody's package with options of `format`: their classes by name."""

    def install(**classes: str) -> None:
        site = tmp_path / "site"
        (site / "theirs_of_formats" / "conf" / "format").mkdir(parents=True)
        (site / "theirs_of_formats" / "__init__.py").touch()
        (site / "theirs_of_formats" / "kinds.py").write_text(THEIRS)
        for name, target in classes.items():
            (site / "theirs_of_formats" / "conf" / "format" / f"{name}.yaml").write_text(f"_target_: {target}\n")
        info = site / "theirs_of_formats-1.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: theirs-of-formats\nVersion: 1\n")
        (info / "entry_points.txt").write_text("[flowanchor.plugins]\ntheirs = theirs_of_formats\n")
        monkeypatch.syspath_prepend(str(site))
        for module in [module for module in sys.modules if module.startswith("theirs_of_formats")]:
            monkeypatch.delitem(sys.modules, module)  # of another test, in another folder

    return install


def test_those_that_recognise_more_than_their_own_are_asked_last(package):
    package(a="theirs_of_formats.kinds.Folder", b="theirs_of_formats.kinds.File")
    names = [one.name for one in formats()]
    assert names == ["lora", "flowanchor", "huggingface", "diffusers", "file", "theirs", "authors", "transformer"]


def test_a_folder_that_is_converted_first(package, tmp_path):
    (tmp_path / "release").mkdir()
    (tmp_path / "release" / "theirs.txt").touch()
    with pytest.raises(CheckpointError, match="holds no checkpoints/last.ckpt: give a run folder"):
        find_checkpoint(tmp_path / "release")
    package(theirs="theirs_of_formats.kinds.Folder")
    with pytest.raises(CheckpointError, match="convert it first: python src/convert.py checkpoint=.*release output="):
        load_model(tmp_path / "release")
    assert format_of(tmp_path / "release").name == "theirs" and in_place(tmp_path / "release") is None
    lines = inspect_file(tmp_path / "release", Choices())
    assert "release: weights of format=theirs" in lines and "trained as   flow, step not told" in lines
    assert "no match" not in lines and "missing" not in lines and "matched" in lines


def test_a_file_that_is_opened_where_it_lies(package, tmp_path):
    save_file({"theirs": torch.ones(1)}, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match="was not written by flowanchor"):
        load_model(tmp_path / "a.safetensors")
    package(file="theirs_of_formats.kinds.File")
    model = load_model(tmp_path / "a.safetensors")
    assert model.ema == "ema" and model.backbone.sample_shape == (1, 4, 4) and len(model.digest) == 12
    with pytest.raises(CheckpointError, match="no EMA profile 'none'"):
        load_model(tmp_path / "a.safetensors", ema="none")


@pytest.mark.parametrize("target", ["theirs_of_formats.kinds.Missing", "theirs_of_formats.gone.Folder", "os.system"])
def test_a_broken_format_is_left_out(package, target):
    package(theirs=target, file="theirs_of_formats.kinds.File")
    with pytest.warns(UserWarning, match=f"The format {target} is left out"):
        names = [one.name for one in formats()]
    assert "file" in names and "theirs" not in names and "authors" in names


def test_nobodys_folder(tmp_path):
    with pytest.raises(CheckpointError, match="of no format that is known here .*authors"):
        format_of(tmp_path)
    assert in_place(Path("nowhere")) is None
