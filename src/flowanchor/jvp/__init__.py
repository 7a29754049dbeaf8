"""Tangent engines: a network's prediction together with its Jacobian-vector product (`jvp=`).

Nothing here imports Lightning or Hydra.
"""

from flowanchor.jvp.full import Full

__all__ = ["Full"]
