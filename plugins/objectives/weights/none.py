"""No weight: the mean squared error as it is."""

from __future__ import annotations

from flowanchor.interfaces import Weight


class NoWeight(Weight):
    """The error itself."""
