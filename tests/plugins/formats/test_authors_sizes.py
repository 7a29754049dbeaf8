"""The architecture of a state dict: every switch of the network is read back from the weights that it has."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

from flowanchor.checkpoints.fit import compare
from flowanchor.errors import CheckpointError
from flowanchor.plugins.backbones.lightningdit import LightningDiT
from flowanchor.plugins.formats.authors_sizes import infer_backbone

_spec = importlib.util.spec_from_file_location("released", Path(__file__).with_name("released.py"))
assert _spec is not None and _spec.loader is not None
released = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(released)

SIZES = dict(input_size=8, patch_size=2, in_channels=4, hidden_size=48, depth=3, num_heads=3, num_classes=5)
PLAIN = {"backbone": "lightningdit", "num_heads": 3}


@pytest.mark.parametrize("name", ["plain", "auxiliary", "noshift", "dit"])
def test_the_golden_networks(name):
    state, _, config = released.golden(name)
    found = infer_backbone(state, **({"backbone": "lightningdit", "num_heads": 2} if name == "dit" else {}))
    config.pop("disable_label_dropout")
    assert {key: found[key] for key in config if key != "mlp_ratio"} == {
        key: value for key, value in config.items() if key != "mlp_ratio"
    }
    fit = compare(state, found)
    assert fit.complete and fit.matched == len(state)


@pytest.mark.parametrize(
    "switch",
    [
        dict(),
        dict(use_qknorm=True),
        dict(use_qknorm=True, use_rmsnorm=True),
        dict(use_rmsnorm=True),
        dict(use_swiglu=True),
        dict(use_swiglu=True, mlp_ratio=2.5),
        dict(mlp_ratio=2.0),
        dict(use_rope=True),
        dict(wo_shift=True),
        dict(learn_sigma=True),
        dict(auxiliary_time_cond=True),
        dict(patch_size=1),
        dict(num_classes=0),
        dict(class_dropout_prob=0.0),
        dict(num_classes=0, class_dropout_prob=0.0),
    ],
    ids=str,
)
def test_every_switch_is_read_back(switch):
    settings = {**SIZES, **switch}
    state = LightningDiT(**settings).state_dict()
    null = settings.get("class_dropout_prob", 0.1) > 0
    found = infer_backbone(state, **PLAIN, num_classes=None if null else settings["num_classes"])
    for key, value in settings.items():
        assert found[key] == value, key
    for key in (key for key in found if key.startswith(("use_", "wo_", "learn_", "aux"))):
        assert found[key] == settings.get(key, False), key
    assert compare(state, found).complete


def test_heads_of_released_sizes_and_of_others():
    for hidden, heads in ((384, 6), (768, 12), (1152, 16)):
        assert infer_backbone(small(hidden), backbone="lightningdit")["num_heads"] == heads
    with pytest.raises(CheckpointError, match=r"number of attention heads \(hidden size 48\): add num_heads=N"):
        infer_backbone(LightningDiT(**SIZES).state_dict(), backbone="lightningdit")
    rotary = LightningDiT(**{**SIZES, "num_heads": 4, "use_rope": True}).state_dict()
    assert infer_backbone(rotary)["num_heads"] == 4


def small(hidden: int) -> dict[str, torch.Tensor]:
    with torch.device("meta"):
        return LightningDiT(**{**SIZES, "hidden_size": hidden, "num_heads": 1, "depth": 1}).state_dict()


def test_what_cannot_be_told_is_asked_for():
    state = LightningDiT(**SIZES).state_dict()
    with pytest.raises(CheckpointError, match="add backbone=sit, backbone=dit or backbone=lightningdit"):
        infer_backbone(state)
    with pytest.raises(CheckpointError, match="backbone=unet is not known here"):
        infer_backbone(state, backbone="unet")
    for name, module in (("sit", "sit.SiT"), ("dit", "dit.DiT")):
        assert infer_backbone(state, backbone=name, num_heads=3)["_target_"].endswith(module)
    with pytest.raises(CheckpointError, match=r"num_classes=9 does not fit a label table of 6 rows: use num_classes=5"):
        infer_backbone(state, **PLAIN, num_classes=9)


def test_differences_are_named():
    state = LightningDiT(**SIZES).state_dict()
    config = infer_backbone(state, **PLAIN)
    del state["blocks.1.attn.proj.bias"]
    state["blocks.0.extra"] = torch.zeros(1)
    state["blocks.2.mlp.fc1.bias"] = torch.zeros(7)
    fit = compare(state, config)
    assert fit.missing == ("blocks.1.attn.proj.bias",) and fit.unknown == ("blocks.0.extra",)
    assert fit.reshaped == ("blocks.2.mlp.fc1.bias 7, wanted 192",) and not fit.complete


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("x_embedder.proj.weight"), "have no x_embedder.proj.weight"),
        (lambda state: state.update({"pos_embed": torch.zeros(1, 15, 48)}), "15 positions, which is no square"),
        (lambda state: state.update({"x_embedder.proj.weight": torch.zeros(3, 3)}), "4 dimensions were expected"),
        (lambda state: [state.pop(key) for key in list(state) if key.startswith("blocks.")], "have no blocks"),
    ],
)
def test_other_weights(change, message):
    state = LightningDiT(**SIZES).state_dict()
    change(state)
    with pytest.raises(CheckpointError, match=message):
        infer_backbone(state, **PLAIN)
