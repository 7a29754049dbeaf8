"""Improved MeanFlow whole from the command line: trained, resumed, drawn with guidance, measured, handed on."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

import flowanchor
from flowanchor.checkpoints import load_model
from flowanchor.checkpoints.read import read_checkpoint

RUN = [
    "objective=imf_whole", "backbone=imf_dit", "backbone.hidden_size=16", "backbone.num_heads=2", "backbone.depth=2",
    "backbone.head_depth=1", "data.batch_size=32", "ema=power", "trainer.limit_val_batches=1", "optimizer.lr=1e-2",
]  # fmt: skip
QUIET = ["callbacks.sample_grid=null", "callbacks.best=null"]


@pytest.mark.slow
def test_the_whole_way(command):
    folder = command("train", *RUN, *QUIET, "name=whole", "trainer.max_steps=4")
    command("train", *RUN, *QUIET, "name=parts", "trainer.max_steps=2")
    command("train", *RUN, "callbacks.best=null", "callbacks.sample_grid.every_n_steps=4", "sampler.guidance_scale=2",
            "name=parts", "trainer.max_steps=4")  # fmt: skip
    runs = folder / "outputs" / "train"
    one, two = (torch.load(runs / name / "checkpoints" / "last.ckpt", weights_only=True) for name in ("whole", "parts"))
    heads = [key for key in one["state_dict"] if ".velocity." in key or "velocity_layer" in key]
    assert heads and all(one["state_dict"][key].abs().sum() > 0 for key in heads if key.endswith("weight"))
    for key, value in one["state_dict"].items():
        assert torch.equal(value, two["state_dict"][key]), key

    told = [f"checkpoint={runs / 'whole'}", "num_samples=20", "sampler.steps=2"]
    for name, scale in (("plain", 1), ("guided", 4)):
        more = [f"sampler.guidance_scale={scale}", "sampler.guidance_low=0.2"]
        command("sample", *told, *more, f"name={name}")
    drawn = {
        name: np.load(folder / "outputs" / "sample" / name / "samples.npz")["images"] for name in ("plain", "guided")
    }
    assert not np.array_equal(*drawn.values())
    model = flowanchor.load(runs / "whole")
    again = model.sample(num_samples=20, steps=2, guidance_scale=4.0, guidance_low=0.2)
    assert np.array_equal(again.numpy(), drawn["guided"])

    command("evaluate", f"checkpoint={runs / 'whole'}", "nfe=[2]", "num_samples=20", "metric=random",
            "metric.cache_dir=cache", "sampler.guidance_scale=3", f"hydra.run.dir={folder / 'score'}")  # fmt: skip
    (line,) = json.loads((folder / "score" / "metrics.json").read_text())["results"]
    assert line["nfe"] == line["network_calls"] == 2

    command("convert", f"checkpoint={runs / 'whole'}", "output=bare.safetensors")
    command("convert", f"checkpoint={runs / 'whole'}", "output=all.safetensors", "training_parts=true")
    bare, kept = (read_checkpoint(folder / f"{name}.safetensors") for name in ("bare", "all"))
    assert not load_model(folder / "bare.safetensors").backbone.has_velocity_head
    assert load_model(folder / "all.safetensors").backbone.has_velocity_head
    assert bare["flowanchor"]["config"]["backbone"]["velocity_head"] is False
    names = [set(next(iter(content["ema"].values()))) for content in (kept, bare)]
    assert names[0] - names[1] == {key.removeprefix("student.") for key in heads} and not names[1] - names[0]
    opened = flowanchor.load(folder / "bare.safetensors")
    assert torch.equal(opened.sample(num_samples=20, steps=2, guidance_scale=4.0, guidance_low=0.2), again)

    # A student starts from the file that lacks the head, which begins at zero.
    command(
        "train", *RUN, *QUIET, "name=next", "trainer.max_steps=1", "optimizer.lr=0", "initialise_from=bare.safetensors"
    )
    started = torch.load(runs / "next" / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    assert torch.equal(
        started["student.final_layer.linear.weight"], opened.backbone.state_dict()["final_layer.linear.weight"]
    )
    assert not started["student.velocity_layer.linear.weight"].any()


def test_a_pretrained_network_learns_guidance_as_an_input(command, tiny):
    """Embedders of guidance and span begin at zero: at first LightningDiT is its teacher, whatever it is told."""
    own = [
        *tiny,
        "callbacks=default",
        "callbacks.sample_grid=null",
        "callbacks.best=null",
        "trainer.limit_val_batches=0",
    ]
    command("train", *own, "objective=flow_matching", "objective/interval=plain", "name=teacher", "trainer.max_steps=2")
    told = ["objective=imf_whole", "backbone.auxiliary_time_cond=true", "backbone.guidance_cond=true"]
    start = ["initialise_from=outputs/train/teacher", "teacher=checkpoint", "teacher.checkpoint=outputs/train/teacher"]
    with pytest.raises(SystemExit):
        command("train", *own, *told[:2], *start, "name=refused")
    folder = command(
        "train",
        *own,
        *told,
        *start,
        "teacher.guidance_scale=1",
        "name=student",
        "trainer.max_steps=1",
        "optimizer.lr=0",
    )
    runs = folder / "outputs" / "train"
    teacher, student = (load_model(runs / name).backbone for name in ("teacher", "student"))
    x, t, y = torch.randn(3, 1, 8, 8), torch.rand(3), torch.tensor([0, 4, 9])
    with torch.no_grad():
        wanted = teacher.predict(x, t, y)
        found = student.predict(x, t, flowanchor.interfaces.Guided.alike(y, t, 5.0, 0.2, 0.7), torch.rand(3))
    torch.testing.assert_close(found, wanted)
