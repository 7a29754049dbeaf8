"""Two passes: the tangent without a graph, then an ordinary forward."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from flowanchor.errors import ConfigError
from flowanchor.interfaces import Answer, Backbone, Question
from flowanchor.jvp.attention import AttentionTangent, resolve
from flowanchor.jvp.compiled import runs_eagerly
from flowanchor.jvp.dual import Directions, Moving, embed_dual, one_by_one, run_network, stage_dual, still_or
from flowanchor.jvp.stages import ask, check_stages, stages, through
from flowanchor.jvp.surroundings import Surroundings
from flowanchor.jvp.watch import watched


class TwoPass:
    """A tangent pass under `no_grad`, then a plain forward that carries the gradient (as in rCM).

    Exact. It costs one forward more than `Chain`, and in return the pass with gradient is the network as it stands:
    compiled, with fused attention.

    Args:
        checkpoint: run each block of the plain forward under activation checkpointing.
        attention: how attention's tangent is computed (`flowanchor.jvp.attention`): a name or an object.
    """

    def __init__(self, checkpoint: bool = False, attention: str | AttentionTangent = "auto") -> None:
        self.checkpoint = checkpoint
        self.attention = resolve(attention)

    def __repr__(self) -> str:
        return f"TwoPass(checkpoint={self.checkpoint!r}, attention={self.attention!r})"

    def check_run(self, backbone: Backbone, *, sharded: bool, low_precision: bool) -> None:
        """Raise `ConfigError` where it cannot train (`flowanchor.jvp.compatibility`)."""
        check_stages(backbone)

    def __call__(self, backbone: Backbone, x: Tensor, cond: Any, questions: Sequence[Question]) -> list[Answer]:
        return one_by_one(self._dual, backbone, x, cond, questions)

    def _dual(self, backbone: Backbone, inputs: Directions) -> Answer:
        x, t, cond, r = inputs.x, inputs.t, inputs.cond, inputs.r
        before = Surroundings.here(x.device, eager=True, others=True)
        tangent = self._tangent(backbone, inputs)
        before.forget_if_unused()
        with before:
            return Answer(plain_forward(backbone, x, t, cond, r, self.checkpoint), tangent)

    def _tangent(self, backbone: Backbone, inputs: Directions) -> Tensor:
        inputs.check()
        embed, links = stages(backbone)

        def walk(inputs: Directions) -> Tensor:
            moving: Moving = through(embed.units, lambda: embed_dual(embed, inputs, self.attention))
            for link in links:
                tokens, tangent = through(
                    link.units, lambda now=moving, link=link: stage_dual(link, now, self.attention)
                )
                moving = moving._replace(tokens=tokens, tokens_tangent=tangent)
            return still_or(moving.tokens_tangent, moving.tokens)

        with torch.no_grad(), watched(backbone):
            found: Tensor = run_network(backbone, walk, inputs)
        return found


def check_checkpointed(network: nn.Module) -> None:
    """Raise `ConfigError` for a network that has no blocks to checkpoint."""
    if not isinstance(network, Backbone):
        raise ConfigError(
            f"jvp.checkpoint=true checkpoints the blocks of a Backbone, and {type(network).__name__} is none: leave it "
            "out."
        )


def plain_forward(network: nn.Module, x: Tensor, t: Tensor, cond: Any, r: Tensor | None, checkpointed: bool) -> Tensor:
    """`F(x, t, r)` with gradient, [B, *]; each block checkpointed or not."""
    if not checkpointed:
        return ask(network, x, t, cond, r)
    check_checkpointed(network)
    assert isinstance(network, Backbone)

    def predict(x: Tensor, t: Tensor, cond: Any, r: Tensor | None) -> Tensor:
        tokens, context = network.embed(x, t, cond, r)
        for block in network.blocks:
            before = Surroundings.here(x.device, eager=runs_eagerly())
            contexts = partial(_contexts, before)
            tokens = checkpoint(
                block, tokens, context, use_reentrant=False, preserve_rng_state=False, context_fn=contexts
            )
            before.forget_if_unused()
        return network.head(tokens, context)

    prediction: Tensor = run_network(network, predict, x, t, cond, r)
    return prediction


def _contexts(before: Surroundings) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Around a checkpointed block, and around its recomputations."""
    return nullcontext(), before
