"""The reference engine: one forward-mode pass over the whole network, with its graph kept."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from flowanchor.errors import ConfigError
from flowanchor.interfaces import Backbone, Dual


class Full:
    """`torch.func.jvp` over the model, gradient carried through the primal (what FACM's authors do).

    Exact and simple, and dear in memory: every activation is kept twice, and checkpointing is impossible. Fused
    attention has no forward-mode rule, so attention runs on the math backend inside the pass.
    """

    def __call__(
        self,
        backbone: Backbone,
        x: Tensor,
        t: Tensor,
        cond: Any,
        tangent_x: Tensor,
        tangent_t: Tensor,
        r: Tensor | None = None,
        tangent_r: Tensor | None = None,
    ) -> Dual:
        primals, tangents = [x, t], [tangent_x, tangent_t]
        if tangent_r is not None:
            if r is None:
                raise ConfigError("A tangent of r was given without r: pass r, or leave tangent_r out.")
            primals.append(r)
            tangents.append(tangent_r)
        for primal, tangent in zip(primals, tangents, strict=True):
            if primal.shape != tangent.shape:
                raise ConfigError(
                    f"A tangent of shape {tuple(tangent.shape)} was given for an input of shape "
                    f"{tuple(primal.shape)}: they must match."
                )

        def predict(x: Tensor, t: Tensor, *moving_r: Tensor) -> Tensor:
            return backbone.predict(x, t, cond, moving_r[0] if moving_r else r)

        with sdpa_kernel(SDPBackend.MATH):
            out = torch.func.jvp(predict, tuple(primals), tuple(tangents))
        prediction, tangent = cast(tuple[Tensor, Tensor], out)  # typed as two or three values: three with has_aux
        return Dual(prediction, tangent.detach())
