"""The contract of an attention tangent, and what all of them check."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from flowanchor.errors import ConfigError


class AttentionTangent(ABC):
    """Attention's output together with its tangent.

    With `S = q k^T scale`, `P = softmax(S)` and `O = P v`:

        dS = (dq k^T + q dk^T) scale        dP = P * (dS - rowsum(P * dS))        dO = dP v + P dv

    A tangent that is None is zero, and nothing is computed for it.
    """

    @abstractmethod
    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        dq: Tensor | None,
        dk: Tensor | None,
        dv: Tensor | None,
        scale: float | None = None,
    ) -> tuple[Tensor, Tensor]:
        """q, dq [B, H, N_q, d], k, dk [B, H, N_kv, d], v, dv [B, H, N_kv, e] -> O, dO [B, H, N_q, e].

        `scale` is 1 / sqrt(d) where not given. Nothing carries gradient. Half-precision inputs are accumulated in
        float32, and O and dO have the dtype of v.
        """

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"


def check_shapes(q: Tensor, k: Tensor, v: Tensor, dq: Tensor | None, dk: Tensor | None, dv: Tensor | None) -> None:
    """Raise `ConfigError` where a tangent has another shape than its input, or the inputs do not belong together."""
    for name, value, tangent in (("q", q, dq), ("k", k, dk), ("v", v, dv)):
        if tangent is not None and tangent.shape != value.shape:
            raise ConfigError(
                f"Attention got {name} of shape {tuple(value.shape)} with a tangent of shape {tuple(tangent.shape)}: "
                "they must match."
            )
    if q.shape[-1] != k.shape[-1] or k.shape[-2] != v.shape[-2] or not q.shape[:2] == k.shape[:2] == v.shape[:2]:
        raise ConfigError(
            f"Attention got q, k, v of shapes {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}, which do not "
            "belong together: [B, heads, N_q, d], [B, heads, N_kv, d] and [B, heads, N_kv, e] are wanted."
        )


def wide(tensor: Tensor) -> Tensor:
    """Half precision becomes float32."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor
