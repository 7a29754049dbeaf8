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

from flowanchor.base.files import add_file
from flowanchor.base.stock_folder import without_code
from flowanchor.base.trusted import brief
from flowanchor.errors import CheckpointError, ConfigError
from flowanchor.text.base import TextEncoder, Tokens
from flowanchor.weights import check_finite

KEPT = 64  # embeddings of prompts, 8 MB each at most for UMT5
_WEIGHTS = "*.safetensors"
_FILES = (".safetensors", ".json", ".model", ".txt")  # of weights, settings, vocabularies


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
        self._class = network
        for folder in (self.folder, self.tokenizer_folder):
            if not folder.is_dir():
                raise CheckpointError(f"There is no folder {folder} for text_encoder={name}: download it there first.")
        self.network, self._tokenizer = self._read_network(), self._read_tokenizer()
        self._known: dict[str, Tensor] = {}
        self.width = int(getattr(self.network.config, "d_model", 0) or self.network.config.hidden_size)

    def _read_network(self) -> Any:
        if not any(self.folder.glob(_WEIGHTS)):
            raise CheckpointError(
                f"{self.folder} holds no weights ({_WEIGHTS}): download them (a gated release asks you to accept its "
                "licence first)."
            )
        without_code(self.folder)
        try:
            network, info = getattr(_library(), self._class).from_pretrained(
                self.folder, local_files_only=True, use_safetensors=True, output_loading_info=True, dtype=self.dtype
            )
        except Exception as error:  # whatever transformers makes of another configuration, or of damaged files
            raise CheckpointError(
                f"{self.folder} cannot be read as {self._class} ({brief(error)}): download it again."
            ) from error
        missing = sorted(info["missing_keys"])
        if missing:
            raise CheckpointError(f"{self.folder} is no {self._class}: it lacks {', '.join(missing[:3])}.")
        check_finite(dict(network.named_parameters()), self.folder)
        return network.eval().requires_grad_(False)

    def _read_tokenizer(self) -> Any:
        without_code(self.tokenizer_folder)
        try:
            tokenizer = _library().AutoTokenizer.from_pretrained(
                self.tokenizer_folder, local_files_only=True, trust_remote_code=False
            )
        except Exception as error:  # whatever a tokenizer's own code raises without its files
            raise CheckpointError(
                f"{self.tokenizer_folder} has no tokenizer that can be read ({type(error).__name__}): give its folder, "
                "text_encoder.tokenizer=FOLDER."
            ) from error
        # Where files are missing, transformers makes an empty one: special tokens alone, 303 of them for T5.
        if len(set(tokenizer.get_vocab()) - set(tokenizer.get_added_vocab())) < 2:
            raise CheckpointError(f"The tokenizer in {self.tokenizer_folder} has no vocabulary: download it again.")
        return tokenizer

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
            for file in sorted(
                path for path in folder.iterdir() if path.suffix in (".safetensors", ".json", ".model", ".txt")
            ):
                digest.update(file.name.encode())
                add_file(digest, file)
        return digest.hexdigest()


def clean(prompt: str) -> str:
    """A prompt with repaired characters, without HTML's escapes and without repeated spaces (as in Wan's pipeline)."""
    try:
        import ftfy

        prompt = ftfy.fix_text(prompt)
    except ImportError:
        warnings.warn("Prompts are not repaired without ftfy: pip install 'flowanchor[wan]'.", stacklevel=2)
    return re.sub(r"\s+", " ", html.unescape(html.unescape(prompt)).strip()).strip()


def _library() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise ConfigError("Text encoders need transformers: pip install 'flowanchor[wan]'.") from error
    transformers.utils.logging.disable_progress_bar()  # of reading a file that takes seconds
    return transformers
