"""One fused Triton kernel for attention's output and its tangent, forward only."""

from __future__ import annotations

import importlib.util
import os

import torch
from torch import Tensor

from flowanchor.errors import ConfigError
from flowanchor.jvp.attention.base import AttentionTangent, check_shapes
from flowanchor.jvp.attention.tiles import CACHE, Card, Tile, choose

LARGEST_HEAD = 256
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# Of torch.set_float32_matmul_precision, what the kernel's products do under precision=auto.
PRECISIONS = {"highest": "ieee", "high": "tf32x3", "medium": "tf32"}


class Triton(AttentionTangent):
    """Scores stay on the chip: beside O and dO nothing of the size of the tokens is written.

    For head sizes up to 256, N_q != N_kv, bfloat16, float16 and float32, accumulated in float32. A head size that is no
    power of two is computed in two parts (72 = 64 + 8, the second padded to 16), not padded to the next power.

    Args:
        precision: of the products of float32 inputs. "ieee": float32 throughout, without tensor cores. "tf32x3": three
            products of tensor cores for one, nearly as exact. "tf32": one, 10 bits of mantissa. "auto": as
            `torch.set_float32_matmul_precision` says, which a run sets from `matmul_precision`: ieee for highest,
            tf32x3 for high, tf32 for medium.
        autotune: time a few tiles the first time that a head size, type and length is met on a card, and use the
            fastest; false: the tile of a table (`tiles`).
        cache_dir: where the tiles that were found are remembered, one file per kind of card.
    """

    def __init__(self, precision: str = "auto", autotune: bool = False, cache_dir: str = CACHE) -> None:
        if precision != "auto" and precision not in PRECISIONS.values():
            raise ConfigError(
                f"jvp.attention.precision={precision} is unknown: choose auto, {', '.join(PRECISIONS.values())}."
            )
        if not isinstance(autotune, bool):
            raise ConfigError(f"jvp.attention.autotune={autotune} is unknown: choose true or false.")
        self.precision, self.autotune, self.cache_dir = precision, autotune, cache_dir

    def __repr__(self) -> str:
        return f"Triton(precision={self.precision!r}, autotune={self.autotune})"

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

        scale = q.shape[-1] ** -0.5 if scale is None else scale
        precision = self._precision()

        def run(tile: Tile) -> tuple[Tensor, Tensor]:
            return attention_with_tangent(q, k, v, dq, dk, dv, scale, tile, precision)

        card = Card.of(q.device)
        if self.autotune and q.is_cuda and not torch.cuda.is_current_stream_capturing():
            from flowanchor.jvp.attention.tuning import tuned

            return run(tuned(card, q.shape[-1], q.dtype, precision, k.shape[2], run, self.cache_dir))
        return run(choose(q.shape[-1], q.dtype, card, precision))

    def _precision(self) -> str:
        return PRECISIONS[torch.get_float32_matmul_precision()] if self.precision == "auto" else self.precision

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
