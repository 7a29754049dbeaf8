"""Scikit-learn's handwritten digits: 1,797 gray images of 8 x 8 pixels, installed with the library."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from sklearn.datasets import load_digits

from flowanchor.data.base import FlowDataModule
from flowanchor.data.images import ArrayImages, ImageSet, split_heldout
from flowanchor.errors import ConfigError

HELDOUT_PER_CLASS = 50


class DigitsDataModule(FlowDataModule):
    """Digits 0 to 9: 1,297 for training, 500 held out (50 of each class), always the same split.

    The grey levels 0..16 become 0..255 and then [-1, 1]. `num_classes=0` trains without labels.
    Source: UCI ML hand-written digits (Alpaydin & Kaynak), test part, as in `sklearn.datasets.load_digits`.
    """

    name = "digits"

    def __init__(self, channels: int = 1, size: int = 8, num_classes: int = 10, **loader: Any) -> None:
        super().__init__(**loader)
        if (channels, size) != (1, 8) or num_classes not in (0, 10):
            raise ConfigError(
                f"data=digits has 1 channel, size 8 and 10 classes, not {channels}, {size} and {num_classes}: use "
                "data.channels=1 data.size=8 data.num_classes=10 (or data.num_classes=0 to train without labels)."
            )
        self.channels, self.size, self.num_classes = channels, size, num_classes
        self.class_names = tuple(str(digit) for digit in range(10))

    def load(self) -> dict[str, ImageSet]:
        digits = load_digits()
        levels = torch.from_numpy(digits.images).unsqueeze(1)  # [N, 1, 8, 8], 0..16
        labels = np.asarray(digits.target, dtype=np.int64)
        everything = (levels * (255 / 16)).round().to(torch.uint8)
        train, heldout = split_heldout(labels, len(labels), HELDOUT_PER_CLASS, seed=0)
        return {
            "train": ArrayImages(everything[train], labels[train]),
            "heldout": ArrayImages(everything[heldout], labels[heldout]),
        }
