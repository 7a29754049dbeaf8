"""Classes by name or by number, and where the names come from."""

from __future__ import annotations

import json

import pytest
import torch

import flowanchor
from flowanchor.checkpoints.consolidated import write_consolidated
from flowanchor.checkpoints.description import named_classes
from flowanchor.checkpoints.format import Choices
from flowanchor.checkpoints.huggingface import write_folder
from flowanchor.checkpoints.inspection import inspect_file
from flowanchor.errors import CheckpointError, ConfigError
from flowanchor.generation.class_names import class_numbers
from flowanchor.plugins.backbones.lightningdit import LightningDiT

NAMES = ("T-shirt/top", "Sneaker", "Bag")
SIZES = dict(input_size=4, patch_size=2, in_channels=1, hidden_size=16, depth=1, num_heads=2, num_classes=3)
BACKBONE = {"_target_": "flowanchor.plugins.backbones.lightningdit.LightningDiT", **SIZES}
CONFIG = {
    "backbone": BACKBONE,
    "objective": {"interval": {"_target_": "flowanchor.plugins.objectives.intervals.expanded.ExpandedInterval"}},
    "sampler": {"_target_": "flowanchor.plugins.samplers.consistency.ConsistencySampler", "steps": 2},
    "codec": {"_target_": "flowanchor.plugins.codecs.identity.Identity"},
}


def meta(names=NAMES):
    return {"format": 1, "kind": "shortcut", "step": 7, "config": CONFIG, "class_names": list(names)}


def weights():
    torch.manual_seed(1)
    network = LightningDiT(**SIZES)
    for parameter in network.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.3)
    return network.state_dict()


@pytest.mark.parametrize(
    "given, numbers",
    [
        (["Sneaker"], [1]),
        (["sneaker", "t-shirt/top", 2], [1, 0, 2]),
        ("bag", 2),
        ([0, 1], [0, 1]),
        (["2"], [2]),
        (None, None),
    ],
    ids=str,
)
def test_names_become_numbers(given, numbers):
    assert class_numbers(given, NAMES) == numbers


def test_a_text_is_a_name_before_it_is_a_number():
    """Folders 10 and 9 in the order of their names: class 0 is ten."""
    assert class_numbers(["10", "9"], ("10", "9")) == [0, 1]
    assert class_numbers([1], ("10", "9")) == [1]


def test_names_that_differ_by_case_alone_must_be_written_so():
    assert class_numbers(["a", "A"], ("A", "a")) == [1, 0]
    with pytest.raises(ConfigError, match="There is no class"):
        class_numbers(["é"], ("E", "e"))


@pytest.mark.parametrize(
    "text, names, sentence",
    [
        ("sneeker", NAMES, "There is no class 'sneeker': did you mean Sneaker?"),
        ("zebra", NAMES, "There is no class 'zebra': it has T-shirt/top, Sneaker, Bag."),
        ("zebra", (), "classes=zebra: this checkpoint holds no names of its classes: use numbers, such as [0,1]."),
        ("zebra", [f"n{i}" for i in range(1000)], "n19 and 980 others."),
    ],
    ids=str,
)
def test_a_name_that_there_is_not(text, names, sentence):
    with pytest.raises(ConfigError) as raised:
        class_numbers([text], names)
    assert sentence in str(raised.value)


def test_names_travel_in_files_and_published_folders(tmp_path):
    write_consolidated(tmp_path / "a.safetensors", weights(), meta(), "none")
    write_folder(tmp_path / "published", weights(), meta(), "none", "card")
    assert json.loads((tmp_path / "published" / "config.json").read_text())["flowanchor"]["class_names"] == list(NAMES)
    drawn = []
    for path in ("a.safetensors", "published"):
        model = flowanchor.load(tmp_path / path)
        assert model.class_names == NAMES
        told = inspect_file(tmp_path / path, Choices()).splitlines()
        assert "  classes      T-shirt/top, Sneaker, Bag" in told
        assert torch.equal(model.sample(["sneaker", 2], seed=3), model.sample([1, 2], seed=3))
        assert torch.equal(model.sample("bag", num_samples=2), model.sample([2, 2]))
        drawn.append(model.sample(["bag"]))
        with pytest.raises(ConfigError, match="did you mean Sneaker"):
            model.sample(["sneker"])
        with pytest.raises(ConfigError, match="between 0 and 2"):
            model.sample(["7"])
    assert torch.equal(*drawn)


@pytest.mark.parametrize(
    "names", ["abc", [1, 2, 3], ["a", "b", "\n"], ["a", "b", "c" * 201], [["a"], "b", "c"], {"a": 1}]
)
def test_what_a_stranger_writes_there_is_refused(tmp_path, names):
    file = tmp_path / "a.safetensors"
    write_consolidated(file, weights(), {**meta(), "class_names": names}, "none")
    with pytest.raises(CheckpointError):
        flowanchor.load(file)


def test_names_for_other_classes_are_none(tmp_path):
    write_consolidated(tmp_path / "a.safetensors", weights(), meta(["a", "b"]), "none")
    assert flowanchor.load(tmp_path / "a.safetensors").class_names == ()
    assert named_classes(["odd\nname", "${x}", "\udce9"], 3) == ["odd?name", "$ {x}", "?"]
