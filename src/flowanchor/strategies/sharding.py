"""Sharding a backbone by its stages with FSDP2, so that one stage at a time is whole.

Only PyTorch is needed here: a plain script may call `shard_backbone`, and Lightning's strategy does.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

from flowanchor.interfaces import Backbone
from flowanchor.jvp.stages import UnitMethod, check_stages, is_unit


def shard_backbone(
    backbone: Backbone,
    mesh: DeviceMesh,
    *,
    param_dtype: torch.dtype | None = None,
    reduce_dtype: torch.dtype | None = None,
    prefetch: bool = True,
) -> None:
    """Shard a network in place: one unit per stage, gathered for that stage and freed after it, forward and backward.

    Args:
        backbone: the network; its parameters may be on the meta device.
        mesh: one dimension (shards), or two (replicas x shards: HSDP).
        param_dtype: in which parameters are gathered and used; None: as they are stored. The network's
            `float32_modules` stay as stored: they become units inside the stage's unit. A forward under autocast casts
            the activations, so inputs are not cast here: a time in bfloat16 would lose its digits. The network's
            `whole_parameters` are not sharded then: who trains must average their gradients over the processes.
        reduce_dtype: in which gradients are reduced; None: `param_dtype`.
        prefetch: gather the next stage while one runs.

    Raises `ConfigError` where the network has no stages. What the network may be asked afterwards: its `predict` and
    `forward`, and the tangent engines; nothing between them.
    """
    check_stages(backbone)
    # Nothing here writes into what a unit returns, which is what FSDP2 warns of.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    low = MixedPrecisionPolicy(param_dtype=param_dtype, reduce_dtype=reduce_dtype, cast_forward_inputs=False)
    exact = MixedPrecisionPolicy(cast_forward_inputs=False)
    wide = set(backbone.float32_modules()) if param_dtype is not None else set()
    kept = set(backbone.whole_parameters()) if param_dtype is not None else set()
    stages = [stage for stage in backbone.stage_modules() if stage]
    for stage in stages:
        for module in _nested(stage, wide):
            fully_shard(module, mesh=mesh, mp_policy=exact, reshard_after_forward=True)
        policy = exact if wide & set(stage) else low
        unit: Any = stage if len(stage) > 1 else stage[0]
        fully_shard(unit, mesh=mesh, mp_policy=policy, reshard_after_forward=True, ignored_params=kept)
    tables = {p for p in backbone.parameters(recurse=False) if not p.requires_grad}
    fully_shard(backbone, mesh=mesh, mp_policy=exact, ignored_params=tables | kept)
    embed, *_, head = backbone.stage_modules()
    backbone.__dict__["embed"] = UnitMethod(backbone.embed, _units(embed))
    backbone.__dict__["head"] = UnitMethod(backbone.head, _units(head))
    register_fsdp_forward_method(backbone, "predict")
    if prefetch:
        _prefetch([_units(stage) for stage in stages])


def _nested(stage: list[nn.Module], wide: set[nn.Module]) -> list[nn.Module]:
    """The float32 modules strictly inside the modules of a stage."""
    return [inner for module in stage for inner in module.modules() if inner in wide and inner is not module]


def _units(stage: list[nn.Module]) -> list[nn.Module]:
    return [inner for module in stage for inner in module.modules() if is_unit(inner)]


def _prefetch(units: list[list[nn.Module]]) -> None:
    for now, following in zip(units, units[1:], strict=False):
        first = now[0]
        assert isinstance(first, FSDPModule)
        first.set_modules_to_forward_prefetch([unit for unit in following if isinstance(unit, FSDPModule)])


def unsharded_backbones(module: nn.Module) -> list[Backbone]:
    """The networks inside a module that are not sharded yet, outermost only."""
    networks = [found for found in module.modules() if isinstance(found, Backbone)]
    inner = {part for network in networks for part in network.modules() if part is not network}
    return [network for network in networks if network not in inner and not is_unit(network)]
