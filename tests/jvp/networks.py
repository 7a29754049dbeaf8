"""Small networks for the tests of the engines."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from flowanchor.interfaces import Answer, Backbone, Question, StageContext
from flowanchor.plugins.backbones.lightningdit import LightningDiT


class CrossBlock(nn.Module):
    """Self-attention, cross-attention to text and a feed-forward, modulated by time; like a block of Wan."""

    def __init__(self, dim: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.modulation = nn.Parameter(torch.randn(1, 6, dim) / dim**0.5)
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(3))
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.q, self.kv, self.cross_out = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim), nn.Linear(dim, dim)
        self.ffn = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(approximate="tanh"), nn.Linear(2 * dim, dim))
        self.dropout = dropout

    def heads_of(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = functional.scaled_dot_product_attention(*map(self.heads_of, (q, k, v)))
        return out.transpose(1, 2).flatten(-2)

    def forward(self, tokens: Tensor, context: StageContext) -> Tensor:
        (c,), (text,) = context
        shift, scale, gate, shift2, scale2, gate2 = (self.modulation + c).unbind(1)
        x = self.norms[0](tokens) * (1 + scale[:, None]) + shift[:, None]
        tokens = tokens + gate[:, None] * self.out(self.attend(*self.qkv(x).chunk(3, -1)))
        crossed = self.attend(self.q(self.norms[1](tokens)), *self.kv(text).chunk(2, -1))
        tokens = tokens + self.cross_out(functional.dropout(crossed, self.dropout, self.training))
        x = self.norms[2](tokens) * (1 + scale2[:, None]) + shift2[:, None]
        return tokens + gate2[:, None] * self.ffn(x)


class CrossNet(Backbone):
    """Sequences [B, N, C] conditioned on text [B, L, T]; the projected text is part of the fixed context."""

    def __init__(self, dim: int = 16, heads: int = 2, depth: int = 2, channels: int = 3, dropout: float = 0.0) -> None:
        super().__init__()
        self.sample_shape = (6, channels)
        self.inward = nn.Linear(channels, dim)
        self.time = nn.Sequential(nn.Linear(1, dim), nn.SiLU(), nn.Linear(dim, 6 * dim))
        self.text = nn.Sequential(nn.Linear(5, dim), nn.GELU(), nn.Linear(dim, dim))
        self.blocks = nn.ModuleList(CrossBlock(dim, heads, dropout) for _ in range(depth))
        self.norm, self.outward = nn.LayerNorm(dim), nn.Linear(dim, channels)
        self.table = nn.Parameter(torch.randn(dim) / dim**0.5)

    def embed(self, x: Tensor, t: Tensor, cond: Tensor, r: Tensor | None = None) -> tuple[Tensor, StageContext]:
        c = self.time(t[:, None]).unflatten(-1, (6, -1))
        return self.inward(x), StageContext((c,), (self.text(cond),))

    def head(self, tokens: Tensor, context: StageContext) -> Tensor:
        return self.outward(self.norm(tokens) * (1 + self.table + context.carried[0][:, :1]))


def lightningdit(**switches) -> LightningDiT:
    """A LightningDiT whose every weight matters (a fresh one has zero gates and a zero head)."""
    settings = {"input_size": 4, "patch_size": 2, "in_channels": 3, "hidden_size": 16, "depth": 2}
    torch.manual_seed(0)
    network = LightningDiT(**{**settings, "num_heads": 2, "num_classes": 5, **switches})
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return network


RELEASED = {"use_qknorm": True, "use_swiglu": True, "use_rope": True, "use_rmsnorm": True}


def inputs(network: Backbone, batch: int = 3, dtype: torch.dtype = torch.float64) -> dict[str, Tensor | None]:
    """Inputs and tangents of an engine's call, as keywords."""
    draw = torch.Generator().manual_seed(1)
    x, dx = torch.randn(2, batch, *network.sample_shape, dtype=dtype, generator=draw)
    t = torch.rand(batch, dtype=dtype, generator=draw)
    cond = torch.arange(batch) % 5
    if isinstance(network, CrossNet):
        cond = torch.randn(batch, 4, 5, dtype=dtype, generator=draw)
    named = {"x": x, "t": t, "cond": cond, "tangent_x": dx, "tangent_t": torch.linspace(1.0, -2.0, batch, dtype=dtype)}
    if network.takes_end_time:
        named |= {"r": torch.ones_like(t), "tangent_r": torch.full_like(t, 0.3)}
    return named


def ask_one(engine, network, **given) -> Answer:
    """Prediction and tangent, of `inputs`."""
    return engine(network, given["x"], given["cond"], [question(**given)])[0]


def ask_both(engine, network, plain: Question, **given) -> tuple[Answer, Tensor]:
    """The same, and an ordinary prediction at the times of `plain`."""
    found, other = engine(network, given["x"], given["cond"], [question(**given), plain])
    return found, other.prediction


def question(t, tangent_x, tangent_t, r=None, tangent_r=None, **rest) -> Question:
    return Question(t, r, (tangent_x, tangent_t) if tangent_r is None else (tangent_x, tangent_t, tangent_r))
