"""Names and sizes of KL autoencoders: the original (LDM) layout into that of diffusers, and a file's architecture."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from flowanchor.errors import CheckpointError

PARTS = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")

# Within a level, a resnet and an attention of the original layout.
_LAYERS = {"nin_shortcut": "conv_shortcut", "norm1": "norm1", "conv1": "conv1", "norm2": "norm2", "conv2": "conv2"}
_ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
_DEPRECATED = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}  # of early diffusers


def autoencoder_weights(state: Mapping[str, Any]) -> tuple[dict[str, Tensor], list[str]]:
    """The autoencoder in a state dict of either layout, under diffusers' names; and the keys that are none of it.

    The latter are what a release carries along from its training: losses, discriminators, alignment heads.
    """
    own = {key: value for key, value in state.items() if key.startswith(PARTS) and isinstance(value, Tensor)}
    ignored = [key for key in state if key not in own]
    if any(".down." in key or key.startswith("encoder.mid.") for key in own):
        own = _from_ldm(own)
    return {_current_name(key): _current_shape(key, value) for key, value in own.items()}, ignored


def _from_ldm(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    levels = 1 + max((int(m[1]) for key in state if (m := re.match(r"decoder\.up\.(\d+)\.", key))), default=0)
    return {_diffusers_name(key, levels): value for key, value in state.items()}


def _diffusers_name(key: str, levels: int) -> str:
    """One name; diffusers counts the decoder's levels from the latent, the original from the image."""
    side, _, rest = key.partition(".")
    if not rest or side not in ("encoder", "decoder"):
        return key
    if rest.startswith("norm_out."):
        return f"{side}.conv_norm_out.{rest.removeprefix('norm_out.')}"
    if match := re.fullmatch(r"mid\.block_(\d)\.(\w+)\.(\w+)", rest):
        return f"{side}.mid_block.resnets.{int(match[1]) - 1}.{_LAYERS[match[2]]}.{match[3]}"
    if match := re.fullmatch(r"mid\.attn_1\.(\w+)\.(\w+)", rest):
        return f"{side}.mid_block.attentions.0.{_ATTENTION[match[1]]}.{match[2]}"
    if match := re.fullmatch(r"(down|up)\.(\d+)\.(.+)", rest):
        level = int(match[2]) if match[1] == "down" else levels - 1 - int(match[2])
        return f"{side}.{match[1]}_blocks.{level}.{_level_name(match[3], match[1])}"
    return key


def _level_name(rest: str, direction: str) -> str:
    if match := re.fullmatch(r"block\.(\d+)\.(\w+)\.(\w+)", rest):
        return f"resnets.{match[1]}.{_LAYERS.get(match[2], match[2])}.{match[3]}"
    if match := re.fullmatch(r"attn\.(\d+)\.(\w+)\.(\w+)", rest):
        return f"attentions.{match[1]}.{_ATTENTION.get(match[2], match[2])}.{match[3]}"
    return re.sub(r"^(down|up)sample\.", f"{direction}samplers.0.", rest)


def _current_name(key: str) -> str:
    head, dot, leaf = key.rpartition(".")
    stem, _, name = head.rpartition(".")
    return f"{stem}.{_DEPRECATED[name]}{dot}{leaf}" if ".attentions." in key and name in _DEPRECATED else key


def _current_shape(key: str, value: Tensor) -> Tensor:
    """Attention's 1 x 1 convolutions are linear layers in diffusers."""
    attends = ".attentions." in key or ".attn" in key
    return value[:, :, 0, 0] if attends and value.dim() == 4 else value


def infer_architecture(weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """Arguments of `diffusers.AutoencoderKL` for weights under its names; raises `CheckpointError`."""
    try:
        encoder, decoder = _side(weights, "encoder", "down"), _side(weights, "decoder", "up")
        latent = int(weights["decoder.conv_in.weight"].shape[1])
        if encoder["channels"] != decoder["channels"][::-1] or encoder["layers"] != decoder["layers"] - 1:
            raise CheckpointError(
                f"The autoencoder's encoder has levels of {encoder['channels']} channels and its decoder "
                f"{decoder['channels'][::-1]}: diffusers' AutoencoderKL wants the same in both."
            )
        return {
            "in_channels": int(weights["encoder.conv_in.weight"].shape[1]),
            "out_channels": int(weights["decoder.conv_out.weight"].shape[0]),
            "down_block_types": ["AttnDownEncoderBlock2D" if a else "DownEncoderBlock2D" for a in encoder["attends"]],
            "up_block_types": ["AttnUpDecoderBlock2D" if a else "UpDecoderBlock2D" for a in decoder["attends"]],
            "block_out_channels": encoder["channels"],
            "layers_per_block": encoder["layers"],
            "latent_channels": latent,
            "use_quant_conv": "quant_conv.weight" in weights,
            "use_post_quant_conv": "post_quant_conv.weight" in weights,
            "mid_block_add_attention": any(key.startswith("encoder.mid_block.attentions.") for key in weights),
        }
    except (KeyError, ValueError) as error:
        raise CheckpointError(
            f"These are not the weights of a KL autoencoder ({error} is missing): "
            "set codec.weights=FILE to the released VA-VAE or Stable Diffusion VAE."
        ) from error


def _side(weights: Mapping[str, Tensor], side: str, direction: str) -> dict[str, Any]:
    stem = f"{side}.{direction}_blocks."
    names = [key.removeprefix(stem) for key in weights if key.startswith(stem)]
    levels = 1 + max(int(name.split(".")[0]) for name in names)
    layers = 1 + max(int(name.split(".")[2]) for name in names if name.startswith("0.resnets."))
    if levels * layers > len(weights):
        raise ValueError("one of its layers")  # a name counts layers that there are no weights for
    return {
        "channels": [int(weights[f"{stem}{i}.resnets.0.conv1.weight"].shape[0]) for i in range(levels)],
        "layers": layers,
        "attends": [any(name.startswith(f"{i}.attentions.") for name in names) for i in range(levels)],
    }
