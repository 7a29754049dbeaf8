"""What is measured: one training step per engine, as a function that a fresh process can build from names and numbers.

Each builder returns a `Workload`; the builders' arguments are JSON, so that a process can be told which one to make.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from flowanchor.interfaces import Question, TangentEngine
from flowanchor.jvp import Chain, Full, TwoPass, compile_blocks, dual
from flowanchor.jvp.attention import AttentionTangent, resolve
from flowanchor.jvp.stages import stages
from flowanchor.plugins.backbones.lightningdit import LightningDiT

ENGINES: dict[str, Callable[[], TangentEngine]] = {
    "Full": Full,
    "Chain(recompute)": Chain,
    'Chain("selective")': lambda: Chain(recompute="selective"),
    "Chain(recompute=False)": lambda: Chain(recompute=False),
    "TwoPass(checkpoint)": lambda: TwoPass(checkpoint=True),
}
# LightningDiT with the switches of the released weights; 12 blocks, width 384, 16 x 16 tokens, 33 M parameters.
REFERENCE = {"input_size": 16, "patch_size": 1, "in_channels": 4, "hidden_size": 384, "depth": 12, "num_heads": 6}
RELEASED = {"use_qknorm": True, "use_swiglu": True, "use_rope": True, "use_rmsnorm": True}


@dataclass
class Workload:
    """A step, and the network whose gradients it makes."""

    step: Callable[[], Any]
    network: nn.Module | None = None

    def forget(self) -> None:
        """Drop the gradients, as an optimizer does between steps."""
        if self.network is not None:
            self.network.zero_grad(set_to_none=True)


def lightningdit(seed: int = 0, **size: Any) -> LightningDiT:
    """A LightningDiT that is not at its initialisation, where zero gates would make half of it idle."""
    torch.manual_seed(seed)
    network = LightningDiT(num_classes=10, **RELEASED, **{**REFERENCE, **size})
    for parameter in network.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.02)
    return network


def engine_step(
    engine: str, batch: int = 8, accumulate: bool = False, device: str = "cpu", bfloat16: bool = False, **size: Any
) -> Workload:
    """Prediction and tangent, and the gradient of a loss on the prediction.

    `accumulate`: the gradients exist already and are added to, as in a second micro-batch. `bfloat16`: under autocast.
    """
    with torch.device(device):
        network, ask = lightningdit(**size), ENGINES[engine]()
    x, v = torch.randn(2, batch, *network.sample_shape, device=device)
    t, labels = torch.rand(batch, device=device), torch.randint(0, 10, (batch,), device=device)

    def step() -> None:
        with torch.autocast(device, torch.bfloat16, enabled=bfloat16):
            (answer,) = ask(network, x, labels, [Question(t, along=(v, torch.ones_like(t)))])
        answer.prediction.float().square().mean().backward()

    if not accumulate:
        return Workload(step, network)
    for parameter in network.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    return Workload(step)


def dual_step(kind: str, batch: int = 2, bfloat16: bool = False, **size: Any) -> Workload:
    """Values and tangents through two blocks, nothing kept.

    `kind`: "compiled"; "eager"; "pytorch", which is eager with PyTorch's own rules for products and sums; or, of what
    the eager pass computes, "products" alone (of linear layers), or "floor", these and attention with its tangent.
    """
    network = lightningdit(**{"depth": 2, **size})
    x, v = torch.randn(2, batch, *network.sample_shape)
    t, labels = torch.rand(batch), torch.randint(0, 10, (batch,))
    embed, links = stages(network)
    if kind == "compiled":
        compile_blocks(network)
    rules = {} if kind == "pytorch" else dual._RULES

    def step(attention: AttentionTangent = resolve("auto")) -> None:  # noqa: B008
        with (
            torch.no_grad(),
            torch.autocast("cpu", torch.bfloat16, enabled=bfloat16),
            patch.object(dual, "_RULES", rules),
        ):
            moving = dual.embed_dual(embed, dual.Directions(x, t, labels, v, torch.ones_like(t)), attention)
            for link in links[:-1]:
                tokens, tangent = dual.stage_dual(link, moving, attention)
                moving = moving._replace(tokens=tokens, tokens_tangent=tangent)

    if kind not in ("products", "floor"):
        return Workload(step)
    calls: list[Callable[[], Any]] = []
    with _Products(calls) as products:
        step(_Attention(calls, products) if kind == "floor" else _Attention([], products))

    def again() -> None:
        with torch.no_grad():
            for call in calls:
                call()

    return Workload(again)


class _Products(TorchDispatchMode):
    """Collects the calls of matrix products, with what they were given."""

    KINDS = ("mm", "addmm", "linear", "bmm", "baddbmm")

    def __init__(self, calls: list[Callable[[], Any]]) -> None:
        super().__init__()
        self.calls, self.looks = calls, True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.looks and func.overloadpacket.__name__ in self.KINDS:
            self.calls.append(partial(func, *args, **(kwargs or {})))
        return func(*args, **(kwargs or {}))


class _Attention(AttentionTangent):
    """Collects the calls of attention with its tangent, whose products are its own."""

    def __init__(self, calls: list[Callable[[], Any]], products: _Products) -> None:
        self.calls, self.products, self.own = calls, products, resolve("auto")

    def __call__(self, *given: Any) -> tuple[Tensor, Tensor]:
        self.calls.append(partial(self.own, *given))
        self.products.looks = False
        try:
            return self.own(*given)
        finally:
            self.products.looks = True


def attention_step(
    kind: str,
    tokens: int = 4096,
    heads: int = 16,
    head_size: int = 72,
    batch: int = 1,
    device: str = "cpu",
    bfloat16: bool = False,
) -> Workload:
    """Attention's output and tangent, all inputs moving; `forward`: the output alone, by fused attention."""
    dtype = torch.bfloat16 if bfloat16 else torch.float32
    q, k, v, dq, dk, dv = torch.randn(6, batch, heads, tokens, head_size, device=device, dtype=dtype)

    def step() -> None:
        with torch.no_grad():
            if kind == "forward":
                functional.scaled_dot_product_attention(q, k, v)
            else:
                attention(q, k, v, dq, dk, dv)

    attention = resolve("math" if kind == "forward" else kind)
    return Workload(step)
