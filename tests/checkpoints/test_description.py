"""What a checkpoint says about itself, and its weights, may be wrong in any way: one sentence, and no memory for it."""

from __future__ import annotations

import importlib.util
import json
import resource
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import flowanchor
from flowanchor.checkpoints import initialise_student, load_model, read_checkpoint
from flowanchor.checkpoints.format import Choices
from flowanchor.checkpoints.inspection import inspect_file
from flowanchor.checkpoints.resuming import check_resumable
from flowanchor.errors import CheckpointError
from flowanchor.plugins.backbones.lightningdit import LightningDiT
from flowanchor.plugins.teachers.checkpoint import CheckpointVelocity

_spec = importlib.util.spec_from_file_location("strangers", Path(__file__).with_name("strangers.py"))
assert _spec is not None and _spec.loader is not None
strangers = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(strangers)

META: dict[str, Any] = {
    "no config": {"config": None},
    "config a text": {"config": "x"},
    "config a list": {"config": []},
    "step a text": {"step": "abc"},
    "step negative": {"step": -1},
    "step a truth": {"step": True},
    "step a fraction": {"step": 1.5},
    "step huge": {"step": 10**30},
    "step far too many digits": {"step": 10**50},
    "kind unknown": {"kind": "diffusion"},
    "kind a list": {"kind": ["flow"]},
    "format a truth": {"format": True},
    "format a text": {"format": "1"},
}
CONFIGS: dict[str, Any] = {
    "objective a text": {"objective": "x"},
    "objective empty": {"objective": {}},
    "interval a text": {"objective": {"interval": "x"}},
    "backbone a text": {"backbone": "x"},
    "backbone without a class": {"backbone": strangers.SIZES},
    "backbone no backbone": {"backbone": strangers.INTERVAL},
    "class no text": {"backbone": {**strangers.BACKBONE, "_target_": 3}},
    "sampler a list": {"sampler": []},
    "data a number": {"data": 3},
    "unknown setting": {"backbone": {**strangers.BACKBONE, "hidden": 16}},
    "setting of another type": {"backbone": {**strangers.BACKBONE, "num_heads": "two"}},
    "setting null": {"backbone": {**strangers.BACKBONE, "mlp_ratio": None}},
    "no heads": {"backbone": {**strangers.BACKBONE, "num_heads": 0}},
    "negative width": {"backbone": {**strangers.BACKBONE, "hidden_size": -16}},
}
HUGE: dict[str, Any] = {
    "width": {"hidden_size": 10**9},
    "depth": {"depth": 10**9},
    "classes": {"num_classes": 10**12},
    "side": {"input_size": 10**6},
    "everything": {"hidden_size": 2**62, "depth": 2**62},
    "ratio": {"mlp_ratio": 1e12},
    "ratio infinite": {"mlp_ratio": float("inf")},
}


@pytest.mark.parametrize("wrong", [*META, *CONFIGS])
def test_wrong_descriptions(tmp_path, wrong):
    content = strangers.checkpoint()
    content["flowanchor"].update(META.get(wrong, {}))
    if wrong in CONFIGS:
        content["flowanchor"]["config"].update(CONFIGS[wrong])
    path = strangers.as_file(tmp_path, content)
    with strangers.canary():
        for opened in (lambda: strangers.use(path), lambda: CheckpointVelocity(str(path))):
            sentence = strangers.refusal(opened)
            if wrong == "data a number" or wrong == "sampler a list" or sentence is not None:
                assert sentence is not None and str(path) in sentence
            else:
                raise AssertionError("it was opened")


@pytest.mark.parametrize("what", HUGE)
def test_networks_too_large_for_any_memory(tmp_path, what):
    """Looked at without values, and compared with the weights that are there, before anything is made."""
    content = strangers.checkpoint()
    content["flowanchor"]["config"]["backbone"].update(HUGE[what])
    path = strangers.as_file(tmp_path, content)
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    sentence = strangers.refusal(lambda: load_model(path))
    assert sentence is not None and str(path) in sentence
    assert time.perf_counter() - began < 10
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1_000_000, "kB"


def weights(**changes: Any) -> dict[str, Any]:
    content = strangers.checkpoint()
    for owner, prefix in ((content["state_dict"], "student."), (content["ema"]["short"], "")):
        for name in list(owner):
            if name.removeprefix(prefix) in changes:
                owner[name] = changes[name.removeprefix(prefix)]
    return content


NAME = "x_embedder.proj.weight"
SHAPE = (16, 1, 2, 2)
WEIGHTS: dict[str, Any] = {
    "a text": "weights",
    "nothing": None,
    "a list": [[0.0] * 4] * 16,
    "sparse": torch.zeros(SHAPE).to_sparse(),
    "quantised": torch.quantize_per_tensor(torch.zeros(SHAPE), 0.1, 0, torch.qint8),
    "without values": torch.empty(SHAPE, device="meta"),
    "whole numbers": torch.zeros(SHAPE, dtype=torch.int64),
    "truths": torch.zeros(SHAPE, dtype=torch.bool),
    "complex": torch.zeros(SHAPE, dtype=torch.complex64),
    "one number, repeated": torch.zeros(1).expand(SHAPE),
    "not numbers": torch.full(SHAPE, float("nan")),
    "one infinite": torch.zeros(SHAPE).index_fill_(0, torch.tensor([3]), float("inf")),
}


@pytest.mark.parametrize("what", WEIGHTS)
def test_weights_that_are_none(tmp_path, what):
    path = strangers.as_file(tmp_path, weights(**{NAME: WEIGHTS[what]}))
    for opened in (
        lambda: flowanchor.load(path),
        lambda: load_model(path, ema="none", dtype=torch.bfloat16),
        lambda: CheckpointVelocity(str(path)),
        lambda: initialise_student(LightningDiT(**strangers.SIZES, num_classes=3), path),
    ):
        sentence = strangers.refusal(opened)
        assert sentence is not None and str(path) in sentence


def test_a_large_tensor_in_a_small_file(tmp_path):
    """Strides of zero make any size out of one number: a network that fits it would take all memory."""
    content = strangers.checkpoint()
    wide = torch.zeros(1).expand(10**5, 10**5)
    content["state_dict"] = {f"student.{name}": wide for name in content["ema"]["short"]}
    sentence = strangers.refusal(lambda: load_model(strangers.as_file(tmp_path, content), ema="none"))
    assert "larger than what the file holds" in sentence


@pytest.mark.parametrize("place", ["state_dict", "ema"])
@pytest.mark.parametrize("value", [None, [], "x", {"a": 1}, {1: torch.zeros(1)}, {"a\x1b[2J": torch.zeros(1)}])
def test_sets_of_weights_that_are_none(tmp_path, place, value):
    content = strangers.checkpoint()
    content[place] = value if place == "state_dict" else {"short": value}
    assert strangers.refusal(lambda: strangers.use(strangers.as_file(tmp_path, content)))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"[" * 100_000, "levels deep"),
        (b'{"flowanchor": ' * 50_000, "levels deep"),
        (b"\xff\xfe", "config.json is damaged"),
        (b'{"flowanchor": {"format": 1, "format": 1}}', "a key stands in it twice"),
        (b'{"flowanchor": {"format": NaN}}', "not a number"),
        (b'{"flowanchor": {"step": ' + b"9" * 5000 + b"}}", "config.json is damaged"),
        (b'{"flowanchor": {"config": "\\ud800"}}', "no Unicode"),
        (b'{"flowanchor": {"config": "\\u001b[2J"}}', "control characters"),
        (b'{"flowanchor": {"config": {"backbone": "${oc.env:HOME}"}}}', "looked up elsewhere"),
        (b'{"flowanchor": {"format": 1, "kind": "flow", "step": 1, "config": []}}', "it is a list"),
    ],
)
def test_damaged_and_hostile_json(tmp_path, text, words):
    folder = strangers.as_published(tmp_path, strangers.checkpoint())
    (folder / "config.json").write_bytes(text)
    with strangers.canary():
        assert words in strangers.refusal(lambda: strangers.use(folder))


def test_a_named_pipe_is_not_waited_for(tmp_path):
    import os

    folder = strangers.as_published(tmp_path, strangers.checkpoint())
    (folder / "config.json").unlink()
    os.mkfifo(folder / "config.json")
    assert strangers.refusal(lambda: strangers.use(folder))


def test_metadata_of_safetensors(tmp_path):
    path = strangers.as_safetensors(tmp_path, strangers.checkpoint())
    tensors = load_file(path)
    for text in ("[" * 100_000, "3", '"x"', "{", '{"format": 1}', json.dumps({"format": 1, "config": {"a": "${b}"}})):
        save_file(tensors, path, {"flowanchor": text})
        assert strangers.refusal(lambda: strangers.use(path)), text[:30]


def test_what_is_shown_of_a_file_has_no_escapes(tmp_path):
    content = strangers.checkpoint()
    content["flowanchor"]["config"]["backbone"]["preset"] = "\x1b]0;owned\x07"
    path = strangers.as_file(tmp_path, content)
    assert "\x1b" not in strangers.refusal(lambda: inspect_file(path, Choices()))


def test_a_checkpoint_without_the_optimizers_state_is_not_resumed(tmp_path):
    path = strangers.as_file(tmp_path, strangers.checkpoint())
    with pytest.raises(CheckpointError, match="lacks pytorch-lightning_version.*initialise_from=FILE"):
        check_resumable(read_checkpoint(path), path)
    state = {"state": {}, "param_groups": [{"params": [0]}]}
    whole = {
        "pytorch-lightning_version": "2.6", "epoch": 0, "global_step": 3, "loops": {}, "callbacks": {},
        "optimizer_states": [state], "lr_schedulers": [],
    }  # fmt: skip
    check_resumable(whole, path)
    for states in ([], [3], [{**state, "param_groups": [3]}], [{**state, "param_groups": [{"params": 3}]}]):
        with pytest.raises(CheckpointError, match="it lacks optimizer_states"):
            check_resumable({**whole, "optimizer_states": states}, path)


def test_a_configuration_of_nothing_still_holds_weights(tmp_path):
    """A module that was used without Hydra knows no configuration: its weights can start a student all the same."""
    content = strangers.checkpoint()
    content["flowanchor"]["config"] = {}
    path = strangers.as_file(tmp_path, content)
    initialise_student(LightningDiT(**strangers.SIZES, num_classes=3), path)
    with pytest.raises(CheckpointError, match="holds no configuration of its network"):
        load_model(path)
