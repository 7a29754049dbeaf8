"""What version 0.1 wrote is opened: runs, sharded and published checkpoints, encoded sets, options' old names."""

from __future__ import annotations

import importlib
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from hydra.utils import get_object
from omegaconf import OmegaConf
from safetensors.torch import load_file

import flowanchor
from flowanchor.checkpoints import trusted
from flowanchor.checkpoints.registry import current_name, registered

EARLIER = Path(__file__).parents[1] / "fixtures" / "version_0_1"
SAMPLES = load_file(EARLIER / "samples.safetensors")
CLASSES = {
    "digits": "outputs/train/digits",
    "sharded": "outputs/train/sharded",
    "published": "published",
    "file": "digits.safetensors",
}
TEXTS = {"wan": "outputs/train/wan", "wan_published": "wan_published"}
PROMPTS = ["a photo of the digit 3", "a photo of the digit 1"]


@pytest.fixture
def earlier(tmp_path, monkeypatch):
    """A copy to work in."""
    shutil.copytree(EARLIER, tmp_path / "earlier")
    monkeypatch.chdir(tmp_path / "earlier")
    return tmp_path / "earlier"


@pytest.mark.parametrize("name", CLASSES)
def test_networks_of_classes_draw_what_they_drew(name, earlier):
    drawn = torch.as_tensor(flowanchor.load(CLASSES[name]).sample([0, 1, 2, 3], steps=2, seed=1))
    torch.testing.assert_close(drawn.int(), SAMPLES[name].int(), rtol=0, atol=1)  # a grey level, for another CPU


@pytest.mark.parametrize("name", TEXTS)
def test_networks_of_texts_draw_what_they_drew(name, earlier):
    drawn = torch.as_tensor(flowanchor.load(TEXTS[name]).sample(prompts=PROMPTS, steps=2, seed=1))
    torch.testing.assert_close(drawn.int(), SAMPLES[name].int(), rtol=0, atol=1)


def run(monkeypatch, program, *words):
    GlobalHydra.instance().clear()
    monkeypatch.setattr(sys, "argv", [f"src/{program}.py", *words])
    importlib.import_module(f"flowanchor.programs.{program}").main()


def test_the_authors_layout_is_read(earlier, monkeypatch):
    words = ["kind=shortcut", "interval=expanded", "num_heads=2", "num_classes=10"]
    run(monkeypatch, "convert", "checkpoint=digits_authors.pt", "output=again.safetensors", *words)
    ours, theirs = load_file("digits.safetensors"), load_file("again.safetensors")
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def words_of(name):
    """The command line of a run in commands.sh, without its length."""
    lines = (EARLIER / "commands.sh").read_text().splitlines()
    variables = {
        name: value.strip('"').split() for name, _, value in (line.partition("=") for line in lines) if name.isupper()
    }
    words = next(line for line in lines if "train.py" in line and f" name={name} " in line).split()[2:]
    filled = [part for word in words for part in (variables[word[1:]] if word.startswith("$") else [word])]
    return [word for word in filled if not word.startswith("trainer.max_steps=")]


@pytest.mark.parametrize("name, steps", [("digits", 3), ("wan", 2)])
def test_a_run_goes_on(name, steps, earlier, monkeypatch):
    kept = torch.load(f"outputs/train/{name}/checkpoints/last.ckpt", weights_only=True)
    run(monkeypatch, "train", *words_of(name), f"trainer.max_steps={steps + 2}")
    made = torch.load(f"outputs/train/{name}/checkpoints/last.ckpt", weights_only=True)
    assert (kept["global_step"], made["global_step"]) == (steps, steps + 2)
    assert made["state_dict"].keys() == kept["state_dict"].keys()


def composed(*words):
    GlobalHydra.instance().clear()
    with initialize_config_module("flowanchor.conf", version_base="1.3"):
        return compose("train", list(words))


def built(settings):
    return trusted.build(OmegaConf.to_container(settings, resolve=True), "data", "a file")


def test_encoded_sets_are_read(earlier):
    stored = load_file(earlier / "latents" / "latents_rank00_shard000.safetensors")["latents"]
    known = torch.load(earlier / "latents" / "latents_stats.pt", weights_only=True)
    stored = (stored - known["mean"]) / known["std"]
    shape = ["data.channels=3", "data.size=8", "data.num_classes=2", "data.batch_size=4", "data.num_workers=0"]
    for data, root in (("latents", "latents"), ("webdataset", "latents_tars")):
        module = built(composed(f"data={data}", f"data.root={root}", *shape).data)
        module.setup("fit")
        batch = next(iter(module.train_dataloader()))
        assert batch.x1.shape == (4, 3, 8, 8) and sorted(batch.cond.tolist()) == [0, 0, 1, 1]
        if data == "latents":
            assert all(any(torch.allclose(x, y, atol=1e-5) for y in [*stored, *stored.flip(-1)]) for x in batch.x1)


def test_a_captioned_set_is_read(earlier):
    words = ["data=captions", "data.root=captioned_latents", "data.channels=3", "data.height=8", "data.width=8"]
    module = built(composed(*words, "data.text_dim=384", "data.batch_size=4", "data.num_workers=0").data)
    module.setup("fit")
    batch = next(iter(module.train_dataloader()))
    assert batch.x1.shape[0] == 4 and batch.x1.shape[-2:] == (8, 8)


NAMES = json.loads((EARLIER / "names.json").read_text())
PLACES = {"backbone": "backbone", "objective/interval": "objective.interval", "sampler": "sampler", "codec": "codec",
          "text_encoder": "text_encoder", "data": "data"}  # fmt: skip


@pytest.mark.parametrize("group", NAMES)
def test_an_options_old_name_is_its_class(group):
    for name in NAMES[group]:
        found = get_object(current_name(name))
        assert callable(found), name
        if group in PLACES:
            assert current_name(name) in registered(PLACES[group]), name


def test_a_plugin_package_of_then_trains(earlier, monkeypatch):
    monkeypatch.syspath_prepend(str(earlier / "plugin_package"))
    chosen = ["data=earlier_digits", "sampler=earlier_consistency", "codec=earlier_identity"]
    run(monkeypatch, "train", *chosen, "backbone=earlier_lightningdit", "trainer.max_steps=1", "name=theirs",
        "callbacks.best=null", "callbacks.sample_grid.nfe=[2]", "trainer.limit_val_batches=0")  # fmt: skip
    drawn = flowanchor.load("outputs/train/theirs").sample([1], steps=1)
    assert tuple(drawn.shape) == (1, 8, 8, 1)
