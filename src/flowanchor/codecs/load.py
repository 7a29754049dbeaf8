"""The codec of a checkpoint, and the statistics that a run takes over from its data."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf, open_dict

from flowanchor.base.trusted import build
from flowanchor.data.base import FlowDataModule
from flowanchor.encoded.statistics import LatentStatistics
from flowanchor.errors import ConfigError
from flowanchor.interfaces import Codec

if TYPE_CHECKING:
    from flowanchor.checkpoints import LoadedModel


def load_codec(model: LoadedModel, chosen: DictConfig | None = None) -> Codec:
    """The codec that a network was trained with, in evaluation mode.

    `chosen` is a codec of the command line, which takes its place (its weights may lie elsewhere on this machine); the
    statistics that it does not bring are the checkpoint's.
    """
    own = model.config.get("codec") or {}
    if chosen is None and not own:
        raise ConfigError(
            f"{model.path} does not say how its samples become images: add its codec (for Wan codec=wan_vae "
            "codec.weights=FOLDER)."
        )
    if chosen is None:
        codec: Codec = build(own, "codec", model.path)
    else:
        from flowanchor.base.typed import instantiate

        settings: Any = OmegaConf.to_container(chosen, resolve=True)
        if "statistics" in settings and settings["statistics"] is None and own.get("statistics") is not None:
            settings["statistics"] = LatentStatistics.read(own["statistics"]).as_config()  # numbers, nothing else
        codec = instantiate(settings, _convert_="all")
    channels = model.backbone.sample_shape[0]
    if codec.latent_channels not in (None, channels):
        raise ConfigError(
            f"The network draws samples of {channels} channels and codec={codec.name} decodes {codec.latent_channels}: "
            "choose the codec that it was trained with."
        )
    if not codec.usable:
        raise ConfigError(
            f"The network draws latents of codec={codec.name}, whose weights are not known here: add "
            f"codec={codec.name} codec.weights=FILE."
        )
    return codec.eval()


def adopt_statistics(cfg: DictConfig, data: FlowDataModule) -> None:
    """Write the statistics of encoded data into the configuration of the codec, as plain numbers.

    So a checkpoint holds what decodes its samples. Raises `ConfigError` where codec and data do not fit.
    """
    statistics = data.statistics
    channels = cfg.codec.get("latent_channels")
    if channels is not None and channels != data.channels:
        raise ConfigError(
            f"codec={cfg.codec.get('name')} has latents of {channels} channels and the data has {data.channels}: "
            "encode the images first (python src/encode.py) and train with data=latents, or use codec=identity."
        )
    if statistics is None or "statistics" not in cfg.codec:
        return
    if cfg.codec.statistics is None:
        with open_dict(cfg.codec):
            cfg.codec.statistics = statistics.as_config()


def check_codec(cfg: DictConfig, data: FlowDataModule) -> None:
    """Raise `ConfigError` where encoded data says that another codec has made it; without its weights, by the name."""
    encoded = data.encoded_by
    if "name" not in encoded:
        return
    from flowanchor.base.typed import instantiate

    codec: Codec = instantiate(cfg.codec, _convert_="all")
    name, digest, where = encoded["name"], encoded.get("digest"), cfg.data.get("root") or data.name
    if codec.name != name:
        raise ConfigError(f"{where} was encoded by {name} and the run has codec={codec.name}: use codec={name}.")
    if codec.usable and digest and codec.fingerprint() != digest:
        raise ConfigError(
            f"{where} was encoded by other weights than codec.weights={cfg.codec.get('weights')}: use those of the "
            "encoding, or encode again."
        )
