"""Math and Streaming: against differences, over every cut into tiles, in the promised precision; their peaks."""

from __future__ import annotations

import pytest
import torch

from flowanchor.errors import ConfigError
from flowanchor.jvp.attention import Auto, Math, Streaming, choice, streaming

from .peaks import peak


def draws(batch, heads, queries, keys, d, dtype=torch.float64, width=None):
    """q, k, v, dq, dk, dv as a network has them: heads cut out of a wider row, so not contiguous."""
    draw = torch.Generator().manual_seed(0)
    sizes = [(queries, d), (keys, d), (keys, width or d)] * 2
    return [
        torch.randn(batch, rows, heads, columns, generator=draw, dtype=dtype).transpose(1, 2) for rows, columns in sizes
    ]


@pytest.mark.parametrize("engine", [Math(), Streaming(4, 4)], ids=repr)
def test_central_differences(engine):
    q, k, v, *moved = draws(2, 2, 5, 6, 8)

    def attend(step):
        a, b, c = (x + step * dx for x, dx in zip((q, k, v), moved, strict=True))
        return torch.softmax(a @ b.mT * 0.4, -1) @ c

    step = 1e-3
    single = (attend(step) - attend(-step)) / (2 * step)
    double = (attend(2 * step) - attend(-2 * step)) / (4 * step)
    differences = (4 * single - double) / 3  # Richardson: the error is of fourth order in the step
    out, tangent = engine(q, k, v, *moved, scale=0.4)
    assert (out - attend(0)).norm() <= 1e-13 * out.norm()
    assert (tangent - differences).norm() <= 1e-10 * tangent.norm()


@pytest.mark.parametrize("room", [1, 40, 100, 250, 10_000])
@pytest.mark.parametrize(
    "which", [(True, True, True), (True, False, False), (False, True, False), (False, False, True)]
)
def test_any_share_of_samples_and_heads_makes_a_tile(monkeypatch, room, which):
    """From one head at a time, over a part of a sample's heads and several samples, to all at once."""
    monkeypatch.setattr(streaming, "CPU_TILE", room)
    q, k, v, *moved = draws(3, 5, 7, 11, 6, width=4)
    moved = [tangent if there else None for tangent, there in zip(moved, which, strict=True)]
    for found, right in zip(Streaming(4, 3)(q, k, v, *moved), Math()(q, k, v, *moved), strict=True):
        assert found.shape == (3, 5, 7, 4)
        assert (found - right).norm() <= 1e-13 * right.norm()


def test_the_peak_of_the_formula_is_three_tensors_of_scores():
    inputs = draws(1, 2, 512, 512, 8, torch.float32)
    scores = 4 * 2 * 512 * 512
    assert 3 * scores <= peak(lambda: Math()(*inputs)) <= 3.2 * scores


def test_the_workspace_of_streaming_grows_neither_with_samples_nor_heads_nor_tokens():
    def workspace(batch, heads, tokens):
        inputs = draws(batch, heads, tokens, tokens, 8, torch.float32)
        return peak(lambda: Streaming()(*inputs)) - 2 * inputs[0].nbytes  # beside O and dO

    least = workspace(1, 4, 256)
    assert least > 0
    for size in ((2, 16, 256), (1, 4, 768), (4, 2, 512)):
        assert workspace(*size) <= 1.1 * least


def test_neither_autocast_nor_gradient_reaches_the_formulas():
    inputs = draws(1, 2, 6, 9, 8, torch.float32)
    for engine in (Math(), Streaming(4, 4), Auto()):
        wanted = engine(*inputs)
        needing = [x.clone().requires_grad_() for x in inputs]
        with torch.autocast("cpu", torch.bfloat16):
            found = engine(*needing)
        for a, b in zip(found, wanted, strict=True):
            assert torch.equal(a, b) and not a.requires_grad


def test_auto_takes_the_formula_for_few_scores_and_tiles_for_many(monkeypatch):
    asked = []
    for kind in (Math, Streaming):
        plain = kind.__call__
        monkeypatch.setattr(kind, "__call__", lambda *args, plain=plain: (asked.append(type(args[0])), plain(*args))[1])
    monkeypatch.setattr(choice, "FEW_SCORES", 2 * 3 * 8 * 10)
    for keys in (10, 11):
        Auto()(*draws(2, 3, 8, keys, 4))
    assert asked == [Math, Streaming]


@pytest.mark.parametrize("engine", [Math(), Streaming()], ids=repr)
def test_values_of_another_batch_are_refused(engine):
    q, k, v, dq, dk, dv = draws(2, 3, 5, 6, 4)
    with pytest.raises(ConfigError, match="do not belong together"):
        engine(q, k, v[:1], dq, dk, dv[:1])
