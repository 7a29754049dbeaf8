"""How a tangent engine reaches attention: calls of `scaled_dot_product_attention` are answered with a dual number.

Fused attention has no forward-mode rule. A rule of one's own (an autograd Function with `jvp`) runs after the forward
and would compute the scores twice; here the call itself is caught, so value and tangent come from one pass, and no
layer has to be written for it.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from flowanchor.jvp.attention.base import AttentionTangent
from flowanchor.jvp.attention.math import Math, formula


def intercept(attention: AttentionTangent) -> AbstractContextManager[Any]:
    """A region in which attention of dual numbers is computed by `attention`; other calls are left alone.

    Under `no_grad` value and tangent come from `attention`. With gradient the value is an ordinary (fused) call, which
    carries the gradient, and the tangent is computed beside it. `Math` stands for PyTorch's own rules, operator by
    operator, for the plain formula (`formula`). So do calls with a mask, dropout, causality, grouped heads or inputs
    that are broadcast, whatever `attention` is.
    """
    return _Intercept(attention)


class _Intercept(TorchFunctionMode):
    def __init__(self, attention: AttentionTangent) -> None:
        super().__init__()
        self.attention = attention

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is functional.scaled_dot_product_attention:
            return _attend(self.attention, *args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _attend(
    attention: AttentionTangent,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    query, key, value = (autocast_of(tensor) for tensor in (query, key, value))
    (q, dq), (k, dk), (v, dv) = (forward_ad.unpack_dual(tensor) for tensor in (query, key, value))
    if dq is None and dk is None and dv is None:
        return functional.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    options = attn_mask is not None or dropout_p > 0 or is_causal or enable_gqa
    same_heads = query.ndim == key.ndim == value.ndim == 4 and query.shape[:2] == key.shape[:2] == value.shape[:2]
    if options or not same_heads or isinstance(attention, Math):
        return formula(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
    with torch.no_grad():
        out, tangent = attention(q, k, v, dq, dk, dv, scale)
    if torch.is_grad_enabled():
        out = functional.scaled_dot_product_attention(q, k, v, scale=scale)
    return forward_ad.make_dual(out, tangent)


def autocast_of(tensor: Tensor) -> Tensor:
    """What autocast would make of an input of attention, or of a linear layer."""
    kind = tensor.device.type
    low = torch.is_autocast_enabled(kind) and tensor.dtype != torch.float64
    return tensor.to(torch.get_autocast_dtype(kind)) if low else tensor
