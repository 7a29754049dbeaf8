"""VAEs of pipelines as codecs: equal to diffusers' networks called by hand, with what their pipelines do to latents."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

from flowanchor.errors import CheckpointError, ConfigError
from flowanchor.plugins.codecs.pipeline_vae import KINDS, PipelineVAE

MEAN, STD = [0.1, -0.3, 0.5, 0.0], [1.5, 0.8, 2.0, 1.0]
TWO = {"block_out_channels": [8, 8], "norm_num_groups": 4, "latent_channels": 4}
BLOCKS = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
LISTED = {
    "base_dim": 8, "z_dim": 4, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1, "latents_mean": MEAN, "latents_std": STD
}  # fmt: skip


def ltx(**settings: Any) -> Any:
    made = diffusers.AutoencoderKLLTXVideo(
        latent_channels=4, block_out_channels=(8, 8), decoder_block_out_channels=(8, 8), layers_per_block=(1, 1, 1),
        decoder_layers_per_block=(1, 1, 1), spatio_temporal_scaling=(True, True),
        decoder_spatio_temporal_scaling=(True, True), down_block_types=("LTXVideoDownBlock3D",) * 2,
        decoder_inject_noise=(False,) * 3, upsample_residual=(False,) * 2, upsample_factor=(1, 1), scaling_factor=0.7,
        patch_size=2, **settings,
    )  # fmt: skip
    made.latents_mean.copy_(torch.tensor(MEAN))
    made.latents_std.copy_(torch.tensor(STD))
    return made


def flux2() -> Any:
    made = diffusers.AutoencoderKLFlux2(**TWO, **BLOCKS)
    made.bn.running_mean.copy_(torch.linspace(-1, 1, 16))
    made.bn.running_var.copy_(torch.linspace(0.5, 2, 16))
    return made


# Which network, how many pixels per latent of the codec along each side, and its channels.
CASES: dict[str, tuple[Any, int, int]] = {
    "AutoencoderKL": (lambda: diffusers.AutoencoderKL(**TWO, **BLOCKS, scaling_factor=1.5, shift_factor=0.06), 2, 4),
    "AutoencoderKL, no shift": (lambda: diffusers.AutoencoderKL(**TWO, **BLOCKS, scaling_factor=0.13), 2, 4),
    "AutoencoderKLFlux2": (flux2, 4, 16),
    "AutoencoderKLQwenImage": (lambda: diffusers.AutoencoderKLQwenImage(**LISTED), 8, 4),
    "AutoencoderKLWan": (lambda: diffusers.AutoencoderKLWan(**LISTED), 8, 4),
    "AutoencoderDC": (
        lambda: diffusers.AutoencoderDC(
            latent_channels=4, attention_head_dim=4, encoder_block_out_channels=(8, 8, 16),
            decoder_block_out_channels=(8, 8, 16), encoder_layers_per_block=(1, 1, 1),
            decoder_layers_per_block=(1, 1, 1), encoder_qkv_multiscales=((), (), ()),
            decoder_qkv_multiscales=((), (), ()), scaling_factor=0.41,
        ), 4, 4,
    ),
    "AutoencoderKLLTXVideo": (ltx, 8, 4),
    "AutoencoderKLLTXVideo, told the noise": (lambda: ltx(timestep_conditioning=True), 8, 4),
    "AutoencoderKLHunyuanVideo15": (
        lambda: diffusers.AutoencoderKLHunyuanVideo15(
            latent_channels=4, block_out_channels=(8, 16, 16), layers_per_block=1, spatial_compression_ratio=4,
            temporal_compression_ratio=4,
        ), 4, 4,
    ),
}  # fmt: skip


def by_hand(network: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """Latents as the network of the class reads them, and what its pipeline decodes them to."""
    kind, config = type(network).__name__, network.config
    if kind == "AutoencoderDC":
        z = network.encode(x).latent * config.scaling_factor
        return z, network.decode(z / config.scaling_factor).sample
    z = network.encode(x).latent_dist.mode()
    if kind == "AutoencoderKL":
        shift = config.shift_factor or 0
        z = (z - shift) * config.scaling_factor
        return z, network.decode(z / config.scaling_factor + shift).sample
    if kind == "AutoencoderKLFlux2":
        pipeline = diffusers.Flux2Pipeline
        mean = network.bn.running_mean.view(1, -1, 1, 1)
        std = (network.bn.running_var.view(1, -1, 1, 1) + config.batch_norm_eps).sqrt()
        z = (pipeline._patchify_latents(z) - mean) / std
        return z, network.decode(pipeline._unpatchify_latents(z * std + mean)).sample
    if kind == "AutoencoderKLLTXVideo":
        pipeline, numbers = diffusers.LTXPipeline, (network.latents_mean, network.latents_std, config.scaling_factor)
        z = pipeline._normalize_latents(z, *numbers)
        told = torch.zeros(len(z)) if config.timestep_conditioning else None
        return z, network.decode(pipeline._denormalize_latents(z, *numbers), told).sample
    if kind == "AutoencoderKLHunyuanVideo15":
        return z * config.scaling_factor, network.decode(z).sample
    mean, std = (torch.tensor(config[name]).view(1, -1, 1, 1, 1) for name in ("latents_mean", "latents_std"))
    return (z - mean) / std, network.decode(z).sample


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made: dict[str, Path] = {}

    def folder(case: str) -> Path:
        if case not in made:
            torch.manual_seed(0)
            made[case] = tmp_path_factory.mktemp("pipeline")
            CASES[case][0]().save_pretrained(made[case] / "vae")
        return made[case]

    return folder


def codec(folder: Path, **settings: Any) -> PipelineVAE:
    return PipelineVAE(str(folder), **{"dtype": "float32", **settings}).eval()


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_latents_and_images_are_the_pipelines(case, folders):
    _, down, channels = CASES[case]
    ours = codec(folders(case))
    network = getattr(diffusers, case.split(",")[0]).from_pretrained(folders(case) / "vae").eval()
    assert (ours.latent_channels, ours.downsampling, ours.usable) == (channels, down, True)
    torch.manual_seed(1)
    video = ours.layout.video
    images = torch.rand(2, 3, *([ours.layout.every + 1] if video else []), 16, 24) * 2 - 1
    for given in [images, *([images[:, :, :1]] if video else [])]:
        found = [by_hand(network, one) for one in given.split(1)]  # diffusers' HunyuanVideo 1.5 takes no more at once
        latents, decoded = (torch.cat(parts) for parts in zip(*found, strict=True))
        wanted = decoded.clamp(-1, 1)
        wanted = wanted[:, :, 0] if video and given.shape[2] == 1 else wanted
        found = ours.encode(given)
        assert found.shape[1] == channels and found.shape[-2:] == (16 // down, 24 // down)
        torch.testing.assert_close(found, latents, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(ours.decode(latents), wanted, rtol=1e-4, atol=1e-4)
        raw = ours.posterior(given)
        mean, deviation = ours._statistics(raw.mean)
        torch.testing.assert_close((raw.mean - mean) / deviation, latents, rtol=1e-4, atol=1e-5)
        assert (raw.logvar is None) == (case == "AutoencoderDC")


@pytest.mark.parametrize("case", ["AutoencoderKL", "AutoencoderKLQwenImage"])
def test_an_image_is_one_frame(case, folders):
    """As captions are encoded, with an axis of one frame, and as a network of images draws them, without."""
    ours, images = codec(folders(case), chunk=2), torch.rand(3, 3, 16, 16) * 2 - 1
    latents = ours.encode(images)
    framed = latents if latents.ndim == 5 else latents[:, :, None]
    assert framed.shape[2] == 1
    assert torch.equal(ours.decode(framed), ours.decode(framed[:, :, 0])) and ours.decode(framed).ndim == 4
    torch.testing.assert_close(codec(folders(case), chunk=1).encode(images), latents, rtol=1e-4, atol=1e-5)
    if case == "AutoencoderKL":
        with pytest.raises(ConfigError, match="are no images"):
            ours.decode(framed.expand(-1, -1, 2, -1, -1))


def test_sizes_that_cannot_be_encoded(folders):
    ours = codec(folders("AutoencoderKLQwenImage"))
    with pytest.raises(ConfigError, match="both must be multiples of 8: set captions.multiple"):
        ours.encode(torch.zeros(1, 3, 12, 16))
    with pytest.raises(ConfigError, match="use 1, 5, 9, ... frames"):
        ours.encode(torch.zeros(1, 3, 4, 16, 16))


def test_bad_folders_and_settings(folders, tmp_path):
    named = PipelineVAE()
    assert not named.usable and named.fingerprint() == "pipeline" and named.latent_channels is None
    with pytest.raises(ConfigError, match="codec.weights=FOLDER"):
        named.decode(torch.zeros(1, 4, 2, 2))
    for settings, message in (({"dtype": "int8"}, "codec.dtype=int8"), ({"chunk": 0}, "codec.chunk=0")):
        with pytest.raises(ConfigError, match=message):
            PipelineVAE(**settings)
    with pytest.raises(ConfigError, match="There is no VAE in"):
        codec(tmp_path)
    shutil.copytree(folders("AutoencoderKL"), tmp_path / "copy")
    path = tmp_path / "copy" / "vae" / "config.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "_class_name": "AsymmetricAutoencoderKL"}))
    with pytest.raises(CheckpointError, match="holds a AsymmetricAutoencoderKL, not a VAE that is known here"):
        codec(tmp_path / "copy")
    path.write_text(json.dumps({name: value for name, value in content.items() if name != "latent_channels"}))
    with pytest.raises(CheckpointError, match="does not say its sizes"):
        codec(tmp_path / "copy")
    path.write_text(json.dumps({**content, "auto_map": {"AutoModel": "mine.Code"}}))
    with pytest.raises(CheckpointError, match="asks for code of its own choice"):
        codec(tmp_path / "copy")


def test_fingerprints_tell_weights_apart(folders):
    prints = {codec(folders(case)).fingerprint() for case in ("AutoencoderKL", "AutoencoderKL, no shift")}
    assert len(prints) == 2 and codec(folders("AutoencoderKL") / "vae").fingerprint() in prints


def test_all_that_are_known_are_tested():
    assert {case.split(",")[0] for case in CASES} == set(KINDS)
