"""How each known pipeline of diffusers encodes a prompt: its parts, and its `encode_prompt` as a named tuple.

The pipelines do the work, in whatever version is installed; here stands what they are asked, and which of what they
return belongs to a text. Sources: `diffusers.pipelines`, the classes named below.
"""

from __future__ import annotations

import inspect
import warnings
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import diffusers
import torch
from diffusers.utils import is_bs4_available, is_ftfy_available
from torch import Tensor

from flowanchor.base.plain import read_json
from flowanchor.errors import CheckpointError
from flowanchor.text.base import MaskedTokens, PooledTokens, Tokens, TwoTexts

CLIP = ("CLIPTokenizer", "CLIPTokenizerFast")
T5 = ("T5TokenizerFast", "T5Tokenizer")
QWEN = ("Qwen2Tokenizer", "Qwen2TokenizerFast")
GEMMA = ("GemmaTokenizer", "GemmaTokenizerFast")


class PipelineTexts(ABC):
    """One pipeline class.

    Attributes:
        stock: its name in diffusers.
        parts: folders -> classes of transformers that may lie there.
        optional: text encoders that it can do without.
        readers: tokenizers, the one first that reads most of a prompt.
        length: tokens of a prompt that it reads at most.
        usual: how many it reads unless told otherwise; None: so many.
        others: what its constructor takes beside, all left out.
    """

    stock: ClassVar[str]
    parts: ClassVar[Mapping[str, tuple[str, ...]]]
    optional: ClassVar[tuple[str, ...]] = ()
    readers: ClassVar[tuple[str, ...]] = ("tokenizer",)
    length: ClassVar[int]
    usual: ClassVar[int | None] = None
    others: ClassVar[tuple[str, ...]] = ("transformer", "vae", "scheduler")

    @abstractmethod
    def encode(self, pipeline: Any, prompt: str, length: int, device: torch.device) -> Any:
        """A prompt -> a named tuple of tensors without batch."""

    def negative(self, pipeline: Any, prompt: str, length: int, device: torch.device) -> Any:
        """The negative prompt, in the pipeline's way."""
        return self.encode(pipeline, prompt, length, device)

    def told(self, index: Mapping[str, Any]) -> str:
        """What the index says beside its parts that changes texts."""
        return ""

    def build(self, index: Mapping[str, Any], folder: Path, parts: Mapping[str, Any]) -> Any:
        """The pipeline of these parts. `index`: the folder's `model_index.json`."""
        return getattr(diffusers, self.stock)(**dict.fromkeys(self.others), **parts)


class StableDiffusion3(PipelineTexts):
    """CLIP-L and CLIP-G side by side (77 tokens), T5 behind them (zeros where it is left out); both pooled vectors."""

    stock = "StableDiffusion3Pipeline"
    parts = {
        "tokenizer": CLIP, "tokenizer_2": CLIP, "tokenizer_3": T5,
        "text_encoder": ("CLIPTextModelWithProjection",), "text_encoder_2": ("CLIPTextModelWithProjection",),
        "text_encoder_3": ("T5EncoderModel",),
    }  # fmt: skip
    optional = ("text_encoder_3",)
    readers = ("tokenizer_3", "tokenizer")
    length = 256

    def encode(self, pipeline: Any, prompt: str, length: int, device: torch.device) -> PooledTokens:
        tokens, _, pooled, _ = pipeline.encode_prompt(
            prompt, None, None, device=device, do_classifier_free_guidance=False, max_sequence_length=length
        )
        return PooledTokens(tokens[0], pooled[0])

    def build(self, index: Mapping[str, Any], folder: Path, parts: Mapping[str, Any]) -> Any:
        pipeline = super().build(index, folder, parts)
        if parts["text_encoder_3"] is None:  # the zeros in its place are as wide as the network reads
            config = folder / "transformer" / "config.json"
            width = read_json(config).get("joint_attention_dim") if config.is_file() else None
            if not isinstance(width, int):
                raise CheckpointError(
                    f"{config} must say how wide the text is (joint_attention_dim) where text_encoder_3 is left out: "
                    "download it, too."
                )
            pipeline.transformer = SimpleNamespace(config=SimpleNamespace(joint_attention_dim=width))
        return pipeline


class Flux1(PipelineTexts):
    """T5 (512 tokens, padding among them), the pooled vector of CLIP-L."""

    stock = "FluxPipeline"
    parts = {
        "tokenizer": CLIP, "tokenizer_2": T5, "text_encoder": ("CLIPTextModel",), "text_encoder_2": ("T5EncoderModel",)
    }  # fmt: skip
    readers = ("tokenizer_2",)
    length = 512

    def encode(self, pipeline: Any, prompt: str, length: int, device: torch.device) -> PooledTokens:
        tokens, pooled, _ = pipeline.encode_prompt(prompt, None, device=device, max_sequence_length=length)
        return PooledTokens(tokens[0], pooled[0])


class Flux2(PipelineTexts):
    """Three layers of Mistral 3 side by side, 512 tokens, padding among them."""

    stock = "Flux2Pipeline"
    parts = {
        "tokenizer": ("PixtralProcessor",), "text_encoder": ("Mistral3ForConditionalGeneration",)
    }  # fmt: skip
    length = 512

    def encode(self, pipeline: Any, prompt: str, length: int, device: torch.device) -> Tokens:
        tokens, _ = pipeline.encode_prompt(prompt, device=device, max_sequence_length=length)
        return Tokens(tokens[0])


class Flux2Klein(Flux2):
    """The same of Qwen3."""

    stock = "Flux2KleinPipeline"
    parts = {"tokenizer": QWEN, "text_encoder": ("Qwen3ForCausalLM",)}


class ZImage(PipelineTexts):
    """The second last layer of Qwen3, of a chat's turn."""

    stock = "ZImagePipeline"
    parts = {"tokenizer": QWEN, "text_encoder": ("Qwen3Model", "Qwen3ForCausalLM")}
    length = 512

    def encode(self, pipeline: Any, prompt: str, length: int, device: torch.device) -> MaskedTokens:
        found, _ = pipeline.encode_prompt(
            prompt, device=device, do_classifier_free_guidance=False, max_sequence_length=length
        )
        return _text(found[0], None)


class QwenImage(PipelineTexts):
    """Qwen2.5-VL behind a template, whose tokens are left out."""

    stock = "QwenImagePipeline"
    parts = {"tokenizer": QWEN, "text_encoder": ("Qwen2_5_VLForConditionalGeneration",)}
    length, usual = 1024, 512

    def encode(self, pipeline: Any, prompt: str, length: int, device: torch.device) -> MaskedTokens:
        tokens, mask = pipeline.encode_prompt(prompt, device=device, max_sequence_length=length)
        return _text(tokens[0], None if mask is None else mask[0])


class Krea2(PipelineTexts):
    """Several layers of Qwen3-VL, [L, layers, D]; the index says which."""

    stock = "Krea2Pipeline"
    parts = {"tokenizer": QWEN, "text_encoder": ("Qwen3VLModel",)}
    length = 512

    def encode(self, pipeline: Any, prompt: str, length: int, device: torch.device) -> MaskedTokens:
        tokens, mask = pipeline.encode_prompt(prompt, device=device, max_sequence_length=length)
        return _text(tokens[0], mask[0])

    def told(self, index: Mapping[str, Any]) -> str:
        return str(index.get("text_encoder_select_layers"))

    def build(self, index: Mapping[str, Any], folder: Path, parts: Mapping[str, Any]) -> Any:
        layers = index.get("text_encoder_select_layers")
        return diffusers.Krea2Pipeline(**dict.fromkeys(self.others), **parts, text_encoder_select_layers=layers)


class Sana(PipelineTexts):
    """Gemma 2 behind an instruction, which the negative prompt has not."""

    stock = "SanaPipeline"
    parts = {"tokenizer": GEMMA, "text_encoder": ("Gemma2Model", "Gemma2ForCausalLM")}
    length = 300

    def encode(self, pipeline: Any, prompt: str, length: int, device: torch.device) -> MaskedTokens:
        usual = inspect.signature(type(pipeline).__call__).parameters["complex_human_instruction"].default
        return self._encode(pipeline, prompt, length, device, usual)

    def negative(self, pipeline: Any, prompt: str, length: int, device: torch.device) -> MaskedTokens:
        return self._encode(pipeline, prompt, length, device, None)

    def _encode(self, pipeline: Any, prompt: str, length: int, device: torch.device, instruction: Any) -> MaskedTokens:
        tokens, mask, *_ = pipeline.encode_prompt(
            prompt, False, device=device, max_sequence_length=length, complex_human_instruction=instruction
        )
        return _text(tokens[0], mask[0])


class PixArt(PipelineTexts):
    """T5 under a mask, of captions that the pipeline cleans of addresses, markup and broken letters.

    That needs beautifulsoup4 and ftfy. Without them captions are read as they are, in small letters, with a warning, as
    the pipeline reads them then; the encoder's fingerprint tells which.
    """

    stock = "PixArtSigmaPipeline"
    parts = {"tokenizer": T5, "text_encoder": ("T5EncoderModel",)}
    length = 300

    def encode(self, pipeline: Any, prompt: str, length: int, device: torch.device) -> MaskedTokens:
        tokens, mask, *_ = pipeline.encode_prompt(
            prompt, False, device=device, max_sequence_length=length, clean_caption=_can_clean()
        )
        return _text(tokens[0], mask[0])

    def told(self, index: Mapping[str, Any]) -> str:
        return "cleaned" if _can_clean() else ""

    def build(self, index: Mapping[str, Any], folder: Path, parts: Mapping[str, Any]) -> Any:
        if not _can_clean():
            warnings.warn(
                f"{self.stock} cleans captions of addresses and markup, and what it needs for that is not here: "
                "pip install 'flowanchor[wan]' (beautifulsoup4, ftfy). They are read as they are.",
                stacklevel=2,
            )
        return super().build(index, folder, parts)


def _can_clean() -> bool:
    return bool(is_bs4_available() and is_ftfy_available())


class PixArtAlpha(PixArt):
    """The first one, of shorter texts."""

    stock = "PixArtAlphaPipeline"
    length = 120


class LTXVideo(PipelineTexts):
    """T5."""

    stock = "LTXPipeline"
    parts = {"tokenizer": T5, "text_encoder": ("T5EncoderModel",)}
    length = 128

    def encode(self, pipeline: Any, prompt: str, length: int, device: torch.device) -> MaskedTokens:
        tokens, mask, *_ = pipeline.encode_prompt(
            prompt, do_classifier_free_guidance=False, device=device, max_sequence_length=length
        )
        return _text(tokens[0], mask[0])


class _NoVAE:
    """What HunyuanVideo15Pipeline's constructor asks a VAE for, where none is read: texts do not depend on it."""

    config = SimpleNamespace(latent_channels=None)
    temporal_compression_ratio, spatial_compression_ratio = 4, 16


class HunyuanVideo15(PipelineTexts):
    """Qwen2.5-VL behind a template, and ByT5 of words in quotation marks."""

    stock = "HunyuanVideo15Pipeline"
    parts = {
        "tokenizer": QWEN, "tokenizer_2": ("ByT5Tokenizer",), "text_encoder": ("Qwen2_5_VLTextModel",),
        "text_encoder_2": ("T5EncoderModel",),
    }  # fmt: skip
    length = 1000
    others = ("transformer", "vae", "scheduler", "guider")

    def encode(self, pipeline: Any, prompt: str, length: int, device: torch.device) -> TwoTexts:
        pipeline.tokenizer_max_length = length
        tokens, mask, tokens_2, mask_2 = pipeline.encode_prompt(prompt, device=device)
        return TwoTexts(*_text(tokens[0], mask[0]), *_text(tokens_2[0], mask_2[0]))

    def build(self, index: Mapping[str, Any], folder: Path, parts: Mapping[str, Any]) -> Any:
        others = {**dict.fromkeys(self.others), "vae": _NoVAE()}
        return diffusers.HunyuanVideo15Pipeline(**others, **parts)


def _text(tokens: Tensor, mask: Tensor | None) -> MaskedTokens:
    """Tokens [L, *] that are text, at least one: without any, one that the mask leaves out."""
    kept = torch.ones(len(tokens), dtype=torch.bool, device=tokens.device) if mask is None else mask.bool()
    if not bool(kept.any()):
        return MaskedTokens(tokens[:1], kept[:1])
    return MaskedTokens(tokens[kept], kept[kept])


KNOWN: dict[str, PipelineTexts] = {
    kind.stock: kind()
    for kind in (
        StableDiffusion3, Flux1, Flux2, Flux2Klein, ZImage, QwenImage, Krea2, Sana, PixArt, PixArtAlpha, LTXVideo,
        HunyuanVideo15,
    )
}  # fmt: skip
