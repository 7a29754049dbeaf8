"""Moments in bfloat16 (optimizer=adamw_bf16), sharded over two processes: saved, resumed, in half the memory."""

from __future__ import annotations

import pytest
import torch

from flowanchor.checkpoints import read_checkpoint


@pytest.fixture(scope="module")
def two(torchrun, folder):
    common = {"batch": 16, "sharded": {}, "low_moments": True, "validate": False}
    return torchrun(
        2,
        {"name": "whole", "steps": 4, **common},
        {"name": "half", "steps": 2, "save": True, **common},
        {"name": "resumed", "steps": 4, "resume": str(folder / "half.ckpt"), **common},
    )


def test_a_sharded_resume_goes_on_bit_for_bit(two):
    for resumed, whole in zip(two["resumed"], two["whole"], strict=True):
        assert resumed["losses"] == whole["losses"][2:]
        for name, value in whole["weights"].items():
            assert torch.equal(resumed["weights"][name], value), name


def test_the_checkpoint_holds_them_in_bfloat16(two, folder):
    (state,) = read_checkpoint(folder / "half.ckpt")["optimizer_states"]
    moments = [name for name in state["tensors"] if "exp_avg" in name]
    assert len(moments) >= 80
    assert {state["tensors"].dtype(name) for name in moments} == {torch.bfloat16}
