"""SiT (arXiv 2401.08740): LightningDiT's trunk with DiT's own layers, on 4-channel latents; released key names."""

from __future__ import annotations

from typing import Literal

from flowanchor.plugins.backbones.end_time import GATE
from flowanchor.plugins.backbones.lightningdit import LightningDiT

_SIZES = {
    "XL": {"depth": 28, "hidden_size": 1152, "num_heads": 16},
    "L": {"depth": 24, "hidden_size": 1024, "num_heads": 16},
    "B": {"depth": 12, "hidden_size": 768, "num_heads": 12},
    "S": {"depth": 12, "hidden_size": 384, "num_heads": 6},
}

# The released sizes; nano is for trials.
PRESETS: dict[str, dict[str, int]] = {
    "nano": {"depth": 4, "hidden_size": 64, "patch_size": 2, "num_heads": 4},
    **{f"{name}/{patch}": {**size, "patch_size": patch} for name, size in _SIZES.items() for patch in (2, 4, 8)},
}


class SiT(LightningDiT):
    """Velocity transformer with sine-cosine positions, LayerNorm and a GELU feed-forward.

    Its convention is ours: `t = 0` is noise, time is fed unscaled, and it predicts data minus noise. The released
    networks have twice the output channels (`learn_sigma`), of which the second half is dropped.

    Args: as `LightningDiT`'s, whose other switches are off.
    """

    presets = PRESETS

    def __init__(
        self,
        input_size: int = 32,
        patch_size: int = 2,
        in_channels: int = 4,
        hidden_size: int = 1152,
        depth: int = 28,
        num_heads: int = 16,
        mlp_ratio: float = 4.0,
        num_classes: int = 1000,
        class_dropout_prob: float = 0.1,
        learn_sigma: bool = True,
        auxiliary_time_cond: bool = False,
        disable_label_dropout: bool = False,
        predicts: Literal["v", "x"] = "v",
        end_time: str | None = None,
        end_time_split: float | None = None,
        end_time_gate: float = GATE,
    ) -> None:
        super().__init__(
            input_size,
            patch_size,
            in_channels,
            hidden_size,
            depth,
            num_heads,
            mlp_ratio,
            num_classes,
            class_dropout_prob,
            learn_sigma=learn_sigma,
            auxiliary_time_cond=auxiliary_time_cond,
            disable_label_dropout=disable_label_dropout,
            predicts=predicts,
            end_time=end_time,
            end_time_split=end_time_split,
            end_time_gate=end_time_gate,
        )
