"""Checks of what others write: `check_backbone(network)`, and `python -m flowanchor.testing backbone=NAME`."""

from flowanchor.testing.backbone import check_backbone, examine_backbone

__all__ = ["check_backbone", "examine_backbone"]
