"""What a reference is: a set of images that generated ones are compared with."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator

from torch import Tensor

from flowanchor.metrics.frechet import Gaussian

Shape = tuple[int, int, int]  # C, H, W of the images that are evaluated


class Reference(ABC):
    """A named set of images, or statistics of one, or both.

    Attributes:
        name: what stands beside a score.
        digest: hash (hex) of the content, wherever it is stored.
        shape: of the images.
        n: number of images; None where there are statistics alone.
        gaussian, spatial: statistics of Inception's features that come with it.
    """

    name: str
    shape: Shape
    gaussian: Gaussian | None = None
    spatial: Gaussian | None = None

    @property
    @abstractmethod
    def digest(self) -> str: ...

    @property
    @abstractmethod
    def n(self) -> int | None: ...

    @abstractmethod
    def chunks(self, batch_size: int) -> Iterator[Tensor]:
        """The images, uint8 [b, C, H, W], in order; nothing where there are none."""
