"""A number that changes from step to step, where a captured step can see it."""

from __future__ import annotations

import torch
from torch import Tensor

from flowanchor.graphs.capture import CaptureError, capturing


class StepNumber:
    """`set` in `at_step`, before the step; `on(device)` in the step: a tensor without dimensions, written in place.

    It is float64, so that `1 - number` is rounded as Python rounds it; without dimensions it widens no other tensor. It
    is no buffer of a module, which precision=bf16-true would round.
    """

    def __init__(self, value: float) -> None:
        self.value = value
        self._tensor: Tensor | None = None

    def set(self, value: float) -> None:
        """Outside of the captured part."""
        self.value = value
        if self._tensor is not None:
            self._tensor.fill_(value)

    def on(self, device: torch.device) -> Tensor:
        """The number as a tensor [] on a device, always the same one."""
        if self._tensor is None or self._tensor.device != device:
            if capturing():
                raise CaptureError("A StepNumber is read for the first time while a step is captured.")
            dtype = torch.float32 if device.type == "mps" else torch.float64
            self._tensor = torch.full((), self.value, dtype=dtype, device=device)
        return self._tensor
