"""`flowanchor-convert consolidate`: one safetensors file from any checkpoint."""

from __future__ import annotations

import sys
from pathlib import Path

from omegaconf import DictConfig

from flowanchor.checkpoints.consolidated import SUFFIX, write_consolidated
from flowanchor.checkpoints.load import find_checkpoint, read_checkpoint, select_weights
from flowanchor.errors import ConfigError
from flowanchor.programs.launch import program

ACTIONS = ("consolidate",)


def convert(cfg: DictConfig) -> None:
    """Do what `action` says; nothing is written but the file that was asked for."""
    if cfg.action not in ACTIONS:
        raise ConfigError(f"convert.py cannot {cfg.action}: write convert.py {' or convert.py '.join(ACTIONS)}.")
    consolidate(cfg)


def consolidate(cfg: DictConfig) -> Path:
    """Write the weights of a checkpoint, and what is needed to open them alone, into `output`."""
    if not cfg.checkpoint:
        raise ConfigError("Which checkpoint? Add checkpoint=PATH (a run folder, a sharded checkpoint or a .ckpt file).")
    if not cfg.output or Path(cfg.output).suffix != SUFFIX:
        raise ConfigError(f"Where to? Add output=FILE{SUFFIX}, with that ending.")
    output = Path(cfg.output).expanduser()
    if output.exists() and not cfg.overwrite:
        raise ConfigError(f"{output} exists already: choose another output=, or add overwrite=true.")
    file = find_checkpoint(cfg.checkpoint)
    content = read_checkpoint(file)
    name, weights = select_weights(content, cfg.ema_profile, file)
    size = write_consolidated(output, weights, content["flowanchor"], name)
    print(f"{output}: {len(weights)} tensors, {size / 2**20:,.1f} MiB, weights {name} of {file}")
    return output


def main() -> None:
    """The program; its first word may be the action, as in `convert.py consolidate checkpoint=...`."""
    if len(sys.argv) > 1 and sys.argv[1].isidentifier():
        sys.argv[1] = f"action={sys.argv[1]}"
    _main()


_main = program("convert")(convert)
