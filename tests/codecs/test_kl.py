"""KL autoencoders on diffusers against an independent one, and the files that they are read from."""

from __future__ import annotations

import importlib.util
import json
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from flowanchor.encoded.statistics import LatentStatistics
from flowanchor.errors import CheckpointError, ConfigError
from flowanchor.plugins.codecs.kl import KLCodec

_spec = importlib.util.spec_from_file_location("ldm", Path(__file__).with_name("ldm.py"))
assert _spec is not None and _spec.loader is not None
ldm = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(ldm)

ARCHITECTURES = {
    "plain": dict(ch=32, ch_mult=(1, 2), z=4, embed=4, layers=1, resolution=16),
    "attention in both": dict(
        ch=32, ch_mult=(1, 1, 2), z=6, embed=6, layers=2, resolution=32,
        encoder_attention=(8, 16), decoder_attention=(8, 16),
    ),
    "attention in one": dict(
        ch=32, ch_mult=(2, 1, 2), z=4, embed=4, layers=1, resolution=16, decoder_attention=(16, 4)
    ),
    "no attention, wider latent": dict(
        ch=64, ch_mult=(1, 2), z=4, embed=3, layers=2, resolution=8, mid_attention=False
    ),
}  # fmt: skip


def relative(ours, theirs):
    return ((ours - theirs).norm() / theirs.norm()).item()


@pytest.fixture
def state():
    torch.manual_seed(0)
    return ldm.random_state(**ARCHITECTURES["attention in one"])


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_is_that_of_latent_diffusion(name):
    torch.manual_seed(1)
    settings = ARCHITECTURES[name]
    state = ldm.random_state(**settings)
    codec, reference = KLCodec.of_weights(state), ldm.Reference(state)
    images = torch.rand(3, 3, settings["resolution"], settings["resolution"]) * 2 - 1
    mean, logvar = reference.moments(images)
    found = codec.posterior(images)
    assert codec.latent_channels == settings["embed"] and codec.downsampling == 2 ** (len(settings["ch_mult"]) - 1)
    assert relative(found.mean, mean) < 1e-5 and relative(found.logvar, logvar) < 1e-5
    assert relative(codec.decode(mean), reference.decode(mean)) < 1e-5


def test_statistics_are_between_the_network_and_the_latents(state):
    statistics = LatentStatistics((0.5, -1.0, 0.0, 2.0), (2.0, 1.0, 3.0, 0.5), 0.7)
    plain, normalised = KLCodec.of_weights(state), KLCodec.of_weights(state, statistics=statistics.as_config())
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    raw = plain.posterior(images).mean
    torch.testing.assert_close(normalised.encode(images), statistics.normalise(raw))
    torch.testing.assert_close(normalised.posterior(images).mean, raw)
    torch.testing.assert_close(normalised.decode(normalised.encode(images)), plain.decode(raw), rtol=1e-4, atol=1e-4)
    assert plain.fingerprint() == normalised.fingerprint()


def test_chunks_change_nothing_and_bound_the_calls(state):
    whole, parts = KLCodec.of_weights(state), KLCodec.of_weights(state, chunk=2)
    latents = torch.randn(5, 4, 4, 4)
    sizes = []
    parts.network.decoder.register_forward_pre_hook(lambda _, given: sizes.append(len(given[0])))
    torch.testing.assert_close(parts.decode(latents), whole.decode(latents))
    assert sizes == [2, 2, 1]


def test_bfloat16_is_close_and_returns_what_it_was_given(state):
    latents = torch.randn(2, 4, 4, 4)
    low = KLCodec.of_weights(state, dtype="bfloat16").decode(latents)
    assert low.dtype == torch.float32 and 0 < relative(low, KLCodec.of_weights(state).decode(latents)) < 0.05


def released(state, path):
    """As training leaves it: a nested state dict that carries losses and alignment heads along."""
    extra = {
        "loss.logvar": torch.zeros(()),
        "linear_proj.weight": torch.zeros(2, 2),
        "foundation_model.x": torch.ones(1),
    }
    torch.save({"epoch": 3, "state_dict": {**state, **extra}}, path)


@pytest.mark.parametrize("kind", ["released .pt", "original .safetensors", "saved by us", "diffusers folder"])
def test_every_kind_of_file_gives_the_same_codec(kind, state, tmp_path):
    settings = dict(name="vavae", latent_channels=4, downsampling=4)
    codec = KLCodec.of_weights(state)
    path = tmp_path / "weights.pt"
    if kind == "released .pt":
        released(state, path)
    elif kind == "original .safetensors":
        path = path.with_suffix(".safetensors")
        save_file(state, path)
    elif kind == "saved by us":
        path = tmp_path / "deep" / "weights.safetensors"
        codec.save(path)
    else:
        path = tmp_path / "folder"
        codec.network.save_pretrained(path)
    loaded = KLCodec(weights=str(path), **settings)
    assert loaded.network is None, "weights are read when they are needed"
    latents = torch.randn(1, 4, 4, 4)
    torch.testing.assert_close(loaded.decode(latents), codec.decode(latents))
    assert loaded.fingerprint() == codec.fingerprint() and not any(p.requires_grad for p in loaded.parameters())


def test_a_folder_is_built_as_its_config_says(tmp_path):
    """Groups of the norms and the activation change no weight's shape."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    network = AutoencoderKL(
        block_out_channels=(16, 16), latent_channels=4, norm_num_groups=8, act_fn="gelu",
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    ).eval()  # fmt: skip
    network.save_pretrained(tmp_path / "folder")
    codec = KLCodec("vavae", latent_channels=4, downsampling=2, weights=str(tmp_path / "folder"))
    images = torch.rand(2, 3, 8, 8) * 2 - 1
    with torch.no_grad():
        torch.testing.assert_close(codec.encode(images), network.encode(images).latent_dist.mean)
        torch.testing.assert_close(
            codec.decode(images[:, :1].expand(2, 4, 8, 8)), network.decode(images[:, :1].expand(2, 4, 8, 8)).sample
        )
    config = json.loads((tmp_path / "folder" / "config.json").read_text())
    (tmp_path / "folder" / "config.json").write_text(json.dumps(config | {"norm_num_groups": "eight"}))
    with pytest.raises(CheckpointError, match="norm_num_groups='?eight"):
        KLCodec("vavae", latent_channels=4, downsampling=2, weights=str(tmp_path / "folder")).encode(images)


def test_the_fingerprint_is_of_the_weights(state):
    changed = {**state, "decoder.conv_out.bias": state["decoder.conv_out.bias"] + 1e-3}
    assert KLCodec.of_weights(state).fingerprint() != KLCodec.of_weights(changed).fingerprint()


class _Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_a_malicious_file_is_refused_unread(tmp_path):
    path, trace = tmp_path / "vavae.pt", tmp_path / "trace"
    torch.save({"state_dict": _Malicious(trace)}, path)
    with pytest.raises(CheckpointError, match="cannot be read safely"):
        KLCodec("vavae", 4, 4, weights=str(path)).decode(torch.zeros(1, 4, 4, 4))
    path.write_bytes(pickle.dumps(_Malicious(trace)))
    with pytest.raises(CheckpointError, match="cannot be read safely"):
        KLCodec("vavae", 4, 4, weights=str(path)).decode(torch.zeros(1, 4, 4, 4))
    assert not trace.exists()


def test_mistakes_are_named(state, tmp_path):
    with pytest.raises(ConfigError, match="add codec.weights=FILE"):
        KLCodec("vavae", 32, 16).decode(torch.zeros(1, 32, 2, 2))
    with pytest.raises(ConfigError, match="There is no file"):
        KLCodec("vavae", 32, 16, weights=str(tmp_path / "nowhere.pt"))
    with pytest.raises(ConfigError, match="codec.dtype=int8"):
        KLCodec("vavae", 32, 16, dtype="int8")
    released(state, tmp_path / "small.pt")
    with pytest.raises(
        CheckpointError, match="4 latent channels and downsampling 4, and codec=vavae is set to 32 and 16"
    ):
        KLCodec("vavae", 32, 16, weights=str(tmp_path / "small.pt")).fingerprint()
    del state["encoder.mid.block_1.norm1.bias"]
    released(state, tmp_path / "lacking.pt")
    with pytest.raises(CheckpointError, match="lack encoder.mid_block.resnets.0.norm1.bias"):
        KLCodec("vavae", 4, 4, weights=str(tmp_path / "lacking.pt")).fingerprint()
    torch.save({"state_dict": {"blocks.0.weight": torch.zeros(2)}}, tmp_path / "foreign.pt")
    with pytest.raises(CheckpointError, match="not the weights of a KL autoencoder"):
        KLCodec("vavae", 4, 4, weights=str(tmp_path / "foreign.pt")).fingerprint()
    with pytest.raises(ConfigError, match="multiples of"):
        KLCodec.of_weights(ldm.random_state(**ARCHITECTURES["plain"])).encode(torch.zeros(1, 3, 15, 16))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda weight: weight.long(), "other numbers than floating-point ones in encoder.conv_in.weight"),
        (lambda weight: weight.to(torch.complex64), "other numbers than floating-point ones"),
        (lambda weight: weight * float("nan"), "weights that are not finite"),
        (lambda weight: weight.to_sparse(), "cannot be used as a weight .it is sparse"),
        (lambda weight: weight[:, :, 0, 0], "have another shape of encoder.conv_in.weight"),
        (lambda weight: weight.sum(), "holds no autoencoder"),
        (lambda weight: weight[:3], "no autoencoder that diffusers can build|not the weights of a KL autoencoder"),
    ],
)
def test_weights_that_are_none(change, words, state, tmp_path):
    state["encoder.conv_in.weight"] = change(state["encoder.conv_in.weight"])
    torch.save(state, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match=words) as refused:
        KLCodec("vavae", 4, 4, weights=str(tmp_path / "a.pt")).decode(torch.zeros(1, 4, 4, 4))
    assert str(tmp_path) in str(refused.value) and "\n" not in str(refused.value)


def test_layers_that_a_name_counts_are_not_built(tmp_path, state):
    """A billion layers by a name of twenty letters."""
    name = "decoder.up_blocks.0.resnets.{}.conv1.weight"
    modern = dict(KLCodec.of_weights(state).network.state_dict())
    save_file({**modern, name.format(10**9): torch.zeros(2)}, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match="not the weights of a KL autoencoder"):
        KLCodec("vavae", 4, 4, weights=str(tmp_path / "a.safetensors")).fingerprint()
