"""How well a network still knows the flow: the velocities that its anchor's question gives, on held-out samples.

A shortcut needs the velocity that it is built on; FACM (arXiv 2507.03738) names forgetting it as the cause of collapse.
What is measured is the answer to the anchor's question (`2 - t` under an expanded interval, `r = t` of a network of two
times), whether or not an anchor trains it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils._pytree import tree_map

from flowanchor.base.noise import sample_noise
from flowanchor.errors import ConfigError, DataError
from flowanchor.interfaces import Backbone, Batch, Interval, Question
from flowanchor.jumps.guidance import Guidance
from flowanchor.jumps.precision import asking, state_dtype

TIMES = (0.05, 0.25, 0.5, 0.75, 0.95)

# x_t [B, *], t [B], condition, x1 - x0 [B, *] -> velocity [B, *]
Teacher = Callable[[Tensor, Tensor, Any, Tensor], Tensor]


@dataclass(frozen=True)
class FlowError:
    """At one time, the mean over samples; the last two where there is a teacher.

    `error` holds the variance of `x1 - x0` given `x_t`, the same for every network on the same samples: compare it with
    the error of another network, such as the one that training began with.
    """

    t: float
    error: float  # mean square of F - (x1 - x0)
    from_teacher: float | None = None  # mean square of F - the teacher's velocity
    cosine: float | None = None  # between F and the teacher's velocity, each sample one vector

    def as_dict(self) -> dict[str, float | None]:
        return asdict(self)


@dataclass(frozen=True)
class Probe:
    """Held-out samples with noise that belongs to them, the same at every measurement."""

    batches: list[Batch]
    noise: list[Tensor]  # x0, float64, one for each batch

    @classmethod
    def of(cls, batches: Iterable[Batch], samples: int, seed: int = 0, first: int = 0) -> Probe:
        """The first `samples` of what a loader yields, fewer where it has fewer; `first` numbers them for the noise.

        Raises:
            DataError: a loader that yields nothing.
        """
        kept: list[Batch] = []
        noise: list[Tensor] = []
        count = 0
        for x1, cond in batches:
            size = min(len(x1), samples - count)
            kept.append(Batch(x1[:size], tree_map(lambda part, size=size: part[:size], cond)))
            noise.append(sample_noise(seed, range(first + count, first + count + size), x1.shape[1:]))
            count += size
            if count == samples:
                break
        if not kept:
            raise DataError("There are no held-out samples to measure velocities on: raise data.heldout.")
        return cls(kept, noise)

    @torch.no_grad()
    def measure(
        self, network: Backbone, interval: Interval, times: Sequence[float] = TIMES, teacher: Teacher | None = None
    ) -> list[FlowError]:
        """A line per time. The network is asked in evaluation mode, which it leaves as it was, without guidance."""
        training = network.training
        network.eval()
        try:
            return [self._at(time, network, interval, teacher) for time in check_times(times)]
        finally:
            network.train(training)

    def _at(self, time: float, network: Backbone, interval: Interval, teacher: Teacher | None) -> FlowError:
        device, dtype = next(network.parameters()).device, state_dtype(network)
        sums = torch.zeros(3, dtype=torch.float64)
        count = 0
        for (samples, cond), noise in zip(self.batches, self.noise, strict=True):
            x1, x0 = samples.to(device).double(), noise.to(device)
            cond = tree_map(lambda part: part.to(device) if isinstance(part, Tensor) else part, cond)
            t = torch.full((len(x1),), time, device=device, dtype=dtype)
            x_t, flow = ((1 - time) * x0 + time * x1).to(dtype), x1 - x0
            with asking(network, device):
                told = interval.anchor(t).for_network(network)
                answer = Guidance().velocity(network, x_t, told, cond, t).double()
                taught = None if teacher is None else teacher(x_t, t, cond, flow.to(dtype)).double()
            sums[0] += _mean_squares(answer - flow).sum().cpu()
            if taught is not None:
                sums[1] += _mean_squares(answer - taught).sum().cpu()
                sums[2] += functional.cosine_similarity(answer.flatten(1), taught.flatten(1)).sum().cpu()
            count += len(x1)
        error, apart, cosine = (sums / count).tolist()
        return FlowError(time, error) if teacher is None else FlowError(time, error, apart, cosine)


def teacher_network(network: Backbone, interval: Interval | None, guidance: Guidance) -> Teacher:
    """A frozen network as what teaches: asked at `t`, or at the anchor's question of `interval`."""

    def velocity(x: Tensor, t: Tensor, cond: Any, flow: Tensor) -> Tensor:
        question = Question(t) if interval is None else interval.anchor(t)
        return guidance.velocity(network, x, question.for_network(network), cond, t)

    return velocity


def check_times(times: Sequence[float]) -> list[float]:
    """Times as numbers; raises `ConfigError` for one outside of [0, 1), or none."""
    found = [float(time) for time in times]
    if not found or not all(0 <= time < 1 for time in found):
        raise ConfigError(f"Velocities are measured at times in [0, 1), and these are {found}: use [0.05,0.5,0.95].")
    return found


def _mean_squares(difference: Tensor) -> Tensor:
    return difference.square().flatten(1).mean(1)
