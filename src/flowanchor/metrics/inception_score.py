"""The inception score of predictions that pass by (arXiv 1606.03498)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from flowanchor.metrics.frechet import Array

SHUFFLE_SEED = 2020  # torch-fidelity's


def split_of_each(n: int, splits: int) -> np.ndarray:
    """Which of the splits each of n images belongs to, [N], a byte each: those that torch-fidelity draws."""
    order = np.random.RandomState(SHUFFLE_SEED).permutation(n)
    found = np.empty(n, dtype=np.min_scalar_type(splits))
    for split in range(splits):
        found[order[split * n // splits : (split + 1) * n // splits]] = split
    return found


class InceptionScore:
    """Per split: the sum of the predictions, and of their negative entropies.

    `exp(mean KL(p | q))` of a split needs no more, since `mean KL(p | q) = mean(sum p log p) - sum q log q`, where q is
    the mean prediction.
    """

    def __init__(self, splits: int) -> None:
        self.counts: Array = np.zeros(splits)
        self.negentropy: Array = np.zeros(splits)  # sum of p log p
        self.predictions: Array = np.zeros((splits, 0))  # sum of p [splits, K]

    def add(self, split: np.ndarray, logits: np.ndarray) -> None:
        """Take in logits [B, K] of images of these splits [B]."""
        shifted = np.asarray(logits, dtype=np.float64)
        shifted = shifted - shifted.max(1, keepdims=True)
        log_p = shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
        p = np.exp(log_p)
        if not self.predictions.size:
            self.predictions = np.zeros((len(self.counts), p.shape[1]))
        np.add.at(self.counts, split, 1)
        np.add.at(self.negentropy, split, (p * log_p).sum(1))
        np.add.at(self.predictions, split, p)

    def merge(self, other: InceptionScore) -> None:
        """Take in what another has collected."""
        if other.predictions.size:
            self.counts += other.counts
            self.negentropy += other.negentropy
            self.predictions = other.predictions + (self.predictions if self.predictions.size else 0)

    def score(self) -> tuple[float, float]:
        """Mean and standard deviation over the splits."""
        q = self.predictions / self.counts[:, None]
        q_log_q = np.where(q > 0, q * np.log(np.where(q > 0, q, 1)), 0).sum(1)
        scores = np.exp(self.negentropy / self.counts - q_log_q)
        return float(scores.mean()), float(scores.std())

    def state(self) -> dict[str, np.ndarray]:
        """Everything collected, as arrays; `from_state` takes it back."""
        return {"counts": self.counts, "negentropy": self.negentropy, "predictions": self.predictions}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> InceptionScore:
        """What `state` gave."""
        found = cls(len(state["counts"]))
        found.counts, found.negentropy, found.predictions = (
            np.array(state[name]) for name in ("counts", "negentropy", "predictions")
        )
        return found
