"""What the comparison of samplers concludes, on numbers whose answer is known."""

from __future__ import annotations

import math

import pytest

import samplers

FALLING = {"1": [2.0, 2.2], "2": [1.0, 1.4], "4": [0.9, 1.1], "8": [0.88, 1.14]}
RISING = {"1": [1.0, 1.2], "2": [1.0, 1.1], "4": [1.2, 1.4], "8": [1.3, 1.5]}


def test_differences_are_taken_set_by_set():
    mean, error = samplers.paired([2.0, 2.2, 2.4], [1.0, 1.4, 1.2])
    assert mean == pytest.approx(-(1.0 + 0.8 + 1.2) / 3)
    assert error == pytest.approx(math.sqrt((0.0**2 + 0.2**2 + 0.2**2) / 2 / 3))


def test_a_rise_within_the_paired_error_is_none():
    assert samplers.never_rises(FALLING)  # from 4 to 8 calls by 0.01, with an error of 0.03
    assert not samplers.never_rises(RISING)
    assert not samplers.never_rises({**FALLING, "8": [0.95, 1.16]})  # by 0.055 ± 0.005


def test_the_least_mean_over_all_calls_is_chosen_of_those_with_all_calls():
    short = {n: [0.1, 0.1] for n in ("2", "4", "8")}
    assert samplers.choose({"falls": FALLING, "rises": RISING, "no single call": short}) == "rises"
    assert samplers.choose({"falls": FALLING, "rises": {**RISING, "8": [9.0, 9.0]}}) == "falls"


def test_the_page_shows_what_was_chosen_and_whether_it_held():
    record = {
        "data": "digits",
        "machine": {"cpu": "a CPU", "torch": "2.0", "date": "today", "commit": "abc"},
        "teacher": {"teacher, Euler": FALLING, "teacher, midpoint": {n: FALLING[n] for n in ("2", "4", "8")}},
        "choosing": {"A": FALLING, "B": RISING},
        "chosen": "A",
        "reported": [{"A": FALLING}, {"A": RISING}],
    }
    text = samplers.page(record)
    assert "Chosen on seed 0: *A*; seed 1: never rises, seed 2: rises." in text
    assert "| teacher, midpoint |  |  | 1.20 | 1.00 | 1.01 |  | -0.20 ± 0.10 | +0.01 ± 0.03 |" in text
