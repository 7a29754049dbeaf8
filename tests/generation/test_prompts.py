"""From prompts to samples: embeddings, sizes, and a checkpoint of a text network that is sampled by prompt."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from flowanchor.checkpoints import load_model
from flowanchor.errors import ConfigError
from flowanchor.generation.generator import Generator, sample_shape
from flowanchor.generation.opened import OpenedModel
from flowanchor.generation.prompts import load_text_encoder
from flowanchor.plugins.backbones.lightningdit import LightningDiT
from flowanchor.plugins.backbones.wan import Wan
from flowanchor.plugins.codecs.identity import Identity
from flowanchor.plugins.objectives.intervals.expanded import ExpandedInterval
from flowanchor.plugins.samplers.consistency import ConsistencySampler
from flowanchor.plugins.text_encoders.minilm import MiniLM

SMALL = {
    "in_channels": 3, "height": 8, "width": 8, "num_attention_heads": 2, "attention_head_dim": 16, "ffn_dim": 48,
    "num_layers": 2, "freq_dim": 32, "text_dim": 384, "text_len": 12,
}  # fmt: skip


@pytest.fixture(scope="module")
def encoder():
    return MiniLM()


@pytest.fixture
def network():
    torch.manual_seed(0)
    network = Wan(**SMALL)
    torch.nn.init.normal_(network.proj_out.weight, std=0.3)
    return network.eval()


def asked(network, prompts, negative=None):
    return network.conditioning.request(len(prompts), prompts=prompts, negative=negative)


def test_prompts_and_the_negative_one(encoder, network):
    found = asked(network, ["a red fox", "seven"], "an ugly picture of something").cond(0, 2, encoder).tokens
    assert found.shape[0] == 2 and torch.equal(found[1, :3], encoder.encode(["seven"])[0].tokens)
    null = network.conditioning.null_text.tokens
    assert torch.equal(null, encoder.encode(["an ugly picture of something"])[0].tokens)
    assert found.shape[1] == len(null), "long enough for guidance"


def test_a_prompt_that_is_too_long_for_the_network_is_cut(encoder, network):
    prompt = "a handwritten seven " * 5
    with pytest.warns(UserWarning, match="reads 12 tokens of a prompt; the rest of 'a handwritten seven a"):
        found = asked(network, [prompt, "a two"]).cond(0, 2, encoder)
    assert found.tokens.shape == (2, 12, 384)
    assert torch.equal(found.tokens[0], encoder.encode([prompt])[0].tokens[:12])
    assert network(torch.randn(2, 3, 1, 8, 8), torch.tensor([0.1, 0.5]), found).isfinite().all()


def test_an_encoder_of_another_width_is_refused(encoder):
    with pytest.raises(ConfigError, match="384 channels and the network reads 12"):
        asked(Wan(**{**SMALL, "text_dim": 12}), ["x"]).cond(0, 1, encoder)


@pytest.mark.parametrize(
    "size, shape",
    [(None, (3, 1, 8, 8)), ("48x32", (3, 1, 4, 6)), ((32, 48), (3, 1, 4, 6)), ("1024X768", (3, 1, 96, 128))],
)
def test_sizes(network, size, shape):
    assert sample_shape(network, size, 8) == shape


@pytest.mark.parametrize(
    "size, message", [("40x32", "multiples of 16, and 40"), ("big", "width x height"), ("8x16", "8 is not")]
)
def test_bad_sizes(network, size, message):
    with pytest.raises(ConfigError, match=message):
        sample_shape(network, size, 8)
    with pytest.raises(ConfigError, match="one size only"):
        sample_shape(LightningDiT(4, 2, 1, 16, 1, 2), "48x32", 8)


def test_images_of_text_and_of_other_sizes(encoder, network):
    generator = Generator(network, ExpandedInterval(), ConsistencySampler(2), Identity(), encoder)
    three = asked(network, ["one", "two", "three"])

    def draw(request, first=0):
        return torch.cat(list(generator.draw(request, 0, 2, (4, 6), first)))

    images = draw(three)
    assert images.shape == (3, 4, 6, 3) and images.dtype == torch.uint8
    alone = draw(three.part(2, 3), 2)
    assert (images[2].int() - alone[0].int()).abs().max() <= 1, "an image depends on its own prompt and index"
    assert not torch.equal(images[2], draw(three.part(0, 1), 2)[0])
    encoded = three.encoded(encoder)
    generator.encoder = None
    assert (images.int() - draw(encoded).int()).abs().max() <= 1, "the encoder is not needed any more"
    with pytest.raises(ConfigError, match="text_encoder=NAME"):
        draw(three)


def test_videos_cannot_be_written_as_images(encoder):
    video = Wan(**SMALL, frames=5).eval()
    generator = Generator(video, ExpandedInterval(), ConsistencySampler(1), Identity(), encoder)
    with pytest.raises(ConfigError, match="5 frames"):
        list(generator.draw(asked(video, ["one"]), 0, 1))


@pytest.fixture
def generator(training, tmp_path):
    """A run of a text network, as `flowanchor.load` opens it."""
    training.fit(tmp_path, "run", 1, 8, wan="one", objective="facm", validate=False, save=True)
    model = load_model(tmp_path / "run.ckpt", ema="none")
    config = {
        **model.config,
        "sampler": {"_target_": "flowanchor.plugins.samplers.consistency.ConsistencySampler", "steps": 2},
        "codec": {"_target_": "flowanchor.plugins.codecs.identity.Identity"},
        "text_encoder": {"_target_": "flowanchor.plugins.text_encoders.minilm.MiniLM", "max_length": 4},
    }
    return OpenedModel(**{**vars(model), "config": config})


def test_a_generator_needs_prompts_and_an_encoder_that_fits(generator):
    with pytest.raises(ConfigError, match="give prompts"):
        generator.sample(labels=[1])
    with pytest.raises(ConfigError, match="384 channels and the network reads 12"):
        generator.sample(prompts="seven")
    bare = replace(generator, config={**generator.config, "text_encoder": None})
    with pytest.raises(ConfigError, match="does not say how its prompts are encoded"):
        load_text_encoder(bare)
