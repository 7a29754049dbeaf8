"""The tangent by central differences: no forward-mode AD at all."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call

from flowanchor.errors import ConfigError
from flowanchor.interfaces import Answer, Backbone, Question
from flowanchor.jvp.dual import Directions, one_by_one
from flowanchor.jvp.stages import ask, is_sharded
from flowanchor.jvp.surroundings import Surroundings
from flowanchor.jvp.two_pass import check_checkpointed, plain_forward

LOW = (torch.float16, torch.bfloat16)
STEPS = {torch.float32: 5e-3, torch.float64: 1e-5}


class FiniteDifference:
    """`(F(z + eps d) - F(z - eps d)) / 2 eps`, and an ordinary forward for the gradient.

    Not exact. The error is `eps^2 / 6` times the third derivative along `d`, plus the roundoff of `F` over `eps`: with
    the default steps 1e-5 relative in float32 and 1e-9 in float64 on small transformers (the tests assert ten times
    that). In bfloat16 the roundoff would be as large as the tangent, so it is refused; so is TF32 on a GPU.

    Args:
        eps: step, in units of the tangent; None: 5e-3 in float32, 1e-5 in float64.
        dtype: in which the differences are computed: torch.float32, or torch.float64 (a copy of the weights is made).
        checkpoint: run each block of the ordinary forward under activation checkpointing.
    """

    def __init__(
        self, eps: float | None = None, dtype: torch.dtype | str = torch.float32, checkpoint: bool = False
    ) -> None:
        chosen = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
        if chosen not in STEPS:
            raise ConfigError(f"jvp.dtype={dtype} cannot carry finite differences: choose float32 or float64.")
        if eps is not None and not eps > 0:
            raise ConfigError(f"jvp.eps={eps} must be a positive step, for instance jvp.eps=5e-3.")
        self.dtype: torch.dtype = chosen
        self.eps = STEPS[chosen] if eps is None else eps
        self.checkpoint = checkpoint

    def __repr__(self) -> str:
        return f"FiniteDifference(eps={self.eps:g}, dtype={self.dtype})"

    def __call__(self, backbone: Backbone, x: Tensor, cond: Any, questions: Sequence[Question]) -> list[Answer]:
        return one_by_one(self._dual, backbone, x, cond, questions)

    def _dual(self, backbone: Backbone, inputs: Directions) -> Answer:
        inputs.check()
        x = inputs.x
        kind = x.device.type
        autocast = torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) in LOW
        self.check_run(backbone, sharded=is_sharded(backbone), low_precision=autocast or x.dtype in LOW)
        if x.is_cuda:
            self.check_products(torch.get_float32_matmul_precision())
        before = Surroundings.here(x.device, others=True)
        tangent = self._difference(backbone, inputs, before)
        with before:
            return Answer(plain_forward(backbone, x, inputs.t, inputs.cond, inputs.r, self.checkpoint), tangent)

    def check_run(self, backbone: Backbone, *, sharded: bool, low_precision: bool) -> None:
        """Raise `ConfigError` where it cannot train (`flowanchor.jvp.compatibility`)."""
        if low_precision or any(p.dtype in LOW for p in backbone.parameters()):
            raise ConfigError(
                "jvp=finite_difference drowns in the roundoff of bfloat16 and float16: choose jvp=chain, or train with "
                "trainer.precision=32-true."
            )
        smoothing = getattr(backbone, "tangent_smoothing", 0.0)  # another module need not have it
        if smoothing > 0:
            raise ConfigError(
                f"backbone.tangent_smoothing={smoothing:g} is seen by forward-mode AD alone: choose "
                "jvp=chain, or set it to 0 and let jvp.eps do the smoothing of jvp=finite_difference."
            )
        if self.checkpoint:
            check_checkpointed(backbone)
        if sharded and self._needs_copy(backbone):
            raise ConfigError(
                f"jvp.dtype={self.dtype} needs a whole copy of the weights, and this network is sharded: set "
                "jvp.dtype=float32, or choose jvp=chain."
            )

    def check_products(self, precision: str) -> None:
        """Raise `ConfigError` where a GPU's float32 products have too few digits for differences (TF32, bfloat16)."""
        if self.dtype == torch.float32 and precision != "highest":
            raise ConfigError(
                f"jvp=finite_difference drowns in the roundoff of matmul_precision={precision} on a GPU: add "
                "matmul_precision=highest, or choose jvp=chain."
            )

    def _needs_copy(self, backbone: Backbone) -> bool:
        return any(p.dtype != self.dtype for p in backbone.parameters() if p.is_floating_point())

    def _difference(self, backbone: Backbone, inputs: Directions, before: Surroundings) -> Tensor:
        """Both ways with the random numbers that are drawn from the state `before`, which is forgotten if none are."""
        weights: dict[str, Tensor] = {}
        if self._needs_copy(backbone):
            held = dict(backbone.named_parameters()) | dict(backbone.named_buffers())
            weights = {name: v.detach().to(self.dtype) for name, v in held.items() if v.is_floating_point()}

        def at(step: float) -> Tensor:
            x = _moved(inputs.x, inputs.tangent_x, step, self.dtype)
            t = _moved(inputs.t, inputs.tangent_t, step, self.dtype)
            r = None if inputs.r is None else _moved(inputs.r, inputs.tangent_r, step, self.dtype)
            if weights:
                return functional_call(_Ask(backbone), _prefixed(weights), (x, t, inputs.cond, r))
            return ask(backbone, x, t, inputs.cond, r)

        with torch.no_grad(), _exact_convolutions(inputs.x):
            ahead = at(self.eps)
            before.forget_if_unused()
            with before:
                behind = at(-self.eps)
            return ((ahead - behind) / (2 * self.eps)).to(inputs.x.dtype)


@contextmanager
def _exact_convolutions(x: Tensor) -> Iterator[None]:
    """cuDNN convolves in TF32 unless it is told otherwise, whatever the precision of products is."""
    if not x.is_cuda:
        yield
        return
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def _moved(value: Tensor, tangent: Tensor | None, step: float, dtype: torch.dtype) -> Tensor:
    value = value.to(dtype)
    return value if tangent is None else value + step * tangent.to(dtype)


class _Ask(torch.nn.Module):
    """`ask` as a forward, for `functional_call`."""

    def __init__(self, backbone: torch.nn.Module) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, x: Tensor, t: Tensor, cond: Any, r: Tensor | None) -> Tensor:
        return ask(self.backbone, x, t, cond, r)


def _prefixed(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"backbone.{name}": value for name, value in weights.items()}
