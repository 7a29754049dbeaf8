"""Objective = interval + time distribution + optional anchor + optional shortcut + weights."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from flowanchor.base.broadcast import like
from flowanchor.errors import ConfigError
from flowanchor.interfaces import (
    Anchor,
    Answer,
    Ask,
    Backbone,
    Batch,
    Interval,
    Objective,
    ObjectiveResult,
    Point,
    Question,
    Shortcut,
    TangentEngine,
    TermResult,
    TimeDistribution,
    Times,
    VelocityField,
    Weight,
)
from flowanchor.velocity import answerable, as_velocity, without_held


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
        # A config group `none` is null: a dict where others laid settings over it, or where an older run recorded it.
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
        if self.shortcut is None:
            return Times(self.time.sample(size, device))
        return self.shortcut.draw(self.time, self.interval, size, device)

    def at_step(self, step: int) -> None:
        self.warming = step < self.anchor_warmup_steps
        if self.shortcut is not None:
            self.shortcut.at_step(step)

    @property
    def phase(self) -> Hashable:
        return "warming" if self.warming else None if self.shortcut is None else self.shortcut.phase

    @property
    def asks_elsewhere(self) -> bool:
        return self.shortcut is not None and self.shortcut.asks_elsewhere

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
            # Once: every branch must see the same labels.
            if end is not None and self.shortcut is not None and self.shortcut.drops_instants:
                cond = student.conditioning.dropped(cond, t == end)
            else:
                cond = student.conditioning.dropped(cond)
        times = like(t, x1)
        x_t = ((1 - times) * noise + times * x1).to(x1.dtype)  # times are float32 also where samples are bfloat16
        flow = x1 - noise
        v = as_velocity(velocity(x_t, t, cond, flow, student, self.interval), x1, velocity)

        ask = _Asked(student, engine, self.interval, x_t, cond, self._anchor_question(t))
        if student.predicts == "x":
            v = answerable(at_least_float32(v), t, student, velocity)
        target = at_least_float32(v)
        losses: dict[str, Tensor] = {}
        diagnostics: dict[str, Tensor] = {}
        jump: TermResult | None = None
        if self.shortcut is not None and not self.warming:
            jump = self.shortcut.loss(ask, Point(x_t, t, torch.ones_like(t) if end is None else end, target))
        if self.anchor is not None:
            term = self.anchor.loss(ask.anchored(), target, t)
            losses["anchor"] = self.anchor_weight * self._collect("anchor", term, diagnostics)
        if jump is not None:
            if ask.tangent is not None:
                diagnostics["tangent_norm"] = ask.tangent.flatten(1).norm(dim=1).mean()
            losses["shortcut"] = self.shortcut_weight * self._collect("shortcut", jump, diagnostics)
        return ObjectiveResult(
            loss=torch.stack(list(losses.values())).sum(),
            terms={name: loss.detach() for name, loss in losses.items()},
            diagnostics=diagnostics,
            velocity=v,
            prediction=None if ask.prediction is None else ask.prediction.detach(),
            tangent=ask.tangent,
        )

    def _anchor_question(self, t: Tensor) -> Question | None:
        if self.anchor is None:
            return None
        pretraining = self.anchor.branch == "pretraining" or self.warming
        return self.interval.pretraining(t) if pretraining else self.interval.anchor(t)

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


class _Asked(Ask):
    """What the two terms ask the student, and what it answered.

    The anchor's question is about the same `x_t` as the shortcut's first one and goes to the engine with it: an engine
    that answers both in one walk gathers a sharded network, and reduces its gradient, once for both.
    """

    def __init__(
        self,
        student: Backbone,
        engine: TangentEngine,
        interval: Interval,
        x_t: Tensor,
        cond: Any,
        anchor: Question | None,
    ) -> None:
        self.student, self.engine, self.interval = student, engine, interval
        self.x_t, self.cond = x_t, cond
        self.prediction: Tensor | None = None  # of the shortcut's first question
        self.tangent: Tensor | None = None
        self._waiting = anchor
        self._anchored: Tensor | None = None
        self._with_gradient = torch.is_grad_enabled()

    def __call__(self, x: Tensor, t: Tensor, end: Tensor) -> Tensor:
        return self._answer(x, self.interval.shortcut(t, end)).prediction

    def along(self, velocity: Tensor, x: Tensor, t: Tensor, end: Tensor) -> tuple[Tensor, Tensor]:
        direction: tuple[Tensor, ...] = (velocity.to(self.x_t.dtype), torch.ones_like(t))
        if self.interval.end_rate:
            direction = (*direction, torch.full_like(t, self.interval.end_rate))
        prediction, tangent = self._answer(x, self.interval.shortcut(t, end)._replace(along=direction), t)
        assert tangent is not None
        return prediction, tangent

    @torch.no_grad()
    def fixed(self, x: Tensor, t: Tensor, end: Tensor) -> Tensor:
        return self._answers(x, [self.interval.shortcut(t, end)])[0].prediction

    def anchored(self) -> Tensor:
        """The answer [B, *] to the anchor's question."""
        if self._anchored is None:
            assert self._waiting is not None
            self._anchored = self._answers(self.x_t, [self._waiting])[0].prediction
        return self._anchored

    def _answer(self, x: Tensor, question: Question, t: Tensor | None = None) -> Answer:
        """`t` [B]: of the samples, where there is a tangent."""
        questions = [question]
        if self._waiting is not None and x is self.x_t and torch.is_grad_enabled() == self._with_gradient:
            questions, self._waiting = [self._waiting, question], None
        *anchored, answer = self._answers(x, questions)
        if anchored:
            self._anchored = anchored[0].prediction
        if t is not None and answer.tangent is not None:
            answer = answer._replace(tangent=without_held(answer.tangent, t, self.student))
        if self.prediction is None:
            self.prediction, self.tangent = answer
        return answer

    def _answers(self, x: Tensor, questions: Sequence[Question]) -> list[Answer]:
        answers = self.engine(self.student, x.to(self.x_t.dtype), self.cond, questions)
        for value in (value for answer in answers for value in answer if value is not None):
            as_velocity(value, self.x_t, self.student)
        return [
            Answer(at_least_float32(prediction), None if tangent is None else at_least_float32(tangent))
            for prediction, tangent in answers
        ]


def at_least_float32(value: Tensor) -> Tensor:
    """Losses are computed in float32 or better, whatever autocast made of the prediction."""
    return value.float() if value.dtype in (torch.float16, torch.bfloat16) else value
