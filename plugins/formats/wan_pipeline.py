"""A distilled Wan as a folder that stock `diffusers.WanPipeline` opens, with a scheduler that samples it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

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
from flowanchor.plugins.formats.base_pipeline import INDEX, SCHEDULER, BasePipeline
from flowanchor.plugins.formats.pipeline_card import pipeline_card
from flowanchor.plugins.objectives.intervals.expanded import ExpandedInterval
from flowanchor.plugins.samplers.consistency import ConsistencySampler
from flowanchor.plugins.samplers.jump_flow import JumpFlowSampler

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
    _check(given, networks[0], interval, base)
    sampler = _sampler(given, flows=isinstance(interval, ExpandedInterval) and isinstance(backbone, Wan))
    partial = unfinished(output)
    remove(partial)
    partial.mkdir(parents=True)
    base.place(partial, link, _statistics(given))
    _write_scheduler(partial / "scheduler", sampler)
    index: dict[str, Any] = {"_class_name": "WanPipeline", "_diffusers_version": diffusers.__version__}
    index |= {**base.parts, "scheduler": SCHEDULER, "transformer": NETWORK, "transformer_2": [None, None]}
    if isinstance(backbone, WanExperts):
        index |= {"transformer_2": NETWORK, "boundary_ratio": backbone.boundary}
    (partial / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    (partial / "README.md").write_text(pipeline_card(networks[0], sampler, SCHEDULER[0]), encoding="utf-8")
    size = 0
    for name, network in zip(("transformer", "transformer_2"), networks, strict=False):
        stock = stock_transformer(network, dtype)
        stock.save_pretrained(partial / name)
        size += sum(parameter.numel() for parameter in stock.parameters())
    flush(partial)
    replace(partial, output)
    return size


def stock_transformer(network: Wan, dtype: torch.dtype | None = None) -> Any:
    """A stock `diffusers.WanTransformer3DModel` that answers as `network` does when its jumps go to the data.

    An embedder of the end time r adds the same to every time embedding while r = 1: it becomes part of that bias.
    """
    stock = network.transformer()
    state = stock.state_dict()
    if network.takes_end_time:
        embedder = stock.condition_embedder
        weight, bias = network.r_embedder.linear_1.weight, "condition_embedder.time_embedder.linear_2.bias"
        with torch.no_grad():
            waves = embedder.timesteps_proj(torch.zeros(1, device=weight.device)).to(weight.dtype)  # timestep of r = 1
            state[bias] = state[bias] + network.r_embedder(waves)[0]
    kept = set(stock._keep_in_fp32_modules or ())
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


def _check(given: DescribedWeights, network: Wan, interval: Interval, base: BasePipeline) -> None:
    check_sampler(ConsistencySampler(), given.meta["kind"], interval)
    if network.takes_end_time and not interval.needs_end_time:
        raise CheckpointError(
            f"{given.file} embeds a second time, which its interval sets to the first one; no stock Wan can: train "
            "with objective/interval=auxiliary, or without backbone.auxiliary_time_cond."
        )
    if network.predicts == "x":
        raise CheckpointError(
            f"{given.file} predicts the data (backbone.predicts=x), and a stock Wan predicts velocities: use "
            "format=huggingface."
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


def _sampler(given: DescribedWeights, flows: bool) -> ConsistencySampler | JumpFlowSampler:
    """The sampler of the run, or the plainest one, with a warning, where the pipeline cannot have that.

    `flows`: whether the anchor can be asked by a timestep alone, and of the same network as the shortcut.
    """
    settings = given.meta["config"].get("sampler")
    own: Sampler | None = build(settings, "sampler", given.file) if settings else None
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
