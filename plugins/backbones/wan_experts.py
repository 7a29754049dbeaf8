"""The two experts of Wan 2.2 as one backbone: one for high noise before a boundary of time, one for low noise after it.

Every stage pairs the experts' stages and asks one of them, so that tangent engines and sharding see one network. A
batch is asked at times of one side only: `objective/time=routed` in training, any sampler afterwards.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from diffusers import WanTransformer3DModel
from torch import Tensor, nn

from flowanchor.errors import ConfigError
from flowanchor.interfaces import Backbone, StageContext
from flowanchor.jvp.stages import is_unit, through
from flowanchor.plugins.backbones.wan import Wan
from flowanchor.text.base import Tokens

BOUNDARY = 0.875  # noise level, as released for text-to-video


class WanExperts(Backbone):
    """Two `Wan` of one size: `high` for noise levels `1 - t >= boundary`, `low` from there to the data.

    Weights are named `high.<name>` and `low.<name>`. Times of the anchor's half, `2 - t`, belong to the expert of `t`.

    Args:
        boundary: noise level between the experts.
        preset, settings: of both, as for `Wan.from_preset`.
    """

    any_size = True

    def __init__(self, boundary: float = BOUNDARY, preset: str = "A14B", **settings: Any) -> None:
        super().__init__()
        if not 0 < boundary < 1:
            raise ConfigError(f"backbone.boundary={boundary} is a noise level between 0 and 1: Wan 2.2 has 0.875.")
        self.boundary = boundary
        self._side: str | None = None  # of the batch, once the host was told its times
        self.high, self.low = (Wan.from_preset(preset, **settings) for _ in range(2))
        self.blocks = nn.ModuleList(_Pair(*pair) for pair in zip(self.high.blocks, self.low.blocks, strict=True))
        self.sample_shape, self.patch_size = self.high.sample_shape, self.high.patch_size
        self.size_steps = self.high.size_steps
        self.conditioning = self.low.conditioning = self.high.conditioning  # they are asked alike
        self.takes_end_time, self.end_time = self.high.takes_end_time, self.high.end_time
        self.tangent_smoothing, self.predicts = self.high.tangent_smoothing, self.high.predicts
        self.initialise()

    def expert(self, t: Tensor) -> Wan:
        """Which network answers at times t [B]; raises `ConfigError` where they lie on both sides."""
        return cast(Wan, getattr(self, self._side or self.side(t)))

    def side(self, t: Tensor) -> str:
        """Its name, `high` or `low`; asked of times on a device, the host waits for it."""
        noise = torch.where(t > 1, t - 1, 1 - t)
        high = noise >= self.boundary
        if bool(high.all()):
            return "high"
        if bool(high.any()):
            raise ConfigError(
                "A batch has times of both experts, and one network is asked at a time: use objective/time=routed."
            )
        return "low"

    def at_times(self, t: Tensor | None) -> Hashable:
        self._side = None if t is None else self.side(t)
        return self._side

    @contextmanager
    def without_adapters(self) -> Iterator[None]:
        with self.high.without_adapters(), self.low.without_adapters():
            yield

    def transformers(self) -> tuple[WanTransformer3DModel, WanTransformer3DModel]:
        """Stock networks that share the weights: high noise, low noise."""
        return self.high.transformer(), self.low.transformer()

    # ----------------------------------------------------------------------------------------------------- stages

    def embed(self, x: Tensor, t: Tensor, cond: Tokens, r: Tensor | None = None) -> tuple[Tensor, StageContext]:
        expert = self.expert(t.detach())
        tokens, context = expert.embed(x, t, cond, r)
        # The table of its head belongs to no stage of this network, so it comes along.
        return tokens, context._replace(fixed=(*context.fixed, expert.scale_shift_table, expert is self.high))

    def head(self, tokens: Tensor, context: StageContext) -> Tensor:
        expert = self.high if context.fixed[-1] else self.low
        return expert.head(tokens, context, table=context.fixed[-2])

    def stage_modules(self) -> list[list[nn.Module]]:
        pairs = zip(self.high.stage_modules(), self.low.stage_modules(), strict=True)
        return [[*high, *low] for high, low in pairs]

    def float32_modules(self) -> list[nn.Module]:
        return [*self.high.float32_modules(), *self.low.float32_modules()]

    def whole_parameters(self) -> list[nn.Parameter]:
        return [*self.high.whole_parameters(), *self.low.whole_parameters()]

    def meaning(self) -> dict[str, Any]:
        return self.high.meaning()

    def copies(self) -> dict[str, str]:
        experts = (("high", self.high), ("low", self.low))
        return {f"{part}.{name}": f"{part}.{of}" for part, expert in experts for name, of in expert.copies().items()}

    def borrowed(self) -> set[str]:
        experts = (("high", self.high), ("low", self.low))
        return {f"{name}.{key}" for name, expert in experts for key in expert.borrowed()}

    def initialise_stage(self, index: int) -> None:
        self.high.initialise_stage(index)
        self.low.initialise_stage(index)


class _Pair(nn.Module):
    """A block of each expert. They are registered with their own networks, under whose names they are saved."""

    def __init__(self, high: nn.Module, low: nn.Module) -> None:
        super().__init__()
        self.__dict__["choices"] = (high, low)

    def forward(self, tokens: Tensor, context: StageContext) -> Tensor:
        high, low = self.__dict__["choices"]
        asked = high if context.fixed[-1] else low
        units = [block for block in (high, low) if is_unit(block)]  # sharded: gathered and freed together
        return cast(Tensor, through(units, lambda tokens: asked(tokens, context), tokens))
