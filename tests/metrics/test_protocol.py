from __future__ import annotations

import pytest
import torch

from flowanchor.errors import ConfigError
from flowanchor.metrics.protocol import make_labels, parse_nfe


def test_balanced_labels_are_balanced_in_every_prefix():
    labels = make_labels("balanced", 25, 10, seed=0)
    assert labels.tolist() == [i % 10 for i in range(25)] and labels.dtype == torch.int64


def test_random_labels_follow_the_seed():
    first, again, other = (make_labels("random", 1000, 10, seed=s) for s in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)
    counts = torch.bincount(first, minlength=10)
    assert counts.min() > 60 and counts.max() < 140 and counts.float().std() > 1


def test_unconditional_networks_get_no_labels():
    assert make_labels("balanced", 10, 0, seed=0) is None


@pytest.mark.parametrize(
    ("protocol", "count", "message"),
    [("even", 10, "protocol=balanced or protocol=random"), ("random", 0, "num_samples=1000")],
)
def test_bad_requests(protocol, count, message):
    with pytest.raises(ConfigError, match=message):
        make_labels(protocol, count, 10, seed=0)


@pytest.mark.parametrize(
    ("value", "expected"),
    [(1, [1]), ("4", [4]), ("1,2", [1, 2]), ("1, 2", [1, 2]), ([1, 2, 4], [1, 2, 4]), ([2, 2], [2]), (None, [None])],
)
def test_nfe_in_every_spelling(value, expected):
    assert parse_nfe(value) == expected


@pytest.mark.parametrize("value", [0, -1, "0", [1, 0], 1.5, "two", [], "", [None]])
def test_nfe_that_cannot_be(value):
    with pytest.raises(ConfigError, match=r"nfe=\[1,2,4\]"):
        parse_nfe(value)
