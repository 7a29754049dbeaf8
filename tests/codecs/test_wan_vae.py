"""Wan's VAE as a codec against diffusers' network called by hand, for images and videos."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from flowanchor.errors import CheckpointError, ConfigError
from flowanchor.plugins.codecs.wan_vae import WanVAE

MEAN, STD = [0.1, -0.3, 0.5, 0.0], [1.5, 0.8, 2.0, 1.0]


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    from diffusers import AutoencoderKLWan

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("pipeline")
    AutoencoderKLWan(
        base_dim=8, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, latents_mean=MEAN, latents_std=STD
    ).save_pretrained(folder / "vae")
    return folder


@pytest.fixture(scope="module")
def by_hand(pipeline):
    from diffusers import AutoencoderKLWan

    return AutoencoderKLWan.from_pretrained(pipeline / "vae").eval()


def codec(folder, **settings):
    return WanVAE(str(folder), **{"latent_channels": 4, "dtype": "float32", **settings}).eval()


@pytest.mark.parametrize("frames", [1, 5])
def test_encode_and_decode(pipeline, by_hand, frames):
    torch.manual_seed(1)
    video = torch.rand(3, 3, frames, 32, 48) * 2 - 1
    mean, std = (torch.tensor(values).view(1, -1, 1, 1, 1) for values in (MEAN, STD))
    with torch.no_grad():
        theirs = (by_hand.encode(video).latent_dist.mode() - mean) / std
        images = by_hand.decode(theirs * std + mean).sample
    ours = codec(pipeline)
    latents = ours.encode(video)
    assert latents.shape == (3, 4, (frames + 3) // 4, 4, 6)
    torch.testing.assert_close(latents, theirs, rtol=1e-4, atol=1e-5)
    wanted = images.clamp(-1, 1)
    torch.testing.assert_close(ours.decode(latents), wanted[:, :, 0] if frames == 1 else wanted, rtol=1e-4, atol=1e-5)


def test_an_image_is_one_frame(pipeline):
    ours, images = codec(pipeline / "vae", chunk=2), torch.rand(3, 3, 16, 16) * 2 - 1
    latents = ours.encode(images)
    assert torch.equal(latents, ours.encode(images[:, :, None])) and latents.shape == (3, 4, 1, 2, 2)
    assert torch.equal(ours.decode(latents), ours.decode(latents[:, :, 0]))
    posterior = ours.posterior(images)
    assert posterior.mean.shape == posterior.logvar.shape == (3, 4, 1, 2, 2)


def test_bfloat16_is_close(pipeline):
    images = torch.rand(1, 3, 16, 16) * 2 - 1
    exact, low = (codec(pipeline, dtype=dtype).encode(images) for dtype in ("float32", "bfloat16"))
    assert 0 < (exact - low).norm() <= 0.05 * exact.norm()


def test_without_weights_it_can_be_named(pipeline):
    bare = WanVAE()
    assert not bare.usable and bare.fingerprint() == "wan_vae"
    with pytest.raises(ConfigError, match="codec.weights=FOLDER"):
        bare.decode(torch.zeros(1, 16, 1, 2, 2))
    assert codec(pipeline).fingerprint() == codec(pipeline / "vae").fingerprint() != "wan_vae"


@pytest.mark.parametrize(
    "shape, message", [((1, 3, 12, 16), "multiples of 8"), ((1, 3, 4, 16, 16), "4 frames .* use 1, 5, 9")]
)
def test_sizes_that_do_not_fit(pipeline, shape, message):
    with pytest.raises(ConfigError, match=message):
        codec(pipeline).encode(torch.zeros(shape))


def test_bad_folders(pipeline, tmp_path):
    with pytest.raises(ConfigError, match="There is no VAE in"):
        codec(tmp_path)
    with pytest.raises(ConfigError, match="set codec.latent_channels=4 codec.downsampling=8"):
        codec(pipeline, latent_channels=16).encode(torch.zeros(1, 3, 16, 16))
    config = json.loads((pipeline / "vae" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "_class_name": "AutoencoderKL"}))
    with pytest.raises(CheckpointError, match="holds a AutoencoderKL, not Wan's VAE"):
        codec(tmp_path).encode(torch.zeros(1, 3, 16, 16))
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="no weights"):
        codec(tmp_path).encode(torch.zeros(1, 3, 16, 16))


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ({"auto_map": {"AutoModel": "mine.Net"}}, "asks for code of its own choice .auto_map"),
        ({"quantization_config": {"quant_method": "x"}}, "asks for code of its own choice .quantization_config"),
        ({"inner": [{"custom_pipelines": "x"}]}, "asks for code of its own choice .custom_pipelines"),
        ({"z_dim": "many"}, "cannot be read as Wan's VAE"),
        ({"base_dim": -4}, "cannot be read as Wan's VAE"),
    ],
)
def test_hostile_and_damaged_folders(pipeline, tmp_path, entries, words):
    shutil.copytree(pipeline / "vae", tmp_path / "vae")
    config = json.loads((tmp_path / "vae" / "config.json").read_text())
    (tmp_path / "vae" / "config.json").write_text(json.dumps({**config, **entries}))
    with pytest.raises(CheckpointError, match=words) as refused:
        codec(tmp_path).encode(torch.zeros(1, 3, 16, 16))
    assert "\n" not in str(refused.value)


def test_pickled_weights_are_not_looked_at(pipeline, tmp_path):
    """diffusers would fall back on a .bin file."""
    shutil.copytree(pipeline / "vae", tmp_path / "vae")
    weights = next((tmp_path / "vae").glob("*.safetensors"))
    torch.save(load_file(weights), tmp_path / "vae" / "diffusion_pytorch_model.bin")
    weights.rename(tmp_path / "vae" / "other.safetensors")
    with pytest.raises(CheckpointError, match="cannot be read as Wan's VAE"):
        codec(tmp_path).encode(torch.zeros(1, 3, 16, 16))


def test_diverged_weights(pipeline, tmp_path):
    shutil.copytree(pipeline / "vae", tmp_path / "vae")
    weights = next((tmp_path / "vae").glob("*.safetensors"))
    tensors = load_file(weights)
    tensors[sorted(tensors)[0]].fill_(float("inf"))
    save_file(tensors, weights, {"format": "pt"})
    with pytest.raises(CheckpointError, match="weights that are not finite"):
        codec(tmp_path).encode(torch.zeros(1, 3, 16, 16))
