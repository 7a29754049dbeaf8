"""Layers of LightningDiT: attention with QK-norm and rotary positions, SwiGLU, RMSNorm, embedders, adaLN blocks.

Attribute names are those of the released checkpoints, so that they load with `strict=True` and no table.
"""

from __future__ import annotations

import math
from typing import cast

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional

from flowanchor.interfaces import StageContext


class RMSNorm(nn.Module):
    """Root-mean-square norm (arXiv 1910.07467) in float32 or better; written out so that forward AD passes through."""

    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        wide = x.double() if x.dtype == torch.float64 else x.float()
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return normed.type_as(x) * self.weight


class RotaryPositions(nn.Module):
    """Axial rotary embedding on a `side x side` grid: first half of a head turns with the row, second with the column.

    Tables `freqs_cos`, `freqs_sin`: [N, head_dim] with neighbouring pairs of channels sharing an angle (EVA-02,
    arXiv 2303.11331).
    """

    def __init__(self, head_dim: int, side: int, theta: float = 10000.0) -> None:
        super().__init__()
        half = head_dim // 2
        rates = theta ** (-torch.arange(0, half, 2)[: half // 2].float() / half)  # [head_dim / 4]
        angles = (torch.arange(side).float()[:, None] * rates).repeat_interleave(2, dim=1)  # [side, head_dim / 2]
        grid = torch.cat([angles[:, None].expand(-1, side, -1), angles[None].expand(side, -1, -1)], dim=-1)
        self.register_buffer("freqs_cos", grid.cos().flatten(0, 1))
        self.register_buffer("freqs_sin", grid.sin().flatten(0, 1))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair of neighbouring channels of x [B, heads, N, head_dim] by its angle."""
    even, odd = x[..., 0::2], x[..., 1::2]
    quarter_turn = torch.stack([-odd, even], dim=-1).flatten(-2)
    return (x * cos + quarter_turn * sin).type_as(x)


class Attention(nn.Module):
    """Multi-head self-attention through `scaled_dot_product_attention` [B, N, D] -> [B, N, D]."""

    def __init__(self, dim: int, num_heads: int, use_qknorm: bool, use_rmsnorm: bool) -> None:
        super().__init__()
        self.num_heads = num_heads
        head_dim = dim // num_heads
        norm = RMSNorm if use_rmsnorm else nn.LayerNorm
        self.qkv = nn.Linear(dim, 3 * dim)
        self.q_norm = norm(head_dim) if use_qknorm else nn.Identity()
        self.k_norm = norm(head_dim) if use_qknorm else nn.Identity()
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor] | None = None) -> Tensor:
        q, k, v = rearrange(self.qkv(x), "b n (three h d) -> three b h n d", three=3, h=self.num_heads)
        q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:
            q, k = rotate(q, *rope), rotate(k, *rope)
        out = functional.scaled_dot_product_attention(q.type_as(v), k.type_as(v), v)
        return self.proj(rearrange(out, "b h n d -> b n (h d)"))


class SwiGLU(nn.Module):
    """Gated feed-forward `w3(silu(a) b)`, `a, b = w12(x)` (arXiv 2002.05202)."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.w12 = nn.Linear(dim, 2 * hidden)
        self.w3 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.w12(x).chunk(2, dim=-1)
        return self.w3(functional.silu(gate) * value)


class FeedForward(nn.Module):
    """Two layers with a tanh-approximated GELU between them (DiT)."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(functional.gelu(self.fc1(x), approximate="tanh"))


class PatchEmbedding(nn.Module):
    """Images [B, C, H, W] -> tokens [B, N, D] in row-major order."""

    def __init__(self, patch_size: int, in_channels: int, hidden_size: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, hidden_size, patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        # A view would hand its layout, channels before tokens, to every sum along the network.
        return rearrange(self.proj(x), "b d h w -> b (h w) d").contiguous()


class TimeEmbedding(nn.Module):
    """A time [B] -> [B, D]: cosines and sines of 128 rates, then two layers. Time is fed as it is, or times `scale`.

    A scale of 1000, as diffusion models have it, makes the fastest wave turn 159 times over [0, 1]: the derivative by
    the time, and with it a tangent, grows with it. The waves are computed outside autocast, in float32 or better: bf16
    keeps 8 bits of a time, too few to tell steps apart.
    """

    num_waves = 128
    slowest_period = 10000.0

    def __init__(self, hidden_size: int, scale: float = 1.0) -> None:
        super().__init__()
        self.scale = scale
        self.mlp = nn.Sequential(
            nn.Linear(2 * self.num_waves, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size)
        )

    @property
    def layers(self) -> tuple[nn.Linear, nn.Linear]:
        """The two linear layers of `mlp`."""
        return cast(nn.Linear, self.mlp[0]), cast(nn.Linear, self.mlp[2])

    def forward(self, t: Tensor) -> Tensor:
        with torch.autocast(device_type=t.device.type, enabled=False):
            wide = t if t.dtype == torch.float64 else t.float()
            steps = torch.arange(self.num_waves, device=t.device, dtype=wide.dtype) / self.num_waves
            phase = self.scale * wide[:, None] * torch.exp(-math.log(self.slowest_period) * steps)
            waves = torch.cat([phase.cos(), phase.sin()], dim=-1)
            return self.mlp(waves.to(self.layers[0].weight.dtype))


class GuidanceEmbedding(nn.Module):
    """Guidance [B] as a sum of embeddings [B, D]: of `1 - 1 / scale`, and of the least and the largest noise level."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.scale, self.least_noise, self.most_noise = (TimeEmbedding(hidden_size) for _ in range(3))

    @property
    def embedders(self) -> tuple[TimeEmbedding, TimeEmbedding, TimeEmbedding]:
        return self.scale, self.least_noise, self.most_noise

    def forward(self, scale: Tensor, low: Tensor, high: Tensor) -> Tensor:
        return cast(Tensor, self.scale(1 - 1 / scale) + self.least_noise(1 - high) + self.most_noise(1 - low))


class LabelEmbedding(nn.Module):
    """Class labels [B] -> [B, D]; the null class, where there is one, is the last row."""

    def __init__(self, num_rows: int, hidden_size: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(num_rows, hidden_size)

    def forward(self, labels: Tensor) -> Tensor:
        return self.embedding_table(labels)


def modulate(x: Tensor, shift: Tensor | None, scale: Tensor) -> Tensor:
    """adaLN: x [B, N, D], shift and scale [B, D]."""
    out = x * (1 + scale[:, None])
    return out if shift is None else out + shift[:, None]


def unit_size(values: Tensor, eps: float = 1e-4) -> Tensor:
    """Pixel norm of shifts and scales [B, D]: root mean square 1 over the channels (sCM, arXiv 2410.11081)."""
    return values * torch.rsqrt(values.square().mean(1, keepdim=True) + eps)


def make_norm(dim: int, use_rmsnorm: bool) -> nn.Module:
    return RMSNorm(dim) if use_rmsnorm else nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)


class Modulation(nn.Sequential):
    """adaLN's shifts, scales and gates from the condition, c [B, D] -> [B, k D]; outside autocast.

    It is a product per sample, not per token, so float32 costs nothing, and a gate of 8 bits would round every token.
    """

    def __init__(self, hidden_size: int, parts: int) -> None:
        super().__init__(nn.SiLU(), nn.Linear(hidden_size, parts * hidden_size))

    def forward(self, c: Tensor) -> Tensor:
        with torch.autocast(device_type=c.device.type, enabled=False):
            return cast(Tensor, super().forward(c.to(cast(nn.Linear, self[1]).weight.dtype)))


class Block(nn.Module):
    """Attention and feed-forward, each modulated and gated by the condition (adaLN, arXiv 2212.09748).

    `reads`: which of the carried conditions.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        mlp_ratio: float,
        use_qknorm: bool,
        use_swiglu: bool,
        use_rmsnorm: bool,
        wo_shift: bool,
        pixel_norm: bool = False,
        reads: int = 0,
    ) -> None:
        super().__init__()
        self.reads = reads
        hidden = int(hidden_size * mlp_ratio)
        self.wo_shift, self.pixel_norm = wo_shift, pixel_norm
        self.norm1 = make_norm(hidden_size, use_rmsnorm)
        self.attn = Attention(hidden_size, num_heads, use_qknorm, use_rmsnorm)
        self.norm2 = make_norm(hidden_size, use_rmsnorm)
        self.mlp = SwiGLU(hidden_size, int(2 / 3 * hidden)) if use_swiglu else FeedForward(hidden_size, hidden)
        self.adaLN_modulation = Modulation(hidden_size, 4 if wo_shift else 6)

    def forward(self, tokens: Tensor, context: StageContext) -> Tensor:
        modulation = self.adaLN_modulation(context.carried[self.reads])
        shift1: Tensor | None = None
        shift2: Tensor | None = None
        if self.wo_shift:
            scale1, gate1, scale2, gate2 = modulation.chunk(4, dim=1)
        else:
            shift1, scale1, gate1, shift2, scale2, gate2 = modulation.chunk(6, dim=1)
        if self.pixel_norm:
            scale1, scale2 = unit_size(scale1), unit_size(scale2)
            shift1, shift2 = (None if shift is None else unit_size(shift) for shift in (shift1, shift2))
        rope = (context.fixed[0], context.fixed[1]) if context.fixed else None
        tokens = tokens + gate1[:, None] * self.attn(modulate(self.norm1(tokens), shift1, scale1), rope)
        return tokens + gate2[:, None] * self.mlp(modulate(self.norm2(tokens), shift2, scale2))


class FinalLayer(nn.Module):
    """Modulated norm and projection to patches: [B, N, D] -> [B, N, p p C]; `reads` as in `Block`."""

    def __init__(self, hidden_size: int, out_features: int, use_rmsnorm: bool, reads: int = 0) -> None:
        super().__init__()
        self.reads = reads
        self.norm_final = make_norm(hidden_size, use_rmsnorm)
        self.linear = nn.Linear(hidden_size, out_features)
        self.adaLN_modulation = Modulation(hidden_size, 2)

    def forward(self, tokens: Tensor, context: StageContext) -> Tensor:
        shift, scale = self.adaLN_modulation(context.carried[self.reads]).chunk(2, dim=1)
        return self.linear(modulate(self.norm_final(tokens), shift, scale))


def sincos_positions(dim: int, side: int) -> Tensor:
    """Fixed sine-cosine table [side * side, dim] (DiT): first half of the channels from column, second from row."""
    rates = 10000.0 ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim / 4))
    line = torch.arange(side, dtype=torch.float64)[:, None] * rates  # [side, dim / 4]
    waves = torch.cat([line.sin(), line.cos()], dim=1)  # [side, dim / 2]
    columns = waves[None].expand(side, -1, -1)
    rows = waves[:, None].expand(-1, side, -1)
    return torch.cat([columns, rows], dim=-1).flatten(0, 1).float()
