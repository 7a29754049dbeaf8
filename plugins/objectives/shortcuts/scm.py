"""sCM: continuous-time consistency without an anchor, with its three stabilisers."""

from __future__ import annotations

import math
from typing import Literal

import torch

from flowanchor.base.broadcast import like
from flowanchor.errors import ConfigError
from flowanchor.interfaces import Ask, Point, Shortcut, StepNumber, TermResult


class SCMShortcut(Shortcut):
    """Moves `F(x_t, t)` along `-g`, `g = cos(pi t / 2) (sg(F) - (v + (1 - t) w dF/dt))`, normalised (arXiv 2410.11081).

    In the form of a straight flow. `w = min(1, step / warmup_steps)` warms the tangent up; `g` is divided by its norm
    plus `normalisation`; the error of `F - sg(F) + g` goes through the weight, learned in the paper
    (`objective/weight=log_variance`).

    rCM (arXiv 2510.08431) warms up another way. In TrigFlow's terms, `x = cos T x1 + sin T x0` and `G` the network,
    its gradient is `cos T sqrt(1 - w^2 sin^2 T) (G - dx/dT) + w (cos T sin T x + cos T sin T dG/dT)`; at w = 1 that is
    sCM's, at w = 0 a flow model's. In ours: with `n = sqrt(t^2 + (1 - t)^2)` TrigFlow's state is `x_t / n`, `cos T` is
    `t / n`, `sin T` is `(1 - t) / n`, and `dt/dT = -n^2`. That both networks mean the same data,
    `cos T x - sin T G = x_t + (1 - t) F`, gives `G = (2 t - 1) x_t / n - n F`, `dx/dT` being the same with v, hence
    `G - dx/dT = -n (F - v)` and `x + dG/dT = n ((2 t - 1) (F - v) + n^2 dF/dt)`. All of it divided by `-n t`:

        sqrt(1 - w^2 s^2) / n (F - v) - w (1 - t) ((2 t - 1) / n^2 (F - v) + dF/dt),   s = (1 - t) / n,

    which is `F - v - (1 - t) dF/dt` at w = 1 and `(F - v) / n` at w = 0.

    Args:
        warmup_steps: steps until the tangent counts wholly; 0: from the start.
        warmup: `tangent`: w multiplies the tangent alone; `rcm`: the formula above takes the place of
            `sg(F) - (v + (1 - t) w dF/dt)`.
        normalisation: what is added to the norm; null: no normalisation.
        norm: `l2`, that of the whole sample (as published, with the sum of squares as the error), or `rms`, its root
            mean square. The direction is the same; the addend bites where the root mean square of g is
            `normalisation`, or for l2 that divided by the root of the number of values.
        time_weight: whether `cos(pi t / 2)` multiplies `g`.
    """

    def __init__(
        self,
        warmup_steps: int = 10_000,
        normalisation: float | None = 0.1,
        time_weight: bool = True,
        norm: Literal["l2", "rms"] = "l2",
        warmup: Literal["tangent", "rcm"] = "tangent",
    ) -> None:
        super().__init__()
        if warmup not in ("tangent", "rcm"):
            raise ConfigError(f"objective.shortcut.warmup={warmup}: choose tangent or rcm.")
        self.warmup = warmup
        if norm not in ("l2", "rms"):
            raise ConfigError(f"objective.shortcut.norm={norm}: choose l2 or rms.")
        self.norm = norm
        self.warmup_steps, self.normalisation, self.time_weight = warmup_steps, normalisation, time_weight
        self.warmth = StepNumber(1.0)  # w
        self.at_step(0)

    def at_step(self, step: int) -> None:
        self.warmth.set(min(1.0, step / self.warmup_steps) if self.warmup_steps else 1.0)

    def loss(self, ask: Ask, point: Point) -> TermResult:
        x, t, r, v = point
        prediction, tangent = ask.along(v, x, t, r)
        fixed, warmth = prediction.detach(), self.warmth.on(t.device)
        if self.warmup == "tangent":
            g = fixed - (v + like(1 - t, x) * warmth * tangent)
        else:
            squared = t.square() + (1 - t).square()  # n^2
            turned = (1 - (warmth * (1 - t)).square() / squared).clamp(min=0)  # rounding may leave less at t = 0
            share = (turned / squared).sqrt() - warmth * (1 - t) * (2 * t - 1) / squared
            g = like(share, x) * (fixed - v) - like(warmth * (1 - t), x) * tangent
        if self.time_weight:
            g = like(torch.cos(t * (math.pi / 2)), x) * g
        if self.normalisation is not None:
            squares = g.flatten(1).square()
            norm = (squares.sum(1) if self.norm == "l2" else squares.mean(1)).sqrt()
            g = g / (like(norm, x) + self.normalisation)
        return self.weight.term(prediction - fixed + g, t, warmth=warmth.float())
