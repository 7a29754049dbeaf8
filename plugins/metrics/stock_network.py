"""Networks of other libraries as extractors of features, in torch-fidelity's clothes; transformers' from a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch_fidelity.feature_extractor_base import FeatureExtractorBase
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2.functional import resize

from flowanchor.errors import CheckpointError


def read_stock(kind: Any, folder: Path, what: str, *beside: Any) -> tuple[Any, ...]:
    """The frozen network of class `kind` in a folder, float32, and what the classes `beside` read of it.

    No code of the folder is run. Raises `CheckpointError` for damaged or lacking files; `what`: the network's name.
    """
    try:
        read: Any = kind.from_pretrained(
            folder, local_files_only=True, use_safetensors=True, output_loading_info=True, dtype=torch.float32
        )
        others = [
            Processor.from_pretrained(folder, local_files_only=True, trust_remote_code=False) for Processor in beside
        ]
    except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
        said = f"{what} with its processor" if beside else what
        raise CheckpointError(
            f"{folder} cannot be read as {said} ({str(error).splitlines()[0]}): download all of its files, safetensors "
            "among them."
        ) from error
    network, info = read
    missing = sorted(info["missing_keys"])
    if missing:
        raise CheckpointError(f"{folder} is no {what}: it lacks {', '.join(missing[:3])}.")
    return network.eval().requires_grad_(False), *others


def resized(images: Tensor, side: int) -> Tensor:
    """uint8 [B, C, H, W] -> uint8 [B, C, side, side]: bicubic with antialiasing, in 8 bits as Pillow has it."""
    return resize(images, [side, side], interpolation=InterpolationMode.BICUBIC, antialias=True)


class StockExtractor(FeatureExtractorBase):
    """A module from images uint8 [B, 3, H, W] to features [B, D], as torch-fidelity's extractor of one layer.

    A subclass says what its `layer` is called.
    """

    layer: ClassVar[str]

    def __init__(self, name: str, features_list: list[str], module: nn.Module, **_: Any) -> None:
        super().__init__(name, features_list)
        self.module = module

    @classmethod
    def get_provided_features_list(cls) -> tuple[str, ...]:
        return (cls.layer,)

    @classmethod
    def get_default_feature_layer_for_metric(cls, metric: str) -> str:
        return cls.layer

    @staticmethod
    def can_be_compiled() -> bool:
        return False

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        return (self.module(images),)
