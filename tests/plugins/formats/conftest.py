"""A tiny pipeline of Wan with random weights, as diffusers and transformers save one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

CHANNELS, WIDTH = 16, 24


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a pipeline: index, VAE, text encoder, tokenizer."""
    from diffusers import AutoencoderKLWan
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    AutoencoderKLWan(
        base_dim=4, z_dim=CHANNELS, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
    ).save_pretrained(folder / "vae")
    UMT5EncoderModel(
        UMT5Config(vocab_size=16, d_model=WIDTH, d_kv=8, d_ff=32, num_layers=2, num_heads=3)
    ).save_pretrained(folder / "text_encoder")
    words = {"<pad>": 0, "</s>": 1, "<unk>": 2, **{word: 3 + i for i, word in enumerate("a red fox in snow".split())}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", padding_side="right"
    ).save_pretrained(folder / "tokenizer")
    index = {
        "_class_name": "WanPipeline", "_diffusers_version": "0.35.1", "vae": ["diffusers", "AutoencoderKLWan"],
        "text_encoder": ["transformers", "UMT5EncoderModel"], "tokenizer": ["transformers", "PreTrainedTokenizerFast"],
        "transformer": ["diffusers", "WanTransformer3DModel"],
        "scheduler": ["diffusers", "UniPCMultistepScheduler"],
    }  # fmt: skip
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder
