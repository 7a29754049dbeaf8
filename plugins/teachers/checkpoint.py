"""A frozen network teaches: distillation, with classifier-free guidance baked into the target."""

from __future__ import annotations

from collections.abc import Hashable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from flowanchor.base.rank_zero import rank_zero_warn
from flowanchor.checkpoints import load_model
from flowanchor.checkpoints.load import store_low
from flowanchor.conditioning import Text
from flowanchor.errors import CheckpointError, ConfigError
from flowanchor.interfaces import Backbone, Interval, Question, VelocityField
from flowanchor.jumps.guidance import Guidance


class CheckpointVelocity(VelocityField):
    """`v_u + scale (v_c - v_u)` of a frozen network for `low <= t <= high`, `v_c` outside (`teacher=checkpoint`).

    Args:
        checkpoint: file or run folder of the teacher.
        ema: which average of its weights teaches; null: the one its own evaluation uses.
        ask: how the teacher is told the time: `plain` (`t`: a flow model, or stage 1 of FACM), `anchor` (the anchor
            branch of its own interval: a teacher that was itself distilled), or `auto`, which picks by its objective.
        dtype: in which its linear layers and convolutions are kept: `float32`, `bfloat16`, or `auto`: bfloat16 where
            training casts them to it at every call anyway, and so learns from the same velocity, bit for bit.
        precision: the trainer's, which `auto` follows; null: unknown, float32.
    """

    weights_from = ("checkpoint",)
    is_network = True

    def __init__(
        self,
        checkpoint: str,
        guidance_scale: float = 1.75,
        guidance_low: float = 0.125,
        guidance_high: float = 1.0,
        ema: str | None = None,
        ask: str = "auto",
        dtype: str = "float32",
        precision: str | int | None = None,
    ) -> None:
        if not checkpoint:
            raise ConfigError(
                "The teacher needs a checkpoint: add teacher.checkpoint=PATH (a .ckpt file or a run folder)."
            )
        model = load_model(checkpoint, ema=ema, hashed=False)  # the run hashes it, once for all processes
        if ask not in ("auto", "plain", "anchor"):
            raise ConfigError(f"teacher.ask={ask} is unknown: choose auto, plain or anchor.")
        ask = ("anchor" if model.kind == "shortcut" else "plain") if ask == "auto" else ask
        self._setup(
            model.backbone,
            Guidance(guidance_scale, guidance_low, guidance_high),
            model.interval if ask == "anchor" else None,
        )
        self.path = model.path
        self.any_length = "text_len" not in model.config.get("backbone", {})  # a stock transformer says none
        self.low = keeps_low(dtype, precision)
        if self.low:
            store_low(self.network, torch.bfloat16)

    @classmethod
    def of_network(cls, network: Backbone, guidance: Guidance, interval: Interval | None = None) -> CheckpointVelocity:
        """The same field around a network that is already in memory; `interval` if it must be asked at its anchor."""
        field = cls.__new__(cls)
        field._setup(network, guidance, interval)
        field.path = "memory"
        return field

    def _setup(self, network: Backbone, guidance: Guidance, interval: Interval | None) -> None:
        torch.nn.Module.__init__(self)
        self.network = network.eval().requires_grad_(False)
        self.guidance = guidance
        self.low = self.any_length = False
        self.asked_interval = interval
        self.path = ""
        self._reached: bool | None = None  # whether guidance reaches a time of the batch, once the host was told them

    def train(self, mode: bool = True) -> CheckpointVelocity:
        """The teacher never leaves evaluation mode."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, x: Tensor, t: Tensor, cond: Any, flow: Tensor, student: Backbone, interval: Interval) -> Tensor:
        question = Question(t) if self.asked_interval is None else self.asked_interval.anchor(t)
        question = question.for_network(self.network)
        with self._casting(x.device.type):
            return self.guidance.velocity(self.network, x, question, cond, t, self._reached).to(flow.dtype)

    def clips(self, student: Backbone) -> bool:
        return self.network.predicts == "x"

    def at_times(self, t: Tensor | None) -> Hashable:
        self._reached = None if t is None or self.guidance.scale == 1 else self.guidance.reaches(t)
        return self._reached, self.network.at_times(t)

    def _casting(self, device: str) -> AbstractContextManager[Any]:
        """Weights in bfloat16 take inputs in bfloat16, also in a run that casts nothing."""
        return torch.autocast(device, torch.bfloat16, cache_enabled=False) if self.low else nullcontext()

    def check(self, student: Backbone) -> None:
        """Raise `CheckpointError` where teacher and student do not speak of the same samples.

        A teacher whose folder says nothing of the length of texts reads them as far as the student does.
        """
        told = [(network.sample_shape, network.conditioning.described()) for network in (self.network, student)]
        (their_shape, theirs), (our_shape, ours) = told
        if their_shape[:1] != our_shape[:1] or not self.network.any_size and their_shape != our_shape:
            theirs, ours = f"samples of shape {their_shape}", f"samples of shape {our_shape}"
        if theirs != ours:
            raise CheckpointError(
                f"The teacher {self.path} was trained on {theirs}, this student has {ours}: choose the data and the "
                "backbone.in_channels/input_size/num_classes that the teacher was trained with."
            )
        texts = [one for one in (self.network.conditioning, student.conditioning) if isinstance(one, Text)]
        if len(texts) == 2 and self.any_length:
            texts[0].longest = dict(texts[1].longest)
        lengths = [one.longest for one in texts]
        if len(lengths) == 2 and lengths[0] != lengths[1]:
            read = [" and ".join(f"{length} {name}" for name, length in one.items()) for one in lengths]
            rank_zero_warn(
                f"The teacher {self.path} reads {read[0]} of a text and this student {read[1]}: texts without mask are "
                "filled up with zeros, so that the two are not told the same. Set backbone.text_len to the teacher's, "
                "or choose teacher=base."
            )


def keeps_low(dtype: str, precision: str | int | None) -> bool:
    """Whether a teacher is kept in bfloat16 (`teacher.dtype`) where the trainer has this precision."""
    if dtype not in ("auto", "float32", "bfloat16"):
        raise ConfigError(f"teacher.dtype={dtype} is unknown: choose auto, float32 or bfloat16.")
    if dtype == "auto":
        return str(precision) in ("bf16-mixed", "bf16")
    return dtype == "bfloat16" and precision != "bf16-true"  # where all of a run is in bfloat16, the teacher is as well
