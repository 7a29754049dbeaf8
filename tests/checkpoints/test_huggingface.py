"""Folders of the hub: config.json is data, damaged or hostile ones are refused in one sentence."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from flowanchor.checkpoints import load_model
from flowanchor.checkpoints.huggingface import write_folder
from flowanchor.errors import CheckpointError

_spec = importlib.util.spec_from_file_location(
    "released", Path(__file__).parents[1] / "plugins" / "formats" / "released.py"
)
assert _spec is not None and _spec.loader is not None
released = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(released)

STATE, _, CONFIG = released.golden("plain")


@pytest.fixture
def folder(tmp_path) -> Path:
    config = {
        "backbone": {"_target_": "flowanchor.plugins.backbones.lightningdit.LightningDiT", **CONFIG},
        "objective": {"interval": {"_target_": "flowanchor.plugins.objectives.intervals.plain.PlainInterval"}},
        "sampler": {"_target_": "flowanchor.plugins.samplers.flow.FlowSampler", "steps": 4},
    }
    write_folder(tmp_path / "f", STATE, {"kind": "flow", "step": 3, "config": config}, "ema", "# card\n")
    return tmp_path / "f"


def edit(folder: Path, change) -> None:
    content = json.loads((folder / "config.json").read_text())
    change(content)
    (folder / "config.json").write_text(json.dumps(content))


def test_config_json_has_the_last_word(folder):
    assert load_model(folder).config["sampler"]["steps"] == 4
    edit(folder, lambda content: content["flowanchor"]["config"]["sampler"].update(steps=9))
    assert load_model(folder).config["sampler"]["steps"] == 9
    save_file(load_file(folder / "model.safetensors"), folder / "model.safetensors")  # as another tool writes it
    model = load_model(folder)
    assert model.ema == "ema" and model.kind == "flow" and model.step == 3
    assert torch.equal(model.backbone.state_dict()["pos_embed"], STATE["pos_embed"])


def test_a_presets_name_survives_and_paths_do_not(tmp_path, folder):
    meta = {
        "kind": "flow",
        "step": 3,
        "config": json.loads((folder / "config.json").read_text())["flowanchor"]["config"],
    }
    meta["config"]["backbone"]["preset"] = "XL/2"
    meta["config"]["data"] = {"root": "/data/images", "file": "~/x.pt", "list": ["a/b.tar"], "size": 4}
    write_folder(tmp_path / "g", STATE, meta, "ema", "")
    published = json.loads((tmp_path / "g" / "config.json").read_text())["flowanchor"]["config"]
    assert published["backbone"]["preset"] == "XL/2"
    assert published["data"] == {"root": None, "file": None, "list": [None], "size": 4}


@pytest.mark.parametrize("place", ["backbone", "interval"])
@pytest.mark.parametrize("target", ["os.system", "builtins.eval", "flowanchor.provenance.subprocess.Popen"])
def test_a_config_that_asks_for_foreign_code_is_refused(folder, tmp_path, place, target):
    trap = tmp_path / "sprung"
    attack = {"_target_": target, "command": f"touch {trap}", "args": ["touch", str(trap)]}

    def change(content):
        config = content["flowanchor"]["config"]
        (config if place == "backbone" else config["objective"])[place] = attack

    edit(folder, change)
    with pytest.raises(CheckpointError, match="asks for"):
        load_model(folder)
    assert not trap.exists()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "config.json").write_text("{"), "config.json is damaged"),
        (lambda folder: edit(folder, lambda content: content["flowanchor"].update(format=9)), "checkpoint format 9"),
        (lambda folder: edit(folder, lambda content: content["flowanchor"].pop("kind")), "lacks flowanchor.kind"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"short"), "read safely"),
        (lambda folder: (folder / "model.safetensors").unlink(), "holds no checkpoints/last.ckpt"),
        (
            lambda folder: edit(folder, lambda content: content["flowanchor"]["config"]["backbone"].update(depth=3)),
            "it lacks blocks.2",
        ),
    ],
)
def test_damaged_folders(folder, damage, message):
    damage(folder)
    with pytest.raises(CheckpointError, match=message):
        load_model(folder)


def test_a_folder_of_another_library(folder):
    (folder / "config.json").write_text('{"_class_name": "AutoencoderKL"}')
    save_file({"w": torch.zeros(1)}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="was not written by flowanchor"):
        load_model(folder)


def test_a_write_that_fails_leaves_the_earlier_folder(folder):
    class Failing(dict):
        def __iter__(self):
            raise OSError("no space left")

    before = (folder / "config.json").read_text()
    meta = {"kind": "flow", "step": 4, "config": json.loads(before)["flowanchor"]["config"]}
    with pytest.raises(OSError, match="no space"):
        write_folder(folder, Failing(STATE), meta, "ema", "")
    assert (folder / "config.json").read_text() == before and load_model(folder).step == 3
