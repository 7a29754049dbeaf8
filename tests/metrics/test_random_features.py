from __future__ import annotations

import pytest
import torch

from flowanchor.data.images import ArrayImages
from flowanchor.metrics.evaluator import Evaluator
from flowanchor.plugins.metrics.random_features import FEATURES, RandomMetric


@pytest.mark.parametrize(("channels", "side"), [(1, 8), (3, 16), (3, 33)])
def test_any_image_without_data(channels, side):
    metric = RandomMetric()
    images = torch.randint(0, 256, (4, channels, side, side), dtype=torch.uint8)
    features, logits = metric.extractor(None)(torch.stack([metric.prepare(image) for image in images]))
    assert features.shape == (4, FEATURES) and logits.shape == (4, 16) and metric.label(None) == "FD-random"
    assert features.std(0).min() > 1e-3


def test_worse_images_score_worse_and_the_weights_are_fixed(digits):
    evaluator = Evaluator(RandomMetric(kid_subset_size=100), digits)
    assert evaluator.extractor_digest == Evaluator(RandomMetric(), digits).extractor_digest
    assert evaluator.extractor_digest != Evaluator(RandomMetric(seed=1), digits).extractor_digest
    clean = digits.images("heldout").stack(range(500))
    noise = 80 * torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))
    noisy = evaluator.score(ArrayImages((clean + noise).clamp(0, 255).to(torch.uint8), None))
    assert noisy.fd > 5 * evaluator.floor(500).fd and noisy.kid > evaluator.floor(500).kid


def test_making_it_leaves_the_random_state():
    state = torch.get_rng_state()
    RandomMetric().extractor(None)
    assert torch.equal(torch.get_rng_state(), state)
