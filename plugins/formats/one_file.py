"""One network in one safetensors file, as every program of flowanchor opens it."""

from __future__ import annotations

from pathlib import Path

from flowanchor.checkpoints.consolidated import SUFFIX, write_consolidated
from flowanchor.checkpoints.format import DescribedWeights, Format
from flowanchor.checkpoints.summary import count


class OneFile(Format):
    """A `.safetensors` file of flowanchor. It is a checkpoint, so no format is needed to read it."""

    name = "flowanchor"
    suffix = SUFFIX
    predictions = ("v", "x")

    def recognises(self, path: Path) -> bool:
        return False

    def write(self, given: DescribedWeights, output: Path) -> str:
        write_consolidated(output, given.weights, given.meta, given.ema)
        return count(given.weights)
