"""Forgetting, stability, what runs would take: legal rows, tables whose numbers are known, records that go on."""

from __future__ import annotations

import math
from dataclasses import asdict
from functools import partial
from itertools import combinations

import pytest
import torch

import forgetting
import gpu_evidence
import growth
import second_opinion
import short_runs
import stability
import what_it_takes
from flowanchor import compose
from flowanchor.base.typed import instantiate
from flowanchor.plugins.backbones.lightningdit import LightningDiT

COMPOSED = partial(compose, "data=digits")


def checked(*words):
    """The objective and settings of a row, which must fit a small network that they are for."""
    cfg = COMPOSED(*words)
    objective = instantiate(cfg.objective, _convert_="all")
    told = {name: cfg.backbone[name] for name in ("auxiliary_time_cond", "end_time", "time_scale")}
    objective.check(LightningDiT(input_size=4, patch_size=2, hidden_size=16, depth=1, num_heads=2, **told))
    return cfg, objective


def test_every_row_of_forgetting_is_an_objective_of_its_own_and_says_rightly_whether_it_has_an_anchor():
    seen = set()
    for row in forgetting.ROWS:
        cfg, objective = checked(*row.words)
        seen.add(str(cfg.objective))
        shares = {"MeanFlow": 0.75, "MeanFlow without r = t": 0.0, "DMF": 0.5, "MeanFlow, gated": 0.5}
        kept = objective.anchor is not None or shares.get(row.name, 0) > 0
        assert kept is not row.anchored.startswith("nothing"), row.name
        assert shares.get(row.name) == (objective.shortcut.share if row.name in shares else None)
    assert len(seen) == len(forgetting.ROWS) == 9


@pytest.mark.parametrize("data", ["digits", "fashion_mnist"])
def test_cells_are_what_they_say_and_come_in_pairs(data):
    cells = stability.cells(data)
    assert len(set(cells)) == len(cells)
    seen = set()
    for cell in cells:
        assert stability.Cell(**{**asdict(cell), "anchor": not cell.anchor}) in cells
        pairs = set(combinations([one for one in asdict(cell).items() if one[0] != "start"], 2))
        if pairs <= seen:  # any two of the settings that it types were composed together already
            continue
        seen |= pairs
        cfg, objective = checked(*(word for word in cell.words(None)))
        assert (objective.anchor is not None) is cell.anchor
        assert (cfg.backbone.time_scale, cfg.trainer.precision) == (cell.scale, cell.precision)
        assert cfg.objective.interval._target_.endswith("ExpandedInterval")
        if cell.tangent != "facm":
            assert (objective.shortcut.normalisation, objective.shortcut.warmup_steps) == (
                0.1 if cell.tangent == "normalised" else None, 0,
            )  # fmt: skip
    whole = {(c.anchor, c.scale, c.precision) for c in cells if (c.start, c.tangent) == ("distilled", "raw")}
    assert data != "digits" or len(whole) == 2 * 3 * 2


def row(seed, cosine, fd, broke=False):
    lines = [{"t": t, "error": e, "from_teacher": 0.1, "cosine": cosine} for t, e in ((0.25, 0.5), (0.75, 0.7))]
    lines[1]["cosine"] = cosine - 0.2
    curves = [{"step": 0, "lines": lines}, {"step": 9, "lines": lines}]
    return {"row": "FACM", "seed": seed, "broke": broke, "curves": curves, "fd": fd}


def forgotten():
    about = {"steps": 9, "batch": 8, "held_out": 7, "samples": 6, "sets": 5, "seeds": [0, 1]}
    teacher = {"lines": [{"t": 0.25, "error": 0.4}, {"t": 0.75, "error": 0.6}], "fd": {"2": 3.0, "16": 1.0}}
    machine = {"cpu": "a CPU", "cores": 2, "torch": "2.0", "date": "2000-01-01", "commit": "abc"}
    fds = [{"1": 2.0, "2": 1.5, "flow": 1.0}, {"1": 4.0, "2": 1.5, "flow": 2.0}]
    rows = [row(seed, 0.9, fd) for seed, fd in enumerate(fds)]
    return {"machine": machine, "about": about, "teacher": {**teacher, "floor": 0.9}, "rows": rows}


def test_the_table_of_forgetting():
    """Errors of 0.5 and 0.7 beside the teacher's 0.4 and 0.6: a fifth more."""
    lines = forgetting.table(forgotten()).splitlines()
    cells = [cell.strip() for cell in lines[2].strip("|").split("|")]
    assert cells == [
        "FACM", "anchor on 2 - t", "20.0 ± 0.0", "0.1000 ± 0.0000", "0.8000 ± 0.0000", "0.75: 0.700 ± 0.000",
        "3.00 ± 1.41", "1.50 ± 0.00", "1.50 ± 0.71",
    ]  # fmt: skip
    assert lines[-1].split("|")[-4:-1] == ["  ", " 3.00 ", " 1.00 "]
    assert "0 of 2 runs stopped" in forgetting.page(forgotten())
    assert len(forgetting.figure(forgotten()).axes[0].lines) == 2


def test_the_table_of_stability_counts_what_broke_and_what_got_worse():
    with_anchor, without = stability.Cell(True, 1), stability.Cell(False, 1)

    def run(cell, seed, fd, norm):
        return {
            **asdict(cell),
            "seed": seed,
            "fd": {"1": fd, "2": fd},
            "began_at": 10.0,
            "broke": fd is None,
            "highest_norm": norm,
        }

    rows = [run(with_anchor, 0, 2.0, 1.5), run(with_anchor, 1, 4.0, 30.0)]
    rows += [run(without, 0, 12.0, 1234.0), run(without, 1, None, None)]
    about = {"data": "digits", "steps": 9, "batch": 8, "samples": 6, "sets": 5, "seeds": [0, 1]}
    content = {**forgotten(), "about": about, "rows": rows, "starts": {"distilled, 1": 10.0}}
    cells = stability.cells("digits")
    line = [cell.strip() for cell in stability.table(content, cells).splitlines()[2].strip("|").split("|")]
    assert line == [
        "distilled", "raw", "32-true", "x1", "10.0", "3.00 ± 1.41", "12.00", "0 of 2", "2 of 2", "30", "1.23e+03"
    ]  # fmt: skip
    assert f"2 of {len(cells)} cells have all seeds" in stability.page(content, cells)
    assert "1 of 4 runs stopped" in stability.page(content, cells)
    texts = [text.get_text() for text in stability.picture(content, cells).axes[0].texts]
    assert sorted(texts) == ["12.00\n2 of 2 worse", "3.00 ± 1.41"]


def test_a_record_goes_on_and_refuses_other_settings(tmp_path):
    record = short_runs.Record(tmp_path / "record.json", {"steps": 3, "seeds": (0, 1)})
    record.add({"row": "a", "seed": 0, "fd": math.inf, "list": [1.23456789, math.nan]})
    again = short_runs.Record(tmp_path / "record.json", {"steps": 3, "seeds": (0, 1)})
    assert again.find(row="a", seed=0) == {"row": "a", "seed": 0, "fd": None, "list": [1.2346, None]}
    assert again.find(row="a", seed=1) is None and again.content["machine"] == record.content["machine"]
    with pytest.raises(SystemExit, match="was measured with"):
        short_runs.Record(tmp_path / "record.json", {"steps": 4, "seeds": (0, 1)})


def test_a_short_run_is_what_train_makes_of_it_and_its_averages_come_back(tmp_path):
    words = ("data=digits", "backbone.depth=1", "backbone.hidden_size=16", "backbone.num_heads=2", "data.batch_size=8")
    done = short_runs.fit(tmp_path, *words, "trainer.max_steps=3", "ema.sigma_rel=null", "ema.decay=1e-9")
    kept = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
    assert kept["flowanchor"]["step"] == 3 and len(done.watch.norms) == len(done.watch.seconds) == 3
    assert len(set(done.watch.norms)) == 3 and min(done.watch.norms) > 0
    for name, value in done.student.state_dict().items():  # an average that forgets at once is the last weights
        torch.testing.assert_close(value, kept["state_dict"][f"student.{name}"], rtol=1e-6, atol=1e-7)
    stopped = short_runs.fit(tmp_path / "no", *words, "optimizer.lr=1e30", "max_nonfinite_steps=1", ends=False)
    assert stopped.student is None and 1 <= len(stopped.watch.norms) < 20


def test_what_a_run_takes():
    """By hand: 128.1 million samples, 11 forward passes of 2 TFLOP each; 1,000 images a second on a card."""
    run = what_it_takes.RUNS[0]
    plans = {r.plan: {"Chain(recompute)": {str(r.cards): {"parts": {"a": 2e9, "b": 1e9}}}} for r in what_it_takes.RUNS}
    about = {"torch": "2.0", "date": "2000-01-01", "commit": "abc"}
    record = {"machine": about, "forward_flops": dict.fromkeys(what_it_takes.NETWORKS, 2e12)}
    gpu = {"machine": {"device": "a card"}, "rows": {run.step: {"images_per_second": 1000.0}}}
    line = what_it_takes.page(record, plans, gpu).splitlines()[2]
    assert "| 2.00 | 2.82 | 36 | 32 | 3.0 |" in line  # 128.1167e6 / 1000 / 3600
    assert "| not measured |" in what_it_takes.page(record, plans, None).splitlines()[2]


def test_slopes_are_those_of_powers_and_stand_beside_what_they_were_drawn_through():
    assert growth.slope([1, 2, 4], [3, 6, 12]) == pytest.approx(1)
    assert growth.slope([10, 20], [5, 20]) == pytest.approx(2)
    assert growth.off([1, 2, 4], [1, 2, 8]) == pytest.approx(2 ** (1 / 3))  # by hand: 0, 1, 3 beside -1/6 + 1.5 x
    rows = [
        {"part": "cost", "what": what, "value": value, "cpu_seconds": value / 10, "bytes": 1e6 * value**2}
        for what, values in growth.COSTS.items()
        for value in values
    ]
    quality = {"part": "quality", "what": "steps", "value": 25, "parameters": 1234, "teacher": 2.0}
    rows += [{**quality, "seed": seed, "student": fd} for seed, fd in enumerate((3.0, 5.0))]
    usual = {**quality, "what": "batch", "value": growth.BATCH, "seed": 0, "student": 7.0, "commit": "def"}
    text = growth.page({**forgotten(), "about": {"rounds": growth.ROUNDS}, "rows": [*rows, usual]})
    assert "| depth | 2, 4, 8, 16 | 0.20, 0.40, 0.80, 1.60 | 1.00 (x1.00) | 4, 16, 64, 256 | 2.00 (x1.00) |" in text
    assert "| steps | 25 | 1,234 | 2.00 | 4.00 ± 1.41 |" in text
    for crossing in (f"batch | {growth.BATCH}", f"steps | {growth.STEPS}", f"hidden_size | {growth.WIDTH}"):
        assert f"| {crossing} | 1,234 | 2.00 | 7.00 |" in text
    assert text.endswith("commit abc, later rows def.")


def test_many_tokens_show_where_their_line_bends():
    rows = [
        {"part": "long", "value": value, "cpu_seconds": seconds, "bytes": 1e6 * value}
        for value, seconds in ((64, 1.0), (256, 4.0), (1024, 64.0))
    ]
    cells = growth.cost_row("tokens", rows)  # exponents of 2 by hand: 0, 2, 6 over 6, 8, 10: slope 1.5, off by 2^(2/3)
    assert cells == ["tokens", "64, 256, 1,024", "1.00, 4.00, 64.00", "1.50 (x1.59)", "64, 256, 1024", "1.00 (x1.00)"]
    assert "slopes are 1.00, 2.00 in seconds and 1.00, 1.00 in bytes" in growth.steps_of(rows)


def opinions(*values):
    """Three seeds of a line: distances of the one metric, of the other."""
    return [{"small": small, "efficientnet": other} for small, other in values]


def test_two_representations_agree_where_both_say_the_same():
    lines = {
        "a": opinions((1, 10), (2, 20), (3, 30)),
        "b": opinions((2, 11), (3, 21), (4, 31)),  # behind a for both
        "c": opinions((3, 9), (4, 19), (5, 29)),  # the last for the one and the first for the other
        "d": opinions((9, 12), (3, 22), (4, 32)),  # the one cannot tell it from b, and c only by its mean
    }
    tau, told, alike, every = second_opinion.agreement(lines)
    # By hand: means 2, 3, 4, 5.33 and 20, 21, 19, 22; ab ad bd cd agree, ac bc do not: (4 - 2) / 6.
    assert tau == pytest.approx(1 / 3)
    assert (told, alike, every) == (4, 2, 6)  # ab, ac, ad, bc; of these ab, ad


def test_the_page_of_a_second_opinion_shows_whole_lines():
    rows = [
        {"data": "digits", "case": name, "calls": 2, "seed": seed, "fd": {"small": fd + seed, "efficientnet": 9.0 - fd}}
        for name, fd in (("best", 1.0), ("worst", 3.0))
        for seed in (0, 1)
    ]
    rows += [{**rows[0], "case": "half"}, {"data": "digits", "case": "held-out images", "fd": rows[0]["fd"]}]
    about = {"samples": 5, "reference": 7, "seeds": [0, 1]}
    text = second_opinion.page({**forgotten(), "about": about, "rows": rows})
    assert "| best | 2 | 1.50 ± 0.71 | 8.00 ± 0.00 | 1 | 2 |" in text and "half" not in text
    assert "| held-out images |  | 1.00 | 8.00 |  |  |" in text
    assert "tau of the means: -1.00. Of 1 pairs of lines both metrics tell 1 apart" in text and "order 0 of" in text


def test_a_step_costs_more_where_it_is_deeper():
    small = {"hidden_size": 32, "tokens": 4, "batch": 1}
    shallow, deep = (growth.cost(depth=depth, **small) for depth in (1, 6))
    assert 0 < shallow["bytes"] < deep["bytes"] and 0 < shallow["cpu_seconds"] < deep["cpu_seconds"]


@pytest.mark.parametrize("data", list(gpu_evidence.TEACHERS))
@pytest.mark.parametrize("part", list(gpu_evidence.PARTS))
def test_rows_of_a_gpu_are_whole_commands(data, part, tmp_path):
    cfg = compose(*gpu_evidence.words(data, part, tmp_path / "row", "cuda", tiny=False))
    assert cfg.trainer.max_time.seconds == gpu_evidence.PARTS[part] and cfg.trainer.precision == "bf16-mixed"
    assert (cfg.objective.anchor is None) == (part == "FACM without anchor")
    parts = gpu_evidence.PARTS.values()
    assert sum(parts) + len(parts) * gpu_evidence.AROUND < 540 / len(gpu_evidence.TEACHERS), "nine minutes"


def test_a_row_of_a_gpu_stops_when_its_time_is_over(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_evidence, "SIZE", gpu_evidence.TINY)
    monkeypatch.setitem(gpu_evidence.PARTS, "teacher", 1)
    monkeypatch.setattr(gpu_evidence, "CALLS", (2,))
    found = gpu_evidence.measure("digits", "teacher", tmp_path / "teacher", "cpu", tiny=False)
    assert 1 <= found["steps"] < 100_000 and found["seconds"] < 60 and found["fd"]["2"] > 0
