"""Inception's path without its weights file: a network of random weights in the same format."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch_fidelity import feature_extractor_inceptionv3 as inception

from flowanchor.errors import ConfigError
from flowanchor.metrics.evaluator import Evaluator
from flowanchor.plugins.data.digits import DigitsDataModule
from flowanchor.plugins.metrics.inception import InceptionMetric


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "inception.pth"
    # Its constructor can only load a file, so it is asked to load its own random weights.
    original = inception.FeatureExtractorInceptionV3.load_state_dict
    patch = pytest.MonkeyPatch()
    patch.setattr(inception, "load_state_dict_from_url", lambda *_, **__: {})
    patch.setattr(
        inception.FeatureExtractorInceptionV3, "load_state_dict", lambda self, _: original(self, self.state_dict())
    )
    torch.manual_seed(0)
    network = inception.FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], verbose=False)
    patch.undo()
    torch.save(network.state_dict(), path)
    return path


def test_gray_images_are_repeated_and_the_number_is_called_fid(weights):
    metric = InceptionMetric(str(weights))
    evaluator = Evaluator(metric, DigitsDataModule(batch_size=8), batch_size=3)
    assert evaluator.label == "FID"
    found = evaluator.look(evaluator.data.images("heldout").stack(range(6)))
    assert (found.features.shape, found.logits.shape, found.spatial.shape) == ((6, 2048), (6, 1008), (6, 2023))
    assert found.features.std(0).max() > 0 and found.spatial.std(0).max() > 0  # it looks at the images
    color = torch.zeros(3, 4, 4, dtype=torch.uint8)
    assert metric.prepare(color) is color and metric.prepare(color[:1]).shape == (3, 4, 4)


def test_layers_are_those_of_torch_fidelity_and_of_adm(weights):
    """Pooled features and logits as its own extractor gives them; spatial ones from its blocks, one by one."""
    images = torch.randint(0, 256, (2, 3, 40, 40), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    theirs = inception.FeatureExtractorInceptionV3(
        "inception-v3-compat", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(weights)
    )
    found = Evaluator(InceptionMetric(str(weights)), DigitsDataModule(batch_size=8)).look(images)
    for ours, expected in zip((found.features, found.logits), theirs(images), strict=True):
        torch.testing.assert_close(torch.from_numpy(ours), expected)
    seen = {}
    theirs.Mixed_6d.register_forward_hook(lambda module, inputs, output: seen.update(block=output))
    theirs(images)
    assert seen["block"].shape == (2, 768, 17, 17)  # its first branch, of 1 x 1 convolutions, comes first
    row, column, channel = 4, 11, 6
    place = (row * 17 + column) * 7 + channel  # TensorFlow's order of axes
    torch.testing.assert_close(torch.from_numpy(found.spatial[:, place]), seen["block"][:, channel, row, column])


def test_missing_and_foreign_files(tmp_path):
    data = SimpleNamespace()
    with pytest.raises(ConfigError, match=r"no weights file .*metric\.weights=FILE"):
        InceptionMetric(str(tmp_path / "gone.pth")).extractor(data)
    for name, content in (("text.pth", b"no tensors"), ("empty.pth", b"")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ConfigError, match="not a file of tensors"):
            InceptionMetric(str(tmp_path / name)).extractor(data)
    torch.save({"weight": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(ConfigError, match="other names or shapes"):
        InceptionMetric(str(tmp_path / "other.pth")).extractor(data)


def test_pickled_code_is_not_run(tmp_path):
    class Attack:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    torch.save(Attack(), tmp_path / "evil.pth")
    with pytest.raises(ConfigError, match="not a file of tensors"):
        InceptionMetric(str(tmp_path / "evil.pth")).extractor(SimpleNamespace())
    assert not (tmp_path / "ran").exists()


def test_failed_download_says_what_to_type(monkeypatch):
    def offline(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr(inception, "load_state_dict_from_url", offline)
    with pytest.raises(ConfigError, match=r"no network.*metric\.weights=FILE"):
        InceptionMetric().extractor(SimpleNamespace())
