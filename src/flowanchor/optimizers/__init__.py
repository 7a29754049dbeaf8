"""Optimizers that PyTorch has not (`optimizer=`)."""

from flowanchor.optimizers.adamw_8bit import AdamW8bit
from flowanchor.optimizers.adamw_bf16 import AdamWBF16

__all__ = ["AdamW8bit", "AdamWBF16"]
