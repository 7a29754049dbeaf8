"""Tangent engines: a network's prediction together with its Jacobian-vector product (`jvp=`).

Nothing here imports Lightning or Hydra.
"""

from flowanchor.jvp.chain import Chain
from flowanchor.jvp.compiled import compile_blocks
from flowanchor.jvp.finite_difference import FiniteDifference
from flowanchor.jvp.full import Full
from flowanchor.jvp.two_pass import TwoPass

__all__ = ["Chain", "FiniteDifference", "Full", "TwoPass", "compile_blocks"]
