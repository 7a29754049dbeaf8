"""Wan 2.1 and 2.2 (arXiv 2503.20314) as a chain of stages, of the layers of `diffusers.WanTransformer3DModel`.

State-dict keys are diffusers'; `checkpoints/wan_folder.py` opens released and diffusers folders. What is ours is the
language spoken outside: time 0 is noise and 1 is data, and the prediction is the velocity. `timesteps` and `head` are
where that is translated into Wan's: sigma = 1 - t, timesteps 1000 sigma, noise minus data.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal, cast

import torch
from diffusers import WanTransformer3DModel
from diffusers.models.embeddings import TimestepEmbedding
from diffusers.models.normalization import FP32LayerNorm
from diffusers.models.transformers.transformer_wan import (
    WanRotaryPosEmbed,
    WanTimeTextImageEmbedding,
    WanTransformerBlock,
)
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from flowanchor.conditioning import Text
from flowanchor.errors import ConfigError
from flowanchor.interfaces import Backbone, StageContext
from flowanchor.jvp.smoothing import smoothed
from flowanchor.plugins.backbones.diffusers.pipelines import WAN
from flowanchor.plugins.backbones.end_time import GATE, EndTime, copy_values, required
from flowanchor.plugins.backbones.lora import (
    adapted_layers,
    adapter_parts,
    add_adapters,
    initialise_adapter,
    is_adapter,
    merged,
    stage_adapters,
    switch,
)
from flowanchor.plugins.backbones.lora_files import factors
from flowanchor.text.base import Tokens
from flowanchor.velocity import from_data, known_prediction, with_sample

WAN_TIMESTEPS = 1000.0

# The sizes of the released networks. A14B: each of its two experts.
PRESETS: dict[str, dict[str, Any]] = {
    "nano": {"num_attention_heads": 4, "attention_head_dim": 24, "ffn_dim": 256, "num_layers": 6, "freq_dim": 64},
    "1.3B": {"num_attention_heads": 12, "attention_head_dim": 128, "ffn_dim": 8960, "num_layers": 30},
    "5B": {"num_attention_heads": 24, "attention_head_dim": 128, "ffn_dim": 14336, "num_layers": 30},
    "A14B": {"num_attention_heads": 40, "attention_head_dim": 128, "ffn_dim": 13824, "num_layers": 40},
}


def timesteps(t: Tensor) -> Tensor:
    """Times t [B] -> Wan's timesteps `1000 (1 - t)` [B]; the anchor's half (1, 2] becomes negative ones."""
    return WAN_TIMESTEPS * (1 - t)


class Wan(Backbone):
    """Velocity network of Wan on latents [B, C, F, h, w]; an image is one frame. Conditioned on `Tokens`
    [B, L, text_dim].

    Args:
        in_channels: of a latent (Wan 2.1 and A14B: 16; TI2V-5B: 48).
        frames, height, width: of the latents it draws unless told otherwise; any other size works too.
        num_attention_heads, attention_head_dim, ffn_dim, num_layers, freq_dim, text_dim: as in diffusers.
        patch_size, cross_attn_norm, qk_norm, eps, rope_max_seq_len: as in diffusers.
        text_len: tokens of the text after padding with zeros; the padding is not masked, as released.
        condition_dropout: share of prompts that training replaces by the negative prompt.
        auxiliary_time_cond: a second time embedder for `r`, zero at initialisation; the same as `end_time=auxiliary`.
        tangent_smoothing: standard deviation, in units of t, over which the derivative of the time embedding is
            averaged; 0: the exact one. An embedding of 1,000 timesteps turns within a step of 0.001 of t, and a
            shortcut that learns from the derivative of that feeds on itself (docs/wan.md).
        predicts: `v`: velocities; `x`: the data, from which the head makes velocities (`flowanchor.velocity`).
        lora: `{rank, alpha, targets}`: train adapters only (`lora.add_adapters`); null, or a null rank: all weights.
        end_time: how it is told `r`: `auxiliary`, `decoupled` or `gated` (see `end_time.py`); None: not at all.
        end_time_split: of `decoupled`: how many blocks, or which share of them, are conditioned on `t`; None: 5/7.
        end_time_gate: of `gated`: the weight of what `r` says.

    Raises `ConfigError` for sizes that do not fit together.
    """

    presets = PRESETS
    any_size = True
    pipeline = WAN  # what draws by it in diffusers, and how that reads LoRA files

    def __init__(
        self,
        in_channels: int = 16,
        frames: int = 1,
        height: int = 60,
        width: int = 104,
        num_attention_heads: int = 40,
        attention_head_dim: int = 128,
        ffn_dim: int = 13824,
        num_layers: int = 40,
        freq_dim: int = 256,
        text_dim: int = 4096,
        text_len: int = 512,
        patch_size: Sequence[int] = (1, 2, 2),
        cross_attn_norm: bool = True,
        qk_norm: str = "rms_norm_across_heads",
        eps: float = 1e-6,
        rope_max_seq_len: int = 1024,
        condition_dropout: float = 0.0,
        auxiliary_time_cond: bool = False,
        tangent_smoothing: float = 0.0,
        lora: Mapping[str, Any] | None = None,
        predicts: Literal["v", "x"] = "v",
        end_time: str | None = None,
        end_time_split: float | None = None,
        end_time_gate: float = GATE,
    ) -> None:
        super().__init__()
        self.predicts = known_prediction(predicts, self)
        self.patch_size = (int(patch_size[0]), int(patch_size[1]), int(patch_size[2]))
        self.text_len, self.text_dim = text_len, text_dim
        self.conditioning = Text(Tokens(torch.zeros(1, text_dim)), {"tokens": text_len}, condition_dropout)
        self.size_steps = self.patch_size[1:]
        self.tangent_smoothing = float(tangent_smoothing)
        self.sample_shape = (in_channels, frames, height, width)
        _check_sizes(self.sample_shape, self.patch_size, attention_head_dim, num_layers, condition_dropout)
        if not 0 <= self.tangent_smoothing < 0.5:
            raise ConfigError(
                f"backbone.tangent_smoothing={tangent_smoothing} is a width in time, a small part of 1: use for "
                "example 0.01, or 0 for exact tangents."
            )
        self.told_end = EndTime.of(end_time, end_time_split, end_time_gate, num_layers, auxiliary_time_cond)
        self.end_time, self.takes_end_time = self.told_end.way, self.told_end.way is not None
        # What a stock network of the same weights is built with (`transformer`).
        self.settings = {
            "patch_size": self.patch_size, "num_attention_heads": num_attention_heads,
            "attention_head_dim": attention_head_dim, "in_channels": in_channels, "out_channels": in_channels,
            "text_dim": text_dim, "freq_dim": freq_dim, "ffn_dim": ffn_dim, "num_layers": num_layers,
            "cross_attn_norm": cross_attn_norm, "qk_norm": qk_norm, "eps": eps, "rope_max_seq_len": rope_max_seq_len,
        }  # fmt: skip

        dim = num_attention_heads * attention_head_dim
        self.rope = WanRotaryPosEmbed(attention_head_dim, self.patch_size, rope_max_seq_len)
        self.patch_embedding = nn.Conv3d(in_channels, dim, kernel_size=self.patch_size, stride=self.patch_size)
        self.condition_embedder = WanTimeTextImageEmbedding(dim, freq_dim, 6 * dim, text_dim)
        self.r_embedder = TimestepEmbedding(freq_dim, dim) if self.told_end.needs_embedder else None
        self.blocks = nn.ModuleList(
            WanBlock(dim, ffn_dim, num_attention_heads, qk_norm, cross_attn_norm, eps) for _ in range(num_layers)
        )
        for block in self.blocks[self.told_end.first :]:
            cast(WanBlock, block).reads = 2
        self.norm_out = FP32LayerNorm(dim, eps, elementwise_affine=False)
        self.proj_out = nn.Linear(dim, in_channels * math.prod(self.patch_size))
        self.scale_shift_table = nn.Parameter(torch.empty(1, 2, dim))
        self.adapted = lora is not None and lora.get("rank") is not None
        if self.adapted:
            add_adapters(self, cast(Mapping[str, Any], lora))
            if self.r_embedder is not None:
                self.r_embedder.requires_grad_(True)
        self.embed_adapters, *inner, self.head_adapters = stage_adapters(self.stage_modules())
        for block, layers in zip(self.blocks, inner, strict=True):
            cast(WanBlock, block).adapters = layers
        self.initialise()

    def meaning(self) -> dict[str, Any]:
        return {
            **super().meaning(), **self.told_end.meaning(),
            "num_attention_heads": self.settings["num_attention_heads"], "eps": self.settings["eps"],
        }  # fmt: skip

    @classmethod
    def from_preset(cls, preset: str, **settings: Any) -> Wan:
        """A size by name (`nano`, `1.3B`, `5B`, `A14B`); any setting that is not None replaces the preset's value."""
        if preset not in cls.presets:
            raise ConfigError(f"Unknown {cls.__name__} preset '{preset}': choose one of {', '.join(cls.presets)}.")
        chosen = {name: value for name, value in settings.items() if value is not None}
        return cls(**{**cls.presets[preset], **chosen})

    def transformer(self) -> WanTransformer3DModel:
        """A stock diffusers network that shares these weights (adapters are added to them); nothing of `r` is in it."""
        with torch.device("meta"):
            stock: Any = WanTransformer3DModel(**self.settings)
        stock.rope = self.rope  # its tables are no weights
        own = {name: tensor for name, tensor in merged(self).items() if not name.startswith("r_embedder.")}
        stock.load_state_dict(own, assign=True)
        return cast(WanTransformer3DModel, stock.eval())

    # ----------------------------------------------------------------------------------------------------- stages

    def embed(self, x: Tensor, t: Tensor, cond: Tokens | None, r: Tensor | None = None) -> tuple[Tensor, StageContext]:
        """x [B, C, F, h, w], t [B], text [B, L, text_dim], r [B] -> tokens [B, N, D] and the context.

        Context: what the time adds to the head [B, D] and to every block [B, 6, D], and to the later blocks where those
        are decoupled; text [B, text_len, D], rotary tables, tokens per axis, whether adapters are on.
        """
        if x.ndim != 5:
            raise ConfigError(
                f"Wan reads latents [B, C, frames, h, w], and these have shape {tuple(x.shape)}: use data=captions."
            )
        if any(size % patch for size, patch in zip(x.shape[2:], self.patch_size, strict=True)):
            raise ConfigError(
                f"Latents of {' x '.join(map(str, x.shape[2:]))} cannot be cut into patches of "
                f"{' x '.join(map(str, self.patch_size))}: choose images whose sides are multiples of 16."
            )
        grid = tuple(size // patch for size, patch in zip(x.shape[2:], self.patch_size, strict=True))
        switch(self.embed_adapters, self.adapters_on)
        with _exact(x):
            tokens = self.patch_embedding(x).flatten(2).transpose(1, 2).contiguous()
            added = self._time(t, r)
            late = None
            if self.end_time == "decoupled":
                late = self._embedded(required(r, self) if self.adapters_on else t)
            text = self.condition_embedder.text_embedder(self._padded(cond, x))
            cos, sin = self.rope(x)
        carried: tuple[Tensor, ...] = (added, self._modulation(added))
        if late is not None:
            carried = (late, carried[1], self._modulation(late))
        context = StageContext(carried=carried, fixed=(text, cos, sin, grid, self.adapters_on))
        return tokens, with_sample(context, x, t) if self.predicts == "x" else context

    def head(self, tokens: Tensor, context: StageContext, table: Tensor | None = None) -> Tensor:
        """Tokens [B, N, D] -> velocity [B, C, F, h, w]: data minus noise, the negative of what Wan predicts.

        `table`: the modulation's own [1, 2, D], where the caller holds it.
        """
        shift, scale = ((self.scale_shift_table if table is None else table) + context.carried[0][:, None]).chunk(
            2, dim=1
        )
        switch(self.head_adapters, context.fixed[4])
        with _exact(tokens):
            patches = self.proj_out((self.norm_out(tokens.float()) * (1 + scale) + shift).type_as(tokens))
        frames, rows, columns = context.fixed[3]
        out = patches.unflatten(1, (frames, rows, columns)).unflatten(4, (*self.patch_size, -1))
        out = out.permute(0, 7, 1, 4, 2, 5, 3, 6)  # b c f pf h ph w pw
        out = -out.flatten(6, 7).flatten(4, 5).flatten(2, 3)
        return from_data(out, context) if self.predicts == "x" else out

    def float32_modules(self) -> list[nn.Module]:
        """Embedders of times and the projection that makes the modulation of them."""
        embedder = self.condition_embedder
        times = [embedder.time_embedder, embedder.time_proj]
        return times if self.r_embedder is None else [*times, self.r_embedder]

    def whole_parameters(self) -> list[nn.Parameter]:
        """The modulation tables of the blocks: 6 values per channel, which stay in float32."""
        return [cast(WanBlock, block).scale_shift_table for block in self.blocks]

    def copies(self) -> dict[str, str]:
        """The embedder of the end, gated, starts as that of the time."""
        names = [name for name in self.state_dict() if name.startswith("r_embedder.") and self.end_time == "gated"]
        return {name: name.replace("r_embedder.", "condition_embedder.time_embedder.", 1) for name in names}

    def borrowed(self) -> set[str]:
        """With adapters: everything that they stand beside."""
        if not self.adapted:
            return set()
        return {name for name in self.state_dict() if not is_adapter(name) and not name.startswith("r_embedder.")}

    @contextmanager
    def without_adapters(self) -> Iterator[None]:
        with super().without_adapters():
            yield
        switch(tuple(adapted_layers(self).values()), True)  # as whoever runs the layers by himself expects them

    def lora_factors(
        self, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], source: object
    ) -> dict[str, tuple[Tensor, Tensor]]:
        return factors(self.pipeline, tensors, metadata, source)

    def _time(self, t: Tensor, r: Tensor | None) -> Tensor:
        """[B, D], float32 or better whatever autocast says."""
        added = self._embedded(t)
        if self.r_embedder is None or not self.adapters_on:
            return added
        with torch.autocast(t.device.type, enabled=False):
            return self.told_end.embedded(added, self.r_embedder(self._waves(required(r, self))))

    def _embedded(self, t: Tensor) -> Tensor:
        """What the embedder of times says of one, [B] -> [B, D]."""
        with torch.autocast(t.device.type, enabled=False):
            return cast(Tensor, self.condition_embedder.time_embedder(self._waves(t)))

    def _modulation(self, added: Tensor) -> Tensor:
        """[B, D] -> [B, 6, D]."""
        with torch.autocast(added.device.type, enabled=False):
            return self.condition_embedder.time_proj(functional.silu(added)).unflatten(1, (6, -1))

    def _waves(self, t: Tensor) -> Tensor:
        """Times [B] -> sinusoids [B, freq_dim], of the same frequencies in both halves."""
        weight = self.condition_embedder.time_embedder.linear_1.weight
        half = cast(int, self.settings["freq_dim"]) // 2
        turns = WAN_TIMESTEPS * 10_000.0 ** -(torch.arange(half, device=t.device) / half)  # radians per unit of t
        return smoothed(
            lambda t: self.condition_embedder.timesteps_proj(timesteps(t)).to(weight.dtype),
            t, turns.repeat(2), self.tangent_smoothing,
        )  # fmt: skip

    def _padded(self, cond: Tokens | None, x: Tensor) -> Tensor:
        """Text [B, L, text_dim] -> [B, text_len, text_dim], zeros behind it."""
        if not isinstance(cond, Tokens):
            raise ConfigError("Wan is conditioned on text: pass Tokens([B, L, text_dim]) (zeros: no prompt).")
        text = cond.tokens
        if text.ndim != 3 or text.shape[-1] != self.text_dim or text.shape[1] > self.text_len:
            raise ConfigError(
                f"Text embeddings of shape {tuple(text.shape)} do not fit this Wan, which reads [B, up to "
                f"{self.text_len}, {self.text_dim}]: encode the prompts with the text encoder that it was trained with."
            )
        return functional.pad(text, (0, 0, 0, self.text_len - text.shape[1])).to(x.dtype)

    # ---------------------------------------------------------------------------------------------- initialisation

    def initialise_stage(self, index: int) -> None:
        """Xavier layers, a head of zeros, so that training starts from v = 0; modulation tables as released."""
        for module in self.stage_modules()[index]:
            adapters, adapted = adapter_parts(module), set(adapted_layers(module).values())
            for layer in module.modules():
                if layer in adapted:
                    initialise_adapter(layer)
                elif isinstance(layer, nn.Linear) and layer not in adapters:
                    nn.init.xavier_uniform_(layer.weight)
                    nn.init.zeros_(layer.bias)
                elif isinstance(layer, nn.Conv3d):
                    nn.init.xavier_uniform_(layer.weight.flatten(1))
                    if layer.bias is not None:
                        nn.init.zeros_(layer.bias)
                elif isinstance(layer, (nn.RMSNorm, nn.LayerNorm)) and layer.weight is not None:
                    layer.reset_parameters()
                elif isinstance(layer, WanBlock):
                    _draw_table(layer.scale_shift_table)
        if index == 0:
            embedder = self.condition_embedder
            for layers in (embedder.time_embedder, embedder.text_embedder, self.r_embedder):
                if layers is not None:
                    nn.init.normal_(layers.linear_1.weight, std=0.02)
                    nn.init.normal_(layers.linear_2.weight, std=0.02)
            if self.r_embedder is not None and self.end_time == "gated":
                copy_values(embedder.time_embedder, into=self.r_embedder)
            elif self.r_embedder is not None:
                nn.init.zeros_(self.r_embedder.linear_2.weight)
            _draw_table(self.scale_shift_table)
        elif index > len(self.blocks):
            nn.init.zeros_(self.proj_out.weight)


class WanBlock(WanTransformerBlock):
    """diffusers' block (self-attention, cross-attention to the text, feed-forward) as a stage."""

    reads = 1  # which of the carried tensors modulates it
    adapters: tuple[Any, ...] = ()  # its layers that have an adapter

    def forward(self, tokens: Tensor, context: StageContext) -> Tensor:  # type: ignore[override]
        """Tokens [B, N, D] -> tokens [B, N, D]."""
        text, cos, sin = context.fixed[:3]
        switch(self.adapters, context.fixed[4])
        with _exact(tokens):
            return super().forward(tokens, text, context.carried[self.reads], cast(Tensor, (cos, sin)))


class _KeepDouble(TorchFunctionMode):
    """diffusers widens to float32 by `.float()`; what is float64 already must not be narrowed by it.

    The tensors of a tracer call it `.to(dtype=torch.float32)`.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        narrows = func is Tensor.float or func is Tensor.to and (kwargs or {}).get("dtype") is torch.float32
        if narrows and args[0].dtype == torch.float64:
            return args[0]
        return func(*args, **(kwargs or {}))


def _exact(tensor: Tensor) -> AbstractContextManager[Any]:
    return _KeepDouble() if tensor.dtype == torch.float64 else nullcontext()


def _draw_table(table: nn.Parameter) -> None:
    nn.init.normal_(table, std=table.shape[-1] ** -0.5)


def _check_sizes(
    shape: tuple[int, ...], patch: tuple[int, int, int], head_dim: int, layers: int, dropout: float
) -> None:
    if any(size % p or size < 1 for size, p in zip(shape[1:], patch, strict=True)):
        raise ConfigError(
            f"Latents of {' x '.join(map(str, shape[1:]))} (frames, height, width) cannot be cut into patches of "
            f"{' x '.join(map(str, patch))}: choose multiples of them."
        )
    if head_dim % 2:
        raise ConfigError(f"backbone.attention_head_dim={head_dim} must be even: rotary positions turn pairs.")
    if layers < 1:
        raise ConfigError(f"backbone.num_layers={layers} is too small: a transformer needs at least one block.")
    if not 0 <= dropout <= 1:
        raise ConfigError(f"backbone.condition_dropout={dropout} must be a share between 0 and 1.")
