"""Checks of what others write: `check_backbone(network)`, `check_objective(objective)`, and
`python -m flowanchor.testing backbone=NAME`."""

from flowanchor.testing.backbone import check_backbone, examine_backbone
from flowanchor.testing.objective import Answers, check_objective

__all__ = ["Answers", "check_backbone", "check_objective", "examine_backbone"]
