"""Objective = interval + time distribution + optional anchor + optional shortcut + weights."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flowanchor.errors import ConfigError
from flowanchor.interfaces import (
    Anchor,
    Backbone,
    Batch,
    Interval,
    JointEngine,
    Objective,
    ObjectiveResult,
    Shortcut,
    TangentEngine,
    TermResult,
    TimeDistribution,
    Times,
    VelocityField,
    Weight,
)
from flowanchor.velocity import as_velocity


class ComposedObjective(Objective):
    """One `t` and one `x_t` per sample, shared by both terms; the loss is their weighted sum (FACM, arXiv 2507.03738).

    `anchor` alone is flow matching; `shortcut` alone is consistency training; both are FACM. For the first
    `anchor_warmup_steps` the anchor trains alone, as in stage 1: what a student needs that starts from a flow model
    which never saw the interval's other times (a released one).
    """

    def __init__(
        self,
        interval: Interval,
        time: TimeDistribution,
        anchor: Anchor | None = None,
        shortcut: Shortcut | None = None,
        anchor_weight: float = 1.0,
        shortcut_weight: float = 1.0,
        weight: Weight | None = None,
        anchor_warmup_steps: int = 0,
    ) -> None:
        super().__init__()
        # A config group `none` arrives as a dict: empty, or with the settings that others laid over it.
        anchor = None if isinstance(anchor, dict) else anchor
        shortcut = None if isinstance(shortcut, dict) else shortcut
        weight = None if isinstance(weight, dict) else weight
        if anchor is None and shortcut is None:
            raise ConfigError(
                "The objective has neither anchor nor shortcut: choose objective/anchor= or objective/shortcut=."
            )
        self.interval = interval
        self.time = time
        self.anchor = anchor
        self.shortcut = shortcut
        self.anchor_weight = anchor_weight
        self.shortcut_weight = shortcut_weight
        self.anchor_warmup_steps = anchor_warmup_steps
        self.warming = anchor_warmup_steps > 0  # whether the anchor trains alone at this step
        self.kind = "shortcut" if self.shortcut is not None else "flow"
        if self.shortcut is not None and weight is not None:
            self.shortcut.weight = weight
        self._weight_is_idle = self.shortcut is None and weight is not None

    def draw(self, size: int, device: torch.device | str | None = None) -> Times:
        first = self.time.sample(size, device)
        if self.shortcut is None or not self.shortcut.draws_end:
            return Times(first)
        second, coin = self.time.sample(size, device), torch.rand(size, device=device)
        return Times(*self.shortcut.times(first, second, coin, self.interval))

    def at_step(self, step: int) -> None:
        self.warming = step < self.anchor_warmup_steps
        if self.shortcut is not None:
            self.shortcut.at_step(step)

    @property
    def phase(self) -> Hashable:
        return "warming" if self.warming else None if self.shortcut is None else self.shortcut.phase

    @property
    def asks_elsewhere(self) -> bool:
        return self.shortcut is not None and type(self.shortcut).ahead is not Shortcut.ahead

    def forward(
        self,
        student: Backbone,
        batch: Batch,
        velocity: VelocityField,
        engine: TangentEngine,
        noise: Tensor | None = None,
        t: Tensor | None = None,
        end: Tensor | None = None,
    ) -> ObjectiveResult:
        x1, cond = batch
        noise = torch.randn_like(x1) if noise is None else noise
        if t is None:
            t, end = self.draw(x1.shape[0], x1.device)
        if student.training:
            cond = student.conditioning.dropped(cond)  # once: every branch must see the same labels
        times = t.view(-1, *[1] * (x1.ndim - 1))
        x_t = ((1 - times) * noise + times * x1).to(x1.dtype)  # times are float32 also where samples are bfloat16
        flow = x1 - noise
        v = as_velocity(velocity(x_t, t, cond, flow, student, self.interval), x1, velocity)

        if end is None and self.shortcut is not None:
            end = self.shortcut.end(t)
        anchored, answer = self._ask(student, engine, x_t, t, end, cond, v)
        for given in (anchored, *(answer or ())[:2]):
            if given is not None:
                as_velocity(given, x1, student)
        losses: dict[str, Tensor] = {}
        diagnostics: dict[str, Tensor] = {}
        if self.anchor is not None and anchored is not None:
            term = self.anchor.loss(at_least_float32(anchored), at_least_float32(v), t)
            losses["anchor"] = self.anchor_weight * self._collect("anchor", term, diagnostics)
        prediction = tangent = None
        if self.shortcut is not None and answer is not None:
            prediction, second = at_least_float32(answer.prediction), at_least_float32(answer.second)
            if answer.discrete:
                term = self.shortcut.discrete_loss(prediction, second, at_least_float32(v), t)  # type: ignore[operator]
            else:
                tangent = second
                term = self.shortcut.loss(prediction, tangent, at_least_float32(v), t, end)
                diagnostics["tangent_norm"] = tangent.flatten(1).norm(dim=1).mean()
            losses["shortcut"] = self.shortcut_weight * self._collect("shortcut", term, diagnostics)
        return ObjectiveResult(
            loss=torch.stack(list(losses.values())).sum(),
            terms={name: loss.detach() for name, loss in losses.items()},
            diagnostics=diagnostics,
            velocity=v,
            prediction=None if prediction is None else prediction.detach(),
            tangent=tangent,
        )

    def _ask(
        self,
        student: Backbone,
        engine: TangentEngine,
        x_t: Tensor,
        t: Tensor,
        end: Tensor | None,
        cond: Any,
        v: Tensor,
    ) -> tuple[Tensor | None, _Answer | None]:
        """The anchor's prediction; the shortcut's, with its tangent or, at some steps, another opinion of the network.

        Both terms ask the network about the same `x_t`, so an engine that can asks in one walk: a sharded network is
        then gathered, and its gradient reduced, once for both.
        """
        plain = None
        warming = self.warming
        if self.anchor is not None:
            pretraining = self.anchor.branch == "pretraining" or warming
            plain = self.interval.pretraining(t) if pretraining else self.interval.anchor(t)
        if self.shortcut is None or warming:
            assert plain is not None
            return student.predict(x_t, plain.t, cond, plain.r), None
        told = self.interval.shortcut(t, end)
        later = None if end is None else self.shortcut.ahead(t, end)
        if later is not None:
            assert end is not None
            anchored = None if plain is None else student.predict(x_t, plain.t, cond, plain.r)
            prediction = student.predict(x_t, told.t, cond, told.r)
            with torch.no_grad():
                there = self.interval.shortcut(later, end)
                x_later = (x_t + (later - t).view(-1, *[1] * (x_t.ndim - 1)) * v).to(x_t.dtype)
                opinion = student.predict(x_later, there.t, cond, there.r)
            return anchored, _Answer(prediction, opinion, discrete=True)
        along = v
        if self.shortcut.direction == "own":
            with torch.no_grad():
                own = self.interval.anchor(t)
                along = as_velocity(student.predict(x_t, own.t, cond, own.r), x_t, student).to(v.dtype)
        ones = torch.ones_like(t)
        if plain is not None and isinstance(engine, JointEngine):
            dual, anchored = engine.joint(student, x_t, told.t, cond, along, ones, plain, told.r)
        else:
            anchored = None if plain is None else student.predict(x_t, plain.t, cond, plain.r)
            dual = engine(student, x_t, told.t, cond, along, ones, told.r)
        return anchored, _Answer(dual.prediction, dual.tangent)

    @staticmethod
    def _collect(name: str, term: TermResult, diagnostics: dict[str, Tensor]) -> Tensor:
        """Batch mean of a term; its parts and diagnostics go to the log under the term's name."""
        diagnostics.update({f"{name}_{part}": value.mean() for part, value in term.parts.items()})
        diagnostics.update({f"{name}_{key}": value for key, value in term.diagnostics.items()})
        return term.loss.mean()

    def check(self, backbone: Backbone) -> None:
        super().check(backbone)
        if self.shortcut is not None:
            self.shortcut.check(self.interval)
        if self._weight_is_idle:
            raise ConfigError(
                "objective/weight= weighs the shortcut's error, and this objective has no shortcut: leave it out, or "
                "add a shortcut."
            )
        if self.anchor is None and self.anchor_weight != 1.0 or self.shortcut is None and self.shortcut_weight != 1.0:
            raise ConfigError(
                "A weight is set for a term that the objective does not have: remove the weight or add the term."
            )
        if self.anchor_warmup_steps and self.anchor is None:
            raise ConfigError("objective.anchor_warmup_steps needs an anchor: add objective/anchor=flow_matching.")


class _Answer(NamedTuple):
    """The shortcut's prediction, and its tangent or (`discrete`) the network's opinion elsewhere, without gradient."""

    prediction: Tensor
    second: Tensor
    discrete: bool = False


def at_least_float32(value: Tensor) -> Tensor:
    """Losses are computed in float32 or better, whatever autocast made of the prediction."""
    return value.float() if value.dtype in (torch.float16, torch.bfloat16) else value
