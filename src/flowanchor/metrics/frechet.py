"""The Frechet distance of two Gaussians, by symmetric eigenvalue decompositions in float64."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Gaussian:
    """Mean [D] and covariance [D, D] of features, float64."""

    mean: Array
    covariance: Array

    def __post_init__(self) -> None:
        if self.mean.ndim != 1 or self.covariance.shape != (len(self.mean), len(self.mean)):
            raise ValueError(f"mean {self.mean.shape} and covariance {self.covariance.shape} do not fit")


def frechet_distance(first: Gaussian, second: Gaussian) -> float:
    """`|m1 - m2|^2 + tr(S1) + tr(S2) - 2 tr((S1 S2)^(1/2))` (arXiv 1706.08500, eq. 6).

    The last trace is the sum of the square roots of the eigenvalues of the symmetric `S1^(1/2) S2 S1^(1/2)`, which are
    the singular values of `S1^(1/2) S2^(1/2)`. Taken so, no root of a product is needed (it is not symmetric, and its
    eigenvalues can come out complex), and directions without variance, as all but N - 1 of few samples are, are exact
    zeros instead of square roots of rounding errors. Raises `ValueError` for features of different sizes.
    """
    if first.mean.shape != second.mean.shape:
        raise ValueError(f"features of different sizes: {len(first.mean)} and {len(second.mean)}")
    between = np.linalg.svd(_root(first.covariance).T @ _root(second.covariance), compute_uv=False).sum()
    difference = first.mean - second.mean
    return float(difference @ difference + np.trace(first.covariance) + np.trace(second.covariance) - 2 * between)


def _root(covariance: Array) -> Array:
    """`R` [D, rank] with `R R^T = covariance`; what rounding has left of zero eigenvalues is dropped."""
    values, vectors = np.linalg.eigh((covariance + covariance.T) / 2)
    kept = values > len(values) * np.finfo(np.float64).eps * max(values[-1], 0.0)
    root: Array = vectors[:, kept] * np.sqrt(values[kept])
    return root
