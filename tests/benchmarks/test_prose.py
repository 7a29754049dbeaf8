"""What the pages say below their tables is what the records hold: ranges over seeds, written out once more by hand."""

from __future__ import annotations

import json
import re
import statistics
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def rows(name, **what):
    """Rows of a record with these entries, by seed."""
    content = json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())
    found = [row for row in content["rows"] if all(row.get(key) == value for key, value in what.items())]
    return sorted(found, key=lambda row: row["seed"])


def said(page):
    return re.sub(r"\s+", " ", (ROOT / "docs" / "results" / f"{page}.md").read_text())


def cell(tangent, scale, anchor, precision="32-true", start="distilled", data="digits"):
    return rows(f"stability_{data}", tangent=tangent, scale=scale, anchor=anchor, precision=precision, start=start)


def span(found, digits=0, key=lambda row: row["fd"]["2"]):
    values = [key(row) for row in found]
    return f"{min(values):.{digits}f} to {max(values):.{digits}f}"


@pytest.mark.parametrize(
    "phrase",
    [
        f"ends at FD {span(cell('facm', 1, False))} in all three seeds",
        f"and at {span(cell('facm', 1000, False))} at x1000",
        f"with the anchor at {span(cell('facm', 1, True), 1)}, and {span(cell('facm', 1000, True), 1)}",
        f"behind their start ({span(cell('raw', 1, True))} and {span(cell('raw', 1, False))})",
        f"near it ({span(cell('normalised', 1, True), 1)} and {span(cell('normalised', 1, False), 1)})",
        f"Raw tangents end at {span(cell('raw', 1000, False))} at x1000 and {span(cell('raw', 1, False))} at x1",
        f"normalised ones at {span(cell('normalised', 1000, False))} and {span(cell('normalised', 1, False))}",
        f"no worse at x1000 ({span(cell('raw', 1000, True))}) than at x1 ({span(cell('raw', 1, True))})",
        f"the anchor ({span(cell('normalised', 1000, False))} without), and beside it they change little "
        f"({span(cell('normalised', 1000, True))}, raw ones {span(cell('raw', 1000, True))})",
        f"with an anchor, which ends at {span(cell('raw', 100, True))}, has norms of some hundreds",
        f"in every seed ({span(cell('facm', 1, True, data='fashion_mnist'))} against "
        f"{span(cell('facm', 1, False, data='fashion_mnist'))})",
        f"ends at {span(rows('forgetting', row='FACM without anchor'), 1)}; over 900 steps",
    ],
)
def test_what_is_said_of_stability(phrase):
    assert phrase in said("stability")


def test_what_is_compared_in_words():
    def ends(*of, **more):
        return [row["fd"]["2"] for row in cell(*of, **more)]

    def norms(*of, **more):
        return [row["highest_norm"] for row in cell(*of, **more)]

    started = cell("facm", 1, False)[0]["began_at"]
    assert min(ends("facm", 1, False)) > max(ends("facm", 1000, False)), "worse at x1"
    for anchor in (True, False):
        assert min(ends("raw", 1, anchor)) > started, "behind its start, in all seeds"
        better = [
            a < min(b, c) for a, b, c in zip(*(ends("raw", scale, anchor) for scale in (100, 1, 1000)), strict=True)
        ]
        assert sum(better) == (3 if anchor else 2), "x100 is the best, in every seed but one of those without"
        for scale, most in ((1, 0.4), (100, 0.4), (1000, 2.0)):
            pairs = zip(ends("raw", scale, anchor), ends("raw", scale, anchor, precision="bf16-mixed"), strict=True)
            assert max(abs(a - b) for a, b in pairs) < most, "bfloat16"
        assert max(ends("raw", 1000, anchor)) - min(ends("raw", 1000, anchor)) > 14
    assert max(ends("facm", 1, True) + ends("normalised", 1, True)) < started, "past their start"
    assert 4.5 < max(norms("raw", 1000, True)) / max(norms("raw", 1, True)) < 5.5
    assert max(norms("normalised", 1000, True)) < max(norms("normalised", 1, True))
    assert max(norms("facm", 1, False)) < 10
    assert max(norms("facm", 1000, False)) < min(row["highest_norm"] for row in rows("stability_digits", tangent="raw"))
    assert 200 < min(norms("raw", 100, True)) and max(norms("raw", 100, True)) < 400
    assert f"{max(norms('raw', 1, True, start='scratch')):.0e}" == "9e+08"
    fashion = [("raw", 1, "32-true"), ("raw", 1000, "32-true"), ("raw", 1000, "bf16-mixed")]
    for tangent, scale, precision in fashion:
        with_, without = (ends(tangent, scale, on, precision=precision, data="fashion_mnist") for on in (True, False))
        assert max(abs(a - b) for a, b in zip(with_, without, strict=True)) < 1


def test_what_is_said_of_forgetting():
    def curve(name):
        """Mean distance from the teacher by step, of each seed."""
        return [
            {p["step"]: statistics.fmean(line["from_teacher"] for line in p["lines"]) for p in run["curves"]}
            for run in rows("forgetting", row=name)
        ]

    def mean(name, key):
        return statistics.fmean(run["fd"][key] for run in rows("forgetting", row=name))

    text, last = said("forgetting"), max(curve("FACM")[0])
    flows = f"{mean('FACM', 'flow'):.1f} against {mean('FACM, auxiliary interval', 'flow'):.1f}"
    jumps = f"({mean('FACM, auxiliary interval', '1'):.2f} against {mean('FACM', '1'):.2f})"
    assert f"**along the flow**, {flows}" in text and f"ahead in every seed {jumps}" in text
    pairs = zip(rows("forgetting", row="FACM, auxiliary interval"), rows("forgetting", row="FACM"), strict=True)
    assert all(a["fd"]["1"] < b["fd"]["1"] for a, b in pairs)
    for away, name in (("eight times as far from", "FACM"), ("eight times as far away", "MeanFlow")):
        other = {"FACM": "FACM without anchor", "MeanFlow": "MeanFlow without r = t"}[name]
        ends = [statistics.fmean(run[last] for run in curve(one)) for one in (other, name)]
        assert away in text and 7.5 < ends[0] / ends[1] < 8.5
    for run in curve("FACM without anchor"):
        assert max(run, key=run.get) == 25 and run[last] < run[25] / 2, "largest then, less than half at the end"
    assert all(max(run, key=run.get) in (50, 75) for run in curve("sCM"))
    assert all(0.7 < run[last] / run[25] < 1.2 for run in curve("MeanFlow without r = t")), "stays where it is"
    assert all(0.85 < run[last] / run[25] < 1 for run in curve("FACM, plain interval"))
    assert all(run[last] < 0.6 * run[25] for name in ("FACM", "FACM, auxiliary interval") for run in curve(name))


def test_what_is_said_of_a_second_opinion():
    content = json.loads((ROOT / "benchmarks" / "results" / "second_opinion.json").read_text())
    metrics, text = ("small", "efficientnet"), said("second_opinion")
    floor = next(row["fd"] for row in content["rows"] if row["case"] == "held-out images")
    assert f"(held-out images, {floor['small']:.2f})" in text and f"floor of {floor['efficientnet']:.2f}" in text

    def line(name):
        return [row["fd"] for row in rows("second_opinion", data="digits", case=name, calls=2) if "seed" in row]

    def ahead(one, other):
        """By metric: in every seed, in none, or None."""
        verdicts = [{a[m] < b[m] for a, b in zip(line(one), line(other), strict=True)} for m in metrics]
        return [verdict.pop() if len(verdict) == 1 else None for verdict in verdicts]

    facm, student, teacher = "FACM, expanded interval", "FACM student, jumps", "its teacher, midpoint"
    relatives = ("MeanFlow, r = t share 0.75", "alpha-Flow")
    for one in (facm, student):
        assert ahead(one, teacher) == [None, True]
        assert all(ahead(one, other) == [True, False] for other in relatives)
    for one in (facm, student, *relatives):
        assert ahead(one, teacher)[1] is True
        for other in ("iMF whole: guidance as an input, no velocity head", "iMF whole, without adaptive weight"):
            assert ahead(one, other) == [True, True]
    for one, times in ((student, 4), (teacher, 5)):
        means = [statistics.fmean(fd[m] for fd in line(one)) / floor[m] for m in metrics]
        assert means[0] < 1.2 and round(means[1]) == times
