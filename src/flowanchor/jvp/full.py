"""The reference engine: one forward-mode pass over the whole network, with its graph kept."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from flowanchor.errors import ConfigError
from flowanchor.interfaces import Answer, Backbone, Question
from flowanchor.jvp.attention import AttentionTangent, intercept, resolve
from flowanchor.jvp.compiled import eager_forwards
from flowanchor.jvp.dual import Directions, one_by_one
from flowanchor.jvp.stages import ask, is_sharded


class Full:
    """`torch.func.jvp` over the model, gradient carried through the primal (what FACM's authors do).

    Exact and simple, and dear in memory: every activation is kept twice, and checkpointing is impossible.

    Args:
        attention: how attention's tangent is computed (`flowanchor.jvp.attention`): a name or an object. Fused
            attention has no forward-mode rule, so the reference is the plain formula, "math".
        checkpoint: only false is possible; here for a clear refusal.
    """

    def __init__(self, attention: str | AttentionTangent = "math", checkpoint: bool = False) -> None:
        if checkpoint:
            raise ConfigError(
                "jvp=full cannot be checkpointed (forward-mode AD does not pass through a checkpoint with gradient): "
                "choose jvp=chain, which keeps one input per block."
            )
        self.attention = resolve(attention)

    def __repr__(self) -> str:
        return f"Full(attention={self.attention!r})"

    def check_run(self, backbone: Backbone, *, sharded: bool, low_precision: bool) -> None:
        """Raise `ConfigError` where it cannot train (`flowanchor.jvp.compatibility`)."""
        if sharded and TORCH < (2, 13):
            raise ConfigError(
                f"jvp=full does not pass through a sharded network before torch 2.13, and this is {torch.__version__}: "
                "choose jvp=chain."
            )

    def __call__(self, backbone: Backbone, x: Tensor, cond: Any, questions: Sequence[Question]) -> list[Answer]:
        return one_by_one(self._dual, backbone, x, cond, questions)

    def _dual(self, backbone: Backbone, inputs: Directions) -> Answer:
        x, t, cond, tangent_x, tangent_t, r, tangent_r = inputs
        inputs.check()
        self.check_run(backbone, sharded=is_sharded(backbone) and torch.is_grad_enabled(), low_precision=False)
        primals, tangents = [x, t], [tangent_x, tangent_t]
        if tangent_r is not None:
            primals.append(cast(Tensor, r))
            tangents.append(tangent_r)

        def predict(x: Tensor, t: Tensor, *moving_r: Tensor) -> Tensor:
            with intercept(self.attention):
                return ask(backbone, x, t, cond, moving_r[0] if moving_r else r)

        with eager_forwards():
            out = torch.func.jvp(predict, tuple(primals), tuple(tangents))
        prediction, tangent = cast(tuple[Tensor, Tensor], out)  # typed as two or three values: three with has_aux
        return Answer(prediction, tangent.detach())


TORCH = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
