"""Which classes of diffusers `make test` takes for a test that costs much; `make test-slow` takes them all."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest

# Two streams, two kinds of blocks, one kind, a mask that is looked at.
OF_EACH_KIND = ("SD3.5", "FLUX.1", "LTX-Video", "Z-Image")


def one_of_each_kind(names: Iterable[str]) -> list[Any]:
    """Parameters of a test."""
    return [name if name in OF_EACH_KIND else pytest.param(name, marks=pytest.mark.slow) for name in names]
