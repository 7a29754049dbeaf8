"""A distilled Wan as a folder of diffusers: `WanPipeline` with a scheduler of ours, or `AnyFlowPipeline` as it is."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, cast

import diffusers
import torch

from flowanchor.base.files import flush, remove, replace, unfinished
from flowanchor.base.rank_zero import rank_zero_warn
from flowanchor.base.trusted import build
from flowanchor.checkpoints.format import DescribedWeights
from flowanchor.checkpoints.load import open_described
from flowanchor.encoded.statistics import LatentStatistics
from flowanchor.errors import CheckpointError
from flowanchor.exports import flowanchor_scheduler
from flowanchor.generation.samplers import check_sampler
from flowanchor.interfaces import Backbone, Interval, Sampler
from flowanchor.plugins.backbones.wan import Wan
from flowanchor.plugins.backbones.wan_experts import WanExperts
from flowanchor.plugins.formats import anyflow_pipeline
from flowanchor.plugins.formats.anyflow_pipeline import anyflow_transformer
from flowanchor.plugins.formats.base_pipeline import INDEX, MARK, SCHEDULER, BasePipeline
from flowanchor.plugins.formats.pipeline_card import pipeline_card
from flowanchor.plugins.objectives.intervals.expanded import ExpandedInterval
from flowanchor.plugins.samplers.consistency import ConsistencySampler
from flowanchor.plugins.samplers.jump_flow import JumpFlowSampler
from flowanchor.plugins.samplers.meanflow import MeanFlowSampler

NETWORK = ["diffusers", "WanTransformer3DModel"]


def export_pipeline(
    given: DescribedWeights, base: BasePipeline, output: Path, dtype: torch.dtype | None = None, link: bool = False
) -> int:
    """Write the folder in one move; returns the number of parameters of its network or networks.

    Args:
        base: where VAE, text encoder and tokenizer come from.
        dtype: of the weights, but for those that diffusers keeps in float32; None: as they are.
        link: whether the parts of `base` are linked instead of copied.

    Raises `CheckpointError` for a network that is not a Wan on the latents and texts of this pipeline, `ConfigError`
    for one that is not distilled.
    """
    backbone, interval = open_described(given)
    networks = _networks(backbone, given)
    own = _own_sampler(given)
    anyflow = own if networks[0].end_time == "gated" and isinstance(own, MeanFlowSampler) else None
    jumps: ConsistencySampler | JumpFlowSampler | None = None
    if anyflow is not None:
        _check(given, networks, interval, base, anyflow)
        stocks = [anyflow_transformer(networks[0], given.file)]
    else:
        jumps = _jumps(given, own, flows=isinstance(interval, ExpandedInterval) and isinstance(backbone, Wan))
        _check(given, networks, interval, base, jumps)
        stocks = [_folded(network) for network in networks]
    partial = unfinished(output)
    remove(partial)
    partial.mkdir(parents=True)
    base.place(partial, link, _statistics(given))
    index: dict[str, Any] = {"_diffusers_version": diffusers.__version__, **base.parts}
    if anyflow is not None:
        anyflow_pipeline.write_scheduler(partial / "scheduler", anyflow)
        index |= {"_class_name": "AnyFlowPipeline", **MARK, "scheduler": anyflow_pipeline.SCHEDULER}
        index |= {"transformer": anyflow_pipeline.NETWORK}
        card = anyflow_pipeline.anyflow_card(networks[0], anyflow)
    else:
        assert jumps is not None
        _write_scheduler(partial / "scheduler", jumps)
        index |= {"_class_name": "WanPipeline", "scheduler": SCHEDULER}
        index |= {"transformer": NETWORK, "transformer_2": [None, None]}
        card = pipeline_card(networks[0], jumps, SCHEDULER[0])
    if isinstance(backbone, WanExperts):
        index |= {"transformer_2": NETWORK, "boundary_ratio": backbone.boundary}
    (partial / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    (partial / "README.md").write_text(card, encoding="utf-8")
    size = 0
    for name, stock in zip(("transformer", "transformer_2"), stocks, strict=False):
        _lowered(stock, dtype).save_pretrained(partial / name)
        size += sum(parameter.numel() for parameter in stock.parameters())
    flush(partial)
    replace(partial, output)
    return size


def stock_transformer(network: Wan, dtype: torch.dtype | None = None) -> Any:
    """A stock `diffusers.WanTransformer3DModel` that answers as `network` does when its jumps go to the data."""
    return _lowered(_folded(network), dtype)


def _folded(network: Wan) -> Any:
    """An embedder of the end time r says the same for every sample while r = 1: that becomes part of a bias."""
    stock = network.transformer()
    if network.r_embedder is not None:
        state, embedder = stock.state_dict(), stock.condition_embedder
        weight, last = network.r_embedder.linear_1.weight, "condition_embedder.time_embedder.linear_2"
        with torch.no_grad():
            waves = embedder.timesteps_proj(torch.zeros(1, device=weight.device)).to(weight.dtype)  # timestep of r = 1
            told, gate = network.r_embedder(waves)[0], network.told_end.gate
            if network.end_time == "gated":
                told = gate * told
                state |= {f"{last}.{name}": (1 - gate) * state[f"{last}.{name}"] for name in ("weight", "bias")}
            state[f"{last}.bias"] = state[f"{last}.bias"] + told
        stock.load_state_dict(state, assign=True)
    return stock


def _lowered(stock: Any, dtype: torch.dtype | None) -> Any:
    """With weights of a lower precision, but for those that diffusers keeps in float32; None: as they are."""
    state, kept = stock.state_dict(), set(stock._keep_in_fp32_modules or ())
    for name, tensor in state.items():
        if dtype is not None and tensor.is_floating_point() and not kept.intersection(name.split(".")):
            state[name] = tensor.to(dtype)
    stock.load_state_dict(state, assign=True)
    return stock


def _networks(backbone: Backbone, given: DescribedWeights) -> list[Wan]:
    """The Wan, or that of high and that of low noise."""
    if isinstance(backbone, WanExperts):
        return [backbone.high, backbone.low]
    if isinstance(backbone, Wan):
        return [backbone]
    raise CheckpointError(
        f"{given.file} holds a {type(backbone).__name__}, and only a Wan becomes a diffusers pipeline: "
        "use format=huggingface."
    )


def _check(
    given: DescribedWeights, networks: list[Wan], interval: Interval, base: BasePipeline, sampler: Sampler
) -> None:
    network = networks[0]
    check_sampler(sampler, given.meta["kind"], interval)
    if network.end_time == "decoupled":
        raise CheckpointError(
            f"{given.file} tells its first blocks another time than the later ones (backbone.end_time=decoupled), and "
            "no network of diffusers does: use format=huggingface, or train with objective/interval=gated."
        )
    if sampler.needs_end and len(networks) > 1:
        raise CheckpointError(
            f"{given.file} has two experts, and an AnyFlowPipeline holds one network: export each run of its own, or "
            "use format=huggingface."
        )
    if network.takes_end_time and not interval.needs_end_time:
        raise CheckpointError(
            f"{given.file} embeds a second time, which its interval sets to the first one; no stock Wan can: train "
            "with objective/interval=auxiliary, or without backbone.auxiliary_time_cond."
        )
    codec = str((given.meta["config"].get("codec") or {}).get("_target_", "")).rpartition(".")[2]
    if codec != "WanVAE":
        raise CheckpointError(
            f"{given.file} draws samples for the codec {codec or 'of none'}, and a Wan pipeline decodes by Wan's VAE: "
            "only a network trained with codec=wan_vae becomes one."
        )
    channels, width = base.config("vae").get("z_dim"), base.config("text_encoder").get("d_model")
    if (network.sample_shape[0], network.text_dim) != (channels, width):
        raise CheckpointError(
            f"{given.file} draws latents of {network.sample_shape[0]} channels from texts of width {network.text_dim}, "
            f"and {base.folder} has {channels} and {width}: give the pipeline whose VAE and text encoder it was "
            "trained with."
        )


def _statistics(given: DescribedWeights) -> LatentStatistics | None:
    """Those of the run; None where it normalised by the VAE's own."""
    settings = given.meta["config"]["codec"].get("statistics")
    return None if settings is None else LatentStatistics.read(settings)


def _own_sampler(given: DescribedWeights) -> Sampler | None:
    """The sampler of the run."""
    settings = given.meta["config"].get("sampler")
    return cast(Sampler, build(settings, "sampler", given.file)) if settings else None


def _jumps(given: DescribedWeights, own: Sampler | None, flows: bool) -> ConsistencySampler | JumpFlowSampler:
    """The sampler of the run, or the plainest one, with a warning, where the pipeline cannot have that.

    `flows`: whether the anchor can be asked by a timestep alone, and of the same network as the shortcut.
    """
    if isinstance(own, ConsistencySampler) or isinstance(own, JumpFlowSampler) and flows:
        return own
    plainest = ConsistencySampler()
    if own is not None:
        rank_zero_warn(
            f"{given.file} is sampled by {own.label}, which this pipeline cannot be asked by: its scheduler draws by "
            f"{plainest.label}."
        )
    return plainest


def _write_scheduler(folder: Path, sampler: ConsistencySampler | JumpFlowSampler) -> None:
    settings: dict[str, Any] = {"timestep_shift": sampler.timestep_shift, "kept_noise": sampler.kept_noise}
    if isinstance(sampler, JumpFlowSampler):
        settings |= {"flow": [sampler.middle, sampler.flow_end]}
    else:
        settings |= {
            "grid": sampler.grid, "boundaries": list(sampler.boundaries), "kept_noise_h": sampler.kept_noise_h,
        }  # fmt: skip
    flowanchor_scheduler.FlowAnchorScheduler(**settings).save_pretrained(folder)
    shutil.copyfile(str(flowanchor_scheduler.__file__), folder / f"{SCHEDULER[0]}.py")
