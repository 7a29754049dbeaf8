"""`flowanchor-convert`: look at a checkpoint, import a released one, or write one into another form."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from flowanchor.base.dtypes import DTYPES
from flowanchor.base.plain import bare
from flowanchor.checkpoints.authors import write_authors
from flowanchor.checkpoints.consolidated import SUFFIX, WRITABLE, write_consolidated
from flowanchor.checkpoints.description import described_network
from flowanchor.checkpoints.experts import join_experts
from flowanchor.checkpoints.foreign import read_foreign
from flowanchor.checkpoints.huggingface import is_published, write_folder
from flowanchor.checkpoints.importing import Choices, import_foreign
from flowanchor.checkpoints.inspection import count, inspect_file
from flowanchor.checkpoints.load import (
    by_part,
    check_fit,
    file_digest,
    find_checkpoint,
    is_ours,
    load_model,
    outlined,
    read_checkpoint,
    select_weights,
    whole_weights,
)
from flowanchor.checkpoints.model_card import model_card, read_metrics
from flowanchor.checkpoints.registry import current_name, registered
from flowanchor.checkpoints.soundness import refuse_damaged
from flowanchor.checkpoints.trusted import build
from flowanchor.errors import CheckpointError, ConfigError
from flowanchor.exports.base_pipeline import BasePipeline
from flowanchor.exports.wan_pipeline import export_pipeline, is_exported
from flowanchor.programs.checks import base_of_adapters, check_whole_numbers
from flowanchor.programs.commands import convert as main
from flowanchor.weights import check_finite, dtype_of

ACTIONS = ("consolidate",)
_SUFFIXES = {"flowanchor": SUFFIX, "authors": ".pt", "huggingface": "", "diffusers": ""}
_ONLY_RELEASED = ("backbone", "kind", "interval", "num_heads", "num_classes")


@dataclass(frozen=True)
class Source:
    """One set of weights, whatever it came from."""

    file: Path
    weights: Mapping[str, Tensor]
    meta: dict[str, Any]  # kind, step, config
    ema: str
    raw: Mapping[str, Tensor] | None = None  # the weights without averaging, where the file has them


def convert(cfg: DictConfig) -> None:
    """Do what the settings say; nothing is written but the output that was asked for."""
    if cfg.action not in ACTIONS:
        raise ConfigError(f"convert.py cannot {cfg.action}: write convert.py {' or convert.py '.join(ACTIONS)}.")
    check_whole_numbers(cfg, num_heads=1, num_classes=0)
    if cfg.inspect:
        print(inspect_file(cfg.inspect, _choices(cfg)))
        return
    if cfg.format not in _SUFFIXES:
        raise ConfigError(f"format={cfg.format} is not known: use one of {', '.join(_SUFFIXES)}.")
    if not cfg.checkpoint:
        raise ConfigError(
            "Which checkpoint? Add checkpoint=PATH (a run folder, a sharded checkpoint, a .ckpt file or a released "
            "file), or inspect=PATH to look at one."
        )
    output = _output(cfg)
    for path in by_part("checkpoint", cfg.checkpoint).values():
        refuse_damaged(find_checkpoint(path))
    if cfg.format == "diffusers":
        _export(cfg, output)
        return
    source = _cast(_source(cfg), cfg.dtype)
    check_source(source)
    _WRITERS[cfg.format](cfg, source, output)
    print(f"{output}: {count(source.weights)}, weights {source.ema} of {source.file}")


def _output(cfg: DictConfig) -> Path:
    suffix = _SUFFIXES[cfg.format]
    if not cfg.output or Path(cfg.output).suffix != suffix and suffix:
        where = f"FILE{suffix}, with that ending" if suffix else "FOLDER"
        raise ConfigError(f"Where to? Add output={where}.")
    output = Path(cfg.output).expanduser()
    if output.exists() and not cfg.overwrite:
        raise ConfigError(f"{output} exists already: choose another output=, or add overwrite=true.")
    earlier = is_exported if cfg.format == "diffusers" else is_published
    if output.exists() and (output.is_dir() if suffix else not earlier(output)):
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


def _source(cfg: DictConfig) -> Source:
    if OmegaConf.is_dict(cfg.checkpoint):
        return _whole(cfg, Source(*join_experts(cfg.checkpoint, cfg.ema_profile)))
    file = find_checkpoint(cfg.checkpoint)
    if not is_ours(file):
        foreign = read_foreign(file)
        found = import_foreign(foreign, _choices(cfg))
        return Source(file, found.weights, found.meta, found.ema, foreign.profiles.get("none"))
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
    return _whole(cfg, Source(file, weights, content["flowanchor"], ema, raw))


def _whole(cfg: DictConfig, source: Source) -> Source:
    """The weights of the whole network: those under adapters may not be where the output is opened."""
    settings, base = source.meta["config"].get("backbone") or {}, base_of_adapters(cfg)
    if base is None and not settings.get("lora"):
        return source
    network, weights, _ = outlined(source.meta, source.weights, source.file, base)
    raw = None if source.raw is None else whole_weights(network, source.raw, source.meta, source.file, base)[0]
    return Source(source.file, weights, source.meta, source.ema, raw)


def check_source(source: Source) -> None:
    """Raise `CheckpointError` for weights that should not be handed on: diverged ones, or not those of their network.

    The network of a plugin package that is not installed here is taken as it is described.
    """
    for weights in (source.weights, *([] if source.raw is None else [source.raw])):
        odd = [name for name in weights if dtype_of(weights, name) not in WRITABLE]
        if odd:
            raise CheckpointError(
                f"{source.file} holds {str(dtype_of(weights, odd[0])).removeprefix('torch.')} numbers in "
                f"{bare(odd[0])}, which no network is made of: do not use this file."
            )
    known = None
    settings, _ = described_network(source.meta["config"], source.file)
    if current_name(settings["_target_"]) in registered("backbone"):
        network, whole, _ = outlined(source.meta, source.weights, source.file)
        check_fit(network, whole, source.file)
        known = [name for name, _ in network.named_parameters() if name in source.weights]
    check_finite(source.weights, f"{source.file} ({source.ema})", known)


def _cast(source: Source, name: str | None) -> Source:
    dtype = _dtype(name)
    if dtype is None:
        return source

    def cast(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        tensors = ((key, weights[key]) for key in weights)
        return {key: t.to(dtype) if t.is_floating_point() else t for key, t in tensors}

    raw = None if source.raw is None else cast(source.raw)
    return Source(source.file, cast(source.weights), source.meta, source.ema, raw)


def _dtype(name: str | None) -> torch.dtype | None:
    if name is not None and name not in DTYPES:
        raise ConfigError(f"dtype={name} is not known: use one of {', '.join(DTYPES)}.")
    return None if name is None else DTYPES[name]


def _write_file(cfg: DictConfig, source: Source, output: Path) -> None:
    write_consolidated(output, source.weights, source.meta, source.ema)


def _write_authors(cfg: DictConfig, source: Source, output: Path) -> None:
    write_authors(output, source.weights, source.meta, source.ema, source.raw)


def _write_folder(cfg: DictConfig, source: Source, output: Path) -> None:
    report = None
    if cfg.metrics is not None:
        report = read_metrics(cfg.metrics, file_digest(source.file), source.ema)
    codec = _codec(cfg, source) if cfg.with_codec else None
    card = model_card(
        cfg.name or output.name, source.meta, source.ema, report, source.weights, with_codec=codec is not None
    )
    write_folder(output, source.weights, source.meta, source.ema, card, codec)


def _codec(cfg: DictConfig, source: Source) -> Any:
    """The codec whose weights are published: that of the checkpoint, or the one of the command line."""
    settings = source.meta["config"].get("codec")
    if cfg.get("codec") is not None:
        codec = instantiate(OmegaConf.to_container(cfg.codec, resolve=True), _convert_="all")
    elif settings:
        codec = build(settings, "codec", source.file)
    else:
        raise ConfigError(f"with_codec=true: {source.file} does not say what its codec is: add codec=NAME.")
    if not hasattr(codec, "save"):
        raise ConfigError("with_codec=true: this network draws pixels and has no codec to publish: leave it out.")
    if not codec.usable:
        raise ConfigError(f"with_codec=true: where are the codec's weights? Add codec={codec.name} codec.weights=FILE.")
    return codec


_WRITERS: dict[str, Callable[[DictConfig, Source, Path], None]] = {
    "flowanchor": _write_file,
    "authors": _write_authors,
    "huggingface": _write_folder,
}


def _export(cfg: DictConfig, output: Path) -> None:
    if not cfg.pipeline:
        raise ConfigError(
            "format=diffusers writes a pipeline of Wan, and needs its VAE, text encoder and tokenizer: add "
            "pipeline=FOLDER, a diffusers pipeline of Wan that has them (format=huggingface for other networks)."
        )
    if OmegaConf.is_dict(cfg.checkpoint):
        raise ConfigError(
            "Join the two experts first: convert.py checkpoint='{high: RUN, low: RUN}' output=PAIR.safetensors."
        )
    base, dtype = BasePipeline.read(cfg.pipeline), _dtype(cfg.dtype)
    model = load_model(cfg.checkpoint, ema=cfg.ema_profile, initialise_from=base_of_adapters(cfg))
    size = export_pipeline(model, base, output, dtype, cfg.link)
    print(f"{output}: {size:,} parameters, weights {model.ema} of {model.path}")


if __name__ == "__main__":
    main()
