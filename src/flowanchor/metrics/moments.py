"""Mean and covariance of features that pass by, in float64."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from flowanchor.metrics.frechet import Array, Gaussian


class Moments:
    """Collects rows [B, D]; holds [D] + [D, D] numbers, however many rows there were.

    Sums of deviations from the mean so far are merged as by Chan, Golub and LeVeque (1979): nothing large is
    subtracted from something large, so that features far from zero lose no digits.
    """

    def __init__(self) -> None:
        self.n = 0
        self.mean: Array = np.zeros(0)
        self.scatter: Array = np.zeros((0, 0))  # sum of outer products of deviations

    def add(self, rows: np.ndarray) -> None:
        """Take in rows [B, D]."""
        values = np.asarray(rows, dtype=np.float64)
        if len(values):
            mean = values.mean(0)
            centred = values - mean
            self._merge(len(values), mean, centred.T @ centred)

    def merge(self, other: Moments) -> None:
        """Take in what another has collected."""
        if other.n:
            self._merge(other.n, other.mean, other.scatter)

    def gaussian(self) -> Gaussian:
        """Mean and unbiased covariance of the rows so far (at least two)."""
        if self.n < 2:
            raise ValueError(f"{self.n} rows have no covariance")
        return Gaussian(self.mean, self.scatter / (self.n - 1))

    def state(self) -> dict[str, np.ndarray]:
        """Everything collected, as arrays; `from_state` takes it back."""
        return {"n": np.array(self.n), "mean": self.mean, "scatter": self.scatter}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Moments:
        """What `state` gave."""
        found = cls()
        found.n, found.mean, found.scatter = int(state["n"]), np.array(state["mean"]), np.array(state["scatter"])
        return found

    def _merge(self, n: int, mean: Array, scatter: Array) -> None:
        if not self.n:
            self.n, self.mean, self.scatter = n, mean.copy(), scatter.copy()
            return
        total = self.n + n
        shift = mean - self.mean
        self.scatter += scatter
        self.scatter += np.outer(shift * (self.n * n / total), shift)
        self.mean += shift * (n / total)
        self.n = total
