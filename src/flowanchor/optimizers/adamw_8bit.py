"""AdamW whose moments are kept in 8 bits: 2 bytes per trained value instead of 8."""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.distributed.tensor
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

from flowanchor.errors import ConfigError
from flowanchor.optimizers.low_moments import LowMoments, State
from flowanchor.weights import local

BLOCK = 256  # values that share a scale
FEWEST = 4096  # values of a tensor that is worth it; biases and norms stay in float32
SHORTEST = 16  # values of a row, below which its scale would outweigh what is saved
MOMENTS = {"exp_avg": True, "exp_avg_sq": False}  # name -> with a sign or without
SCALE = "{}_scale"


class AdamW8bit(LowMoments):
    """AdamW with both moments in blocks of 8 bits (arXiv 2110.02861); weights and arithmetic stay as they are.

    A moment is a code of 8 bits per value (the place among `levels`) and a scale per block of 256 values, the largest
    magnitude in it; what a step computes is used before it is rounded. Blocks lie within a row (an entry of the first
    dimension), the last one is what is left of it: a sharded parameter has the blocks of a whole one, on any number of
    processes. Where rows are a multiple of 256 long they are those of torchao and bitsandbytes. As there, tensors of
    less than 4,096 values keep moments of float32; so do those whose rows are shorter than 16.

    Other than there, a second moment above zero is never rounded to zero, but up to the lowest level: the first moment
    reaches further down, and divided by the root of nothing but the present gradient it would make a step of any size.

    The state is plain tensors: `exp_avg` (uint8, of the parameter's shape), `exp_avg_scale` (float32, [rows, blocks]),
    and the same for `exp_avg_sq`. Nothing is drawn at random: a resumed run repeats an uninterrupted one.

    Args:
        lr, betas, eps, weight_decay: as for `torch.optim.AdamW`.

    Raises `ConfigError` for a parameter that is sharded along another dimension than the first.
    """

    together = 1 << 24

    def begin(self, p: Tensor) -> State:
        if not in_eight_bits(p.shape):
            return {name: torch.zeros_like(p, dtype=torch.float32) for name in MOMENTS}
        shape = (p.shape[0], -(-p.shape[1:].numel() // BLOCK))
        state: State = {}
        for name in MOMENTS:
            state[name] = torch.zeros_like(p, dtype=torch.uint8)
            state[SCALE.format(name)] = _zeros(shape, p)
        return state

    def read(self, states: list[State]) -> tuple[list[Tensor], list[Tensor]]:
        first, second = ([_read(state, name) for state in states] for name in MOMENTS)
        return first, second

    def keep(self, states: list[State], first: list[Tensor], second: list[Tensor], place: tuple[int, ...]) -> None:
        for name, exact in zip(MOMENTS, (first, second), strict=True):
            for state, moment in zip(states, exact, strict=True):
                kept = local(state[name])
                if SCALE.format(name) not in state:
                    kept.copy_(moment)
                elif kept.numel():  # a process may hold none of it
                    codes, scale = quantised(moment.flatten(1), MOMENTS[name])
                    kept.copy_(codes.view_as(kept))
                    local(state[SCALE.format(name)]).copy_(scale)


def in_eight_bits(shape: torch.Size) -> bool:
    """Whether the moments of a parameter of this shape are kept in 8 bits."""
    return len(shape) > 1 and shape.numel() >= FEWEST and shape[1:].numel() >= SHORTEST


def quantised(exact: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    """float32 [rows, n] -> codes, uint8 [rows, n], of the nearest levels; scales, float32 [rows, blocks]."""
    rows, length = exact.shape
    blocks = -(-length // BLOCK)
    scale = F.pad(exact.abs(), (0, blocks * BLOCK - length)).view(rows, blocks, BLOCK).amax(-1).clamp_(min=1e-12)
    borders = _borders(signed, exact.device)
    return torch.bucketize(exact / _per_value(scale, length), borders, out_int32=True, right=True).byte(), scale


def dequantised(codes: Tensor, scale: Tensor, signed: bool) -> Tensor:
    """Codes [rows, n] and scales [rows, blocks] -> float32 [rows, n]."""
    return levels(signed, codes.device)[codes.int()].mul_(_per_value(scale, codes.shape[1]))


@lru_cache(maxsize=16)
def levels(signed: bool, device: torch.device) -> Tensor:
    """float32 [256], rising: the values of the codes, parts of a scale (arXiv 2110.02861, dynamic tree quantisation).

    0, 1, and seven decades from 1e-6 on, each finer than the one below: 1, 2, ..., 64 values of a sign, twice as many
    where all are positive, in the middle of as many equal parts of a tenth to one.
    """
    found = [torch.tensor([0.0, 1.0])]
    for decade in range(7):
        edges = torch.linspace(0.1, 1, 2 ** (decade + (not signed)) + 1)
        middles = 10.0 ** (decade - 6) * ((edges[:-1] + edges[1:]) / 2)
        found += [middles, -middles] if signed else [middles]
    return torch.cat(found).sort().values.to(device)


@lru_cache(maxsize=16)
def _borders(signed: bool, device: torch.device) -> Tensor:
    """float32 [255]: in the middle between neighbours; without a sign, all above zero is more than zero."""
    exact = levels(signed, torch.device("cpu")).double()
    borders = ((exact[:-1] + exact[1:]) / 2).float()
    if not signed:
        borders[0] = torch.finfo(torch.float32).tiny
    return borders.to(device)


def _per_value(scale: Tensor, length: int) -> Tensor:
    """Scales [rows, blocks] -> [rows, length]."""
    return scale.repeat_interleave(BLOCK, dim=1)[:, :length]


def _read(state: State, name: str) -> Tensor:
    kept = local(state[name])
    if SCALE.format(name) not in state:
        return kept.clone()
    scale = local(state[SCALE.format(name)])
    return dequantised(kept.flatten(1), scale, MOMENTS[name]).view_as(kept)


def _zeros(shape: tuple[int, int], p: Tensor) -> Tensor:
    """Of the rows of a parameter: each process has those of its part."""
    if not isinstance(p, DTensor):
        return torch.zeros(shape, device=p.device)
    if any(isinstance(placement, Shard) and placement.dim for placement in p.placements):
        raise ConfigError(
            "optimizer=adamw8bit needs parameters that are sharded along their first dimension, as "
            "strategy=fsdp_chain_jvp shards them: take optimizer=adamw."
        )
    return torch.distributed.tensor.zeros(shape, device_mesh=p.device_mesh, placements=p.placements)
