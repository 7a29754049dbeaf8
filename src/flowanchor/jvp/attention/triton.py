"""One fused Triton kernel for attention's output and its tangent, forward only."""

from __future__ import annotations

import importlib.util
import os

import torch
from torch import Tensor

from flowanchor.errors import ConfigError
from flowanchor.jvp.attention.base import AttentionTangent, check_shapes

LARGEST_HEAD = 256
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


class Triton(AttentionTangent):
    """Scores stay on the chip: beside O and dO nothing of the size of the tokens is written.

    For head sizes up to 256, N_q != N_kv, bfloat16, float16 and float32, accumulated in float32. A head size that is no
    power of two is computed in two parts (72 = 64 + 8, the second padded to 16), not padded to the next power.
    """

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
        check_shapes(q, k, v, dq, dk, dv)
        reason = self._refusal(q, k, v)
        if reason is not None:
            raise ConfigError(f"jvp/attention=triton {reason}: choose jvp/attention=streaming, or auto.")
        from flowanchor.jvp.attention.triton_kernel import attention_with_tangent

        return attention_with_tangent(q, k, v, dq, dk, dv, q.shape[-1] ** -0.5 if scale is None else scale)

    def can_run(self, q: Tensor, k: Tensor, v: Tensor) -> bool:
        """Whether these tensors are on a GPU and of a kind that the kernel takes."""
        return q.is_cuda and self._refusal(q, k, v) is None

    @staticmethod
    def _refusal(q: Tensor, k: Tensor, v: Tensor) -> str | None:
        if importlib.util.find_spec("triton") is None:
            return "needs the package triton, which is not installed"
        if not q.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
            return f"runs on a GPU, and these tensors are on {q.device.type}"
        if torch._C._functorch.maybe_current_level() is not None:
            return "cannot look into the tensors of torch.func.jvp (jvp=full)"
        if max(q.shape[-1], v.shape[-1]) > LARGEST_HEAD:
            return f"takes heads of up to {LARGEST_HEAD} channels, and these have {max(q.shape[-1], v.shape[-1])}"
        if q.shape[-1] != v.shape[-1]:
            return f"takes values as wide as keys, and these have {v.shape[-1]} and {k.shape[-1]} channels"
        if q.dtype not in DTYPES or not q.dtype == k.dtype == v.dtype:
            kinds = ", ".join(str(x.dtype).removeprefix("torch.") for x in (q, k, v))
            return f"takes q, k, v of one type (float32, bfloat16 or float16), and these are {kinds}"
        return None
