"""The text encoders of a pipeline of diffusers, from its folder, through the pipeline's own `encode_prompt`."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import nn

from flowanchor.base.plain import bare, read_json
from flowanchor.errors import CheckpointError, ConfigError
from flowanchor.plugins.text_encoders.pipeline_texts import KNOWN, PipelineTexts
from flowanchor.text.base import TextEncoder
from flowanchor.text.frozen import KEPT
from flowanchor.text.parts import add_folder, read_network, read_tokenizer

INDEX = "model_index.json"


class PipelineEncoder(TextEncoder):
    """Prompts through the installed pipeline class, of which only tokenizers and text encoders are read.

    What it gives is what the pipeline's network is conditioned on: tokens with a mask are cut to the text, tokens
    without one keep the padding that the network was trained with. Nothing in the folder is executed: its index names
    the pipeline, which must be one that is known here (`pipeline_texts`), and classes of transformers among those that
    the pipeline takes.

    Args:
        weights: the pipeline's folder, with `model_index.json`.
        max_length: tokens of a prompt that are read; None: as the pipeline does.
        without: parts that are left out, where the pipeline can do without them.
        dtype: of the encoders.
    """

    name = "pipeline"

    def __init__(
        self,
        weights: str | None = None,
        max_length: int | None = None,
        without: Sequence[str] = (),
        dtype: str = "bfloat16",
    ) -> None:
        super().__init__()
        if not weights:
            raise ConfigError(
                "text_encoder=pipeline needs the pipeline: add text_encoder.weights=FOLDER, one with model_index.json."
            )
        if dtype not in ("float32", "bfloat16", "float16"):
            raise ConfigError(f"text_encoder.dtype={dtype} is unknown: choose float32, bfloat16 or float16.")
        self.folder, self.dtype = Path(weights).expanduser(), getattr(torch, dtype)
        self.index = index = _index(self.folder)
        self.texts = _texts(index, self.folder)
        self.max_length = (self.texts.usual or self.texts.length) if max_length is None else max_length
        if not 1 <= self.max_length <= self.texts.length:
            raise ConfigError(
                f"text_encoder.max_length={max_length} must be between 1 and {self.texts.length}, what "
                f"{self.texts.stock} reads."
            )
        odd = [part for part in without if part not in self.texts.optional]
        if odd:
            can = ", ".join(self.texts.optional) or "nothing"
            raise ConfigError(
                f"text_encoder.without={list(without)}: {self.texts.stock} can be read without {can}: leave out {odd}."
            )
        parts = {part: _class(index, part, self.texts, self.folder) for part in self.texts.parts}
        for part in (*without, *(part for part in self.texts.optional if parts[part] is None)):
            parts |= {part: None, part.replace("text_encoder", "tokenizer"): None}
        self.parts = {part: kind for part, kind in parts.items() if kind is not None}
        found = {part: self._read(part, kind) for part, kind in self.parts.items()}
        self.networks = nn.ModuleDict({part: one for part, one in found.items() if isinstance(one, nn.Module)})
        absent = dict.fromkeys(parts.keys() - found.keys())
        self.__dict__["pipeline"] = self.texts.build(index, self.folder, {**absent, **found})
        self._known: dict[str, Any] = {}  # and `width` is known when there is one

    def _read(self, part: str, kind: str) -> Any:
        if part.startswith("tokenizer"):
            return read_tokenizer(self.folder / part, kind, f"{part}/ of the pipeline in text_encoder.weights=FOLDER")
        return read_network(self.folder / part, kind, self.dtype)

    def encode(self, prompts: Sequence[str]) -> list[Any]:
        for prompt in prompts:  # data sets repeat themselves: a few embeddings are kept
            if prompt not in self._known:
                self._known[prompt] = self._encode(prompt)
        found = [self._known[prompt] for prompt in prompts]
        while len(self._known) > KEPT:
            self._known.pop(next(iter(self._known)))
        return found

    @torch.no_grad()
    def encode_negative(self, prompt: str) -> Any:
        """As the pipeline does where it guides: Sana without the instruction that stands before other prompts."""
        return self._plain(self.texts.negative(self.__dict__["pipeline"], prompt, self.max_length, self._device))

    @torch.no_grad()
    def _encode(self, prompt: str) -> Any:
        found = self._plain(self.texts.encode(self.__dict__["pipeline"], prompt, self.max_length, self._device))
        self._tell_cut(prompt)
        return found

    def _plain(self, text: Any) -> Any:
        """A text on the CPU, embeddings in float32."""
        self.width = text.tokens.shape[-1]
        return text._make((value.float() if value.is_floating_point() else value).cpu() for value in text)

    @property
    def _device(self) -> torch.device:
        return next(self.networks.parameters()).device

    def _tell_cut(self, prompt: str) -> None:
        """What the longest reader's tokenizer leaves out of a prompt; templates around it are not counted."""
        reader = next(part for part in self.texts.readers if part in self.parts)
        found = self.__dict__["pipeline"].components[reader]
        tokenizer = found.tokenizer if self.parts[reader].endswith("Processor") else found
        longest = min(self.max_length, tokenizer.model_max_length)
        ids = tokenizer(prompt)["input_ids"]
        if len(ids) > longest:
            lost = tokenizer.decode(ids[longest - 1 :], skip_special_tokens=True)
            warnings.warn(f"A prompt has {len(ids)} tokens and {longest} are read; cut off: '{lost}'.", stacklevel=5)

    def fingerprint(self) -> str:
        digest = hashlib.sha256(
            f"{self.texts.stock} {self.max_length} {self.dtype} {self.texts.told(self.index)}".encode()
        )
        for part in self.parts:
            digest.update(part.encode())
            add_folder(digest, self.folder / part)
        return digest.hexdigest()


def _index(folder: Path) -> dict[str, Any]:
    path = folder / INDEX
    if not path.is_file():
        raise CheckpointError(
            f"{folder} holds no {INDEX}: set text_encoder.weights to the folder of a whole pipeline of diffusers."
        )
    found = read_json(path)
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} holds no settings: download it again.")
    return found


def _texts(index: dict[str, Any], folder: Path) -> PipelineTexts:
    stock = index.get("_class_name")
    found = KNOWN.get(stock) if isinstance(stock, str) else None
    if found is None:
        hint = ": its text encoder is text_encoder=umt5" if stock == "WanPipeline" else ""
        raise CheckpointError(
            f"{folder} is a {bare(str(stock))}, whose texts are not known here{hint}. Known: {', '.join(KNOWN)}."
        )
    if found.stock not in dir(diffusers):
        raise ConfigError(f"diffusers {diffusers.__version__} has no {found.stock}: pip install --upgrade diffusers.")
    return found


def _class(index: dict[str, Any], part: str, texts: PipelineTexts, folder: Path) -> str | None:
    """The class of transformers that reads a part, by its name, which is one of those that the pipeline takes."""
    entry, known = index.get(part), texts.parts[part]
    optional = part in texts.optional or part.replace("tokenizer", "text_encoder") in texts.optional
    if optional and (entry is None or entry == [None, None]):
        return None
    named = entry[1] if isinstance(entry, list) and len(entry) == 2 and entry[0] == "transformers" else None
    if named not in known:
        raise CheckpointError(
            f"{folder / INDEX} names {bare(str(named or entry))} as {part} of {texts.stock}, which takes "
            f"{' or '.join(known)}: do not use this folder, or download it again."
        )
    return str(named)
