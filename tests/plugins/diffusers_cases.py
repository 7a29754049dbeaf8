"""Tiny random networks of each described class of diffusers, a condition of two samples for each, and how a script asks
the stock network: written out by hand (einops), in the conventions of diffusers' own pipelines.

    python diffusers_cases.py RANK STORE RESULT NAME...     # one of two processes: sharded against whole
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import torch
import torch.distributed as dist
from einops import rearrange
from torch import Tensor
from torch.utils._pytree import tree_map

from flowanchor.interfaces import Question
from flowanchor.jvp import Chain
from flowanchor.plugins.backbones.diffusers.description import Description
from flowanchor.plugins.backbones.diffusers.flux import Flux1
from flowanchor.plugins.backbones.diffusers.flux2 import Flux2
from flowanchor.plugins.backbones.diffusers.hunyuan_video15 import HunyuanVideo15
from flowanchor.plugins.backbones.diffusers.krea2 import Krea2
from flowanchor.plugins.backbones.diffusers.ltx_video import LTXVideo
from flowanchor.plugins.backbones.diffusers.network import DiffusersTransformer
from flowanchor.plugins.backbones.diffusers.pixart import PixArt
from flowanchor.plugins.backbones.diffusers.qwen_image import QwenImage
from flowanchor.plugins.backbones.diffusers.sana import Sana
from flowanchor.plugins.backbones.diffusers.sd3 import StableDiffusion3
from flowanchor.plugins.backbones.diffusers.texts import MaskedTokens, PooledTokens, TwoTexts
from flowanchor.plugins.backbones.diffusers.z_image import ZImage
from flowanchor.text.base import Tokens
from flowanchor.weights import local, own_part

diffusers.logging.set_verbosity_error()
HEADS = {"attention_head_dim": 16, "num_attention_heads": 2}
LENGTH = 5  # tokens of the longer text


def mask(*lengths: int) -> Tensor:
    return torch.arange(max(lengths))[None] < torch.tensor(lengths)[:, None]


def masked(width: int | tuple[int, ...], *lengths: int) -> MaskedTokens:
    kept = mask(*lengths)
    widths = (width,) if isinstance(width, int) else width
    tokens = torch.randn(2, kept.shape[1], *widths)
    return MaskedTokens(tokens * kept.view(2, -1, *[1] * len(widths)), kept)


def square_ids(rows: int, columns: int, width: int = 3) -> Tensor:
    where = torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).float()
    return torch.nn.functional.pad(where, (1, width - 3))


PACK = "b c (h p) (w q) -> b (h w) (c p q)"
UNPACK = "b (h w) (c p q) -> b c (h p) (w q)"


def sd3(network: Any, x: Tensor, t: Tensor, c: PooledTokens) -> Tensor:
    return -network(x, c.tokens, c.pooled, 1000 * (1 - t), return_dict=False)[0]


def flux(network: Any, x: Tensor, t: Tensor, c: PooledTokens) -> Tensor:
    out = network(
        rearrange(x, PACK, p=2, q=2), c.tokens, c.pooled, 1 - t, square_ids(4, 4), torch.zeros(LENGTH, 3),
        torch.full_like(t, 3.5) if network.config.guidance_embeds else None, return_dict=False,
    )[0]  # fmt: skip
    return -rearrange(out, UNPACK, p=2, q=2, h=4)


def flux2(network: Any, x: Tensor, t: Tensor, c: Tokens) -> Tensor:
    text = torch.zeros(LENGTH, 4)
    text[:, 3] = torch.arange(LENGTH)
    out = network(
        hidden_states=rearrange(x, "b c h w -> b (h w) c"), encoder_hidden_states=c.tokens, timestep=1 - t,
        img_ids=square_ids(4, 4, 4), txt_ids=text, guidance=torch.full_like(t, 4.0), return_dict=False,
    )[0]  # fmt: skip
    return -rearrange(out, "b (h w) c -> b c h w", h=4)


def qwen_image(network: Any, x: Tensor, t: Tensor, c: MaskedTokens) -> Tensor:
    out = network(
        hidden_states=rearrange(x, PACK, p=2, q=2), encoder_hidden_states=c.tokens, timestep=1 - t,
        encoder_hidden_states_mask=None if c.mask.all() else c.mask, img_shapes=[[(1, 4, 4)]] * 2, return_dict=False,
    )[0]  # fmt: skip
    return -rearrange(out, UNPACK, p=2, q=2, h=4)


def z_image(network: Any, x: Tensor, t: Tensor, c: MaskedTokens) -> Tensor:
    texts = [tokens[: int(kept.sum())] for tokens, kept in zip(c.tokens, c.mask, strict=True)]
    return torch.stack(network([one[:, None] for one in x], t, texts, return_dict=False)[0])[:, :, 0]


def sana(network: Any, x: Tensor, t: Tensor, c: MaskedTokens) -> Tensor:
    kept = None if c.mask.all() else c.mask
    return -network(x, c.tokens, 1000 * (1 - t), encoder_attention_mask=kept, return_dict=False)[0]


def pixart(network: Any, x: Tensor, t: Tensor, c: MaskedTokens) -> Tensor:
    none = {"resolution": None, "aspect_ratio": None}
    return -network(
        x, c.tokens, 1000 * (1 - t), encoder_attention_mask=c.mask, added_cond_kwargs=none, return_dict=False
    )[0]


def ltx_video(network: Any, x: Tensor, t: Tensor, c: MaskedTokens, scale: Any = (8 / 25, 32, 32)) -> Tensor:
    out = network(
        rearrange(x, "b c f h w -> b (f h w) c"), c.tokens, 1000 * (1 - t), c.mask, num_frames=2, height=4, width=4,
        rope_interpolation_scale=scale, return_dict=False,
    )[0]  # fmt: skip
    return -rearrange(out, "b (f h w) c -> b c f h w", f=2, h=4)


def hunyuan_video15(network: Any, x: Tensor, t: Tensor, c: TwoTexts) -> Tensor:
    """With image tokens of zeros, masked by the network itself, as its pipeline gives them."""
    still = torch.cat([x, torch.zeros_like(x), torch.zeros_like(x[:, :1])], 1)
    return -network(
        still, 1000 * (1 - t), c.tokens, c.mask, encoder_hidden_states_2=c.tokens_2, encoder_attention_mask_2=c.mask_2,
        image_embeds=torch.zeros(2, 3, 16, dtype=x.dtype), return_dict=False,
    )[0]  # fmt: skip


def krea2(network: Any, x: Tensor, t: Tensor, c: MaskedTokens) -> Tensor:
    places = torch.cat([torch.zeros(c.tokens.shape[1], 3), square_ids(4, 4)])
    kept = None if c.mask.all() else c.mask
    out = network(rearrange(x, PACK, p=2, q=2), c.tokens, 1 - t, places, kept, return_dict=False)[0]
    return -rearrange(out, UNPACK, p=2, q=2, h=4)


@dataclass(frozen=True)
class Case:
    """A class, in one of its forms.

    `loss`: how far the stock value may be from ours; 0 where both run the same operations on the same numbers.
    """

    name: str
    description: type[Description]
    settings: dict[str, Any]
    shape: tuple[int, ...]
    cond: Callable[[], Any]
    ask: Callable[..., Tensor]
    loss: float = 0.0
    more: dict[str, Any] = field(default_factory=lambda: {"text_len": LENGTH})

    def network(self, **more: Any) -> DiffusersTransformer:
        """Random weights in place of zeros, float32."""
        torch.manual_seed(0)
        made = DiffusersTransformer(self.description.stock, self.settings, **{**self.sizes(), **self.more, **more})
        with torch.no_grad():
            for parameter in made.parameters():
                small = parameter.ndim > 1
                parameter.copy_(
                    torch.randn_like(parameter) * 0.15 if small else parameter + 0.1 * torch.randn_like(parameter)
                )
        return made.eval()

    def sizes(self) -> dict[str, int]:
        names = ("channels", "frames", "height", "width") if len(self.shape) == 4 else ("channels", "height", "width")
        return dict(zip(names, self.shape, strict=True))

    def inputs(self, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Any]:
        """x [2, *], t [2] (float32 at least), a condition."""
        torch.manual_seed(1)
        x, cond = torch.randn(2, *self.shape).to(dtype), cast(self.cond(), dtype)
        return x, torch.tensor([0.3003, 0.7777], dtype=dtype if dtype.itemsize > 2 else torch.float32), cond


def cast(tree: Any, dtype: torch.dtype) -> Any:
    return tree_map(lambda v: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v, tree)


SD3 = {
    "sample_size": 8, "patch_size": 2, "in_channels": 4, "out_channels": 4, "num_layers": 2, "joint_attention_dim": 24,
    "caption_projection_dim": 32, "pooled_projection_dim": 20, "pos_embed_max_size": 12, **HEADS,
}  # fmt: skip
SD35 = {**SD3, "dual_attention_layers": (0,), "qk_norm": "rms_norm"}
FLUX = {
    "in_channels": 16, "num_layers": 1, "num_single_layers": 2, "joint_attention_dim": 24, "pooled_projection_dim": 20,
    "axes_dims_rope": (4, 6, 6), **HEADS,
}  # fmt: skip
FLUX2 = {
    "in_channels": 16, "num_layers": 1, "num_single_layers": 2, "joint_attention_dim": 24,
    "axes_dims_rope": (4, 4, 4, 4), "timestep_guidance_channels": 32, **HEADS,
}  # fmt: skip
QWEN = {
    "in_channels": 16, "out_channels": 4, "num_layers": 2, "joint_attention_dim": 24, "axes_dims_rope": (4, 6, 6),
    **HEADS,
}  # fmt: skip
Z_IMAGE = {
    "in_channels": 4, "dim": 32, "n_layers": 2, "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 2,
    "cap_feat_dim": 24, "axes_dims": [4, 6, 6], "axes_lens": [128, 64, 64],
}  # fmt: skip
SANA = {
    "in_channels": 4, "out_channels": 4, "num_layers": 2, "num_cross_attention_heads": 2,
    "cross_attention_head_dim": 16, "cross_attention_dim": 32, "caption_channels": 24, "sample_size": 8,
    "patch_size": 1, **HEADS,
}  # fmt: skip
PIXART = {
    "in_channels": 4, "out_channels": 4, "num_layers": 2, "cross_attention_dim": 32, "sample_size": 8,
    "patch_size": 2, "caption_channels": 24, **HEADS,
}  # fmt: skip
LTX = {
    "in_channels": 8, "out_channels": 8, "cross_attention_dim": 32, "num_layers": 2, "caption_channels": 24, **HEADS,
}  # fmt: skip
HUNYUAN = {
    "in_channels": 9, "out_channels": 4, "num_layers": 2, "num_refiner_layers": 1, "text_embed_dim": 24,
    "text_embed_2_dim": 20, "image_embed_dim": 16, "rope_axes_dim": (4, 6, 6), **HEADS,
}  # fmt: skip
KREA = {
    "in_channels": 16, "num_layers": 2, "num_key_value_heads": 1, "intermediate_size": 48, "timestep_embed_dim": 32,
    "text_hidden_dim": 24, "num_text_layers": 3, "text_num_attention_heads": 2, "text_num_key_value_heads": 2,
    "text_intermediate_size": 32, "num_layerwise_text_blocks": 1, "num_refiner_text_blocks": 1,
    "axes_dims_rope": (4, 6, 6), **HEADS,
}  # fmt: skip


def pooled() -> PooledTokens:
    return PooledTokens(torch.randn(2, LENGTH, 24), torch.randn(2, 20))


def two_texts(first: tuple[int, int], second: tuple[int, int]) -> TwoTexts:
    return TwoTexts(*masked(24, *first), *masked(20, *second))


IMAGE = (4, 8, 8)
CASES = {
    case.name: case
    for case in (
        Case("SD3", StableDiffusion3, SD3, IMAGE, pooled, sd3),
        Case("SD3.5", StableDiffusion3, SD35, IMAGE, pooled, sd3),
        Case("FLUX.1", Flux1, FLUX, IMAGE, pooled, flux),
        Case("FLUX.1 dev", Flux1, {**FLUX, "guidance_embeds": True}, IMAGE, pooled, flux),
        Case("FLUX.2", Flux2, FLUX2, (16, 4, 4), lambda: Tokens(torch.randn(2, LENGTH, 24)), flux2),
        Case("Qwen-Image", QwenImage, QWEN, IMAGE, lambda: masked(24, 5, 5), qwen_image),
        Case("Qwen-Image, padded", QwenImage, QWEN, IMAGE, lambda: masked(24, 5, 3), qwen_image),
        Case("Z-Image", ZImage, Z_IMAGE, IMAGE, lambda: masked(24, 5, 5), z_image),
        Case("Z-Image, padded", ZImage, Z_IMAGE, IMAGE, lambda: masked(24, 40, 5), z_image, more={"text_len": 40}),
        Case("Sana", Sana, SANA, IMAGE, lambda: masked(24, 5, 3), sana),
        Case("PixArt", PixArt, PIXART, IMAGE, lambda: masked(24, 5, 3), pixart),
        Case("LTX-Video", LTXVideo, LTX, (8, 2, 4, 4), lambda: masked(24, 5, 3), ltx_video),
        Case("HunyuanVideo 1.5", HunyuanVideo15, HUNYUAN, (4, 2, 4, 4), lambda: two_texts((5, 5), (3, 3)),
             hunyuan_video15, loss=1e-12),
        Case("HunyuanVideo 1.5, padded", HunyuanVideo15, HUNYUAN, (4, 2, 4, 4), lambda: two_texts((5, 3), (3, 1)),
             hunyuan_video15, loss=1e-12),
        Case("Krea 2", Krea2, KREA, IMAGE, lambda: masked((3, 24), 5, 5), krea2),
        Case("Krea 2, padded", Krea2, KREA, IMAGE, lambda: masked((3, 24), 5, 3), krea2),
    )
}  # fmt: skip


# ----------------------------------------------------------------------------------------------------- two processes


def sharded(name: str, lora: dict[str, Any] | None = None) -> dict[str, float]:
    """Largest differences of a network that is sharded over two processes from the same one, whole.

    With adapters, their base is asked between the student's forward and its backward.
    """
    from torch.distributed.device_mesh import init_device_mesh  # only here are there two processes

    from flowanchor.strategies.sharding import shard_backbone

    network = CASES[name].network(lora=lora).double()
    x, t, cond = CASES[name].inputs()
    dx, dt, weight = torch.randn_like(x), torch.ones_like(t), torch.randn_like(x)

    def answer() -> list[Tensor]:
        with torch.no_grad():
            plain = network.predict(x, t, cond)
        (out,) = Chain()(network, x, cond, [Question(t, along=(dx, dt))])
        with torch.no_grad(), network.without_adapters():
            base = network.predict(x, t, cond)
        (out.prediction * weight).sum().backward()
        assert out.tangent is not None
        return [out.prediction.detach(), out.tangent, plain, base]

    before = answer()
    gradients = {key: p.grad for key, p in network.named_parameters()}
    network.zero_grad()
    shard_backbone(network, init_device_mesh("cpu", (2,)))
    after = answer()
    apart = {
        key: float((a - b).abs().max()) for key, a, b in zip(("F", "dF", "plain", "base"), after, before, strict=True)
    }
    for key, parameter in network.named_parameters():
        if not parameter.requires_grad:
            continue
        wanted = gradients[key][own_part(parameter)]
        if wanted.numel():  # a table of one row is all another process'
            apart[key] = 9e9 if parameter.grad is None else float((local(parameter.grad) - wanted).abs().max())
    return apart


def main() -> None:
    rank, store, result, *names = sys.argv[1:]
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=int(rank), world_size=2)
    forms: list[dict[str, Any] | None] = [None, {"rank": 2, "alpha": 3}]
    found = {f"{name} {lora}": sharded(name, lora) for name in names for lora in forms}
    Path(result).write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
