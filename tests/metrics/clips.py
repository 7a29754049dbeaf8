"""A tiny random CLIP with a tokenizer of single bytes, as files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor

TOKENS = 20


def write_clip(folder: Path, seed: int = 0) -> Path:
    symbols = [*map(chr, range(33, 127)), *map(chr, range(161, 173)), *map(chr, range(174, 256))]
    symbols += [chr(256 + i) for i in range(256 - len(symbols))]
    words = [*symbols, *(symbol + "</w>" for symbol in symbols), "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps({word: number for number, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "CLIPTokenizer", "model_max_length": TOKENS, "bos_token": "<|startoftext|>",
                    "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>", "pad_token": "<|endoftext|>"})
    )  # fmt: skip
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    ends = {"bos_token_id": len(words) - 2, "eos_token_id": len(words) - 1, "pad_token_id": len(words) - 1}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = CLIPModel(
            CLIPConfig(
                text_config={**small, **ends, "vocab_size": len(words), "max_position_embeddings": TOKENS},
                vision_config={**small, "image_size": 16, "patch_size": 8},
                projection_dim=12,
            )
        )
        for parameter in network.parameters():  # the usual start hardly tells two inputs apart
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.3)
    network.save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}).save_pretrained(folder)
    return folder


def cosines(folder: Path, images: Tensor, prompts: Sequence[str]) -> Tensor:
    """uint8 [N, 3, H, W] and N prompts -> [N], by a stock CLIP, one pair at a time: no padding, no batch."""
    network, processor = CLIPModel.from_pretrained(folder).eval(), CLIPProcessor.from_pretrained(folder)
    found = []
    for image, prompt in zip(images, prompts, strict=True):
        picture = Image.fromarray(image.permute(1, 2, 0).numpy())
        asked = processor(text=[prompt], images=[picture], return_tensors="pt", truncation=True, max_length=TOKENS)
        with torch.no_grad():
            out = network(**asked)
        found.append((functional.normalize(out.image_embeds) * functional.normalize(out.text_embeds)).sum())
    return torch.stack(found)
