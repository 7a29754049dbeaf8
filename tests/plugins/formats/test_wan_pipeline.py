"""A student leaves as a pipeline that diffusers opens without flowanchor, and draws what flowanchor draws."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from hydra.core.global_hydra import GlobalHydra
from hydra.utils import instantiate

from flowanchor.base.noise import renoiser, sample_noise
from flowanchor.checkpoints import load_model
from flowanchor.conditioning import batch_of
from flowanchor.plugins.samplers.consistency import ConsistencySampler
from flowanchor.plugins.samplers.jump_flow import JumpFlowSampler
from flowanchor.plugins.text_encoders.umt5 import UMT5
from flowanchor.programs.convert import main
from flowanchor.text.base import Tokens

BACKBONE = {
    "_target_": "flowanchor.plugins.backbones.wan.Wan", "in_channels": 16, "height": 8, "width": 6,
    "num_attention_heads": 2, "attention_head_dim": 24, "ffn_dim": 64, "num_layers": 2, "freq_dim": 32, "text_dim": 24,
    "text_len": 12,
}  # fmt: skip
INTERVALS = "flowanchor.plugins.objectives.intervals"
EXPANDED = {"interval": {"_target_": f"{INTERVALS}.expanded.ExpandedInterval"}}
AUXILIARY = {"interval": {"_target_": f"{INTERVALS}.auxiliary.AuxiliaryInterval"}}
SAMPLER = {"_target_": "flowanchor.plugins.samplers.consistency.ConsistencySampler", "steps": 2}
JUMP_FLOW = "flowanchor.plugins.samplers.jump_flow.JumpFlowSampler"
CODEC = {"_target_": "flowanchor.plugins.codecs.wan_vae.WanVAE"}
MEAN, STD = [0.1 * i - 0.8 for i in range(16)], [0.5 + 0.05 * i for i in range(16)]
STUDENTS = {
    "plain": {},
    "auxiliary": {"backbone": {**BACKBONE, "auxiliary_time_cond": True}, "objective": AUXILIARY},
    "shifted": {
        "sampler": {**SAMPLER, "timestep_shift": 3.0, "kept_noise": 0.2},
        "codec": {**CODEC, "statistics": {"mean": MEAN, "std": STD, "multiplier": 0.5}},
    },
    "experts": {
        "backbone": {**BACKBONE, "_target_": "flowanchor.plugins.backbones.wan_experts.WanExperts", "preset": "nano"},
        "sampler": {**SAMPLER, "boundaries": [0.125]},
    },
    "flows": {"sampler": {"_target_": JUMP_FLOW, "timestep_shift": 0.5, "kept_noise": 0.1}},
}
STEPS = (1, 2, 4)
PROMPTS = ["a red fox", "  a fox   in snow &amp; snow"]
SIZE, SEED, FIRST = (16, 1, 8, 6), 5, 3
FRAMES = {name: 5 if name == "auxiliary" else 1 for name in STUDENTS}

DRAW = """
import json, sys
import numpy as np
from diffusers import DiffusionPipeline, WanPipeline
from diffusers.utils import dynamic_modules_utils

task = json.loads(sys.stdin.read())
dynamic_modules_utils.HF_MODULES_CACHE = task["modules"]  # where diffusers copies a pipeline's own code
found = {}
for name, folder in task["folders"].items():
    loader = WanPipeline if name == "plain" else DiffusionPipeline
    pipe = loader.from_pretrained(folder, trust_remote_code=True)
    assert type(pipe) is WanPipeline, type(pipe)
    pipe.set_progress_bar_config(disable=True)
    for steps in task["steps"][name]:
        for kind in ("latent", "np"):
            frames = task["frames"][name]
            shape = (2, 16, (frames + 3) // 4, 8, 6)
            latents = pipe.scheduler.initial_latents(shape, seed=task["seed"], first=task["first"])
            found[f"{name}/{steps}/{kind}"] = np.asarray(pipe(
                task["prompts"], height=64, width=48, num_frames=frames, num_inference_steps=steps, guidance_scale=1,
                max_sequence_length=12, latents=latents, output_type=kind,
            ).frames)
assert not any(name.partition(".")[0] == "flowanchor" for name in sys.modules)
np.savez(task["output"], **found)
"""


def save_student(path: Path, kind: str = "shortcut", **config: Any) -> Path:
    """A checkpoint with random weights, by default one that becomes a pipeline."""
    config = {"backbone": BACKBONE, "objective": EXPANDED, "sampler": SAMPLER, "codec": CODEC, **config}
    torch.manual_seed(0)
    network = instantiate(config["backbone"])
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.15 * torch.randn_like(parameter))
    weights = {f"student.{name}": value for name, value in network.state_dict().items()}
    meta = {"format": 1, "kind": kind, "step": 7, "config": config}
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"state_dict": weights, "ema": {"short": network.state_dict()}, "flowanchor": meta}, path)
    return path


def run(*arguments: str) -> None:
    GlobalHydra.instance().clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["src/convert.py", *map(str, arguments)])
        main()


def steps_of(name):
    return [steps for steps in STEPS if name != "experts" or steps > 1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, base):
    """Every student, and its pipeline."""
    folder = tmp_path_factory.mktemp("students")
    for name, config in STUDENTS.items():
        save_student(folder / f"{name}.ckpt", **config)
        more = ["link=true"] if name == "shifted" else []
        run(
            f"checkpoint={folder / name}.ckpt", f"output={folder / name}", "format=diffusers", f"pipeline={base}", *more
        )
    return folder


@pytest.fixture(scope="module")
def drawn(folder):
    """What diffusers alone draws with the pipelines, in a process of its own."""
    task = {
        "folders": {name: str(folder / name) for name in STUDENTS},
        "steps": {name: steps_of(name) for name in STUDENTS},
        "prompts": PROMPTS, "frames": FRAMES, "seed": SEED, "first": FIRST, "output": str(folder / "drawn.npz"),
        "modules": str(folder / "hub"),
    }  # fmt: skip
    done = subprocess.run([sys.executable, "-c", DRAW], input=json.dumps(task), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return np.load(folder / "drawn.npz")


@pytest.mark.parametrize("name", STUDENTS)
def test_diffusers_alone_draws_our_images_seed_for_seed(folder, drawn, base, name):
    model = load_model(folder / f"{name}.ckpt")
    text = batch_of(UMT5(str(base), max_length=12, dtype="float32").encode(PROMPTS))
    indices, shape = range(FIRST, FIRST + 2), (16, (FRAMES[name] + 3) // 4, 8, 6)
    noise, fresh = sample_noise(SEED, indices, shape).float(), renoiser(SEED, indices, shape, "cpu")
    vae = AutoencoderKLWan.from_pretrained(base / "vae")
    mean, std = torch.tensor(vae.config.latents_mean), torch.tensor(vae.config.latents_std)
    if name == "shifted":
        mean, std = torch.tensor(MEAN), torch.tensor(STD) / 0.5
    settings = {key: value for key, value in model.config["sampler"].items() if key not in ("_target_", "steps")}
    for steps in steps_of(name):
        sampler = (JumpFlowSampler if name == "flows" else ConsistencySampler)(steps=steps, **settings)
        latents = sampler.sample(model.backbone, noise, text, model.interval, fresh)
        found = torch.from_numpy(drawn[f"{name}/{steps}/latent"])
        assert latents.std() > 0.3
        assert (found - latents).abs().max() <= 1e-5 * latents.abs().max()
        with torch.no_grad():
            raw = latents.float() * std.view(-1, 1, 1, 1) + mean.view(-1, 1, 1, 1)
            images = (vae.decode(raw).sample / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 4, 1).numpy()
        assert images.shape == drawn[f"{name}/{steps}/np"].shape == (2, FRAMES[name], 64, 48, 3)
        assert 0.1 < images.mean() < 0.9 and images.std() > 1e-3
        assert np.abs(images - drawn[f"{name}/{steps}/np"]).max() <= 1e-5
    assert np.abs(drawn[f"{name}/2/np"] - drawn[f"{name}/4/np"]).max() > 1e-3


def test_an_embedder_of_the_end_time_is_not_lost(folder, drawn):
    """Without it the network is another one, and the test above would not hold by chance."""
    model = load_model(folder / "auxiliary.ckpt")
    x, t, text = torch.randn(2, *SIZE), torch.tensor([0.0, 0.6]), Tokens(torch.randn(2, 12, 24))
    folded = WanTransformer3DModel.from_pretrained(folder / "auxiliary/transformer")
    with torch.no_grad():
        expected = model.backbone(x, t, text, torch.ones(2))
        torch.testing.assert_close(-folded(x, 1000 * (1 - t), text.tokens).sample, expected, rtol=1e-5, atol=1e-5)
        plain = -model.backbone.transformer()(x, 1000 * (1 - t), text.tokens).sample
    assert (plain - expected).norm() > 0.01 * expected.norm()


def test_the_folder_says_what_it_is(folder, base):
    index = json.loads((folder / "experts/model_index.json").read_text())
    assert index["transformer_2"] == ["diffusers", "WanTransformer3DModel"] and index["_class_name"] == "WanPipeline"
    assert index["boundary_ratio"] == 0.875  # as released
    plain = json.loads((folder / "plain/model_index.json").read_text())
    assert plain["transformer_2"] == [None, None] and "boundary_ratio" not in plain
    assert "(jump-flow, times 0 0.3333 0.5758 0.8182, 0.1 of" in (folder / "flows/README.md").read_text()
    card = (folder / "shifted/README.md").read_text()
    assert "num_inference_steps=2, guidance_scale=1, max_sequence_length=12" in card and "flowanchor" in card
    for part in ("vae", "text_encoder", "tokenizer"):
        names = {path.name for path in (base / part).iterdir()}
        for name in ("plain", "shifted"):
            assert {path.name for path in (folder / name / part).iterdir()} == names
            linked = {path.name for path in (folder / name / part).iterdir() if path.is_symlink()}
            assert linked == (set() if name == "plain" else names - ({"config.json"} if part == "vae" else set()))
    assert json.loads((base / "vae/config.json").read_text())["latents_mean"] != MEAN, "the base is left alone"


def test_a_sampler_that_a_pipeline_cannot_be_asked_by_is_told(base, tmp_path):
    path = save_student(tmp_path / "a.ckpt", **STUDENTS["auxiliary"], sampler={"_target_": JUMP_FLOW, "steps": 4})
    with pytest.warns(UserWarning, match="sampled by jump-flow, .* draws by consistency"):
        run(f"checkpoint={path}", f"output={tmp_path}/out", "format=diffusers", f"pipeline={base}")
    scheduler = json.loads((tmp_path / "out/scheduler/scheduler_config.json").read_text())
    assert scheduler["flow"] is None and scheduler["kept_noise"] == 0.0


def test_bfloat16_leaves_what_diffusers_keeps_in_float32(folder, base, tmp_path):
    run(
        f"checkpoint={folder}/plain.ckpt",
        f"output={tmp_path}/half",
        "format=diffusers",
        f"pipeline={base}",
        "dtype=bfloat16",
    )
    exact = load_model(folder / "plain.ckpt").backbone.state_dict()
    half = WanTransformer3DModel.from_pretrained(tmp_path / "half/transformer", torch_dtype=torch.bfloat16).state_dict()
    kinds = {name: value.dtype for name, value in half.items()}
    assert kinds["blocks.0.ffn.net.2.weight"] == torch.bfloat16 and kinds["scale_shift_table"] == torch.float32
    for name, value in exact.items():
        assert torch.equal(half[name], value.to(kinds[name])), name


def test_adapters_are_added_to_the_weights_beside_them(folder, base, tmp_path):
    lora = {"backbone": {**BACKBONE, "lora": {"rank": 2}}, "initialise_from": str(folder / "plain.ckpt")}
    path = save_student(tmp_path / "lora.ckpt", **lora)
    content = torch.load(path, weights_only=True)
    for weights in (content["state_dict"], content["ema"]["short"]):
        for name in [name for name in weights if ".lora_" not in name]:
            del weights[name]
    torch.save(content, path)
    run(f"checkpoint={path}", f"output={tmp_path}/out", "format=diffusers", f"pipeline={base}")
    stock = WanTransformer3DModel.from_pretrained(tmp_path / "out/transformer")
    x, text = torch.randn(1, *SIZE), Tokens(torch.randn(1, 12, 24))
    with torch.no_grad():
        expected = load_model(path).backbone(x, torch.tensor([0.4]), text)
        torch.testing.assert_close(-stock(x, torch.tensor([600.0]), text.tokens).sample, expected, rtol=1e-5, atol=1e-5)
        plain = load_model(folder / "plain.ckpt").backbone(x, torch.tensor([0.4]), text)
    assert (plain - expected).norm() > 0.01 * expected.norm()


def test_an_output_is_replaced_on_request_alone(folder, base, tmp_path, capsys):
    shutil.copytree(folder / "plain", tmp_path / "out")
    (tmp_path / "other").mkdir()
    asked = [f"checkpoint={folder}/auxiliary.ckpt", "format=diffusers", f"pipeline={base}"]
    for output, more, words in (
        ("out", [], "exists already: choose another output="),
        ("other", ["overwrite=true"], "no earlier output of this kind"),
    ):
        with pytest.raises(SystemExit):
            run(*asked, f"output={tmp_path / output}", *more)
        assert words in capsys.readouterr().err
    run(*asked, f"output={tmp_path}/out", "overwrite=true")
    weights = "transformer/diffusion_pytorch_model.safetensors"
    assert (tmp_path / "out" / weights).read_bytes() == (folder / "auxiliary" / weights).read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == {"out", "other"}


LIGHTNINGDIT = {
    "_target_": "flowanchor.plugins.backbones.lightningdit.LightningDiT", "input_size": 8, "patch_size": 4,
    "in_channels": 1, "hidden_size": 16, "depth": 1, "num_heads": 2, "num_classes": 10,
}  # fmt: skip


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"backbone": LIGHTNINGDIT}, "holds a LightningDiT, and only a Wan becomes a diffusers pipeline: use format="),
        ({"kind": "flow"}, "trained as a flow model and has no shortcut"),
        (
            {"codec": {"_target_": "flowanchor.plugins.codecs.identity.Identity"}},
            "samples for the codec Identity, and a Wan",
        ),
        ({"backbone": {**BACKBONE, "text_dim": 8}}, "texts of width 8, and .* has 16 and 24: give the pipeline whose"),
        ({"backbone": {**BACKBONE, "in_channels": 4}}, "latents of 4 channels from texts of width 24, and"),
        ({"backbone": {**BACKBONE, "auxiliary_time_cond": True}}, "embeds a second time, .* objective/interval=auxil"),
    ],
)
def test_what_cannot_become_a_pipeline_is_told_so(base, tmp_path, capsys, config, words):
    path = save_student(tmp_path / "run/student.ckpt", **config)
    with pytest.raises(SystemExit):
        run(f"checkpoint={path}", f"output={tmp_path}/out", "format=diffusers", f"pipeline={base}")
    assert re.search(words, capsys.readouterr().err)
    assert [entry.name for entry in tmp_path.iterdir()] == ["run"]


def _without(part):
    return lambda folder: shutil.rmtree(folder / part)


def _other_vae(folder):
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "vae": ["diffusers", "AutoencoderKL"]}))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (None, r"needs its VAE, text encoder and tokenizer: add pipeline=FOLDER"),
        (shutil.rmtree, r"no folder of a diffusers pipeline \(model_index.json is not there\): add pipeline=FOLDER"),
        (_without("tokenizer"), "lacks tokenizer: download all folders"),
        (_other_vae, "decodes by AutoencoderKL: give a pipeline of Wan"),
        (
            lambda folder: (folder / "vae/config.json").write_text("{"),
            r"vae is incomplete \(config.json cannot be read",
        ),
        (lambda folder: (folder / "model_index.json").write_text("[]"), "has no settings"),
    ],
)
def test_a_base_pipeline_that_lacks_something(folder, base, tmp_path, capsys, damage, words):
    given = []
    if damage is not None:
        damaged = Path(shutil.copytree(base, tmp_path / "base"))
        damage(damaged)
        given = [f"pipeline={damaged}"]
    with pytest.raises(SystemExit):
        run(f"checkpoint={folder}/plain.ckpt", f"output={tmp_path}/out", "format=diffusers", *given)
    assert re.search(words, capsys.readouterr().err)
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize(
    ("file", "entries", "words"),
    [
        ("model_index.json", {"vae": ["my_code", "AutoencoderKLWan"]}, "lacks vae: .*must be of diffusers or transf"),
        ("model_index.json", {"tokenizer": [["a"], "b"]}, "lacks tokenizer"),
        ("text_encoder/config.json", {"auto_map": {"AutoModel": "mine.Net"}}, "asks for code of its own choice"),
    ],
)
def test_a_pipeline_that_brings_code_is_not_taken_over(folder, base, tmp_path, capsys, file, entries, words):
    """Whoever opens an export trusts its scheduler's file, and would run what lies beside."""
    hostile = Path(shutil.copytree(base, tmp_path / "base"))
    (hostile / "vae" / "my_code.py").write_text("raise SystemExit('ran')\n")
    path = hostile / file
    before = path.read_text()
    path.write_text(json.dumps({**json.loads(before), **entries}))
    asked = [f"checkpoint={folder}/plain.ckpt", f"output={tmp_path}/out", "format=diffusers", f"pipeline={hostile}"]
    with pytest.raises(SystemExit):
        run(*asked)
    assert re.search(words, capsys.readouterr().err) and not (tmp_path / "out").exists()
    path.write_text(before)
    run(*asked)
    assert not list((tmp_path / "out" / "vae").glob("*.py"))
