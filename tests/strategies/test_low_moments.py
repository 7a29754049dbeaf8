"""Moments in 8 bits and in bfloat16 (optimizer=adamw8bit, adamw_bf16) over two processes: saved, resumed, as in one."""

from __future__ import annotations

import pytest
import torch

from flowanchor.checkpoints import read_checkpoint

WIDE = {"moments": "8 bits", "width": 72, "validate": False}  # enough for matrices of 4,096 values


@pytest.fixture(scope="module")
def two(torchrun, folder):
    half = {"steps": 2, "batch": 16, "sharded": {}, "save": True}
    whole = {"steps": 4, "batch": 16, "sharded": {}, **WIDE}
    return torchrun(
        2,
        {"name": "bfloat16", **half, "moments": "bfloat16", "validate": False},
        {"name": "half", **half, **WIDE},
        {"name": "whole", **whole},
        {"name": "resumed", **whole, "resume": str(folder / "half.ckpt")},
    )


def test_a_sharded_resume_goes_on_bit_for_bit(two):
    for resumed, whole in zip(two["resumed"], two["whole"], strict=True):
        assert resumed["losses"] == whole["losses"][2:]
        for name, value in whole["weights"].items():
            assert torch.equal(resumed["weights"][name], value), name


def test_the_checkpoint_holds_them_in_bfloat16(two, folder):
    (state,) = read_checkpoint(folder / "bfloat16.ckpt")["optimizer_states"]
    moments = [name for name in state["tensors"] if "exp_avg" in name]
    assert len(moments) >= 80
    assert {state["tensors"].dtype(name) for name in moments} == {torch.bfloat16}


def test_the_checkpoint_holds_codes_and_their_scales(two, folder):
    (state,) = read_checkpoint(folder / "half.ckpt")["optimizer_states"]
    tensors = state["tensors"]
    scales = [name for name in tensors if name.endswith("_scale")]
    assert len(scales) > 20
    for name in scales:
        codes = name.removesuffix("_scale")
        assert (tensors.dtype(name), tensors.dtype(codes)) == (torch.float32, torch.uint8)
        assert tensors.shape(name)[0] == tensors.shape(codes)[0]


def test_8_bits_of_two_processes_are_those_of_one(two, training, folder):
    """Gradients of two are added in another order; the blocks are the same. What two saved, one goes on from."""
    one = training.fit(folder, "one", 4, 32, **WIDE)["weights"]
    continued = training.fit(folder, "continued", 4, 32, resume=str(folder / "half.ckpt"), **WIDE)["weights"]
    begun = training.network(hidden_size=72).state_dict()
    way = torch.cat([(value - begun[name.removeprefix("student.")]).flatten() for name, value in one.items()])
    for found in (two["whole"][0]["weights"], continued):
        apart = torch.cat([(found[name] - value).flatten() for name, value in one.items()])
        assert apart.norm() < 1e-3 * way.norm()
