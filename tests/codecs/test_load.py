"""A checkpoint's codec, with the statistics that its data brought."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from omegaconf import OmegaConf

from flowanchor.codecs.load import adopt_statistics, load_codec
from flowanchor.encoded.statistics import LatentStatistics
from flowanchor.errors import ConfigError

VAVAE = {
    "_target_": "flowanchor.plugins.codecs.kl.KLCodec", "name": "vavae", "latent_channels": 4, "downsampling": 2,
    "weights": None, "statistics": None,
}  # fmt: skip
STATISTICS = LatentStatistics((0.0, 1.0, 2.0, 3.0), (1.0, 2.0, 3.0, 4.0), 0.5)


def model(codec, channels=4):
    return SimpleNamespace(
        path="a.ckpt", config={"codec": codec}, backbone=SimpleNamespace(sample_shape=(channels, 8, 8))
    )


def test_the_data_brings_the_statistics_as_plain_numbers():
    cfg = OmegaConf.create({"codec": VAVAE})
    adopt_statistics(cfg, SimpleNamespace(channels=4, statistics=STATISTICS))
    assert OmegaConf.to_container(cfg.codec)["statistics"] == STATISTICS.as_config()
    given = OmegaConf.create({"codec": {**VAVAE, "statistics": {"multiplier": 0.3}}})
    adopt_statistics(given, SimpleNamespace(channels=4, statistics=STATISTICS))
    assert given.codec.statistics == {"multiplier": 0.3}
    pixels = OmegaConf.create({"codec": {"_target_": "flowanchor.plugins.codecs.identity.Identity"}})
    adopt_statistics(pixels, SimpleNamespace(channels=1, statistics=None))
    with pytest.raises(ConfigError, match="latents of 4 channels and the data has 3: encode"):
        adopt_statistics(cfg, SimpleNamespace(channels=3, statistics=None))


def test_another_file_of_the_codec_keeps_the_checkpoints_statistics(tmp_path):
    torch.save({}, tmp_path / "weights.pt")
    trained = {**VAVAE, "statistics": STATISTICS.as_config()}
    here = OmegaConf.create({**VAVAE, "weights": str(tmp_path / "weights.pt")})
    assert load_codec(model(trained), here).statistics == STATISTICS
    own = OmegaConf.create({**here, "statistics": {"multiplier": 2.0}})
    assert load_codec(model(trained), own).statistics == LatentStatistics(multiplier=2.0)


def test_a_codec_without_weights_or_of_other_latents_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="add codec=vavae codec.weights=FILE"):
        load_codec(model(VAVAE))
    with pytest.raises(ConfigError, match="draws samples of 3 channels and codec=vavae decodes 4"):
        load_codec(model(VAVAE, channels=3))
    foreign = {"_target_": "os.system", "command": "true"}
    with pytest.raises(Exception, match="neither flowanchor nor an installed plugin"):
        load_codec(model(foreign))
