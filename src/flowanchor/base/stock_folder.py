"""Folders that transformers and diffusers open: looked at first for entries with which a folder chooses code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from flowanchor.base.plain import bare, read_json
from flowanchor.errors import CheckpointError

# Entries with which a folder chooses code: classes of its own files, kernels and quantisers from elsewhere, adapters.
_CHOOSES_CODE = ("auto_map", "custom_pipelines", "quantization_config")
_KERNELS = ("attn_implementation", "_attn_implementation", "experts_implementation", "_experts_implementation")
_CONFIGS = ("config.json", "tokenizer_config.json", "processor_config.json", "preprocessor_config.json")


def without_code(folder: Path) -> dict[str, Any]:
    """The `config.json` of a folder (empty without one); raises `CheckpointError` where a file in it chooses code."""
    found = {name: read_json(folder / name) for name in _CONFIGS if (folder / name).is_file()}
    if (folder / "adapter_config.json").exists():
        raise CheckpointError(f"{folder} holds adapters beside a network: give the folder of a whole network.")
    for name, content in found.items():
        for settings in _dictionaries(content):
            odd = [key for key in _CHOOSES_CODE if settings.get(key) is not None]
            odd += [key for key in _KERNELS if not str(settings.get(key)).isidentifier()]  # a repository of kernels
            if odd:
                raise CheckpointError(
                    f"{folder / name} asks for code of its own choice ({bare(odd[0])}): do not use this folder, "
                    "or remove that entry if you know that it is not needed."
                )
    config = found.get("config.json", {})
    if not isinstance(config, dict):
        raise CheckpointError(f"{folder / 'config.json'} holds no settings: download it again.")
    return config


def _dictionaries(value: Any) -> list[dict[str, Any]]:
    if isinstance(value, dict):
        return [value, *(inner for one in value.values() for inner in _dictionaries(one))]
    return [inner for one in value for inner in _dictionaries(one)] if isinstance(value, list) else []
