"""Tiny random pipelines of diffusers, of which the text parts alone are there, as their folders lie on a disk."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as BytesToText
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel

LETTERS = "abcdefghijklmnopqrstuvwxyz"
CHAT = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{% if message['content'] is string %}"
    "{{ message['content'] }}{% else %}{{ message['content'][0]['text'] }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WIDTH = 24


def clip_tokenizer() -> Any:
    pieces = ["<|startoftext|>", "<|endoftext|>", *LETTERS, *(letter + "</w>" for letter in LETTERS)]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    return transformers.CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=16)


def t5_tokenizer() -> Any:
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), *((letter, -3.0) for letter in LETTERS)]
    return transformers.T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=512)


def qwen_tokenizer() -> Any:
    pieces = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *sorted(ByteLevel.alphabet())]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    made = transformers.Qwen2Tokenizer(
        vocab=vocabulary, merges=[], additional_special_tokens=pieces[1:3], model_max_length=4096, padding_side="right"
    )
    made.chat_template = CHAT
    return made


def gemma_tokenizer() -> Any:
    pieces = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁", *LETTERS]
    return transformers.GemmaTokenizer(vocab={piece: n for n, piece in enumerate(pieces)}, model_max_length=4096)


def clip(kind: Callable[[Any], Any], width: int) -> Any:
    return kind(
        transformers.CLIPTextConfig(
            vocab_size=60, hidden_size=width, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
            max_position_embeddings=16, projection_dim=width + 2, bos_token_id=0, eos_token_id=1, pad_token_id=1,
        )
    )  # fmt: skip


def t5(width: int = WIDTH) -> Any:
    return transformers.T5EncoderModel(
        transformers.T5Config(
            vocab_size=400, d_model=width, d_kv=8, d_ff=16, num_layers=2, num_heads=2, feed_forward_proj="gated-gelu"
        )
    )


LANGUAGE: dict[str, Any] = {
    "vocab_size": 300, "hidden_size": WIDTH, "intermediate_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 12, "max_position_embeddings": 4096,
}  # fmt: skip
ROPE = {"rope_type": "default", "mrope_section": [2, 2, 2], "rope_theta": 10000.0}


def qwen3(kind: Callable[[Any], Any] = transformers.Qwen3ForCausalLM, layers: int = 3) -> Any:
    return kind(transformers.Qwen3Config(**{**LANGUAGE, "num_hidden_layers": layers}))


def qwen25_vl() -> Any:
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": WIDTH}
    text = {**LANGUAGE, "rope_scaling": ROPE, "rope_parameters": ROPE}
    return transformers.Qwen2_5_VLForConditionalGeneration(
        transformers.Qwen2_5_VLConfig(text_config=text, vision_config=vision)
    )


def qwen3_vl() -> Any:
    vision = {
        "depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": WIDTH,
        "deepstack_visual_indexes": [0],
    }  # fmt: skip
    text = {**LANGUAGE, "rope_scaling": ROPE, "rope_parameters": ROPE}
    return transformers.Qwen3VLModel(transformers.Qwen3VLConfig(text_config=text, vision_config=vision))


def gemma() -> Any:
    return transformers.Gemma2Model(transformers.Gemma2Config(**{**LANGUAGE, "vocab_size": 40}))


def mistral3() -> Any:
    """As deep as the layers that are read: 10, 20, 30."""
    vision = {"num_hidden_layers": 1, "hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    return transformers.Mistral3ForConditionalGeneration(
        transformers.Mistral3Config(
            text_config=transformers.MistralConfig(**{**LANGUAGE, "num_hidden_layers": 31}),
            vision_config=transformers.PixtralVisionConfig(**vision, head_dim=8, image_size=16, patch_size=8),
        )
    )


def pixtral_processor() -> Any:
    """A tokenizer of bytes, which fills up from the left, beside a processor of images."""
    special = ["<pad>", "<s>", "</s>", "[IMG]", "[IMG_BREAK]", "[IMG_END]"]
    vocabulary = {piece: number for number, piece in enumerate([*special, *sorted(ByteLevel.alphabet())])}
    bytewise = Tokenizer(BPE(vocab=vocabulary, merges=[]))
    bytewise.pre_tokenizer, bytewise.decoder = ByteLevel(add_prefix_space=False), BytesToText()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=bytewise, pad_token="<pad>", bos_token="<s>", eos_token="</s>", padding_side="left",
        additional_special_tokens=special[3:], model_max_length=4096,
    )  # fmt: skip
    images = transformers.PixtralImageProcessor(size={"longest_edge": 16}, patch_size={"height": 8, "width": 8})
    return transformers.PixtralProcessor(images, tokenizer, patch_size=8, chat_template=CHAT)


def sd3() -> dict[str, Any]:
    projected = transformers.CLIPTextModelWithProjection
    return {
        "tokenizer": clip_tokenizer(), "tokenizer_2": clip_tokenizer(), "tokenizer_3": t5_tokenizer(),
        "text_encoder": clip(projected, 8), "text_encoder_2": clip(projected, 12), "text_encoder_3": t5(),
    }  # fmt: skip


def flux() -> dict[str, Any]:
    return {
        "tokenizer": clip_tokenizer(), "tokenizer_2": t5_tokenizer(),
        "text_encoder": clip(transformers.CLIPTextModel, 8), "text_encoder_2": t5(),
    }  # fmt: skip


def hunyuan() -> dict[str, Any]:
    text = transformers.Qwen2_5_VLConfig(text_config={**LANGUAGE, "rope_scaling": ROPE, "rope_parameters": ROPE})
    return {
        "tokenizer": qwen_tokenizer(), "tokenizer_2": transformers.ByT5Tokenizer(),
        "text_encoder": transformers.Qwen2_5_VLTextModel(text.text_config), "text_encoder_2": t5(20),
    }  # fmt: skip


PARTS: dict[str, Callable[[], dict[str, Any]]] = {
    "StableDiffusion3Pipeline": sd3,
    "FluxPipeline": flux,
    "Flux2Pipeline": lambda: {"tokenizer": pixtral_processor(), "text_encoder": mistral3()},
    "Flux2KleinPipeline": lambda: {"tokenizer": qwen_tokenizer(), "text_encoder": qwen3(layers=28)},
    "ZImagePipeline": lambda: {"tokenizer": qwen_tokenizer(), "text_encoder": qwen3(transformers.Qwen3Model)},
    "QwenImagePipeline": lambda: {"tokenizer": qwen_tokenizer(), "text_encoder": qwen25_vl()},
    "Krea2Pipeline": lambda: {"tokenizer": qwen_tokenizer(), "text_encoder": qwen3_vl()},
    "SanaPipeline": lambda: {"tokenizer": gemma_tokenizer(), "text_encoder": gemma()},
    "PixArtSigmaPipeline": lambda: {"tokenizer": t5_tokenizer(), "text_encoder": t5()},
    "PixArtAlphaPipeline": lambda: {"tokenizer": t5_tokenizer(), "text_encoder": t5()},
    "LTXPipeline": lambda: {"tokenizer": t5_tokenizer(), "text_encoder": t5()},
    "HunyuanVideo15Pipeline": hunyuan,
}
SETTINGS: dict[str, dict[str, Any]] = {"Krea2Pipeline": {"text_encoder_select_layers": [1, 3]}}


def write_pipeline(stock: str, folder: Path) -> Path:
    """The text parts of a pipeline of this class, and its index."""
    torch.manual_seed(0)
    index: dict[str, Any] = {"_class_name": stock, "_diffusers_version": diffusers.__version__}
    for name, part in PARTS[stock]().items():
        part.save_pretrained(folder / name)
        index[name] = ["transformers", type(part).__name__]
    for name in ("transformer", "vae", "scheduler"):
        index[name] = ["diffusers", "Whatever"]
    (folder / "model_index.json").write_text(json.dumps({**index, **SETTINGS.get(stock, {})}))
    return folder


def parts_of(folder: Path) -> dict[str, Any]:
    """Read by transformers alone, in float32."""
    index = json.loads((folder / "model_index.json").read_text())
    return {
        name: getattr(transformers, entry[1]).from_pretrained(folder / name)
        for name, entry in index.items()
        if isinstance(entry, list) and entry[0] == "transformers"
    }


def stock_pipeline(stock: str, folder: Path, **others: Any) -> Any:
    """The pipeline of these parts by diffusers alone."""
    absent: dict[str, Any] = dict.fromkeys(("transformer", "vae", "scheduler"))
    return getattr(diffusers, stock)(**{**absent, **parts_of(folder), **others}, **SETTINGS.get(stock, {}))
