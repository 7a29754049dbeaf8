"""No weight: the squared error as it is."""

from __future__ import annotations

from flowanchor.interfaces import Weight


class NoWeight(Weight):
    """The error itself: the mean squared difference, or with `reduction: sum` their sum."""
