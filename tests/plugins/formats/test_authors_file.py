"""Each released layout: which sets of weights it holds, under which names, and which one is the default."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

from flowanchor.errors import CheckpointError
from flowanchor.plugins.formats.authors_file import read_foreign

_spec = importlib.util.spec_from_file_location("released", Path(__file__).with_name("released.py"))
assert _spec is not None and _spec.loader is not None
released = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(released)

RAW, _, _ = released.golden("plain")
NARROW, WIDE = released.shifted(RAW, 0.1), released.shifted(RAW, 0.2)


def same(found, expected):
    return found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in expected)


def saved(folder: Path, content) -> Path:
    torch.save(content, folder / "released.pt")
    return folder / "released.pt"


def test_stage_two(tmp_path):
    file = read_foreign(saved(tmp_path, released.stage_two(NARROW, WIDE, RAW)))
    assert list(file.profiles) == ["power_0.05", "power_0.2", "none"] and file.default == "power_0.2"
    assert same(file.profiles["power_0.05"], NARROW) and same(file.profiles["power_0.2"], WIDE)
    assert same(file.profiles["none"], RAW)
    assert (file.kind, file.objective, file.step) == ("FACM stage 2", "shortcut", 40)
    assert set(file.others) == {"opt", "args", "epoch", "step", "scheduler"} and not file.ignored
    assert file.weights()[0] == "power_0.2" and same(file.weights("power_0.05")[1], NARROW)
    with pytest.raises(CheckpointError, match="no weights 'ema': choose ema_profile among power_0.05, power_0.2, none"):
        file.weights("ema")


def test_stage_two_of_another_width_and_of_compiled_networks(tmp_path):
    content = released.stage_two(NARROW, WIDE, RAW, sigma_rel=0.15)
    content["model"] = released.prefixed(RAW, "module._orig_mod.")
    content["emas"] = {
        key.replace("ema_model.", "ema_model._orig_mod."): value for key, value in content["emas"].items()
    }
    content["emas"]["online_model.x"] = torch.zeros(1)
    del content["step"]
    file = read_foreign(saved(tmp_path, content))
    assert list(file.profiles) == ["power_0.05", "power_0.15", "none"] and file.default == "power_0.15"
    assert same(file.profiles["power_0.15"], WIDE) and same(file.profiles["none"], RAW)
    assert file.step == 40, "that of the averages"
    assert file.ignored == ("online_model.x",)


def test_stage_two_extracted(tmp_path):
    file = read_foreign(saved(tmp_path, released.extracted(WIDE)))
    assert list(file.profiles) == ["power_0.2"] and file.objective == "shortcut"
    standard = read_foreign(saved(tmp_path, {**released.extracted(WIDE), "_extracted_from": "Standard EMA"}))
    assert list(standard.profiles) == ["ema"] and standard.objective is None


def test_stage_one_and_lightningdit(tmp_path):
    file = read_foreign(saved(tmp_path, released.stage_one(WIDE, RAW)))
    assert list(file.profiles) == ["ema", "none"] and file.default == "ema" and file.objective is None
    assert same(file.profiles["ema"], WIDE) and same(file.profiles["none"], RAW)
    assert file.settings == {"model": {"model_type": "LightningDiT-XL/1", "in_chans": 4}, "train": [1, 2.5, None]}


@pytest.mark.parametrize("prefix", ["", "module."])
def test_a_bare_state_dict_with_or_without_a_wrapper(tmp_path, prefix):
    from safetensors.torch import save_file

    for path, save in ((tmp_path / "a.pt", torch.save), (tmp_path / "a.safetensors", save_file)):
        save(released.prefixed(RAW, prefix), path)
        file = read_foreign(path)
        assert list(file.profiles) == ["none"] and same(file.profiles["none"], RAW)
    file = read_foreign(saved(tmp_path, {"state_dict": released.prefixed(RAW, prefix), "epoch": 3}))
    assert same(file.weights()[1], RAW)


def test_one_average_that_post_hoc_ema_left(tmp_path):
    state = {**released.prefixed(WIDE, "ema_model."), "initted": torch.tensor(True), "step": torch.tensor(7)}
    file = read_foreign(saved(tmp_path, state))
    assert same(file.weights()[1], WIDE) and file.default == "ema" and file.step == 7


def test_half_precision_stays(tmp_path):
    half = {key: value.half() for key, value in RAW.items()}
    file = read_foreign(saved(tmp_path, {"ema": half}))
    assert {value.dtype for value in file.weights()[1].values()} == {torch.float16}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"epoch": 3, "opt": {}}, r"holds no weights that are known here \(it has epoch, opt\)"),
        ([torch.zeros(1)], "holds a list and no weights"),
        ({}, "it has nothing"),
    ],
)
def test_files_without_weights(tmp_path, content, message):
    with pytest.raises(CheckpointError, match=message):
        read_foreign(saved(tmp_path, content))


def test_a_missing_file(tmp_path):
    with pytest.raises(CheckpointError, match="There is no file"):
        read_foreign(tmp_path / "none.pt")
