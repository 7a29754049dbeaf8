from __future__ import annotations

import pytest

from flowanchor.errors import ConfigError
from flowanchor.metrics.protocol import parse_nfe


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
