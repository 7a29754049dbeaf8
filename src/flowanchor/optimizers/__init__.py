"""Optimizers that PyTorch has not (`optimizer=`)."""

from flowanchor.optimizers.adamw_bf16 import AdamWBF16

__all__ = ["AdamWBF16"]
