"""Which card a LoRA fits on: arithmetic by hand, a plan against a count with values, and the record."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from flowanchor.checkpoints.load import store_low
from flowanchor.jvp.attention import resolve
from flowanchor.jvp.attention.operator import Opaque
from small_cards import CASES, SMALL, TRAINED, check, fits, lasting, quantisable, step_of_depth, step_peak

RECORD = Path(__file__).parents[2] / "benchmarks" / "results" / "small_cards.json"


def test_what_lasts_by_hand():
    """Attention and feed-forward of four blocks are what eight bits halve again; adapters take 20 bytes per value."""
    with torch.device("meta"):
        network = SMALL[2].build(rank=8)
    width, inner = 4 * 48, 384
    layers = [(width, width)] * 8 + [(inner, width), (width, inner)]
    weights = 4 * sum(a * b for a, b in layers)
    assert sum(one.weight.numel() for one in quantisable(network)) == weights
    whole, low = lasting(network, "float32"), lasting(network, "int8")
    assert whole["base"] - low["base"] == 3 * weights - 4 * 5 * sum(a for a, _ in layers)
    assert whole["adapters"] == low["adapters"] == TRAINED * 4 * sum(8 * (a + b) for a, b in layers)
    assert not any(isinstance(one, nn.Linear) and one.weight.requires_grad for one in quantisable(network))


@pytest.mark.slow
def test_a_deeper_network_lies_on_the_line():
    case = SMALL[0]
    network = case.with_blocks(6).build()
    store_low(network, torch.bfloat16, frozen=True)
    direct = step_peak(network, case.text, True, Opaque(resolve("auto")))
    assert step_of_depth(case, 6) == pytest.approx(direct, rel=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("base", ["bfloat16", "int8"])
def test_the_plan_is_what_is_measured(base):
    found = check(SMALL[0], base)
    for planned, measured in zip(found.planned, found.measured, strict=True):
        assert planned == pytest.approx(measured, rel=0.05)


def test_a_card_keeps_a_tenth():
    assert fits(21.5e9, 24) and not fits(21.7e9, 24)


def test_the_record():
    """All networks, each as large as published; nothing further from measurement than a tenth."""
    record = json.loads(RECORD.read_text())
    published = {case.name: case.parameters for case in CASES}
    assert set(record["plans"]) == set(published)
    for name, found in record["plans"].items():
        assert found["parameters"] / 1e9 == pytest.approx(published[name], rel=0.03), name
        parts = found["parts"]
        assert parts["float32"]["base"] > 1.8 * parts["bfloat16"]["base"] > 2.5 * parts["int8"]["base"]
    for one in record["check"]:
        assert sum(one["planned"]) == pytest.approx(sum(one["measured"]), rel=0.1), one
