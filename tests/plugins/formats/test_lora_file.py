"""LoRA files: read by stock diffusers, by its own loaders and pipelines, against what the student answers."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import json
import re
from pathlib import Path
from types import SimpleNamespace

import diffusers
import pytest
import torch
from einops import rearrange
from safetensors import safe_open

from flowanchor.checkpoints.format import DescribedWeights
from flowanchor.errors import CheckpointError
from flowanchor.plugins.backbones.diffusers.network import DiffusersTransformer
from flowanchor.plugins.backbones.lora import is_adapter
from flowanchor.plugins.backbones.wan import Wan
from flowanchor.plugins.formats.lora_file import CARD, MARK, WEIGHTS, LoraFile
from flowanchor.plugins.formats.transformer_folder import TransformerFolder
from flowanchor.plugins.objectives.intervals.plain import PlainInterval
from flowanchor.plugins.samplers.consistency import ConsistencySampler
from flowanchor.text.base import Tokens

from ..diffusers_cases import CASES, LENGTH, PACK, UNPACK
from ..some import one_of_each_kind

LORA = {"rank": 4, "alpha": 8, "targets": None}
WAN = {
    "in_channels": 4, "height": 8, "width": 8, "num_attention_heads": 2, "attention_head_dim": 16, "ffn_dim": 48,
    "num_layers": 2, "freq_dim": 32, "text_dim": 12, "text_len": 6,
}  # fmt: skip
SAMPLER = "flowanchor.plugins.samplers.consistency.ConsistencySampler"
PLAIN = "flowanchor.plugins.objectives.intervals.plain.PlainInterval"


def student(name, lora=LORA, **more):
    """A network, and how a checkpoint describes it."""
    if name == "Wan":
        torch.manual_seed(0)
        network = Wan(**WAN, lora=lora, **more)
        for key, parameter in network.named_parameters():
            torch.nn.init.normal_(parameter, std=0.2 if is_adapter(key) else 0.15)
        return network.eval(), {"_target_": f"{Wan.__module__}.Wan", **WAN, "lora": lora, **more}
    case = CASES[name]
    told = {"stock": case.description.stock, "settings": case.settings, **case.sizes(), **case.more, "lora": lora}
    target = f"{DiffusersTransformer.__module__}.DiffusersTransformer"
    return case.network(lora=lora), json.loads(json.dumps({"_target_": target, **told}))


def described(network, backbone, kind="shortcut", **sampler):
    config = {
        "backbone": backbone, "objective": {"interval": {"_target_": PLAIN}}, "initialise_from": "some/fine_tune",
        "sampler": {"_target_": SAMPLER, **sampler},
    }  # fmt: skip
    return DescribedWeights(Path("run.ckpt"), network.state_dict(), {"kind": kind, "step": 7, "config": config})


def stock_base(network):
    """The stock network of the weights that adapters stand beside."""
    plain = {key: value for key, value in network.state_dict().items() if not is_adapter(key)}
    made = (
        diffusers.WanTransformer3DModel(**network.settings)
        if isinstance(network, Wan)
        else type(network.network).from_config(dict(network.network.config))
    )
    made.load_state_dict(plain)
    return made.eval()


def relative(a, b):
    return float((a - b).norm() / b.norm())


def loaded(pipeline, stock, folder):
    """By the pipeline's own loader, as `load_lora_weights` calls it."""
    found = pipeline.lora_state_dict(str(folder), weight_name=WEIGHTS, return_lora_metadata=True)
    given = {"metadata": found[-1], "network_alphas": found[1] if len(found) == 3 else None}
    takes = inspect.signature(pipeline.load_lora_into_transformer).parameters
    pipeline.load_lora_into_transformer(
        found[0], transformer=stock, **{key: value for key, value in given.items() if key in takes}
    )


READ_BY_STOCK = [
    "SD3",
    "SD3.5",
    "FLUX.1",
    "FLUX.1 dev",
    "FLUX.2",
    "Qwen-Image",
    "Z-Image",
    "Sana",
    "LTX-Video",
    "Krea 2",
]


@pytest.mark.parametrize("name", one_of_each_kind(READ_BY_STOCK))
def test_stock_diffusers_answers_as_the_student(name, tmp_path):
    network, backbone = student(name)
    said = LoraFile().write(described(network, backbone), tmp_path / "lora")
    layers = sum(".lora_A." in key for key in network.state_dict())
    assert said == f"{layers} layers of rank 4"
    stock, case = stock_base(network), CASES[name]
    x, t, cond = case.inputs(torch.float32)
    with torch.no_grad():
        wanted = network.predict(x, t, cond)
        assert relative(case.ask(stock, x, t, cond), wanted) > 1e-2
        loaded(getattr(diffusers, case.description.pipeline.name), stock, tmp_path / "lora")
        assert relative(case.ask(stock, x, t, cond), wanted) < 1e-5


def test_stock_diffusers_reads_wans_own_names(tmp_path):
    network, backbone = student("Wan")
    LoraFile().write(described(network, backbone), tmp_path / "lora")
    stock = stock_base(network)
    x, t, text = torch.randn(2, 4, 1, 8, 8), torch.tensor([0.3, 0.8]), torch.randn(2, 6, 12)
    loaded(diffusers.WanPipeline, stock, tmp_path / "lora")
    with torch.no_grad():
        found = -stock(x, 1000 * (1 - t), text, return_dict=False)[0]
        assert relative(found, network.predict(x, t, Tokens(text))) < 1e-5


STREAMS = [f"attn.{one}" for one in ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj")]
# What ComfyUI looks for in its first blocks (comfy/utils.py and comfy/lora.py: names of diffusers behind
# `transformer.`, its own ones for Wan, raw names for LTX-Video).
COMFY = {
    "SD3": ("transformer.transformer_blocks.0.", [*STREAMS, "attn.to_add_out", "ff.net.0.proj", "ff.net.2",
            "ff_context.net.0.proj", "ff_context.net.2"]),
    "FLUX.1": ("transformer.single_transformer_blocks.0.",
               ["attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp", "proj_out"]),
    "Qwen-Image": ("transformer.transformer_blocks.0.", [*STREAMS, "attn.to_add_out", "img_mlp.net.0.proj",
                   "img_mlp.net.2", "txt_mlp.net.0.proj", "txt_mlp.net.2"]),
    "Z-Image": ("transformer.layers.0.", ["attention.to_q", "attention.to_k", "attention.to_v", "attention.to_out.0",
                "feed_forward.w1", "feed_forward.w2", "feed_forward.w3"]),
    "LTX-Video": ("diffusion_model.transformer_blocks.0.", [f"attn{n}.{one}" for n in (1, 2) for one in
                  ("to_q", "to_k", "to_v", "to_out.0")] + ["ff.net.0.proj", "ff.net.2"]),
    "Wan": ("diffusion_model.blocks.0.", [f"{kind}_attn.{one}" for kind in ("self", "cross") for one in "qkvo"]
            + ["ffn.0", "ffn.2"]),
}  # fmt: skip


@pytest.mark.parametrize("name", COMFY)
def test_names_that_comfyui_knows(name, tmp_path):
    network, backbone = student(name)
    LoraFile(dtype="bfloat16").write(described(network, backbone), tmp_path / "lora")
    first, layers = COMFY[name]
    with safe_open(tmp_path / "lora" / WEIGHTS, framework="pt") as file:
        keys = [key for key in file.keys() if key.startswith(first)]  # noqa: SIM118 - no dictionary
        assert sorted(keys) == sorted(f"{first}{one}.lora_{part}.weight" for one in layers for part in "AB")
        assert {file.get_tensor(key).dtype for key in keys} == {torch.bfloat16}
        assert not any(key.endswith(".alpha") for key in file.keys())  # noqa: SIM118 - ComfyUI takes 1 where none is


def arguments(folder):
    """What the card says that the pipeline is called with."""
    said = re.search(r'pipe\("a red fox in the snow", (.*)\)', (folder / CARD).read_text())
    return eval(f"dict({said[1]})")  # noqa: S307 - written by the test itself


def pipeline_of(name, stock):
    none = dict.fromkeys(("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    if name.startswith("SD3"):
        none |= {"text_encoder_3": None, "tokenizer_3": None}
    made = getattr(diffusers, CASES[name].description.pipeline.name)(
        transformer=stock, scheduler=diffusers.FlowMatchEulerDiscreteScheduler(), **none
    )
    made.set_progress_bar_config(disable=True)
    return made


@pytest.mark.parametrize(
    "name, steps, shift",
    [
        ("SD3.5", 1, 0.0),
        ("SD3.5", 4, 1 / 3),
        ("FLUX.1 dev", 2, 0.4),
        *(
            pytest.param(name, steps, shift, marks=pytest.mark.slow)
            for name, others in (("SD3.5", ((2, 0.4),)), ("FLUX.1 dev", ((1, 0.0), (4, 1 / 3))))
            for steps, shift in (*others, (2, 0.0), (4, 0.0))
        ),
    ],
)
def test_the_stock_pipeline_draws_the_students_images(name, steps, shift, tmp_path):
    network, backbone = student(name)
    LoraFile(steps=steps).write(described(network, backbone, timestep_shift=shift), tmp_path / "lora")
    pipe = pipeline_of(name, stock_base(network))
    pipe.load_lora_weights(tmp_path / "lora")
    pipe.scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_pretrained(tmp_path / "lora" / "scheduler")
    _, _, cond = CASES[name].inputs(torch.float32)
    cond, noise = type(cond)(*(part[:1] for part in cond)), torch.randn(1, 4, 8, 8)
    flux = name.startswith("FLUX")

    def fresh(step):
        if not flux:
            return torch.randn(noise.shape)
        return rearrange(torch.randn(1, 16, 16), UNPACK, p=2, q=2, h=4)

    torch.manual_seed(9)
    wanted = ConsistencySampler(steps, timestep_shift=shift).sample(network, noise, cond, PlainInterval(), fresh)
    torch.manual_seed(9)
    found = pipe(
        prompt_embeds=cond.tokens, pooled_prompt_embeds=cond.pooled, height=64, width=64, output_type="latent",
        latents=rearrange(noise, PACK, p=2, q=2) if flux else noise, **arguments(tmp_path / "lora"),
    ).images  # fmt: skip
    found = rearrange(found, UNPACK, p=2, q=2, h=4) if flux else found
    assert relative(found.double(), wanted) < 1e-5
    assert cond.tokens.shape[1] == LENGTH


def test_what_the_file_says_of_itself(tmp_path):
    network, backbone = student("SD3")
    given = described(network, backbone, steps=4)
    form = LoraFile(base_model="someone/style", licence="cc-by-4.0")
    form.write(given, tmp_path / "lora")
    with safe_open(tmp_path / "lora" / WEIGHTS, framework="pt") as file:
        said = json.loads(file.metadata()[MARK])
        assert "lora_adapter_metadata" not in file.metadata()
    assert said["base_model"] == "someone/style" and said["licence"] == "cc-by-4.0" and said["rank"] == 4
    assert said["steps"] == 4 and said["sigmas"] == [1, 0.75, 0.5, 0.25] and said["guidance"] == "guidance_scale=1"
    card = (tmp_path / "lora" / CARD).read_text()
    assert "StableDiffusion3Pipeline" in card and "num_inference_steps=4, guidance_scale=1" in card
    scheduler = json.loads((tmp_path / "lora/scheduler/scheduler_config.json").read_text())
    assert scheduler["stochastic_sampling"] and scheduler["shift_terminal"] == 0.25 and scheduler["shift"] == 1
    assert form.replaces(tmp_path / "lora") and not form.replaces(tmp_path)
    given.meta["config"].update(base_lora="mine/own style.safetensors", base_lora_scale=0.5)
    LoraFile().write(given, tmp_path / "over")
    card = (tmp_path / "over" / CARD).read_text()
    assert "base_model" not in card and "merged into it, 0.5 times: load both" in card
    (code,) = re.findall(r"```python\n(.*?)```", card, re.S)
    ast.parse(code)
    assert 'set_adapters(["base", "steps"], [0.5, 1.0])' in code and "own style.safetensors" in code


def test_the_pipeline_of_klein():
    known = CASES["FLUX.2"].description()
    names = [known.drawn_by(SimpleNamespace(guidance_embeds=told)).name for told in (True, False)]
    assert names == ["Flux2Pipeline", "Flux2KleinPipeline"] and all(hasattr(diffusers, name) for name in names)


def test_whole_weights_have_the_adapters_merged(tmp_path):
    network, backbone = student("Z-Image")
    TransformerFolder().write(described(network, backbone), tmp_path / "whole")
    stock = diffusers.ZImageTransformer2DModel.from_pretrained(tmp_path / "whole").eval()
    x, t, cond = CASES["Z-Image"].inputs(torch.float32)
    with torch.no_grad():
        assert relative(CASES["Z-Image"].ask(stock, x, t, cond), network.predict(x, t, cond)) < 1e-5


def refused(given, tmp_path, message, form=None):
    with pytest.raises(CheckpointError, match=message):
        (form or LoraFile()).write(given, tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_what_would_not_be_read_is_not_written(tmp_path, monkeypatch):
    for name in ("PixArt", "HunyuanVideo 1.5"):
        refused(described(*student(name)), tmp_path, "whose pipeline reads no LoRA files.*format=transformer")
    network, backbone = student("SD3", lora=None)
    refused(described(network, backbone), tmp_path, "has no adapters .backbone.lora.rank.")
    refused(described(*student("Wan", end_time="gated")), tmp_path, "is told where a jump ends")
    shifted = {"steps": 4, "timestep_shift": 0.2}
    refused(described(*student("Wan"), **shifted), tmp_path, "WanPipeline cannot be told them: write it for one or two")
    LoraFile(steps=2).write(described(*student("Wan"), **shifted), tmp_path / "two")
    refused(described(*student("SD3"), guidance_scale=2.0), tmp_path, "is sampled with guidance")
    lora = {"rank": 2, "targets": ["condition_embedder.time_proj"]}
    refused(
        described(*student("Wan", lora=lora)), tmp_path, "for which LoRA files of WanTransformer3DModel have no name"
    )
    known = CASES["FLUX.1"].description  # whose loader finds nothing behind this prefix, and says nothing
    monkeypatch.setattr(known, "pipeline", dataclasses.replace(known.pipeline, prefix="diffusion_model."))
    refused(described(*student("FLUX.1")), tmp_path, "FluxPipeline of diffusers .* would not load these adapters")
