from __future__ import annotations

import io
import json

import pytest
from rich.console import Console

from flowanchor.metrics.presentation import finite_or_none, quality_plot, results_table


def make_report(**changes):
    line = {
        "sampler": "flow-euler", "nfe": 50, "network_calls": 100, "n": 1000, "fd": 2.3456, "fd_at_floor_n": 3.21,
        "floor": 1.056, "floor_n": 500, "kid": 0.0123, "precision": 0.876, "recall": 0.765, "inception_score": 9.12,
        "seconds": 12.34,
    }  # fmt: skip
    settings = {
        "extractor": {"name": "small", "digest": "ee00"},
        "reference": {"name": "digits, train split", "hash": "abcd", "n": 1297, "missing": {}},
        "checkpoint": "run/last.ckpt", "checkpoint_hash": "0123456789ab", "step": 30, "ema": "power_0.2",
        "data": "digits", "metric": "FD-digits", "num_samples": 1000, "protocol": "balanced", "seed": 5,
    }  # fmt: skip
    results = [{**line, **changes}, {**line, "nfe": 1, "network_calls": 2, "fd": 79.5, "fd_at_floor_n": 80.5}]
    return {"settings": settings, "floor": {"n": 500, "fd": 1.056}, "results": results}


def test_table_fits_a_terminal_and_says_everything():
    out = io.StringIO()
    Console(file=out, width=80).print(results_table(make_report()))
    text = out.getvalue()
    assert "…" not in text
    row = next(line for line in text.splitlines() if line.startswith("flow-euler"))
    assert row.split() == "flow-euler 50 100 2.346 3.21 1.06 0.0123 0.88 0.77 9.12 12.3".split()
    flat = " ".join(text.split())
    for word in ("run/last.ckpt", "0123456789ab", "balanced", "seed 5", "power_0.2", "n = 1000", "500 held-out"):
        assert word in flat


def test_spreads_fit_as_well():
    several = {
        "sampler": "consistency",
        "nfe": 2,
        "network_calls": 2,
        "fd": 41.194,
        "fd_at_floor_n": 41.02,
        "repeats": 5,
    }
    report = make_report()
    report["settings"] |= {"repeats": 5}
    report["results"] = [
        {**report["results"][0], **several, "spread": {"fd": 0.681, "fd_at_floor_n": 0.812, "kid": 1.0}}
    ]
    out = io.StringIO()
    Console(file=out, width=80).print(results_table(report))
    rows = [line for line in out.getvalue().splitlines() if line.startswith("consist")]
    assert [row.split() for row in rows] == [
        "consistency 2 41.19 ± 0.68 41.02 ± 0.81 1.06 0.0123 0.88 0.77 9.12".split()
    ]
    assert "means over 5 independent sets" in out.getvalue()


@pytest.mark.parametrize("changes", [{}, {"nfe": None, "network_calls": None}, {"fd": None, "fd_at_floor_n": None}])
def test_plot_and_table_of_incomplete_results(tmp_path, changes):
    report = make_report(**changes)
    quality_plot(report, tmp_path / "quality.png")
    assert (tmp_path / "quality.png").stat().st_size > 5000
    Console(file=io.StringIO()).print(results_table(report))


def test_json_has_no_nan():
    nested = {"a": [1.0, float("nan"), {"b": float("inf")}], "c": "nan", "d": 3}
    assert finite_or_none(nested) == {"a": [1.0, None, {"b": None}], "c": "nan", "d": 3}
    json.dumps(finite_or_none(nested), allow_nan=False)


def without_floor():
    report = make_report(fd_at_floor_n=None, floor=None, sfid=4.567, kid=None, precision=None, recall=None)
    report["floor"] = None
    report["settings"]["metric"] = "FID"
    missing = dict.fromkeys(("kid", "precision", "recall"), "the reference holds statistics, no images")
    report["settings"]["reference"] = {"name": "fid-50k-256.npz", "hash": "f1d5", "n": None, "missing": missing}
    return report


def test_a_reference_of_statistics_without_a_floor(tmp_path):
    out = io.StringIO()
    Console(file=out, width=80).print(results_table(without_floor()))
    text = " ".join(out.getvalue().split())
    row = next(line for line in out.getvalue().splitlines() if line.startswith("flow-euler 50".split()[0]))
    assert row.split() == "flow-euler 50 100 2.346 4.567 - - - 9.12 12.3".split()
    for words in ("sFID", "fid-50k-256.npz (statistics, f1d5)", "no kid, precision, recall: the reference holds"):
        assert words in text
    assert "floor" not in text
    quality_plot(without_floor(), tmp_path / "quality.png")
    assert (tmp_path / "quality.png").stat().st_size > 5000


def test_the_reference_stands_beside_the_numbers(tmp_path, monkeypatch):
    from matplotlib.axes import Axes

    titles = []
    monkeypatch.setattr(Axes, "set_title", lambda self, title, **_: titles.append(title))
    quality_plot(make_report(), tmp_path / "quality.png")
    assert "balanced labels" in titles[0] and "digits, train split abcd" in titles[0]
    out = io.StringIO()
    Console(file=out, width=80).print(results_table(make_report()))
    text = " ".join(out.getvalue().split())
    assert "digits, train split (1297 images, abcd)" in text and "extractor small ee00" in text
