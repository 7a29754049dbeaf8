"""Networks and tokenizers of the transformers library, read from local folders that choose no code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from flowanchor.base.files import add_file
from flowanchor.base.stock_folder import without_code
from flowanchor.base.trusted import brief
from flowanchor.errors import CheckpointError, ConfigError
from flowanchor.weights import check_finite

_WEIGHTS = "*.safetensors"
_FILES = (".safetensors", ".json", ".jinja", ".model", ".txt")  # of weights, settings, templates, vocabularies


def read_network(folder: Path, network: str, dtype: torch.dtype) -> Any:
    """The frozen network of a folder (`config.json`, safetensors) as a class of transformers, by its name.

    Raises `CheckpointError` for a folder without weights, of another network, or that chooses code.
    """
    if not any(folder.glob(_WEIGHTS)):
        raise CheckpointError(
            f"{folder} holds no weights ({_WEIGHTS}): download them (a gated release asks you to accept its licence "
            "first)."
        )
    without_code(folder)
    try:
        found, info = getattr(library(), network).from_pretrained(
            folder, local_files_only=True, use_safetensors=True, output_loading_info=True, dtype=dtype
        )
    except Exception as error:  # whatever transformers makes of another configuration, or of damaged files
        raise CheckpointError(f"{folder} cannot be read as {network} ({brief(error)}): download it again.") from error
    missing = sorted(info["missing_keys"])
    if missing:
        raise CheckpointError(f"{folder} is no {network}: it lacks {', '.join(missing[:3])}.")
    check_finite(dict(found.named_parameters()), folder)
    return found.eval().requires_grad_(False)


def read_tokenizer(folder: Path, tokenizer: str, setting: str) -> Any:
    """The tokenizer of a folder (or a processor that holds one) as a class of transformers, by its name.

    Raises `CheckpointError` for a folder without one, without its vocabulary, or that chooses code. `setting`: by which
    it is told.
    """
    without_code(folder)
    Tokenizer = getattr(library(), tokenizer)
    try:
        found = Tokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # whatever a tokenizer's own code raises without its files
        raise CheckpointError(
            f"{folder} has no tokenizer that can be read ({type(error).__name__}): give its folder, {setting}."
        ) from error
    # Where files are missing, transformers makes an empty one: special tokens alone, 303 of them for T5.
    own = found.tokenizer if tokenizer.endswith("Processor") else found
    if len(set(own.get_vocab()) - set(own.get_added_vocab())) < 2:
        raise CheckpointError(f"The tokenizer in {folder} has no vocabulary: download it again.")
    return found


def add_folder(digest: Any, folder: Path) -> None:
    """Add names and content of a folder's files to a hash: of weights, settings and vocabularies."""
    for file in sorted(path for path in folder.iterdir() if path.suffix in _FILES):
        digest.update(file.name.encode())
        add_file(digest, file)


def library() -> Any:
    """transformers, which is imported when the first text encoder is read; raises `ConfigError` without it."""
    try:
        import transformers  # heavy: a list of options and an encoder of another kind do without
    except ImportError as error:
        raise ConfigError("Text encoders need transformers: pip install 'flowanchor[wan]'.") from error
    transformers.utils.logging.disable_progress_bar()  # of reading a file that takes seconds
    return transformers
