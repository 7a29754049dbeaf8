"""The contracts between the trunk and its plugins.

Conventions (FACM, arXiv 2507.03738): `t = 0` is noise and `t = 1` is data, `x_t = (1 - t) x0 + t x1` with
`x0 ~ N(0, I)`, and the velocity of the flow is `v = x1 - x0`. Shapes: `B` batch, `*` the sample's own dimensions
(`C, H, W` for an image), `N` tokens, `D` channels. Times are float32 tensors of shape [B].

Words: a *condition* (`cond`) is what a sample depicts: its label or text. An *interval* is the range of times that a
network is asked at, and says which *question* stands for which velocity. The *anchor* is the loss on instantaneous
velocities F(x_t, t, t), the *shortcut* the one on average velocities F(x_t, t, r) from t to a later *end* r. A
*tangent* is a derivative along a direction; an *engine* computes it beside the prediction.

Nothing in this file imports Lightning or Hydra: objectives, backbones, engines and samplers work in a plain PyTorch
script.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from flowanchor.conditioning import Conditioning, NoCondition
from flowanchor.deferred import StagedWeights
from flowanchor.drawing import Codec as Codec
from flowanchor.drawing import Kind as Kind
from flowanchor.drawing import Posterior as Posterior
from flowanchor.drawing import Sampler as Sampler
from flowanchor.errors import ConfigError
from flowanchor.graphs.step_number import StepNumber as StepNumber  # part of the contract of objectives
from flowanchor.guided import Guided as Guided

# ---------------------------------------------------------------------------------------------------------------- data


class Batch(NamedTuple):
    """What a data module yields: samples in the network's own space, and what they are conditioned on."""

    x1: Tensor  # [B, *], pixels in [-1, 1] or normalised latents
    cond: Any = None  # labels [B] (int64), a named tuple of text (`flowanchor.conditioning.Text`), or None


# ------------------------------------------------------------------------------------------------------------ backbone


class StageContext(NamedTuple):
    """What every stage of a backbone sees besides the tokens.

    `carried` depends on the time (or on x): it has a tangent, and gradient flows through it.
    `fixed` does not (text, masks, tables): no engine spends a tangent on it; it may still need gradient.
    """

    carried: tuple[Tensor, ...]
    fixed: tuple[Any, ...] = ()


class Backbone(StagedWeights, ABC):
    """A velocity network as a chain of stages: `embed`, then each of `blocks`, then `head`.

    That is all that tangent engines and sharding strategies need: they walk the stages, and no layer is rewritten.
    A stage must return a new tensor (never change its input in place). Where its weights come from: `StagedWeights`.
    """

    blocks: nn.ModuleList
    sample_shape: tuple[int, ...]  # shape of one sample, without the batch
    any_size: bool = False  # whether samples of other sizes, with the same channels, fit too
    size_steps: tuple[int, int] = (1, 1)  # of which height and width of such a size must be multiples
    conditioning: Conditioning  # what it is conditioned on beside the time; `NoCondition` unless a constructor sets it
    takes_end_time: bool = False  # whether it is told `r`
    end_time: str | None = None  # how, where an interval asks for one way: `Interval.end_time`
    predicts: Literal["v", "x"] = "v"  # "x": its head turns data into velocities (flowanchor.velocity.from_data)
    needs_span: bool = False  # whether `r` must be the span of the average: it is told no other time
    takes_guidance: bool = False  # whether a condition may be `Guided`, which saves a call with a null condition
    has_velocity_head: bool = False  # whether it also gives instantaneous velocities by layers of their own (`Guided`)
    tangent_smoothing: float = 0.0  # 0: what an engine says is the exact derivative (flowanchor.jvp.smoothing)
    adapters_on: bool = True  # whether `embed` begins an answer with adapters (`without_adapters`)

    def __init__(self) -> None:
        super().__init__()
        self.conditioning = NoCondition()

    @abstractmethod
    def embed(self, x: Tensor, t: Tensor, cond: Any, r: Tensor | None = None) -> tuple[Tensor, StageContext]:
        """[B, *], [B], condition, [B] -> tokens [B, N, D] (or the backbone's own layout) and the context."""

    @abstractmethod
    def head(self, tokens: Tensor, context: StageContext) -> Tensor:
        """Tokens -> velocity [B, *]."""

    def stage_modules(self) -> list[list[nn.Module]]:
        """The children that each stage calls, embed first and head last: what a sharding strategy makes its units of.

        Here: children registered before `blocks` belong to `embed`, those after it to `head`; override it where that
        is not so. A child's parameters must be used by calling the child, nothing else.
        """
        before: list[nn.Module] = []
        after: list[nn.Module] = []
        outer = before
        for child in self.children():
            if child is self.blocks:
                outer = after
            elif next(child.parameters(), None) is not None:
                outer.append(child)
        return [before, *([block] for block in self.blocks), after]

    def float32_modules(self) -> list[nn.Module]:
        """Modules whose parameters and arithmetic stay in float32 when the rest is bfloat16 (time, modulation)."""
        return []

    def whole_parameters(self) -> list[nn.Parameter]:
        """Small trained parameters that a sharding strategy leaves whole, as they are stored: those that must stay in
        float32 and belong to no module of their own."""
        return []

    def without_training_parts(self) -> tuple[set[str], dict[str, Any]]:
        """Names in the state dict of weights that only training asks, and the settings of this network without them.

        A file to draw from leaves them out, and a student may start from one that lacks them.
        """
        return set(), {}

    def meaning(self) -> dict[str, Any]:
        """Settings that say what its weights mean and that their shapes do not show, by their names under `backbone.`.

        A student starts from weights only where both networks agree on every setting that both name. A subclass adds
        its own: how many heads share a layer, what times are multiplied by. An empty name is the option's own.
        """
        return {"predicts": self.predicts}

    @contextmanager
    def without_adapters(self) -> Iterator[None]:
        """A region in which answers begin that are those of the frozen weights alone (`borrowed`), which know no `r`.

        `embed` notes `adapters_on` in the context and every later stage goes by that, on or off, whoever runs it and
        whenever: an engine may run a stage of the student again in the backward pass, inside such a region or not.
        """
        before, self.adapters_on = self.adapters_on, False
        try:
            yield
        finally:
            self.adapters_on = before

    def predict(self, x: Tensor, t: Tensor, cond: Any, r: Tensor | None = None) -> Tensor:
        """The loop over the stages: `F(x, t)` for exactly this condition, deterministic."""
        tokens, context = self.embed(x, t, cond, r)
        for block in self.blocks:
            tokens = block(tokens, context)
        return self.head(tokens, context)

    def forward(self, x: Tensor, t: Tensor, cond: Any, r: Tensor | None = None) -> Tensor:
        """`predict`, with condition dropout in training mode."""
        return self.predict(x, t, self.conditioning.dropped(cond) if self.training else cond, r)

    def at_times(self, t: Tensor | None) -> Hashable:
        """Told the times [B] of a training batch where the host has them, before it is asked about them, and None
        afterwards. Returns which of its computations they take, where that is a choice: the host need not wait for the
        device to make it, and a graph of the step is captured for each (`Objective.phase`)."""
        return None


# -------------------------------------------------------------------------------------------------------- tangents


class Question(NamedTuple):
    """What a network is asked about samples x [B, *]: its answer at these times and, where `along` is given, its
    derivative in that direction."""

    t: Tensor  # [B]
    r: Tensor | None = None  # [B], for networks with a second time embedder
    along: tuple[Tensor, ...] | None = None  # (dx [B, *], dt [B]), or (dx, dt, dr); without dr a given r is held

    def for_network(self, network: Backbone) -> Question:
        """The same for a network that embeds `r` and an interval that does not know it: `r = t`, an instant."""
        return self._replace(r=self.t) if network.takes_end_time and self.r is None else self


class Answer(NamedTuple):
    """A prediction and, where the question wanted it, its directional derivative."""

    prediction: Tensor  # [B, *], carries gradient to the network's parameters
    tangent: Tensor | None = None  # [B, *], never carries gradient


class TangentEngine(Protocol):
    """Answers questions about the same samples, in their order; in one walk over the network where it can."""

    def __call__(self, backbone: Backbone, x: Tensor, cond: Any, questions: Sequence[Question]) -> list[Answer]:
        """x [B, *], condition, questions -> an answer to each: `F(x, t, r)`, with its Jacobian-vector product along
        `along`."""
        ...


# ------------------------------------------------------------------------------------------- intervals and times


class Times(NamedTuple):
    """Training times of a batch: `t` [B] and, where they are drawn, the times at which averages end, [B]."""

    t: Tensor
    end: Tensor | None = None


class GuidedTimes(NamedTuple):
    """Training times of a batch, and the guidance that each sample's average velocity is learned under."""

    t: Tensor
    end: Tensor
    guidance: Tensor  # [B, 3]: `scale`, `low` and `high` of `Guided`


DrawnTimes = Times | GuidedTimes


class Interval(ABC):
    """At which times the network is asked as a shortcut, and at which as a flow model."""

    needs_end_time: bool = False  # whether the backbone must be told `r`
    end_time: str | None = None  # in which way (`Backbone.end_time`); None: in any
    tells_end: bool = False  # whether a shortcut may end anywhere; otherwise at 1, or at `t` itself where it separates
    end_rate: float = 0.0  # how fast what is told as `r` changes with `t` while the end of the average is held
    separates: bool = True  # whether shortcut and anchor are told different things

    @abstractmethod
    def shortcut(self, t: Tensor, end: Tensor | None = None) -> Question:
        """The average velocity from `t` to `end` (None: 1; `t` itself: the instantaneous one)."""

    @abstractmethod
    def anchor(self, t: Tensor) -> Question:
        """The instantaneous velocity at `t`."""

    def pretraining(self, t: Tensor) -> Question:
        """What a flow model is pretrained on so that a student can start from it (stage 1)."""
        return self.anchor(t)

    def check(self, backbone: Backbone) -> None:
        """Raise `ConfigError` if the backbone cannot be told the times of this interval."""
        name = type(backbone).__name__
        if self.end_time is not None and backbone.end_time != self.end_time:
            now = "not told the end of an average" if backbone.end_time is None else f"told it as {backbone.end_time}"
            raise ConfigError(
                f"objective/interval={self.end_time} is for a network that is told the end of an average in that way, "
                f"and this {name} is {now}: set backbone.end_time={self.end_time}, or choose another interval."
            )
        if self.needs_end_time and not backbone.takes_end_time:
            raise ConfigError(
                f"{type(self).__name__} tells the network a second time r, and this {name} has no embedder for it: add "
                "backbone.auxiliary_time_cond=true (of backbone=diffusers: backbone.end_time=auxiliary), or choose "
                "objective/interval=expanded."
            )
        if backbone.needs_span and self.end_rate != -1:
            raise ConfigError(
                f"{type(backbone).__name__} is told nothing of the times but how far the average reaches, which "
                f"{type(self).__name__} does not tell it in this form: choose objective/interval=span."
            )


class TimeDistribution(ABC):
    """How training times are drawn, as a map from a standard draw `z`, so that a test can supply `z`."""

    def draw(self, size: int, device: torch.device | str | None = None) -> Tensor:
        """Standard draws [size], float32 (normal unless a subclass says otherwise)."""
        return torch.randn(size, device=device)

    @abstractmethod
    def from_draw(self, z: Tensor) -> Tensor:
        """z [B] -> t [B] in [0, 1]."""

    def sample(self, size: int, device: torch.device | str | None = None) -> Tensor:
        """Training times [size] in [0, 1], float32."""
        return self.from_draw(self.draw(size, device))


Reduction = Literal["mean", "sum"]

# ------------------------------------------------------------------------------------------------------- objective


@dataclass(frozen=True)
class TermResult:
    """One loss term before the mean over the batch."""

    loss: Tensor  # [B], carries gradient
    parts: dict[str, Tensor] = field(default_factory=dict)  # name -> [B], detached: what the loss is made of
    diagnostics: dict[str, Tensor] = field(default_factory=dict)  # name -> scalar, detached


class Anchor(nn.Module, ABC):
    """The term that keeps the instantaneous velocity."""

    branch: Literal["anchor", "pretraining"] = "anchor"  # which question of the interval it trains

    @abstractmethod
    def loss(self, prediction: Tensor, velocity: Tensor, t: Tensor) -> TermResult:
        """[B, *], [B, *], [B] -> per-sample loss."""


class Weight(nn.Module):
    """What a sample's error is worth: here itself. May have parameters, which are trained with the network.

    Args:
        reduction: whether a sample's error is the mean or the sum of its squared differences. Constants of a weight
            belong to one of them: an epsilon of 0.01 beside a sum of 4,096 values is 2.4e-6 beside their mean.
    """

    def __init__(self, reduction: Reduction = "mean") -> None:
        super().__init__()
        if reduction not in ("mean", "sum"):
            raise ConfigError(f"reduction={reduction} of a weight: choose mean or sum.")
        self.reduction = reduction

    def forward(self, error: Tensor, t: Tensor) -> Tensor:
        """Errors [B] (with gradient), times [B] -> losses [B]."""
        return error

    def term(self, difference: Tensor, t: Tensor, factor: Tensor | None = None, **diagnostics: Tensor) -> TermResult:
        """The loss of differences [B, *] from a target at times [B], times `factor` [B]; the mean square is logged."""
        squares = difference.square().flatten(1)
        error = squares.mean(1) if self.reduction == "mean" else squares.sum(1)
        loss = self(error, t)
        part = error.detach() if self.reduction == "mean" else error.detach() / squares.shape[1]
        return TermResult(loss if factor is None else factor * loss, {"error": part}, diagnostics)


class Point(NamedTuple):
    """Where a shortcut's loss is taken: x_t on the path, the interval of its average velocity, the target velocity."""

    x: Tensor  # [B, *], x_t
    t: Tensor  # [B]
    end: Tensor  # [B]: drawn with t, or 1 (the data)
    velocity: Tensor  # [B, *], float32 at least, without gradient


class Ask(Protocol):
    """Asks the student for average velocities F(x, t, r) [B, *] from `t` [B] to `end` [B], in float32 at least.

    `end = t` asks for the instantaneous velocity, where the interval tells the two apart.
    """

    def __call__(self, x: Tensor, t: Tensor, end: Tensor) -> Tensor:
        """F, with gradient."""
        ...

    def fixed(self, x: Tensor, t: Tensor, end: Tensor) -> Tensor:
        """F, without gradient."""
        ...

    def along(self, velocity: Tensor, x: Tensor, t: Tensor, end: Tensor) -> tuple[Tensor, Tensor]:
        """F, with gradient, and its derivative along `dx/dt = velocity` [B, *] with `end` held, without gradient."""
        ...


class Shortcut(nn.Module, ABC):
    """The term that learns the jump.

    Args:
        weight: what a sample's error is worth where `objective/weight=` does not say otherwise; None: itself.

    Attributes:
        asks_elsewhere: whether it asks about other times than those of its point, and `2 - t`.
        drops_instants: whether conditions are dropped in training among samples whose end is their time, only.
    """

    asks_elsewhere: bool = False
    drops_instants: bool = False

    def __init__(self, weight: Weight | None = None) -> None:
        super().__init__()
        self.weight = Weight() if weight is None else weight

    def draw(self, time: TimeDistribution, interval: Interval, size: int, device: torch.device | str | None) -> Times:
        """Training times of `size` samples; here: averages end at 1."""
        return Times(time.sample(size, device))

    def at_step(self, step: int) -> None:  # noqa: B027 - most shortcuts do not change
        """Told before each training step: writes the numbers that follow a schedule into their `StepNumber`s."""

    @property
    def phase(self) -> Hashable:
        """Which of its computations this step does."""
        return None

    def check(self, interval: Interval) -> None:  # noqa: B027 - most shortcuts fit every interval
        """Raise `ConfigError` if this shortcut cannot be learned under this interval."""

    @abstractmethod
    def loss(self, ask: Ask, point: Point) -> TermResult:
        """What the network is asked, and the loss per sample."""


@dataclass(frozen=True)
class ObjectiveResult:
    """What an objective returns for one batch."""

    loss: Tensor  # scalar, carries gradient
    terms: dict[str, Tensor]  # name -> scalar, detached: the summands of the loss
    diagnostics: dict[str, Tensor]  # name -> scalar, detached: for the log
    velocity: Tensor  # [B, *], the target velocity
    prediction: Tensor | None = None  # [B, *], shortcut branch, detached
    tangent: Tensor | None = None  # [B, *], shortcut branch, detached


class VelocityField(nn.Module, ABC):
    """Where the target velocity comes from: the data, a frozen teacher, or the student itself (the `teacher` group).

    `weights_from`: its arguments that are paths of weights. What these hold is part of a run's identity: it is recorded
    by its digest, and a resume under other weights is refused. `is_network`: whether it is what a network answers that
    training leaves as it is, and not the data or the student of the moment.
    """

    weights_from: tuple[str, ...] = ()
    is_network: bool = False

    @abstractmethod
    def forward(self, x: Tensor, t: Tensor, cond: Any, flow: Tensor, student: Backbone, interval: Interval) -> Tensor:
        """x_t [B, *], t [B], condition, `flow = x1 - x0` [B, *] -> target velocity [B, *], without gradient."""

    def clips(self, student: Backbone) -> bool:
        """Whether its velocities are clipped as those of a network that predicts the data (`Backbone.predicts`)."""
        return False

    def at_times(self, t: Tensor | None) -> Hashable:
        """As `Backbone.at_times`: `t` [B] are the times that it is then asked about."""
        return None

    def check(self, student: Backbone) -> None:  # noqa: B027 - most fields fit every student
        """Raise a `FlowAnchorError` if this field cannot teach this student."""


class Objective(nn.Module, ABC):
    """A training loss. With `noise`, `t` and `end` given it is a pure function of its inputs and the step.

    A training step may be captured once and replayed (`cuda_graph`), and then only tensors change. So `at_step` writes
    each number that changes with the step into a `StepNumber`, which `forward` reads as a tensor; `phase` says which
    computation the step does, where there are several; and `forward` reads no attribute that changes otherwise, takes
    no value to the host and makes no tensor of numbers (`flowanchor.testing.check_objective`).
    """

    interval: Interval
    time: TimeDistribution
    kind: Kind = "shortcut"  # which samplers the trained network supports
    trains_velocity_head: bool = False  # whether it has a loss for `Backbone.has_velocity_head`
    needs_guidance: bool = False  # whether the network must take guidance as an input

    def draw(self, size: int, device: torch.device | str | None = None) -> DrawnTimes:
        """Training times of `size` samples: what `forward` takes after the noise."""
        return Times(self.time.sample(size, device))

    def at_step(self, step: int) -> None:  # noqa: B027 - most objectives do not change
        """Told before each training step, so that what follows a schedule is where it was after a resume."""

    @property
    def phase(self) -> Hashable:
        """Which of its computations this step does; a graph of the step is captured for each."""
        return None

    @property
    def asks_elsewhere(self) -> bool:
        """Whether it asks the student about other times than those it was given, and `2 - t`."""
        return False

    @abstractmethod
    def forward(
        self,
        student: Backbone,
        batch: Batch,
        velocity: VelocityField,
        engine: TangentEngine,
        noise: Tensor | None = None,
        t: Tensor | None = None,
        end: Tensor | None = None,
    ) -> ObjectiveResult: ...

    def check(self, backbone: Backbone) -> None:
        """Raise `ConfigError` if this objective cannot train this backbone."""
        self.interval.check(backbone)
        if backbone.has_velocity_head and not self.trains_velocity_head:
            raise ConfigError(
                f"This {type(backbone).__name__} has a velocity head, for which this objective has no loss: add "
                "backbone.velocity_head=false, or choose objective=imf_whole."
            )
