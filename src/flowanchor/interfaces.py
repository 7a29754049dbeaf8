"""The contracts between the trunk and its plugins.

Conventions (FACM, arXiv 2507.03738): `t = 0` is noise and `t = 1` is data, `x_t = (1 - t) x0 + t x1` with
`x0 ~ N(0, I)`, and the velocity of the flow is `v = x1 - x0`. Shapes: `B` batch, `*` the sample's own dimensions
(`C, H, W` for an image), `N` tokens, `D` channels. Times are float32 tensors of shape [B].

Nothing in this file imports Lightning or Hydra: objectives, backbones, engines and samplers work in a plain PyTorch
script.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol, cast, runtime_checkable

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from flowanchor.deferred import StagedWeights
from flowanchor.errors import ConfigError
from flowanchor.graphs.step_number import StepNumber as StepNumber  # part of the contract of objectives

# ---------------------------------------------------------------------------------------------------------------- data


class Batch(NamedTuple):
    """What a data module yields: samples in the network's own space, and what they are conditioned on."""

    x1: Tensor  # [B, *], pixels in [-1, 1] or normalised latents
    cond: Tensor | None = None  # labels [B] (int64), text embeddings [B, L, D], or None


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
    num_classes: int = 0  # 0: not class-conditional
    takes_end_time: bool = False  # whether `r` has an embedder of its own
    tangent_smoothing: float = 0.0  # 0: what an engine says is the exact derivative (flowanchor.jvp.smoothing)
    condition_dropout: float = 0.0  # share of conditions that `drop_condition` replaces in training

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

    def predict(self, x: Tensor, t: Tensor, cond: Any, r: Tensor | None = None) -> Tensor:
        """The loop over the stages: `F(x, t)` for exactly this condition, deterministic."""
        tokens, context = self.embed(x, t, cond, r)
        for block in self.blocks:
            tokens = block(tokens, context)
        return self.head(tokens, context)

    def forward(self, x: Tensor, t: Tensor, cond: Any, r: Tensor | None = None) -> Tensor:
        """`predict`, with condition dropout in training mode."""
        return self.predict(x, t, self.drop_condition(cond) if self.training else cond, r)

    def at_times(self, t: Tensor | None) -> Hashable:
        """Told the times [B] of a training batch where the host has them, before it is asked about them, and None
        afterwards. Returns which of its computations they take, where that is a choice: the host need not wait for the
        device to make it, and a graph of the step is captured for each (`Objective.phase`)."""
        return None

    def set_null_context(self, embeddings: Tensor) -> None:  # noqa: B027 - labels have a class of their own for it
        """Told the embeddings [L, D] that stand for no condition (of the negative prompt), where the data has any."""

    def null_condition(self, cond: Any) -> Any:
        """The unconditional counterpart of a batch of conditions (same shape)."""
        raise ConfigError(
            f"{type(self).__name__} has no unconditional branch, so guidance cannot be used with it: "
            "set teacher.guidance_scale=1 (or sampler.guidance_scale=1)."
        )

    def stack_conditions(self, first: Any, second: Any) -> Any:
        """Two batches of conditions as one of `B + B'` samples."""
        return tree_map(lambda a, b: torch.cat([a, b]) if isinstance(a, Tensor) else a, first, second)

    def drop_condition(self, cond: Any) -> Any:
        """Replace a random share of the conditions by the null condition (for guidance). Default: none."""
        return cond


# -------------------------------------------------------------------------------------------------------- tangents


class Dual(NamedTuple):
    """A prediction and its directional derivative."""

    prediction: Tensor  # [B, *], carries gradient
    tangent: Tensor  # [B, *], detached


class TangentEngine(Protocol):
    """Computes `F(x, t, r)` and its Jacobian-vector product along `(tangent_x, tangent_t, tangent_r)`.

    The prediction carries gradient to the backbone's parameters, the tangent never does. `r` without `tangent_r` is
    held.
    """

    def __call__(
        self,
        backbone: Backbone,
        x: Tensor,
        t: Tensor,
        cond: Any,
        tangent_x: Tensor,
        tangent_t: Tensor,
        r: Tensor | None = None,
        tangent_r: Tensor | None = None,
    ) -> Dual: ...


@runtime_checkable
class JointEngine(TangentEngine, Protocol):
    """An engine that can also ask the network plainly at a second condition, in one walk over its stages."""

    def joint(
        self,
        backbone: Backbone,
        x: Tensor,
        t: Tensor,
        cond: Any,
        tangent_x: Tensor,
        tangent_t: Tensor,
        plain: Condition,
        r: Tensor | None = None,
        tangent_r: Tensor | None = None,
    ) -> tuple[Dual, Tensor]:
        """The dual, and `F(x, plain.t, plain.r)` [B, *] with gradient: what two separate calls would give."""
        ...


# ------------------------------------------------------------------------------------------- intervals and times


class Times(NamedTuple):
    """Training times of a batch: `t` [B] and, where they are drawn, the times at which averages end, [B]."""

    t: Tensor
    end: Tensor | None = None


class Condition(NamedTuple):
    """The times that a network is told: `t` [B] and, for networks with a second embedder, `r` [B]."""

    t: Tensor
    r: Tensor | None = None

    def for_network(self, network: Backbone) -> Condition:
        """The same for a network that embeds `r` and an interval that does not know it: `r = t`, an instant."""
        return self._replace(r=self.t) if network.takes_end_time and self.r is None else self


class Interval(ABC):
    """Which times tell the network that it is asked as a shortcut, and which that it is asked as a flow model."""

    needs_end_time: bool = False  # whether the backbone must embed `r`
    tells_end: bool = False  # whether a shortcut may end anywhere; otherwise at 1, or at `t` itself where it separates
    separates: bool = True  # whether shortcut and anchor are told different things

    @abstractmethod
    def shortcut(self, t: Tensor, end: Tensor | None = None) -> Condition:
        """Condition of the average velocity from `t` to `end` (None: 1; `t` itself: the instantaneous one)."""

    @abstractmethod
    def anchor(self, t: Tensor) -> Condition:
        """Condition of the instantaneous velocity at `t`."""

    def pretraining(self, t: Tensor) -> Condition:
        """Condition under which a flow model is pretrained so that a student can start from it (stage 1)."""
        return self.anchor(t)

    def check(self, backbone: Backbone) -> None:
        """Raise `ConfigError` if the backbone cannot be told the times of this interval."""
        if self.needs_end_time and not backbone.takes_end_time:
            raise ConfigError(
                f"{type(self).__name__} tells the network a second time r, and this {type(backbone).__name__} has no "
                "embedder for it: add backbone.auxiliary_time_cond=true, or choose objective/interval=expanded."
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


# ------------------------------------------------------------------------------------------------------- objective


@dataclass(frozen=True)
class TermResult:
    """One loss term before the mean over the batch."""

    loss: Tensor  # [B], carries gradient
    parts: dict[str, Tensor] = field(default_factory=dict)  # name -> [B], detached: what the loss is made of
    diagnostics: dict[str, Tensor] = field(default_factory=dict)  # name -> scalar, detached


class Anchor(nn.Module, ABC):
    """The term that keeps the instantaneous velocity."""

    branch: str = "anchor"  # "anchor" or "pretraining": which condition of the interval it trains

    @abstractmethod
    def loss(self, prediction: Tensor, velocity: Tensor, t: Tensor) -> TermResult:
        """[B, *], [B, *], [B] -> per-sample loss."""


class Weight(nn.Module, ABC):
    """What a sample's error is worth; may have parameters of its own, which are trained with the network."""

    @abstractmethod
    def forward(self, error: Tensor, t: Tensor) -> Tensor:
        """Errors [B] (with gradient), times [B] -> losses [B]."""


class Shortcut(nn.Module, ABC):
    """The term that learns the jump: it sees the prediction, its tangent along the flow, and the velocity.

    Attributes:
        draws_end: whether `times` draws where the averages end, from two draws of the time distribution.
        direction: what the tangent goes along: the target `velocity`, or the network's `own` instantaneous one.
        weight: what replaces the shortcut's own adaptive weight; None: nothing does.
        step: the training step; only `at_step` and `phase` may make anything of it (see `Objective`).
    """

    draws_end: bool = False
    direction: str = "velocity"
    weight: Weight | None
    weight_power: float = 0.0
    weight_epsilon: float = 1e-3
    step: int = 0

    def __init__(self) -> None:
        super().__init__()
        self.weight = None  # of the instance: a module under the name of a class attribute would never be found

    def at_step(self, step: int) -> None:
        """Told before each training step: writes the numbers that follow a schedule into their `StepNumber`s."""
        self.step = step

    @property
    def phase(self) -> Hashable:
        """Which of its computations this step does."""
        return None

    def end(self, t: Tensor) -> Tensor | None:
        """Where the average velocity from `t` ends, [B], a function of `t` that the network need not be told; None
        means 1 (the data). Not asked where ends are drawn."""
        return None

    def times(self, first: Tensor, second: Tensor, coin: Tensor, interval: Interval) -> tuple[Tensor, Tensor]:
        """Two draws of the time distribution and a uniform one, [B] each -> times and ends; where `draws_end`."""
        raise NotImplementedError

    def check(self, interval: Interval) -> None:  # noqa: B027 - most shortcuts fit every interval
        """Raise `ConfigError` if this shortcut cannot be learned under this interval."""

    def ahead(self, t: Tensor, end: Tensor) -> Tensor | None:
        """Where the network's own opinion takes the place of a tangent at this step, [B]; None: a tangent is asked."""
        return None

    def weighted(self, error: Tensor, t: Tensor) -> Tensor:
        """The loss [B] of errors [B]: by `weight`, else `e / sg(e + weight_epsilon)^weight_power`."""
        if self.weight is not None:
            return cast(Tensor, self.weight(error, t))
        return error / (error.detach() + self.weight_epsilon) ** self.weight_power

    @abstractmethod
    def loss(
        self, prediction: Tensor, tangent: Tensor, velocity: Tensor, t: Tensor, end: Tensor | None = None
    ) -> TermResult:
        """[B, *] (with gradient), [B, *], [B, *], [B], [B] -> per-sample loss."""


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
    by its digest, and a resume under other weights is refused.
    """

    weights_from: tuple[str, ...] = ()

    @abstractmethod
    def forward(self, x: Tensor, t: Tensor, cond: Any, flow: Tensor, student: Backbone, interval: Interval) -> Tensor:
        """x_t [B, *], t [B], condition, `flow = x1 - x0` [B, *] -> target velocity [B, *], without gradient."""

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
    kind: str = "shortcut"  # "shortcut" or "flow": which samplers the trained network supports

    def draw(self, size: int, device: torch.device | str | None = None) -> Times:
        """Training times of `size` samples."""
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


# --------------------------------------------------------------------------------------------------------- sampling


class Sampler(ABC):
    """Draws samples with a trained network. The state is kept in float64, the network sees float32 (or autocast)."""

    kind: str = "shortcut"  # "shortcut": asks the average velocity; "flow": asks the anchor's instantaneous velocity
    needs_end: bool = False  # whether it asks for averages that end anywhere, which not every interval can tell

    @abstractmethod
    def sample(
        self,
        backbone: Backbone,
        noise: Tensor,
        cond: Any,
        interval: Interval,
        renoise: Callable[[int], Tensor] | None = None,
    ) -> Tensor:
        """noise [B, *] -> samples [B, *] (float64). `renoise(step)` gives fresh noise [B, *] after a step."""

    @abstractmethod
    def with_nfe(self, nfe: int) -> Sampler:
        """The same sampler with a budget of `nfe` velocity evaluations; raises `ConfigError` where impossible."""

    @property
    @abstractmethod
    def nfe(self) -> int | None:
        """Velocity evaluations per sample; None where the solver decides by itself."""


class Posterior(NamedTuple):
    """What a codec knows of an image's latent: a diagonal Gaussian, or a point (`logvar` None). Raw: not normalised."""

    mean: Tensor  # [B, C, h, w]
    logvar: Tensor | None = None  # [B, C, h, w]

    def sample(self, noise: Tensor) -> Tensor:
        """`mean + std * noise` for standard normal noise [B, C, h, w]."""
        return self.mean if self.logvar is None else self.mean + (0.5 * self.logvar).exp() * noise


class Codec(nn.Module, ABC):
    """Maps samples of the network's space to pixels in [-1, 1] and back.

    Attributes:
        name: of the codec, as in `codec=<name>`.
        downsampling: pixels per latent along each side.
        latent_channels: channels of a latent; None: those of the image.
        usable: whether it can decode and encode; False where it was not told its weights.
    """

    name: str = ""
    downsampling: int = 1
    latent_channels: int | None = None
    usable: bool = True

    @abstractmethod
    def decode(self, latents: Tensor) -> Tensor:
        """[B, *] -> images [B, C, H, W] in [-1, 1]."""

    @abstractmethod
    def encode(self, images: Tensor) -> Tensor:
        """images [B, C, H, W] in [-1, 1] -> [B, *], the posterior's mean, normalised."""

    def posterior(self, images: Tensor) -> Posterior:
        """images [B, C, H, W] in [-1, 1] -> what is stored of them: raw, before any normalisation."""
        return Posterior(images)

    def fingerprint(self) -> str:
        """Hash (hex) of all that decides the raw latents: weights and settings, not the statistics."""
        return self.name

    def save(self, path: Path) -> None:
        """Write its weights into a file that its `weights` reads, to be published beside a network."""
        raise ConfigError("with_codec=true: this network draws pixels and has no codec to publish: leave it out.")
