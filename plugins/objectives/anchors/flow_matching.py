"""The flow-matching anchor: mean squared error and direction of the instantaneous velocity."""

from __future__ import annotations

from typing import Literal

from torch import Tensor
from torch.nn import functional

from flowanchor.errors import ConfigError
from flowanchor.interfaces import Anchor, TermResult

CosineDims = Literal["auto", "channel", "sample", "off"]
Branch = Literal["anchor", "pretraining"]


class FlowMatchingAnchor(Anchor):
    """`mean((F - v)^2) + cosine_weight mean(1 - cos(F, v))`, no weight in time (FACM, arXiv 2507.03738).

    Args:
        cosine_weight: weight of the direction term.
        cosine: over which values the cosine is taken: `channel` (the paper), `sample` (all values of a sample), `off`,
            or `auto`: `channel`, and `sample` where there is one channel, since the cosine of two numbers is only
            a sign.
        branch: `anchor` (stage 2), or `pretraining` to train the interval's stage-1 condition (both halves when
            expanded).
    """

    def __init__(self, cosine_weight: float = 1.0, cosine: CosineDims = "auto", branch: Branch = "anchor") -> None:
        super().__init__()
        if cosine not in ("auto", "channel", "sample", "off"):
            raise ConfigError(f"objective.anchor.cosine={cosine} is unknown: choose auto, channel, sample or off.")
        if branch not in ("anchor", "pretraining"):
            raise ConfigError(f"objective.anchor.branch={branch} is unknown: choose anchor or pretraining.")
        self.cosine_weight = cosine_weight
        self.cosine = cosine
        self.branch = branch

    def loss(self, prediction: Tensor, velocity: Tensor, t: Tensor) -> TermResult:  # [B, C, *], [B, C, *], [B]
        mse = (prediction - velocity).square().flatten(1).mean(1)
        parts = {"mse": mse.detach()}
        loss = mse
        if self.cosine != "off" and self.cosine_weight != 0:
            direction = self._direction(prediction, velocity)
            parts["cosine"] = direction.detach()
            loss = mse + self.cosine_weight * direction
        return TermResult(loss, parts)

    def _direction(self, prediction: Tensor, velocity: Tensor) -> Tensor:
        over_sample = self.cosine == "sample" or (self.cosine == "auto" and prediction.shape[1] == 1)
        if over_sample:
            return 1 - functional.cosine_similarity(prediction.flatten(1), velocity.flatten(1), dim=1)
        return (1 - functional.cosine_similarity(prediction, velocity, dim=1)).flatten(1).mean(1)
