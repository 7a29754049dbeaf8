"""`flowanchor-convert`: look at a checkpoint, import a released one, or write one into another form."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from flowanchor.base.dtypes import DTYPES
from flowanchor.base.plain import bare
from flowanchor.base.registry import current_name, registered
from flowanchor.base.typed import instantiate
from flowanchor.checkpoints.adapters import by_part, outlined, whole_weights
from flowanchor.checkpoints.consolidated import WRITABLE
from flowanchor.checkpoints.description import described_network
from flowanchor.checkpoints.find import find_checkpoint
from flowanchor.checkpoints.fit import check_fit
from flowanchor.checkpoints.format import Choices, DescribedWeights, Format
from flowanchor.checkpoints.formats import format_of, formats
from flowanchor.checkpoints.inspection import inspect_file
from flowanchor.checkpoints.read import is_ours, read_checkpoint, select_weights
from flowanchor.checkpoints.soundness import refuse_damaged
from flowanchor.errors import CheckpointError, ConfigError
from flowanchor.programs.checks import base_of_adapters, check_whole_numbers
from flowanchor.programs.commands import convert as main
from flowanchor.weights import check_finite, checked_weights, dtype_of

ACTIONS = ("consolidate",)
_ONLY_RELEASED = ("backbone", "kind", "interval", "num_heads", "num_classes")


def convert(cfg: DictConfig) -> None:
    """Do what the settings say; nothing is written but the output that was asked for."""
    if cfg.action not in ACTIONS:
        raise ConfigError(f"convert.py cannot {cfg.action}: write convert.py {' or convert.py '.join(ACTIONS)}.")
    check_whole_numbers(cfg, num_heads=1, num_classes=0)
    if cfg.inspect:
        print(inspect_file(cfg.inspect, _choices(cfg)))
        return
    if not cfg.checkpoint:
        raise ConfigError(
            "Which checkpoint? Add checkpoint=PATH (a run folder, a sharded checkpoint, a .ckpt file or a released "
            "file), or inspect=PATH to look at one."
        )
    dtype = _dtype(cfg.dtype)
    format: Format = instantiate(cfg.format, _convert_="all")
    output = _output(cfg, format)
    format.check()
    for path in by_part("checkpoint", cfg.checkpoint).values():
        refuse_damaged(find_checkpoint(path))
    given = _given(cfg)
    predicts = given.meta["config"]["backbone"].get("predicts") or "v"
    if predicts not in format.predictions:
        raise CheckpointError(
            f"{given.file} predicts the data (backbone.predicts={predicts}), and format={format.name} is read as a "
            "network of velocities: use format=flowanchor or format=huggingface."
        )
    if not cfg.training_parts:
        given = _without_training_parts(given)
    if dtype is not None and format.casts:
        given = _cast(given, dtype)
    check_given(given)
    print(f"{output}: {format.write(given, output)}, weights {given.ema} of {given.file}")


def _output(cfg: DictConfig, format: Format) -> Path:
    if format.suffix is None:
        others = ", ".join(one.name for one in formats() if one.suffix is not None)
        raise ConfigError(f"format={format.name} is read and not written: use one of {others}.")
    if not cfg.output or Path(cfg.output).suffix != format.suffix and format.suffix:
        where = f"FILE{format.suffix}, with that ending" if format.suffix else "FOLDER"
        raise ConfigError(f"Where to? Add output={where}.")
    output = Path(cfg.output).expanduser()
    if output.exists() and not cfg.overwrite:
        raise ConfigError(f"{output} exists already: choose another output=, or add overwrite=true.")
    if output.exists() and not format.replaces(output):
        raise ConfigError(f"{output} is no earlier output of this kind, and is not replaced: choose another output=.")
    return output


def _choices(cfg: DictConfig) -> Choices:
    """What the command line says about a released file; of the backbone's group only the name of the option counts."""
    sizes = [key for key in HydraConfig.get().overrides.task if key.startswith("backbone.")]
    if sizes:
        raise ConfigError(f"{sizes[0]}: sizes are read off the weights; only num_heads= and num_classes= can be given.")
    codec: Any = None if cfg.get("codec") is None else OmegaConf.to_container(cfg.codec, resolve=True)
    text = {name: None if cfg[name] is None else str(cfg[name]) for name in ("kind", "interval", "ema_profile")}
    return Choices(
        ema=text.pop("ema_profile"),
        backbone=HydraConfig.get().runtime.choices.get("backbone"),
        num_heads=cfg.num_heads,
        num_classes=cfg.num_classes,
        codec=codec,
        **text,
    )


def _given(cfg: DictConfig) -> DescribedWeights:
    """The weights of the checkpoint that was typed, with all that adapters stand beside."""
    if OmegaConf.is_dict(cfg.checkpoint):
        return _whole(cfg, _joined(cfg))
    file = find_checkpoint(cfg.checkpoint)
    if not is_ours(file):
        found = format_of(file).read(file, _choices(cfg))
        return replace(found, weights=checked_weights(found.weights, file))
    told = [name for name in _ONLY_RELEASED if cfg.get(name) is not None]
    told += ["codec"] if cfg.get("codec") is not None and not cfg.with_codec else []
    if told:
        raise ConfigError(
            f"{file} is a checkpoint of flowanchor and says itself what it is: leave out {', '.join(told)} "
            "(these are for released files)."
        )
    content = read_checkpoint(file)
    ema, weights = select_weights(content, cfg.ema_profile, file)
    raw = select_weights(content, "none", file)[1] if len(content["state_dict"]) else None
    return _whole(cfg, DescribedWeights(file, weights, content["flowanchor"], ema, raw))


def _joined(cfg: DictConfig) -> DescribedWeights:
    joining = [one for one in formats() if one.parts]
    found = next((one for one in joining if set(one.parts) == set(cfg.checkpoint)), None)
    if found is None:
        known = ", or ".join(" and ".join(one.parts) for one in joining)
        raise CheckpointError(f"Networks to join are named {known}, not {', '.join(map(str, cfg.checkpoint))}.")
    return found.join(dict(cfg.checkpoint), _choices(cfg))


def _whole(cfg: DictConfig, given: DescribedWeights) -> DescribedWeights:
    """The weights of the whole network: those under adapters may not be where the output is opened."""
    base = base_of_adapters(cfg)
    if base is None and not cfg.base_lora and not _known(given):
        return given
    network, weights, _ = outlined(given.meta, given.weights, given.file, base, cfg.base_lora)
    raw = (
        None if given.raw is None else whole_weights(network, given.raw, given.meta, given.file, base, cfg.base_lora)[0]
    )
    return replace(given, weights=weights, raw=raw)


def _without_training_parts(given: DescribedWeights) -> DescribedWeights:
    """What is drawn with: without the weights that only training asks, and a description that does not ask for them."""
    if not _known(given):
        return given
    network, _, _ = outlined(given.meta, given.weights, given.file)
    names, settings = network.without_training_parts()
    if not names:
        return given

    def kept(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: weights[name] for name in weights if name not in names}

    config = given.meta["config"]
    meta = {**given.meta, "config": {**config, "backbone": {**config["backbone"], **settings}}}
    raw = None if given.raw is None else kept(given.raw)
    return replace(given, weights=kept(given.weights), raw=raw, meta=meta)


def _known(given: DescribedWeights) -> bool:
    """Whether the class of the network is registered here; one of a package that is not is taken as it is described."""
    settings, _ = described_network(given.meta["config"], given.file)
    return current_name(settings["_target_"]) in registered("backbone")


def check_given(given: DescribedWeights) -> None:
    """Raise `CheckpointError` for weights that should not be handed on: diverged ones, or not those of their network.

    The network of a plugin package that is not installed here is taken as it is described.
    """
    for weights in (given.weights, *([] if given.raw is None else [given.raw])):
        odd = [name for name in weights if dtype_of(weights, name) not in WRITABLE]
        if odd:
            raise CheckpointError(
                f"{given.file} holds {str(dtype_of(weights, odd[0])).removeprefix('torch.')} numbers in "
                f"{bare(odd[0])}, which no network is made of: do not use this file."
            )
    known = None
    if _known(given):
        network, whole, _ = outlined(given.meta, given.weights, given.file)
        check_fit(network, whole, given.file)
        known = [name for name, _ in network.named_parameters() if name in given.weights]
    check_finite(given.weights, f"{given.file} ({given.ema})", known)


def _cast(given: DescribedWeights, dtype: torch.dtype) -> DescribedWeights:
    def cast(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        tensors = ((key, weights[key]) for key in weights)
        return {key: t.to(dtype) if t.is_floating_point() else t for key, t in tensors}

    return replace(given, weights=cast(given.weights), raw=None if given.raw is None else cast(given.raw))


def _dtype(name: str | None) -> torch.dtype | None:
    if name is not None and name not in DTYPES:
        raise ConfigError(f"dtype={name} is not known: use one of {', '.join(DTYPES)}.")
    return None if name is None else DTYPES[name]


if __name__ == "__main__":
    main()
