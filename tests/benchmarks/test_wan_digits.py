"""The digits by prompt: a judge that reads digits, and a table that tells seeds apart."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.datasets import load_digits

import wan_digits


def test_the_judge_reads_what_was_prompted():
    judge = wan_digits.Judge()
    assert judge.accuracy >= 0.97
    digits = load_digits()
    prompted = [np.flatnonzero(digits.target == number)[:5] for number in range(10)]
    images = digits.images[np.stack(prompted, axis=1).reshape(-1)]  # sample i shows i % 10
    images = np.repeat((images / 16 * 255).round().astype(np.uint8)[..., None], 3, axis=-1)
    assert judge.share(images) >= 0.95 and judge.share(images[::-1]) <= 0.2
    assert judge.share(np.zeros_like(images)) == pytest.approx(0.1)


def test_a_line_per_width_with_its_range_over_seeds():
    def one(width, seed, share, norm):
        shares = {str(steps): share for steps in wan_digits.STEPS}
        return {"width": width, "seed": seed, "shares": shares, "tangent_norm": norm, "clamp_share": 0.5}

    lines = wan_digits.table([one(0.01, 0, 1.0, 30), one(0.0, 0, 0.69, 878), one(0.0, 1, 0.995, 40)]).splitlines()
    assert lines[2] == "| 0 (exact) | 69.0 to 99.5 | 69.0 to 99.5 | 69.0 to 99.5 | 69.0 to 99.5 | 40 to 878 | 50 |"
    assert lines[3] == "| 0.01 | 100.0 | 100.0 | 100.0 | 100.0 | 30 | 50 |"
