"""flowanchor: few-step generators, trained as flow-anchored consistency models (FACM, arXiv 2507.03738)."""

from __future__ import annotations

import logging as _logging
from collections.abc import Mapping as _Mapping
from pathlib import Path as _Path
from typing import TYPE_CHECKING as _TYPE_CHECKING
from typing import Any as _Any

from flowanchor.base.version import VERSION as _VERSION

if _TYPE_CHECKING:
    from omegaconf import DictConfig as _DictConfig

    from flowanchor.generation.opened import OpenedModel as _OpenedModel

__version__ = _VERSION

# Wherever torchao is installed, every import of diffusers imports it and says that it cannot open files in formats of
# older torchaos, which nothing here does, and PyTorch says what torchao should do otherwise.
_logging.getLogger("diffusers.quantizers.torchao.torchao_quantizer").setLevel(_logging.ERROR)
_logging.getLogger("torch.utils._pytree").addFilter(lambda record: "on Enum subclasses" not in record.getMessage())

# In a checkout, `flowanchor.plugins` and `flowanchor.conf` are the folders plugins/ and conf/ beside src/: they come
# from the same tree as this file, whatever version is installed. In a wheel they lie inside the package.
_root = _Path(__file__).resolve().parents[2]
if (_root / "pyproject.toml").is_file() and (_root / "plugins").is_dir() and (_root / "conf").is_dir():
    __path__.append(str(_root))


def load(
    path_or_repo: str | _Path,
    ema: str | None = None,
    device: str = "cpu",
    codec: _Mapping[str, _Any] | None = None,
    text_encoder: _Mapping[str, _Any] | None = None,
    dtype: _Any = None,
    network: _Any = None,
    initialise_from: _Any = None,
    base_lora: str | _Path | None = None,
) -> _OpenedModel:
    """Open a trained model for sampling: `flowanchor.load(PATH).sample([0, 1, 2], steps=2)`.

    See `flowanchor.generation.opened.load` for the arguments.
    """
    from flowanchor.generation.opened import load as open_model  # PyTorch is imported on first use

    return open_model(path_or_repo, ema, device, codec, text_encoder, dtype, initialise_from, network, base_lora)


def compose(*overrides: str, program: str = "train") -> _DictConfig:
    """The configuration of a command line: `flowanchor.compose("experiment=digits_facm", "seed=1")`.

    See `flowanchor.programs.composing.compose`; what `build_module` and `build_trainer` of `flowanchor.programs.train`
    make of it is what the program trains.
    """
    from flowanchor.programs.composing import compose as composed  # Hydra is imported on first use

    return composed(*overrides, program=program)
