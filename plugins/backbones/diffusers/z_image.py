"""Z-Image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from flowanchor.errors import ConfigError
from flowanchor.plugins.backbones.diffusers.description import ATTENTION, Description
from flowanchor.plugins.backbones.diffusers.pipelines import Pipeline
from flowanchor.plugins.backbones.diffusers.texts import MaskedTokens

PATCH = "2-1"  # of 2 x 2 positions and one frame: the name of its layers


class ZImage(Description):
    """Latents [16, h, w]; text of Qwen3 (512 tokens). It is told our time as it is, and predicts data minus noise."""

    stock = "ZImageTransformer2DModel"
    pipeline = Pipeline("ZImagePipeline", "ZImageLoraLoaderMixin", unguided="guidance_scale=0")
    targets = (*ATTENTION, "feed_forward.w1", "feed_forward.w2", "feed_forward.w3")
    lead = ("noise_refiner",)
    blocks = ("layers",)
    streams = ("x",)
    carried = ("adaln_input",)
    ends = ("all_final_layer",)
    last = f"all_final_layer.{PATCH}.linear"
    time = "t_embedder.mlp"
    sign = 1
    size_steps = (2, 2)
    longest = {"tokens": 512, "mask": 512}

    def check(self, config: Any) -> None:
        if config.siglip_feat_dim is not None or (2 not in config.all_patch_size) or (1 not in config.all_f_patch_size):
            raise ConfigError("This Z-Image sees images, or has no patches of 2 x 2: give one of text alone.")

    def channels(self, config: Any) -> int:
        return int(config.in_channels)

    def level(self, config: Any, t: Tensor) -> Tensor:
        return t * config.t_scale / 1000

    def null(self, config: Any) -> MaskedTokens:
        return MaskedTokens(torch.zeros(1, config.cap_feat_dim), torch.ones(1, dtype=torch.bool))

    def inputs(self, network: Any, x: Tensor, t: Tensor, cond: MaskedTokens) -> dict[str, Any]:
        """Each text in its own length: the network fills them up itself."""
        texts = [tokens[mask.nonzero()[:, 0]] for tokens, mask in zip(cond.tokens, cond.mask, strict=True)]
        return {"x": list(x[:, :, None].unbind()), "t": t, "cap_feats": texts}

    def head(self, network: Any, tokens: Tensor, values: Mapping[str, Any], shape: Sequence[int]) -> Tensor:
        out = network.all_final_layer[PATCH](tokens, c=values["adaln_input"])
        return torch.stack(network.unpatchify(list(out.unbind()), [(1, *shape[2:])] * shape[0], 2, 1))[:, :, 0]
