"""The metric that published numbers use: Inception's features, and the name FID."""

from __future__ import annotations

from pathlib import Path
from pickle import UnpicklingError

import torch
from torch import Tensor
from torch_fidelity.feature_extractor_base import FeatureExtractorBase
from torch_fidelity.utils import create_feature_extractor

from flowanchor.data.base import FlowDataModule
from flowanchor.errors import ConfigError
from flowanchor.metrics.base import Metric

EXTRACTOR = "inception-v3-compat"
WEIGHTS = "weights-inception-2015-12-05-6726825d.pth"


class InceptionMetric(Metric):
    """FID, KID, precision, recall and inception score on torch-fidelity's port of TensorFlow's Inception.

    Args:
        weights: torch-fidelity's weights file; None lets torch-fidelity download it (91 MB).
        statistics: see `Metric`.

    Raises:
        ConfigError: a weights file that is missing or foreign, or a download that fails.
    """

    feature_layer, logits_layer = "2048", "logits_unbiased"

    def __init__(self, weights: str | None = None, **statistics: int) -> None:
        super().__init__(**statistics)
        self.weights = weights

    def label(self, data: FlowDataModule) -> str:
        return "FID"

    def extractor(self, data: FlowDataModule) -> FeatureExtractorBase:
        path = self._checked_weights()
        try:
            return create_feature_extractor(
                EXTRACTOR,
                [self.feature_layer, self.logits_layer],
                cuda=False,
                verbose=False,
                feature_extractor_weights_path=path,
            )
        except OSError as error:  # urllib's errors are OSErrors
            raise ConfigError(
                f"Inception's weights could not be downloaded ({error}): fetch {WEIGHTS} from torch-fidelity's release "
                "v0.2.0 by hand and add metric.weights=FILE."
            ) from error
        except RuntimeError as error:
            raise ConfigError(self._foreign("its tensors have other names or shapes")) from error

    def prepare(self, image: Tensor) -> Tensor:
        return image.expand(3, -1, -1) if image.shape[0] == 1 else image

    def _checked_weights(self) -> str | None:
        """The file's path, if it is one: torch-fidelity itself would unpickle whatever the file holds."""
        if self.weights is None:
            return None
        path = Path(self.weights).expanduser()
        if not path.is_file():
            raise ConfigError(
                f"There is no weights file {path}: set metric.weights=FILE to torch-fidelity's {WEIGHTS}, or leave "
                "metric.weights out to download it."
            )
        try:
            torch.load(path, map_location="cpu", weights_only=True)
        except (UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as error:
            raise ConfigError(self._foreign("it is not a file of tensors")) from error
        return str(path)

    def _foreign(self, why: str) -> str:
        return f"{self.weights} does not hold Inception's weights ({why}): set metric.weights=FILE to {WEIGHTS}."
