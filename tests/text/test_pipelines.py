"""Texts of pipelines: what the stock pipeline's own `encode_prompt` gives, of small random encoders."""

from __future__ import annotations

import inspect
import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

from flowanchor.errors import CheckpointError, ConfigError
from flowanchor.plugins.text_encoders import pipeline_texts
from flowanchor.plugins.text_encoders.pipeline import PipelineEncoder
from flowanchor.plugins.text_encoders.pipeline_texts import KNOWN
from flowanchor.text.base import KINDS

from .pipelines import PARTS, parts_of, stock_pipeline, write_pipeline

PROMPTS = ['a red "fox"', "snow", ""]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Folders by the name of the pipeline, each written once."""
    made: dict[str, Path] = {}

    def folder(stock: str) -> Path:
        if stock not in made:
            made[stock] = write_pipeline(stock, tmp_path_factory.mktemp(stock))
        return made[stock]

    return folder


def sana_instruction(pipeline: Any) -> Any:
    return inspect.signature(type(pipeline).__call__).parameters["complex_human_instruction"].default


def asked(stock: str, pipeline: Any, prompt: str) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The prompt, and the same as a negative prompt, as the pipeline's `__call__` has them encoded; batches of one."""
    if stock == "HunyuanVideo15Pipeline":
        found = dict(zip(("tokens", "mask", "tokens_2", "mask_2"), _hunyuan(pipeline, prompt), strict=True))
        return found, found
    if stock == "StableDiffusion3Pipeline":
        tokens, no_tokens, pooled, no_pooled = pipeline.encode_prompt(prompt, prompt, prompt, negative_prompt=prompt)
        return {"tokens": tokens, "pooled": pooled}, {"tokens": no_tokens, "pooled": no_pooled}
    if stock == "FluxPipeline":
        found = dict(zip(("tokens", "pooled"), pipeline.encode_prompt(prompt, prompt)[:2], strict=True))
        return found, found
    if stock in ("Flux2Pipeline", "Flux2KleinPipeline"):
        found = {"tokens": pipeline.encode_prompt(prompt)[0]}
        return found, found
    if stock == "ZImagePipeline":
        yes, no = (
            {"tokens": one[0][None], "mask": torch.ones(1, len(one[0]))}
            for one in pipeline.encode_prompt(prompt, negative_prompt=prompt)
        )
        return yes, no
    if stock in ("QwenImagePipeline", "Krea2Pipeline"):
        tokens, mask = pipeline.encode_prompt(prompt)
        mask = torch.ones(tokens.shape[:2]) if mask is None else mask
        return {"tokens": tokens, "mask": mask}, {"tokens": tokens, "mask": mask}
    given = {"complex_human_instruction": sana_instruction(pipeline)} if stock == "SanaPipeline" else {}
    if stock.startswith("PixArt"):
        given = {"clean_caption": inspect.signature(type(pipeline).__call__).parameters["clean_caption"].default}
    tokens, mask, no_tokens, no_mask = pipeline.encode_prompt(prompt, negative_prompt=prompt, **given)
    return {"tokens": tokens, "mask": mask}, {"tokens": no_tokens, "mask": no_mask}


def _hunyuan(parts: dict[str, Any], prompt: str) -> tuple[torch.Tensor, ...]:
    """Its constructor wants a VAE; what it asks for texts are functions."""
    kind, cpu = diffusers.HunyuanVideo15Pipeline, torch.device("cpu")
    first = kind._get_mllm_prompt_embeds(parts["text_encoder"], parts["tokenizer"], prompt, cpu)
    return (*first, *kind._get_byt5_prompt_embeds(parts["tokenizer_2"], parts["text_encoder_2"], prompt, cpu))


def whole(text: Any, like: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What a network is given of ours, with zeros (False) as far as theirs goes: theirs with its padding erased."""
    found = {}
    for name, theirs in like.items():
        ours = getattr(text, name)[None]
        padded = torch.zeros_like(theirs, dtype=ours.dtype)
        padded[:, : ours.shape[1]] = ours
        found[name] = padded
    return found


def moved_to_the_front(theirs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tokens that the mask keeps, in their order, zeros behind them: where a mask decides, padding does not count."""
    found = dict(theirs)
    for name in [name for name in theirs if name.startswith("mask")]:
        kept, tokens = theirs[name][0].bool(), theirs[name.replace("mask", "tokens")]
        count = int(kept.sum())
        text = torch.zeros_like(tokens)
        text[:, :count] = tokens[:, kept]
        found[name.replace("mask", "tokens")] = text
        found[name] = (torch.arange(len(kept)) < count)[None]
    return found


@pytest.mark.parametrize("stock", PARTS)
@torch.no_grad()
def test_texts_are_the_pipelines_own(stock, folders):
    """Of all prompts and of the negative one, each for itself. Without a mask they keep the padding that they have."""
    folder = folders(stock)
    encoder = PipelineEncoder(str(folder), dtype="float32")
    pipeline = parts_of(folder) if stock == "HunyuanVideo15Pipeline" else stock_pipeline(stock, folder)
    found = encoder.encode(PROMPTS)
    assert type(found[0]) is KINDS[found[0]._fields] and encoder.width == found[0].tokens.shape[-1]
    for prompt, text in zip(PROMPTS, found, strict=True):
        for ours, theirs in zip((text, encoder.encode_negative(prompt)), asked(stock, pipeline, prompt), strict=True):
            assert set(ours._fields) == set(theirs)
            wanted = moved_to_the_front(theirs)
            for name, value in whole(ours, theirs).items():
                assert torch.equal(value, wanted[name].to(value.dtype)), (prompt, name)
                if "mask" not in theirs:
                    assert getattr(ours, name).shape == theirs[name].shape[1:]
    alike = [a.shape == b.shape and torch.equal(a, b) for a, b in zip(found[0], found[1], strict=True)]
    assert not alike[0]


WRITTEN = "<b>Two&nbsp;birds</b> see https://a.example/b.png by @you #12345 JPEG"


@pytest.mark.parametrize("stock", ["PixArtSigmaPipeline", "PixArtAlphaPipeline"])
@torch.no_grad()
def test_pixart_cleans_captions(stock, folders):
    """As its pipeline does unless told otherwise: another text than that of the caption as it is."""
    pipeline = stock_pipeline(stock, folders(stock))
    found = PipelineEncoder(str(folders(stock)), dtype="float32").encode([WRITTEN])[0]
    theirs, _ = asked(stock, pipeline, WRITTEN)
    assert torch.equal(found.tokens, theirs["tokens"][0][theirs["mask"][0].bool()])
    raw, mask, *_ = pipeline.encode_prompt(WRITTEN, False, clean_caption=False)
    assert len(found.tokens) < int(mask.sum())
    plain, mask, *_ = pipeline.encode_prompt("two birds see by", False, clean_caption=False)
    assert torch.equal(found.tokens, plain[0][mask[0].bool()])


@torch.no_grad()
def test_pixart_without_what_cleans(folders, monkeypatch):
    folder = str(folders("PixArtSigmaPipeline"))
    cleaned = PipelineEncoder(folder, dtype="float32").fingerprint()
    for module in ("diffusers.utils", "diffusers.pipelines.pixart_alpha.pipeline_pixart_sigma"):
        monkeypatch.setattr(f"{module}.is_bs4_available", lambda: False)
    monkeypatch.setattr(pipeline_texts, "is_bs4_available", lambda: False)
    with pytest.warns(UserWarning, match=r"cleans captions .*: pip install 'flowanchor\[wan\]'"):
        encoder = PipelineEncoder(folder, dtype="float32")
    theirs, _ = asked("PixArtSigmaPipeline", stock_pipeline("PixArtSigmaPipeline", Path(folder)), WRITTEN)
    assert torch.equal(encoder.encode([WRITTEN])[0].tokens, theirs["tokens"][0][theirs["mask"][0].bool()])
    assert encoder.fingerprint() != cleaned


@torch.no_grad()
def test_sd3_by_hand(folders):
    """Second last layers of both CLIPs side by side, zeros to the width of T5, T5 behind; pooled vectors joined."""
    encoder = PipelineEncoder(str(folders("StableDiffusion3Pipeline")), dtype="float32", max_length=9)
    parts = parts_of(folders("StableDiffusion3Pipeline"))
    states, pooled = [], []
    for number in ("", "_2"):
        ids = parts[f"tokenizer{number}"]("snow", padding="max_length", max_length=16, return_tensors="pt").input_ids
        answer = parts[f"text_encoder{number}"](ids, output_hidden_states=True)
        states.append(answer.hidden_states[-2][0])
        pooled.append(answer.text_embeds[0])
    ids = parts["tokenizer_3"]("snow", padding="max_length", max_length=9, return_tensors="pt").input_ids
    long = parts["text_encoder_3"](ids).last_hidden_state[0]
    found = encoder.encode(["snow"])[0]
    assert torch.equal(found.tokens, torch.cat([torch.cat([*states, torch.zeros(16, 24 - 20)], 1), long]))
    assert torch.equal(found.pooled, torch.cat(pooled))


def test_sd3_without_t5(folders, tmp_path):
    """Zeros where it would stand, as wide as the network says; the folder of T5 need not be there."""
    shutil.copytree(folders("StableDiffusion3Pipeline"), tmp_path / "copy")
    for name in ("text_encoder_3", "tokenizer_3"):
        shutil.rmtree(tmp_path / "copy" / name)
    wanted = {"without": ["text_encoder_3"], "dtype": "float32"}
    with pytest.raises(CheckpointError, match="must say how wide the text is"):
        PipelineEncoder(str(tmp_path / "copy"), **wanted)
    (tmp_path / "copy" / "transformer").mkdir()
    (tmp_path / "copy" / "transformer" / "config.json").write_text('{"joint_attention_dim": 24}')
    encoder = PipelineEncoder(str(tmp_path / "copy"), **wanted)
    found, full = (
        encoder.encode(["snow"])[0],
        PipelineEncoder(str(folders("StableDiffusion3Pipeline")), dtype="float32"),
    )
    assert found.tokens.shape == (16 + 256, 24) and not found.tokens[16:].any()
    assert torch.equal(found.tokens[:16], full.encode(["snow"])[0].tokens[:16])
    assert encoder.fingerprint() != full.fingerprint()
    index = json.loads((tmp_path / "copy" / "model_index.json").read_text())
    index["text_encoder_3"] = index["tokenizer_3"] = [None, None]
    (tmp_path / "copy" / "model_index.json").write_text(json.dumps(index))
    again = PipelineEncoder(str(tmp_path / "copy"), dtype="float32")
    assert torch.equal(again.encode(["snow"])[0].tokens, found.tokens)


def test_a_long_prompt_is_cut_and_the_cut_is_shown(folders):
    encoder = PipelineEncoder(str(folders("PixArtSigmaPipeline")), max_length=4, dtype="float32")
    with pytest.warns(UserWarning, match="8 tokens and 4 are read; cut off: 'down'"):
        found = encoder.encode(["sndown"])[0]
    assert found.tokens.shape == (4, 24) and found.mask.all()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        encoder.encode(["sn"])
    longer = PipelineEncoder(str(folders("PixArtSigmaPipeline")), dtype="float32")
    assert longer.max_length == 300 and longer.fingerprint() != encoder.fingerprint()


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"weights": None}, "text_encoder.weights=FOLDER"),
        ({"dtype": "int8"}, "text_encoder.dtype=int8 is unknown"),
        ({"max_length": 301}, "max_length=301 must be between 1 and 300"),
        ({"without": ["text_encoder"]}, "PixArtSigmaPipeline can be read without nothing"),
    ],
)
def test_settings_that_cannot_be(settings, message, folders):
    with pytest.raises(ConfigError, match=message):
        PipelineEncoder(**{"weights": str(folders("PixArtSigmaPipeline")), **settings})


@pytest.mark.parametrize(
    "entries, message",
    [
        (
            {"_class_name": "StableDiffusionPipeline"},
            "a StableDiffusionPipeline, whose texts are not known",
        ),
        ({"_class_name": ["pipeline", "Mine"]}, "whose texts are not known here"),
        ({"_class_name": "WanPipeline"}, "its text encoder is text_encoder=umt5"),
        ({"text_encoder": ["pipeline", "Mine"]}, "as text_encoder of PixArtSigmaPipeline, which takes T5EncoderModel"),
        ({"text_encoder": ["transformers", "BertModel"]}, "names BertModel as text_encoder"),
        ({"tokenizer": [None, None]}, "as tokenizer of PixArtSigmaPipeline, which takes T5TokenizerFast"),
    ],
)
def test_an_index_that_chooses_something_else(entries, message, folders, tmp_path):
    """Nothing of `pipeline.py` beside it is run."""
    index = json.loads((folders("PixArtSigmaPipeline") / "model_index.json").read_text())
    (tmp_path / "model_index.json").write_text(json.dumps({**index, **entries}))
    (tmp_path / "pipeline.py").write_text("raise SystemExit('ran')")
    with pytest.raises(CheckpointError, match=message):
        PipelineEncoder(str(tmp_path))


def test_a_folder_that_is_no_pipeline(folders):
    with pytest.raises(CheckpointError, match="holds no model_index.json"):
        PipelineEncoder(str(folders("PixArtSigmaPipeline") / "text_encoder"))


def test_all_that_are_known_are_in_this_diffusers():
    assert set(PARTS) == set(KNOWN) <= set(dir(diffusers))
