"""The network of improved MeanFlow (arXiv 2512.02012): everything that it is told beside the sample are tokens."""

from __future__ import annotations

from typing import Any, Literal, cast

import torch
from einops import rearrange
from torch import Tensor, nn

from flowanchor.conditioning import Classes
from flowanchor.errors import ConfigError
from flowanchor.interfaces import Backbone, Guided, StageContext
from flowanchor.velocity import from_data, known_prediction, with_sample

from .lightningdit import check_sizes
from .lightningdit_layers import (
    Attention,
    LabelEmbedding,
    PatchEmbedding,
    RMSNorm,
    RotaryPositions,
    SwiGLU,
    TimeEmbedding,
)

# `depth` blocks lie between a sample and its average velocity, `head_depth` of them in the stack of their own.
PRESETS: dict[str, dict[str, int]] = {
    "nano": {"depth": 4, "head_depth": 2, "hidden_size": 64, "patch_size": 2, "num_heads": 4},
    "B/2": {"depth": 12, "head_depth": 8, "hidden_size": 768, "patch_size": 2, "num_heads": 12},
    "M/2": {"depth": 24, "head_depth": 8, "hidden_size": 768, "patch_size": 2, "num_heads": 12},
    "L/2": {"depth": 32, "head_depth": 8, "hidden_size": 1024, "patch_size": 2, "num_heads": 16},
    "XL/2": {"depth": 48, "head_depth": 8, "hidden_size": 1024, "patch_size": 2, "num_heads": 16},
}

# How many tokens say what.
CLASS, SCALE, LEAST_NOISE, MOST_NOISE, SPAN = 8, 4, 2, 2, 4
TOLD = CLASS + SCALE + LEAST_NOISE + MOST_NOISE + SPAN


class IMFDiT(Backbone):
    """Transformer on square images or latents that is told a class, its guidance and how far the average reaches.

    It is told no time: a sample shows how noisy it is. Class, guidance and span are tokens before those of the sample;
    there is no adaLN. A trunk of `depth - head_depth` blocks is followed by two stacks of `head_depth` blocks each, one
    for the average velocity F and one for the instantaneous velocity V, which training alone asks. `depth` counts the
    blocks between a sample and F, those that sampling computes.

    Guidance is a `Guided` condition; without it the network answers unguided. As in the paper, what is embedded of it
    is `1 - 1 / scale` and, of its interval, the least and the largest noise level, `1 - high` and `1 - low`.

    Args:
        input_size: height and width of a sample.
        patch_size: side of a token's patch; must divide `input_size`.
        in_channels: channels of a sample.
        hidden_size, depth, head_depth, num_heads, mlp_ratio: size of the transformer.
        num_classes: number of classes; 0 for an unconditional network.
        class_dropout_prob: share of labels replaced by the null class in training; above 0, the null class has a row.
        velocity_head: whether V has its stack. Without it the objective asks F at a span of 0 in its place.
        predicts: `v`: velocities; `x`: the data, from which the head makes velocities (`flowanchor.velocity`).
    """

    presets = PRESETS
    takes_end_time = True
    needs_span = True
    takes_guidance = True

    def __init__(
        self,
        input_size: int = 32,
        patch_size: int = 2,
        in_channels: int = 4,
        hidden_size: int = 768,
        depth: int = 12,
        head_depth: int = 8,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        num_classes: int = 1000,
        class_dropout_prob: float = 0.1,
        velocity_head: bool = True,
        predicts: Literal["v", "x"] = "v",
    ) -> None:
        super().__init__()
        check_sizes(input_size, patch_size, hidden_size, num_heads, use_rope=True)
        self.predicts = known_prediction(predicts, self)
        if not 1 <= head_depth <= depth:
            raise ConfigError(
                f"backbone.head_depth={head_depth} blocks of backbone.depth={depth} are the average velocity's own: it "
                "must be at least 1 and no more than all."
            )
        if not 0 <= class_dropout_prob <= 1:
            raise ConfigError(f"backbone.class_dropout_prob={class_dropout_prob} must be a share between 0 and 1.")
        self.side, self.patch_size = input_size // patch_size, patch_size
        self.sample_shape = (in_channels, input_size, input_size)
        self.has_velocity_head = velocity_head
        null = class_dropout_prob > 0
        if num_classes:
            self.conditioning = Classes(num_classes, null, class_dropout_prob)

        self.x_embedder = PatchEmbedding(patch_size, in_channels, hidden_size)
        self.y_embedder = LabelEmbedding(num_classes + int(null or not num_classes), hidden_size)
        self.scale_embedder = TimeEmbedding(hidden_size)
        self.least_noise_embedder = TimeEmbedding(hidden_size)
        self.most_noise_embedder = TimeEmbedding(hidden_size)
        self.span_embedder = TimeEmbedding(hidden_size)
        self.slots = Slots((CLASS, SCALE, LEAST_NOISE, MOST_NOISE, SPAN), hidden_size)
        rope = RotaryPositions(hidden_size // num_heads, self.side)
        still = torch.zeros(TOLD, hidden_size // num_heads)  # what is told has no place in the image: it is not turned
        self.register_buffer("rope_cos", torch.cat([still + 1, cast(Tensor, rope.freqs_cos)]), persistent=False)
        self.register_buffer("rope_sin", torch.cat([still, cast(Tensor, rope.freqs_sin)]), persistent=False)

        def block() -> GatedBlock:
            return GatedBlock(hidden_size, num_heads, mlp_ratio)

        self.blocks = nn.ModuleList(block() for _ in range(depth - head_depth))
        for index in range(head_depth):
            self.blocks.append(TwinBlock(block(), block() if velocity_head else None, divides=index == 0))
        self.final_layer = Outlet(hidden_size, patch_size**2 * in_channels)
        self.velocity_layer = Outlet(hidden_size, patch_size**2 * in_channels) if velocity_head else None
        self.initialise()

    @classmethod
    def from_preset(cls, preset: str, **settings: Any) -> IMFDiT:
        """A preset by name (`B/2`, `nano`, ...); any setting that is not None replaces the preset's value."""
        if preset not in cls.presets:
            raise ConfigError(f"Unknown {cls.__name__} preset '{preset}': choose one of {', '.join(cls.presets)}.")
        chosen = {name: value for name, value in settings.items() if value is not None}
        return cls(**{**cls.presets[preset], **chosen})

    # ----------------------------------------------------------------------------------------------------- stages

    def embed(self, x: Tensor, t: Tensor, cond: Any, r: Tensor | None = None) -> tuple[Tensor, StageContext]:
        """x [B, C, H, W], t [B], labels [B] or `Guided`, span r [B] -> tokens [B, 20 + N, D] and the context.

        `t` gives the guidance that was not told its number of samples; a network that predicts the data makes
        velocities with it, too.
        """
        if r is None:
            raise ConfigError(f"This {type(self).__name__} is told the span of an average: pass r (0: an instant).")
        labels, scale, low, high, asked = Guided.of(cond, t)
        if asked != "average" and not self.has_velocity_head:
            raise ConfigError("This network has no velocity head: set backbone.velocity_head=true.")
        told = self.slots(
            self.y_embedder(self._labels(labels, x)),
            self.scale_embedder(1 - 1 / scale),
            self.least_noise_embedder(1 - high),
            self.most_noise_embedder(1 - low),
            self.span_embedder(r),
        )
        tokens = torch.cat([told, self.x_embedder(x)], 1)
        context = StageContext(carried=(), fixed=(self.rope_cos, self.rope_sin, asked))
        return tokens, with_sample(context, x, t) if self.predicts == "x" else context

    def head(self, tokens: Tensor, context: StageContext) -> Tensor:
        """Tokens [B, 20 + N, D] -> F or V [B, C, H, W]; F and V [B, 2 C, H, W] where both were asked."""
        asked = context.fixed[2]
        patches = tokens[:, TOLD:]
        if asked == "average" or self.velocity_layer is None:
            return self._velocity(self.final_layer(patches), context)
        if asked == "velocity":
            return self._velocity(self.velocity_layer(patches), context)
        first, second = patches.chunk(2)
        average, velocity = self.final_layer(first), self.velocity_layer(second)
        return torch.cat([self._velocity(average, context), self._velocity(velocity, context)], 1)

    def _velocity(self, patches: Tensor, context: StageContext) -> Tensor:
        p = self.patch_size
        out = rearrange(patches, "b (h w) (p q c) -> b c (h p) (w q)", h=self.side, w=self.side, p=p, q=p)
        return from_data(out, context) if self.predicts == "x" else out

    def _labels(self, labels: Tensor | None, x: Tensor) -> Tensor:
        if labels is not None:
            return labels
        if self.conditioning.classes:
            raise ConfigError(
                f"This {type(self).__name__} is conditioned on {self.conditioning.classes} classes: pass labels."
            )
        return torch.zeros(x.shape[0], dtype=torch.long, device=x.device)

    def float32_modules(self) -> list[nn.Module]:
        """Embedders of numbers."""
        return [self.scale_embedder, self.least_noise_embedder, self.most_noise_embedder, self.span_embedder]

    def without_training_parts(self) -> tuple[set[str], dict[str, Any]]:
        """Everything of V."""
        names = {name for name in self.state_dict() if name.startswith("velocity_layer.") or ".velocity." in name}
        return names, {"velocity_head": False} if names else {}

    # ---------------------------------------------------------------------------------------------- initialisation

    def initialise_stage(self, index: int) -> None:
        """Xavier layers, zero gates and zero outputs: training starts from F = V = 0, and every block from itself."""
        for module in self.stage_modules()[index]:
            for layer in module.modules():
                if isinstance(layer, nn.Linear):
                    nn.init.xavier_uniform_(layer.weight)
                    nn.init.zeros_(layer.bias)
                elif isinstance(layer, RMSNorm):
                    layer.reset_parameters()
                elif isinstance(layer, GatedBlock):
                    nn.init.zeros_(layer.attention_gate)
                    nn.init.zeros_(layer.feed_forward_gate)
        if index == 0:
            nn.init.xavier_uniform_(self.x_embedder.proj.weight.flatten(1))
            if self.x_embedder.proj.bias is not None:
                nn.init.zeros_(self.x_embedder.proj.bias)
            nn.init.normal_(self.y_embedder.embedding_table.weight, std=0.02)
            nn.init.normal_(self.slots.vectors, std=0.02)
            for embedder in self.float32_modules():
                for layer in cast(TimeEmbedding, embedder).layers:
                    nn.init.normal_(layer.weight, std=0.02)
        elif index > len(self.blocks):
            for outlet in (self.final_layer, self.velocity_layer):
                if outlet is not None:
                    nn.init.zeros_(outlet.linear.weight)


class Slots(nn.Module):
    """The tokens of what is told: a learned vector for each, and the embedding of the value that it says.

    Args:
        counts: of how many tokens each value has.
        hidden_size: of a token.
    """

    def __init__(self, counts: tuple[int, ...], hidden_size: int) -> None:
        super().__init__()
        self.counts = counts
        self.vectors = nn.Parameter(torch.zeros(sum(counts), hidden_size))

    def forward(self, *values: Tensor) -> Tensor:
        """Embeddings [B, D], one for each value -> tokens [B, sum of counts, D]."""
        pairs = zip(self.counts, values, strict=True)
        return torch.cat([value[:, None].expand(-1, count, -1) for count, value in pairs], 1) + self.vectors


class GatedBlock(nn.Module):
    """Attention and a gated feed-forward, each behind a learned gate per channel that is zero at first."""

    def __init__(self, hidden_size: int, num_heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.norm1 = RMSNorm(hidden_size)
        self.attn = Attention(hidden_size, num_heads, use_qknorm=True, use_rmsnorm=True)
        self.norm2 = RMSNorm(hidden_size)
        self.mlp = SwiGLU(hidden_size, int(2 / 3 * int(hidden_size * mlp_ratio)))
        self.attention_gate = nn.Parameter(torch.zeros(hidden_size))
        self.feed_forward_gate = nn.Parameter(torch.zeros(hidden_size))

    def forward(self, tokens: Tensor, context: StageContext) -> Tensor:
        rope = (context.fixed[0], context.fixed[1])
        tokens = tokens + self.attention_gate * self.attn(self.norm1(tokens), rope)
        return tokens + self.feed_forward_gate * self.mlp(self.norm2(tokens))


class TwinBlock(nn.Module):
    """A block of each of two stacks, of which those are computed that are asked; both lie side by side in the batch.

    Args:
        average, velocity: the blocks of F and of V.
        divides: whether it is the first one, which gives both stacks what comes from the trunk.
    """

    def __init__(self, average: GatedBlock, velocity: GatedBlock | None, divides: bool) -> None:
        super().__init__()
        self.average, self.velocity, self.divides = average, velocity, divides

    def forward(self, tokens: Tensor, context: StageContext) -> Tensor:
        asked = context.fixed[2]
        if asked == "average" or self.velocity is None:
            return cast(Tensor, self.average(tokens, context))
        if asked == "velocity":
            return cast(Tensor, self.velocity(tokens, context))
        first, second = (tokens, tokens) if self.divides else tokens.chunk(2)
        return torch.cat([self.average(first, context), self.velocity(second, context)])


class Outlet(nn.Module):
    """Norm and projection to patches: [B, N, D] -> [B, N, p p C]."""

    def __init__(self, hidden_size: int, out_features: int) -> None:
        super().__init__()
        self.norm = RMSNorm(hidden_size)
        self.linear = nn.Linear(hidden_size, out_features)

    def forward(self, tokens: Tensor) -> Tensor:
        return cast(Tensor, self.linear(self.norm(tokens)))
