"""The KL autoencoder of latent diffusion (arXiv 2112.10752), straight from a state dict: a reference for tests."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

State = dict[str, Tensor]


def random_state(
    ch: int, ch_mult: tuple[int, ...], z: int, embed: int, layers: int, resolution: int,
    encoder_attention: tuple[int, ...] = (), decoder_attention: tuple[int, ...] = (), mid_attention: bool = True,
) -> State:  # fmt: skip
    """Random weights under the original names; attention at the given resolutions."""
    state: State = {}

    def layer(name: str, out: int, into: int, kernel: int) -> None:
        state[f"{name}.weight"] = torch.randn(out, into, kernel, kernel) / (into * kernel**2) ** 0.5
        state[f"{name}.bias"] = 0.1 * torch.randn(out)

    def norm(name: str, channels: int) -> None:
        state[f"{name}.weight"], state[f"{name}.bias"] = 1 + 0.1 * torch.randn(channels), 0.1 * torch.randn(channels)

    def resnet(name: str, into: int, out: int) -> None:
        norm(f"{name}.norm1", into)
        layer(f"{name}.conv1", out, into, 3)
        norm(f"{name}.norm2", out)
        layer(f"{name}.conv2", out, out, 3)
        if into != out:
            layer(f"{name}.nin_shortcut", out, into, 1)

    def attention(name: str, channels: int) -> None:
        norm(f"{name}.norm", channels)
        for part in ("q", "k", "v", "proj_out"):
            layer(f"{name}.{part}", channels, channels, 1)

    def middle(side: str, channels: int) -> None:
        resnet(f"{side}.mid.block_1", channels, channels)
        if mid_attention:
            attention(f"{side}.mid.attn_1", channels)
        resnet(f"{side}.mid.block_2", channels, channels)

    widths = [ch * m for m in ch_mult]
    layer("encoder.conv_in", ch, 3, 3)
    into = ch
    for i, width in enumerate(widths):
        for j in range(layers):
            resnet(f"encoder.down.{i}.block.{j}", into, width)
            into = width
            if resolution // 2**i in encoder_attention:
                attention(f"encoder.down.{i}.attn.{j}", width)
        if i < len(widths) - 1:
            layer(f"encoder.down.{i}.downsample.conv", width, width, 3)
    middle("encoder", into)
    norm("encoder.norm_out", into)
    layer("encoder.conv_out", 2 * z, into, 3)
    layer("quant_conv", 2 * embed, 2 * z, 1)
    layer("post_quant_conv", z, embed, 1)
    layer("decoder.conv_in", into, z, 3)
    middle("decoder", into)
    for i in reversed(range(len(widths))):
        for j in range(layers + 1):
            resnet(f"decoder.up.{i}.block.{j}", into, widths[i])
            into = widths[i]
            if resolution // 2**i in decoder_attention:
                attention(f"decoder.up.{i}.attn.{j}", into)
        if i > 0:
            layer(f"decoder.up.{i}.upsample.conv", into, into, 3)
    norm("decoder.norm_out", into)
    layer("decoder.conv_out", 3, into, 3)
    return state


class Reference:
    """Encoder and decoder, straight from the names."""

    def __init__(self, state: State) -> None:
        self.state = state

    def moments(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self._conv("encoder.conv_in", x)
        for i in self._numbers("encoder.down."):
            for j in self._numbers(f"encoder.down.{i}.block."):
                h = self._attention(f"encoder.down.{i}.attn.{j}", self._resnet(f"encoder.down.{i}.block.{j}", h))
            if f"encoder.down.{i}.downsample.conv.weight" in self.state:
                h = self._conv(
                    f"encoder.down.{i}.downsample.conv", functional.pad(h, (0, 1, 0, 1)), stride=2, padding=0
                )
        h = self._conv("encoder.conv_out", self._end("encoder", self._middle("encoder", h)))
        mean, logvar = self._conv("quant_conv", h).chunk(2, dim=1)
        return mean, logvar.clamp(-30, 20)

    def decode(self, z: Tensor) -> Tensor:
        h = self._middle("decoder", self._conv("decoder.conv_in", self._conv("post_quant_conv", z)))
        for i in reversed(self._numbers("decoder.up.")):
            for j in self._numbers(f"decoder.up.{i}.block."):
                h = self._attention(f"decoder.up.{i}.attn.{j}", self._resnet(f"decoder.up.{i}.block.{j}", h))
            if f"decoder.up.{i}.upsample.conv.weight" in self.state:
                h = self._conv(f"decoder.up.{i}.upsample.conv", functional.interpolate(h, scale_factor=2.0))
        return self._conv("decoder.conv_out", self._end("decoder", h))

    def _numbers(self, stem: str) -> list[int]:
        return sorted({int(key.removeprefix(stem).split(".")[0]) for key in self.state if key.startswith(stem)})

    def _conv(self, name: str, x: Tensor, stride: int = 1, padding: int | None = None) -> Tensor:
        weight = self.state[f"{name}.weight"]
        pad = weight.shape[-1] // 2 if padding is None else padding
        return functional.conv2d(x, weight, self.state[f"{name}.bias"], stride, pad)

    def _norm(self, name: str, x: Tensor) -> Tensor:
        return functional.group_norm(x, 32, self.state[f"{name}.weight"], self.state[f"{name}.bias"], eps=1e-6)

    def _resnet(self, name: str, x: Tensor) -> Tensor:
        h = self._conv(f"{name}.conv1", functional.silu(self._norm(f"{name}.norm1", x)))
        h = self._conv(f"{name}.conv2", functional.silu(self._norm(f"{name}.norm2", h)))
        return h + (self._conv(f"{name}.nin_shortcut", x) if f"{name}.nin_shortcut.weight" in self.state else x)

    def _attention(self, name: str, x: Tensor) -> Tensor:
        if f"{name}.q.weight" not in self.state:
            return x
        h = self._norm(f"{name}.norm", x)
        q, k, v = (self._conv(f"{name}.{part}", h).flatten(2) for part in ("q", "k", "v"))  # [B, C, N]
        weights = torch.softmax(q.transpose(1, 2) @ k / x.shape[1] ** 0.5, dim=-1)  # [B, N, N]
        return x + self._conv(f"{name}.proj_out", (v @ weights.transpose(1, 2)).view_as(x))

    def _middle(self, side: str, h: Tensor) -> Tensor:
        h = self._attention(f"{side}.mid.attn_1", self._resnet(f"{side}.mid.block_1", h))
        return self._resnet(f"{side}.mid.block_2", h)

    def _end(self, side: str, h: Tensor) -> Tensor:
        return functional.silu(self._norm(f"{side}.norm_out", h))
