"""A frozen encoder of the transformers library, read from a local folder."""

from __future__ import annotations

import hashlib
import html
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flowanchor.errors import CheckpointError, ConfigError
from flowanchor.text.base import TextEncoder, Tokens
from flowanchor.text.parts import add_folder, read_network, read_tokenizer

KEPT = 64  # embeddings of prompts, 8 MB each at most for UMT5


class FrozenEncoder(TextEncoder):
    """Prompts through a tokenizer and a network, one prompt at a time; both are read when first needed.

    Args:
        name: as in `text_encoder=<name>`.
        weights: folder with `config.json` and safetensors files.
        tokenizer: folder of the tokenizer; None: the same.
        network: name of the class in transformers that reads the weights.
        max_length: tokens of the longest prompt.
        padded: fill every prompt up to `max_length` before the network sees it, masked, as Wan's pipeline does.
        cleaned: repair broken characters and spaces first, as Wan's pipeline does.
        dtype: of the network.
    """

    def __init__(
        self,
        name: str,
        weights: str | Path | None,
        tokenizer: str | Path | None,
        network: str,
        max_length: int,
        padded: bool,
        cleaned: bool,
        dtype: str = "float32",
    ) -> None:
        super().__init__()
        if not weights:
            raise ConfigError(f"text_encoder={name} needs its weights: add text_encoder.weights=FOLDER (docs/wan.md).")
        if dtype not in ("float32", "bfloat16", "float16"):
            raise ConfigError(f"text_encoder.dtype={dtype} is unknown: choose float32, bfloat16 or float16.")
        self.name, self.max_length, self.padded, self.cleaned = name, max_length, padded, cleaned
        self.folder, self.tokenizer_folder = Path(weights).expanduser(), Path(tokenizer or weights).expanduser()
        self.dtype: torch.dtype = getattr(torch, dtype)
        for folder in (self.folder, self.tokenizer_folder):
            if not folder.is_dir():
                raise CheckpointError(f"There is no folder {folder} for text_encoder={name}: download it there first.")
        self.network = read_network(self.folder, network, self.dtype)
        self._tokenizer = read_tokenizer(self.tokenizer_folder, "AutoTokenizer", "text_encoder.tokenizer=FOLDER")
        self._known: dict[str, Tensor] = {}
        self.width = int(getattr(self.network.config, "d_model", 0) or self.network.config.hidden_size)

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> list[Tokens]:
        for prompt in prompts:  # data sets repeat themselves: a few embeddings are kept
            if prompt not in self._known:
                self._known[prompt] = self._encode(prompt)
        found = [Tokens(self._known[prompt]) for prompt in prompts]
        while len(self._known) > KEPT:
            self._known.pop(next(iter(self._known)))
        return found

    def _encode(self, prompt: str) -> Tensor:
        text = clean(prompt) if self.cleaned else prompt
        whole = self._tokenizer(text)["input_ids"]
        if len(whole) > self.max_length:
            kept = self._tokenizer(text, truncation=True, max_length=self.max_length)["input_ids"]
            lost = self._tokenizer.decode(whole[len(kept) - 1 :], skip_special_tokens=True)
            warnings.warn(
                f"A prompt has {len(whole)} tokens and {self.max_length} are read; cut off: '{lost}'.", stacklevel=4
            )
        filled: dict[str, Any] = {"padding": "max_length"} if self.padded else {}
        tokens = self._tokenizer(
            text, truncation=True, max_length=self.max_length, return_attention_mask=True, return_tensors="pt", **filled
        )
        where = next(self.network.parameters()).device
        ids, mask = tokens["input_ids"].to(where), tokens["attention_mask"].to(where)
        states = self.network(input_ids=ids, attention_mask=mask).last_hidden_state[0]
        return states[: int(mask.sum())].float().cpu()

    def fingerprint(self) -> str:
        digest = hashlib.sha256(f"{self.max_length} {self.padded} {self.cleaned} {self.dtype}".encode())
        for folder in dict.fromkeys((self.folder, self.tokenizer_folder)):
            add_folder(digest, folder)
        return digest.hexdigest()


def clean(prompt: str) -> str:
    """A prompt with repaired characters, without HTML's escapes and without repeated spaces (as in Wan's pipeline)."""
    try:
        import ftfy

        prompt = ftfy.fix_text(prompt)
    except ImportError:
        warnings.warn("Prompts are not repaired without ftfy: pip install 'flowanchor[wan]'.", stacklevel=2)
    return re.sub(r"\s+", " ", html.unescape(html.unescape(prompt)).strip()).strip()
