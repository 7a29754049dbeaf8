"""LightningDiT (arXiv 2501.01423): a diffusion transformer with the released options, presets and key names."""

from __future__ import annotations

from typing import Any, Literal, cast

import torch
from einops import rearrange
from torch import Tensor, nn

from flowanchor.conditioning import Classes
from flowanchor.errors import ConfigError
from flowanchor.interfaces import Backbone, Guided, StageContext
from flowanchor.velocity import from_data, known_prediction, with_sample

from .end_time import GATE, EndTime, copy_values, required
from .lightningdit_layers import (
    Block,
    FinalLayer,
    GuidanceEmbedding,
    LabelEmbedding,
    Modulation,
    PatchEmbedding,
    RMSNorm,
    RotaryPositions,
    TimeEmbedding,
    sincos_positions,
)

PRESETS: dict[str, dict[str, int]] = {
    "nano": {"depth": 4, "hidden_size": 64, "patch_size": 2, "num_heads": 4},
    "B/1": {"depth": 12, "hidden_size": 768, "patch_size": 1, "num_heads": 12},
    "B/2": {"depth": 12, "hidden_size": 768, "patch_size": 2, "num_heads": 12},
    "L/2": {"depth": 24, "hidden_size": 1024, "patch_size": 2, "num_heads": 16},
    "XL/1": {"depth": 28, "hidden_size": 1152, "patch_size": 1, "num_heads": 16},
    "XL/2": {"depth": 28, "hidden_size": 1152, "patch_size": 2, "num_heads": 16},
    "1p0B/1": {"depth": 24, "hidden_size": 1536, "patch_size": 1, "num_heads": 24},
    "1p0B/2": {"depth": 24, "hidden_size": 1536, "patch_size": 2, "num_heads": 24},
    "1p6B/1": {"depth": 28, "hidden_size": 1792, "patch_size": 1, "num_heads": 28},
    "1p6B/2": {"depth": 28, "hidden_size": 1792, "patch_size": 2, "num_heads": 28},
}


class LightningDiT(Backbone):
    """Velocity transformer on square images or latents, conditioned on a time, a class and optionally a second time.

    Args:
        input_size: height and width of a sample.
        patch_size: side of a token's patch; must divide `input_size`.
        in_channels: channels of a sample.
        hidden_size, depth, num_heads, mlp_ratio: size of the transformer.
        num_classes: number of classes; 0 for an unconditional network.
        class_dropout_prob: share of labels replaced by the null class in training; above 0, the null class has a row.
        use_qknorm, use_swiglu, use_rope, use_rmsnorm: the released switches (off: DiT's layers).
        wo_shift: adaLN without shifts.
        learn_sigma: twice the output channels, the second half of which is dropped (released checkpoints of DiT, SiT).
        auxiliary_time_cond: a second time embedder for `r`, zero at initialisation; the same as `end_time=auxiliary`.
        disable_label_dropout: keep the null class but drop no label.
        guidance_cond: embedders for guidance as an input (`Guided`), zero at initialisation.
        pixel_norm: normalise the blocks' shifts and scales over the channels, as sCM does against collapse.
        end_time: how it is told `r`: `auxiliary`, `decoupled` or `gated` (see `end_time.py`); None: not at all.
        end_time_split: of `decoupled`: how many blocks, or which share of them, are conditioned on `t`; None: 5/7.
        end_time_gate: of `gated`: the weight of what `r` says.
        time_scale: what the times are multiplied by before they are embedded.
        predicts: `v`: velocities; `x`: the data, from which the head makes velocities (`flowanchor.velocity`).
    """

    presets = PRESETS
    predictions: tuple[str, ...] = ("v", "x")

    def __init__(
        self,
        input_size: int = 32,
        patch_size: int = 2,
        in_channels: int = 32,
        hidden_size: int = 1152,
        depth: int = 28,
        num_heads: int = 16,
        mlp_ratio: float = 4.0,
        num_classes: int = 1000,
        class_dropout_prob: float = 0.1,
        use_qknorm: bool = False,
        use_swiglu: bool = False,
        use_rope: bool = False,
        use_rmsnorm: bool = False,
        wo_shift: bool = False,
        learn_sigma: bool = False,
        auxiliary_time_cond: bool = False,
        disable_label_dropout: bool = False,
        pixel_norm: bool = False,
        end_time: str | None = None,
        end_time_split: float | None = None,
        end_time_gate: float = GATE,
        predicts: Literal["v", "x"] = "v",
        guidance_cond: bool = False,
        time_scale: float = 1.0,
    ) -> None:
        super().__init__()
        self.predicts = known_prediction(predicts, self, self.predictions)
        check_sizes(input_size, patch_size, hidden_size, num_heads, use_rope)
        if depth < 1:
            raise ConfigError(f"backbone.depth={depth} is too small: a transformer needs at least one block.")
        if not time_scale > 0:
            raise ConfigError(f"backbone.time_scale={time_scale} must be above 0: 1 feeds the time as it is.")
        if not 0 <= class_dropout_prob <= 1:
            raise ConfigError(f"backbone.class_dropout_prob={class_dropout_prob} must be a share between 0 and 1.")
        self.side = input_size // patch_size
        self.patch_size = patch_size
        self.in_channels = in_channels
        self.learn_sigma = learn_sigma
        self.sample_shape = (in_channels, input_size, input_size)
        null = class_dropout_prob > 0
        if num_classes:
            self.conditioning = Classes(num_classes, null, 0.0 if disable_label_dropout else class_dropout_prob)
        self._meaning = {"": "sit", "time_scale": float(time_scale), "num_heads": num_heads, "pixel_norm": pixel_norm}
        self.told_end = EndTime.of(end_time, end_time_split, end_time_gate, depth, auxiliary_time_cond)
        self.end_time, self.takes_end_time = self.told_end.way, self.told_end.way is not None
        self.takes_guidance = guidance_cond
        late = int(self.end_time == "decoupled")  # which of the carried conditions the later part reads

        self.x_embedder = PatchEmbedding(patch_size, in_channels, hidden_size)
        self.t_embedder = TimeEmbedding(hidden_size, time_scale)
        self.r_embedder = TimeEmbedding(hidden_size, time_scale) if self.told_end.needs_embedder else None
        self.guidance_embedder = GuidanceEmbedding(hidden_size) if guidance_cond else None
        rows = num_classes + int(null)
        self.y_embedder = LabelEmbedding(rows, hidden_size) if rows else None
        self.pos_embed = nn.Parameter(torch.zeros(1, self.side**2, hidden_size), requires_grad=False)
        self.feat_rope = RotaryPositions(hidden_size // num_heads, self.side) if use_rope else None
        self.blocks = nn.ModuleList(
            Block(
                hidden_size,
                num_heads,
                mlp_ratio,
                use_qknorm,
                use_swiglu,
                use_rmsnorm,
                wo_shift,
                pixel_norm,
                late if index >= self.told_end.first else 0,
            )
            for index in range(depth)
        )
        out_channels = 2 * in_channels if learn_sigma else in_channels
        self.final_layer = FinalLayer(hidden_size, patch_size**2 * out_channels, use_rmsnorm, late)
        self.initialise()

    @classmethod
    def from_preset(cls, preset: str, **settings: Any) -> LightningDiT:
        """A preset by name (`XL/1`, `nano`, ...); any setting that is not None replaces the preset's value."""
        if preset not in cls.presets:
            raise ConfigError(f"Unknown {cls.__name__} preset '{preset}': choose one of {', '.join(cls.presets)}.")
        chosen = {name: value for name, value in settings.items() if value is not None}
        return cls(**{**cls.presets[preset], **chosen})

    def meaning(self) -> dict[str, Any]:
        """SiT is this network with all switches off; only then do their weights fit each other."""
        return {**super().meaning(), **self._meaning, **self.told_end.meaning()}

    # ----------------------------------------------------------------------------------------------------- stages

    def embed(self, x: Tensor, t: Tensor, cond: Any, r: Tensor | None = None) -> tuple[Tensor, StageContext]:
        """x [B, C, H, W], t [B], labels [B] or `Guided`, r [B] -> tokens [B, N, D] and the context.

        Context: the condition c [B, D], and a second one for the later blocks where those are decoupled; rotary tables.
        """
        tokens = self.x_embedder(x) + self.pos_embed
        conditions = [self.t_embedder(t)]
        if self.r_embedder is not None:
            conditions = [self.told_end.embedded(conditions[0], self.r_embedder(required(r, self)))]
        elif self.end_time == "decoupled":
            conditions.append(self.t_embedder(required(r, self)))
        if self.guidance_embedder is not None:
            cond, scale, low, high, _ = Guided.of(cond, t)
            guidance = self.guidance_embedder(scale, low, high)
            conditions = [c + guidance for c in conditions]
        if self.y_embedder is not None:
            labels = self.y_embedder(self._labels(cond, x))
            conditions = [c + labels for c in conditions]
        fixed = () if self.feat_rope is None else (self.feat_rope.freqs_cos, self.feat_rope.freqs_sin)
        context = StageContext(carried=tuple(conditions), fixed=fixed)
        return tokens, with_sample(context, x, t) if self.predicts == "x" else context

    def head(self, tokens: Tensor, context: StageContext) -> Tensor:
        """Tokens [B, N, D] -> velocity [B, C, H, W]."""
        patches = self.final_layer(tokens, context)
        p = self.patch_size
        out = rearrange(patches, "b (h w) (p q c) -> b c (h p) (w q)", h=self.side, w=self.side, p=p, q=p)
        out = out[:, : self.in_channels] if self.learn_sigma else out
        return from_data(out, context) if self.predicts == "x" else out

    def float32_modules(self) -> list[nn.Module]:
        """Embedders of times, and every modulation."""
        embedders = (self.t_embedder, self.r_embedder, self.guidance_embedder)
        times = [embedder for embedder in embedders if embedder is not None]
        return [*times, *(module for module in self.modules() if isinstance(module, Modulation))]

    def copies(self) -> dict[str, str]:
        """The embedder of the end, gated, starts as that of the time."""
        names = [name for name in self.state_dict() if name.startswith("r_embedder.") and self.end_time == "gated"]
        return {name: name.replace("r_embedder.", "t_embedder.", 1) for name in names}

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None, r: Tensor | None = None) -> Tensor:
        """x [B, C, H, W], t [B], labels y [B], r [B] -> velocity [B, C, H, W]; drops labels in training mode."""
        return super().forward(x, t, y, r)

    def _labels(self, cond: Tensor | None, x: Tensor) -> Tensor:
        if cond is not None:
            return cond
        if self.conditioning.classes:
            raise ConfigError(
                f"This {type(self).__name__} is conditioned on {self.conditioning.classes} classes: pass labels."
            )
        return torch.zeros(x.shape[0], dtype=torch.long, device=x.device)

    # ---------------------------------------------------------------------------------------------- initialisation

    def initialise_stage(self, index: int) -> None:
        """DiT's initialisation: Xavier layers, zero gates and zero output, so that training starts from v = 0."""
        for module in self.stage_modules()[index]:
            for layer in module.modules():
                if isinstance(layer, nn.Linear):
                    nn.init.xavier_uniform_(layer.weight)
                    nn.init.zeros_(layer.bias)
                elif isinstance(layer, (nn.LayerNorm, RMSNorm)) and layer.weight is not None:
                    layer.reset_parameters()
        if index == 0:
            self._initialise_embedders()
            return
        last = self.final_layer if index > len(self.blocks) else cast(Block, self.blocks[index - 1])
        nn.init.zeros_(cast(nn.Linear, last.adaLN_modulation[-1]).weight)
        if last is self.final_layer:
            nn.init.zeros_(self.final_layer.linear.weight)

    def _initialise_embedders(self) -> None:
        nn.init.xavier_uniform_(self.x_embedder.proj.weight.flatten(1))
        if self.x_embedder.proj.bias is not None:
            nn.init.zeros_(self.x_embedder.proj.bias)
        self.pos_embed.data.copy_(sincos_positions(self.pos_embed.shape[-1], self.side)[None])
        if self.y_embedder is not None:
            nn.init.normal_(self.y_embedder.embedding_table.weight, std=0.02)
        for layer in self.t_embedder.layers:
            nn.init.normal_(layer.weight, std=0.02)
        if self.r_embedder is not None and self.end_time == "gated":
            copy_values(self.t_embedder, into=self.r_embedder)
        elif self.r_embedder is not None:
            first, last = self.r_embedder.layers
            nn.init.normal_(first.weight, std=0.02)
            nn.init.zeros_(last.weight)
        for embedder in [] if self.guidance_embedder is None else self.guidance_embedder.embedders:
            nn.init.normal_(embedder.layers[0].weight, std=0.02)
            nn.init.zeros_(embedder.layers[1].weight)


def check_sizes(input_size: int, patch_size: int, hidden_size: int, num_heads: int, use_rope: bool) -> None:
    sizes = {"input_size": input_size, "patch_size": patch_size, "hidden_size": hidden_size, "num_heads": num_heads}
    for name, size in sizes.items():
        if size < 1:
            raise ConfigError(f"backbone.{name}={size} must be at least 1.")
    if input_size % patch_size:
        divisors = [p for p in range(1, input_size + 1) if input_size % p == 0]
        raise ConfigError(
            f"The sample size {input_size} is not divisible by backbone.patch_size={patch_size}: "
            f"choose a patch size among {', '.join(map(str, divisors))}."
        )
    if hidden_size % num_heads:
        raise ConfigError(
            f"backbone.hidden_size={hidden_size} is not divisible by backbone.num_heads={num_heads}: change either."
        )
    if hidden_size % 4:
        raise ConfigError(f"backbone.hidden_size={hidden_size} must be a multiple of 4 for the position table.")
    if use_rope and (hidden_size // num_heads) % 4:
        raise ConfigError(
            f"Rotary positions need a head size that is a multiple of 4, and {hidden_size} / {num_heads} heads is "
            f"{hidden_size // num_heads}: change backbone.num_heads or set backbone.use_rope=false."
        )
