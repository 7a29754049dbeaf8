"""A gated student leaves as a stock AnyFlowPipeline that draws what our sampler draws, and such folders are read."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from diffusers import AnyFlowPipeline, AnyFlowTransformer3DModel, WanTransformer3DModel

from flowanchor.base.noise import sample_noise
from flowanchor.checkpoints import load_model
from flowanchor.conditioning import batch_of
from flowanchor.generation.samplers import build_sampler
from flowanchor.plugins.samplers.meanflow import MeanFlowSampler
from flowanchor.plugins.text_encoders.umt5 import UMT5
from flowanchor.text.base import Tokens

from .test_wan_pipeline import BACKBONE, INTERVALS, SIZE, run, save_student

GATED = {**BACKBONE, "end_time": "gated", "end_time_gate": 0.3}
TOLD = {"interval": {"_target_": f"{INTERVALS}.end_time.EndTimeInterval", "end_time": "gated"}}
SAMPLER = {
    "_target_": "flowanchor.plugins.samplers.meanflow.MeanFlowSampler",
    "steps": 2,
    "timestep_shift": 0.25,
}  # diffusers' 4
STUDENT = {"backbone": GATED, "objective": TOLD, "sampler": SAMPLER}
PROMPTS = ["a red fox", "  a fox   in snow &amp; snow"]


@pytest.fixture(scope="module")
def exported(tmp_path_factory, base):
    """The student's checkpoint, and its folder."""
    folder = tmp_path_factory.mktemp("anyflow")
    path = save_student(folder / "student.ckpt", **STUDENT)
    run(f"checkpoint={path}", f"output={folder / 'out'}", "format=diffusers", f"pipeline={base}")
    return path, folder / "out"


def test_stock_anyflow_draws_our_images(exported, base):
    path, folder = exported
    model = load_model(path)
    text = batch_of(UMT5(str(base), max_length=12, dtype="float32").encode(PROMPTS))
    noise = sample_noise(5, range(2), SIZE).float()
    pipe = AnyFlowPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    drawn = []
    for steps in (1, 2, 4):
        ours = MeanFlowSampler(steps=steps, timestep_shift=0.25).sample(model.backbone, noise, text, model.interval)
        drawn.append(
            pipe(
                PROMPTS, height=64, width=48, num_frames=1, num_inference_steps=steps, max_sequence_length=12,
                latents=noise, output_type="latent",
            ).frames
        )  # fmt: skip
        assert ours.std() > 0.3 and (drawn[-1] - ours).abs().max() <= 1e-5 * ours.abs().max()
    assert (drawn[1] - drawn[2]).abs().max() > 1e-2


def test_the_folder_needs_no_code_of_ours_and_is_known_again(exported, base, capsys):
    path, folder = exported
    index = json.loads((folder / "model_index.json").read_text())
    assert index["_class_name"] == "AnyFlowPipeline" and index["scheduler"][0] == "diffusers"
    assert not list(folder.rglob("*.py"))
    card = (folder / "README.md").read_text()
    assert "num_inference_steps=2, guidance_scale=1, max_sequence_length=12" in card and "trust" not in card
    asked = [f"checkpoint={path}", f"output={folder}", "format=diffusers", f"pipeline={base}"]
    run(*asked, "overwrite=true")
    (folder / "model_index.json").write_text(json.dumps({k: v for k, v in index.items() if k != "_exported_by"}))
    with pytest.raises(SystemExit):  # somebody else's
        run(*asked, "overwrite=true")
    assert "no earlier output of this kind" in capsys.readouterr().err
    (folder / "model_index.json").write_text(json.dumps(index))


def test_it_is_read_back_bit_for_bit(exported):
    """As are released ones, which have the same form."""
    path, folder = exported
    ours, theirs = load_model(path), load_model(folder)
    assert theirs.kind == "shortcut" and theirs.interval.tells_end and theirs.backbone.told_end.gate == 0.3
    weights = ours.backbone.state_dict()
    assert weights.keys() == theirs.backbone.state_dict().keys()
    assert all(torch.equal(weights[name], value) for name, value in theirs.backbone.state_dict().items())
    sampler = build_sampler({}, theirs)
    assert (sampler.nfe, sampler.timestep_shift) == (4, 0.25)


def test_a_folder_of_diffusers_own_making(tmp_path):
    torch.manual_seed(0)
    settings = {name: value for name, value in BACKBONE.items() if name not in ("_target_", "height", "text_len")}
    settings.pop("width")
    stock = AnyFlowTransformer3DModel(**settings, patch_size=(1, 2, 2), out_channels=16)
    stock.save_pretrained(tmp_path / "net")
    x, text = torch.randn(2, *SIZE), Tokens(torch.randn(2, 12, 24))
    t, r = torch.tensor([0.1, 0.6]), torch.tensor([0.4, 1.0])
    with torch.no_grad():
        told = [(1000 * (1 - time))[:, None] for time in (t, r)]
        wanted = -stock(x.transpose(1, 2), *told, text.tokens).sample.transpose(1, 2)
        network = load_model(tmp_path / "net").backbone
        network.text_len = 12  # padded to 512 where nobody says otherwise
        torch.testing.assert_close(network(x, t, text, r), wanted, rtol=1e-4, atol=1e-5)
    config = json.loads((tmp_path / "net/config.json").read_text())
    (tmp_path / "net/config.json").write_text(json.dumps({**config, "deltatime_type": "t-r"}))
    with pytest.raises(Exception, match="told t-r in place of the end"):
        load_model(tmp_path / "net")


def test_a_gated_student_of_jumps_to_the_data_is_a_stock_wan(base, tmp_path):
    """Its end is always 1: what it says of that becomes a part of the time embedding."""
    path = save_student(tmp_path / "facm.ckpt", backbone=GATED, objective=TOLD)
    run(f"checkpoint={path}", f"output={tmp_path}/out", "format=diffusers", f"pipeline={base}")
    stock = WanTransformer3DModel.from_pretrained(tmp_path / "out/transformer")
    x, t, text = torch.randn(2, *SIZE), torch.tensor([0.0, 0.6]), Tokens(torch.randn(2, 12, 24))
    with torch.no_grad():
        expected = load_model(path).backbone(x, t, text, torch.ones(2))
        torch.testing.assert_close(-stock(x, 1000 * (1 - t), text.tokens).sample, expected, rtol=1e-5, atol=1e-5)


def test_a_grid_of_its_own_is_in_the_card(base, tmp_path):
    sampler = {"_target_": SAMPLER["_target_"], "times": [0, 0.25]}
    path = save_student(tmp_path / "grid.ckpt", **{**STUDENT, "sampler": sampler})
    run(f"checkpoint={path}", f"output={tmp_path}/out", "format=diffusers", f"pipeline={base}", "link=true")
    assert "sigmas=[1.0, 0.75], guidance_scale=1" in (tmp_path / "out/README.md").read_text()
    assert json.loads((tmp_path / "out/scheduler/scheduler_config.json").read_text())["shift"] == 1.0


EXPERTS = {**GATED, "_target_": "flowanchor.plugins.backbones.wan_experts.WanExperts", "preset": "nano"}


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (
            {"backbone": {**BACKBONE, "end_time": "decoupled"}},
            "tells its first blocks another time .* no network of diffusers does: use format=huggingface, or train",
        ),
        ({"backbone": EXPERTS}, "has two experts, and an AnyFlowPipeline holds one network"),
        ({"backbone": {**GATED, "patch_size": [1, 2, 1]}}, "knows rms_norm_across_heads and square patches"),
    ],
)
def test_what_cannot_become_one_is_told_so(base, tmp_path, capsys, config, words):
    path = save_student(Path(tmp_path / "run/student.ckpt"), **{**STUDENT, **config})
    with pytest.raises(SystemExit):
        run(f"checkpoint={path}", f"output={tmp_path}/out", "format=diffusers", f"pipeline={base}")
    assert re.search(words, capsys.readouterr().err)
    assert [entry.name for entry in tmp_path.iterdir()] == ["run"]
