"""How a student is sampled travels with its weights: schedule, shift, sampler and kept noise, on every road."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra.core.global_hydra import GlobalHydra

import flowanchor
from flowanchor.checkpoints.sharded import write_sharded
from flowanchor.errors import ConfigError
from flowanchor.generation.samplers import build_sampler
from flowanchor.play import choices
from flowanchor.plugins.samplers.jump_flow import JumpFlowSampler
from flowanchor.programs import convert, sample, train

SIZES = ["backbone.depth=1", "backbone.hidden_size=16", "backbone.num_heads=2", "data.batch_size=32"]
TRAVELS = ["sampler=jump_flow", "sampler.timestep_shift=0.3", "sampler.kept_noise=0.1", "sampler.steps=6"]
TOLD = "jump-flow, times 0 0.2308 0.3213 0.4118 0.5707 0.7297, 0.1 of the implied noise kept"
ROADS = {
    "last.ckpt": None,
    "sharded.ckpt": None,
    "one.safetensors": "flowanchor",
    "published": "huggingface",
    "back.safetensors": "authors",  # through the authors' layout
}


def run(program, monkeypatch, *arguments: str) -> None:
    GlobalHydra.instance().clear()
    monkeypatch.setattr(sys, "argv", [f"src/{program.__name__.rpartition('.')[2]}.py", *arguments])
    program.main()


@pytest.fixture(scope="module")
def roads(tmp_path_factory) -> Path:
    """One student at the end of each road."""
    folder = tmp_path_factory.mktemp("roads")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        more = ["~callbacks.sample_grid", "trainer.max_steps=2", "logger=none", "optimizer.lr=0.1", "hydra.run.dir=run"]
        run(train, patch, *SIZES, *TRAVELS, *more)
        shutil.copyfile("run/checkpoints/last.ckpt", "last.ckpt")
        write_sharded(folder / "sharded.ckpt", torch.load("last.ckpt", weights_only=True))
        for name, form in ROADS.items():
            if form is not None:
                between = "authors.pt" if form == "authors" else name
                run(convert, patch, "checkpoint=last.ckpt", f"output={between}", f"format={form}")
                if between != name:
                    run(convert, patch, f"checkpoint={between}", f"output={name}")
    return folder


@pytest.mark.parametrize("road", ROADS)
def test_a_student_draws_the_same_after_each_road(roads, road):
    expected, moved = flowanchor.load(roads / "run"), flowanchor.load(roads / road)
    told = JumpFlowSampler(6, timestep_shift=0.3, kept_noise=0.1)
    assert told.told() == TOLD and build_sampler({}, moved).told() == TOLD
    images = expected.sample([0, 1, 2], seed=3, sampler=told)
    assert torch.equal(moved.sample([0, 1, 2], seed=3), images)
    for other in ({"timestep_shift": 0.0}, {"kept_noise": 0.0}, {"steps": 4}):
        assert not torch.equal(moved.sample([0, 1, 2], seed=3, **other), images)


def test_the_program_says_what_it_uses_and_where_that_is_from(roads, tmp_path, monkeypatch, capsys):
    def drawn(*arguments: str) -> tuple[str, np.ndarray]:
        run(sample, monkeypatch, f"checkpoint={roads / 'published'}", "num_samples=3", "classes=[0,1,2]", "seed=3",
            f"hydra.run.dir={tmp_path}", *arguments)  # fmt: skip
        with np.load(tmp_path / "samples.npz") as file:
            return capsys.readouterr().out, file["images"]

    monkeypatch.chdir(tmp_path)
    out, images = drawn()
    assert f"sampler {TOLD} (from the checkpoint)\n" in out
    assert np.array_equal(images, flowanchor.load(roads / "run").sample([0, 1, 2], seed=3).numpy())
    out, _ = drawn("sampler.steps=2", "sampler.kept_noise=0")
    assert "sampler jump-flow, times 0 0.2308 (from the checkpoint, with steps, kept_noise as chosen here)\n" in out
    out, _ = drawn("sampler=consistency")
    assert "sampler consistency, times 0 0.5 (as chosen here)\n" in out


def test_the_card_says_it(roads):
    assert f"| sampler | {TOLD}; NFE 6 |\n" in (roads / "published/README.md").read_text()


@pytest.mark.parametrize("name", ["times", "grid"])
def test_times_of_a_checkpoint_give_way_to_what_is_chosen(roads, name):
    model = flowanchor.load(roads / "run")
    own = {"_target_": "flowanchor.plugins.samplers.consistency.ConsistencySampler", "steps": 2, name: [0.0, 0.2, 0.6]}
    model.config["sampler"] = own

    def times(**chosen):
        return build_sampler(chosen, model).times[:-1].tolist()

    assert times() == times(steps=3) == times(kept_noise=0.1) == [0.0, 0.2, 0.6]
    assert times(steps=2) == [0.0, 0.5] and times(times=[0.0, 0.4]) == times(grid=[0.0, 0.4]) == [0.0, 0.4]
    assert times(steps=2, timestep_shift=1 / 3) == pytest.approx([0.0, 0.25])
    with pytest.raises(ConfigError, match=r"nfe=2: remove the times \(those of a checkpoint: add sampler.steps=2\)"):
        build_sampler({}, model).with_nfe(2)
    assert build_sampler({"steps": 2}, model).with_nfe(4).nfe == 4
    assert choices.choices(model)["consistency"].steps == 3
    assert choices.build(model, "consistency", 3, None).times.tolist() == [0.0, 0.2, 0.6, 1.0]
    assert choices.build(model, "consistency", 2, None).times.tolist() == [0.0, 0.5, 1.0]
