"""A network of the shape of Wan's 14B video transformer, for the memory plan: right in its sizes, not in its key names.

Per block: self-attention with QK-norm and rotary positions, cross-attention to text, feed-forward; modulated by time.
Wan keeps its residual stream, norms and modulation in float32 under autocast, and so does this.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from flowanchor.interfaces import Backbone, StageContext
from flowanchor.plugins.backbones.lightningdit_layers import RMSNorm, rotate

PATCH = (1, 2, 2)


class Norm(nn.Module):
    """LayerNorm in float32."""

    def __init__(self, dim: int, affine: bool = False, eps: float = 1e-6) -> None:
        super().__init__()
        self.shape, self.eps = (dim,), eps
        self.weight = nn.Parameter(torch.empty(dim)) if affine else None
        self.bias = nn.Parameter(torch.empty(dim)) if affine else None

    def forward(self, x: Tensor) -> Tensor:
        out = functional.layer_norm(x.float(), self.shape, eps=self.eps)
        return (out if self.weight is None or self.bias is None else out * self.weight + self.bias).type_as(x)


class Attention(nn.Module):
    """Attention of x [B, N, D] to itself, or to a text [B, L, D]."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim) for _ in range(4))
        self.norm_q, self.norm_k = RMSNorm(dim), RMSNorm(dim)

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def forward(self, x: Tensor, text: Tensor | None = None, rope: tuple[Tensor, Tensor] | None = None) -> Tensor:
        source = x if text is None else text
        q, k = self._heads(self.norm_q(self.q(x))), self._heads(self.norm_k(self.k(source)))
        v = self._heads(self.v(source))
        if rope is not None:
            q, k = rotate(q, *rope), rotate(k, *rope)
        out = functional.scaled_dot_product_attention(q.type_as(v), k.type_as(v), v)
        return self.o(out.transpose(1, 2).flatten(-2))


class Block(nn.Module):
    """Self-attention, cross-attention, feed-forward."""

    def __init__(self, dim: int, heads: int, ffn: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = Norm(dim), Norm(dim)
        self.norm3 = Norm(dim, affine=True)
        self.self_attn, self.cross_attn = Attention(dim, heads), Attention(dim, heads)
        self.ffn = nn.Sequential(nn.Linear(dim, ffn), nn.GELU(approximate="tanh"), nn.Linear(ffn, dim))
        self.modulation = nn.Parameter(torch.empty(1, 6, dim))

    def forward(self, tokens: Tensor, context: StageContext) -> Tensor:
        (c, _), (text, cos, sin) = context  # [B, 6, D]; [B, L, D], [N, head size] twice
        shift, scale, gate, shift2, scale2, gate2 = (self.modulation.float() + c).unsqueeze(2).unbind(1)
        tokens = tokens + gate * self.self_attn(self.norm1(tokens) * (1 + scale) + shift, rope=(cos, sin))
        tokens = tokens + self.cross_attn(self.norm3(tokens), text)
        return tokens + gate2 * self.ffn(self.norm2(tokens) * (1 + scale2) + shift2)


class Head(nn.Module):
    """Modulated norm and projection to patches."""

    def __init__(self, dim: int, out: int) -> None:
        super().__init__()
        self.norm, self.linear = Norm(dim), nn.Linear(dim, out)
        self.modulation = nn.Parameter(torch.empty(1, 2, dim))

    def forward(self, tokens: Tensor, c: Tensor) -> Tensor:
        shift, scale = (self.modulation.float() + c[:, None]).unbind(1)
        return self.linear(self.norm(tokens) * (1 + scale[:, None]) + shift[:, None])


class Time(nn.Module):
    """A time [B] -> its embedding [B, D] and the modulation of all blocks [B, 6, D], in float32."""

    def __init__(self, dim: int, waves: int = 256) -> None:
        super().__init__()
        self.waves = waves
        self.embedding = nn.Sequential(nn.Linear(waves, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.projection = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))

    def forward(self, t: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast(t.device.type, enabled=False):
            rates = torch.logspace(0, -4, self.waves // 2, device=t.device)
            phase = t.float()[:, None] * rates
            c = self.embedding(torch.cat([phase.cos(), phase.sin()], dim=-1))
            return c, self.projection(c).unflatten(1, (6, -1))


class WanLike(Backbone):
    """Velocity of videos [B, C, T, H, W] under a text [B, L, text_dim]; T x H/2 x W/2 tokens.

    It has shapes and no trained or drawn weights: build it on the meta device.
    """

    def __init__(
        self,
        sample_shape: tuple[int, int, int, int] = (16, 21, 60, 104),
        depth: int = 40,
        width: int = 5120,
        ffn: int = 13824,
        heads: int = 40,
        text_dim: int = 4096,
    ) -> None:
        super().__init__()
        channels, frames, height, breadth = sample_shape
        self.sample_shape = sample_shape
        self.grid = (frames, height // PATCH[1], breadth // PATCH[2])
        self.patches = nn.Conv3d(channels, width, PATCH, stride=PATCH)
        self.text = nn.Sequential(nn.Linear(text_dim, width), nn.GELU(approximate="tanh"), nn.Linear(width, width))
        self.time = Time(width)
        self.blocks = nn.ModuleList(Block(width, heads, ffn) for _ in range(depth))
        self.final = Head(width, channels * PATCH[0] * PATCH[1] * PATCH[2])
        tokens = self.grid[0] * self.grid[1] * self.grid[2]
        self.register_buffer("cos", torch.empty(tokens, width // heads), persistent=False)
        self.register_buffer("sin", torch.empty(tokens, width // heads), persistent=False)

    def float32_modules(self) -> list[nn.Module]:
        return [self.time]

    def embed(self, x: Tensor, t: Tensor, cond: Tensor, r: Tensor | None = None) -> tuple[Tensor, StageContext]:
        tokens = self.patches(x).flatten(2).transpose(1, 2).float()
        c, modulation = self.time(t)
        return tokens, StageContext((modulation, c), (self.text(cond), self.cos, self.sin))

    def head(self, tokens: Tensor, context: StageContext) -> Tensor:
        out = self.final(tokens, context.carried[1])  # [B, N, channels x patch]
        frames, rows, columns = self.grid
        out = out.unflatten(2, (self.sample_shape[0], *PATCH)).unflatten(1, self.grid)
        shape = (self.sample_shape[0], frames * PATCH[0], rows * PATCH[1], columns * PATCH[2])
        return out.permute(0, 4, 1, 5, 2, 6, 3, 7).reshape(len(tokens), *shape)

    def null_condition(self, cond: Any) -> Any:
        return torch.zeros_like(cond)
