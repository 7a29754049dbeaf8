"""Attention tangents (`jvp/attention=`): attention's output and its Jacobian-vector product in one forward-only pass.

Gradients come from recomputation with PyTorch's fused attention, so nothing here needs a backward.
"""

from flowanchor.jvp.attention.base import AttentionTangent
from flowanchor.jvp.attention.choice import Auto, resolve
from flowanchor.jvp.attention.intercept import intercept
from flowanchor.jvp.attention.math import Math
from flowanchor.jvp.attention.streaming import Streaming
from flowanchor.jvp.attention.triton import Triton

__all__ = ["AttentionTangent", "Auto", "Math", "Streaming", "Triton", "intercept", "resolve"]
