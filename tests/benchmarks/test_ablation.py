"""The ablation: its rows compose to what they say, its table tells failures from scores."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from hydra import compose, initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from hydra.utils import instantiate

import ablation
from flowanchor.plugins.backbones.lightningdit import LightningDiT
from flowanchor.plugins.objectives.imf_whole import WholeImprovedMeanFlow
from flowanchor.programs.launch import prepare
from flowanchor.reporting.ablation_figure import ablation_figure

ROOT = Path(__file__).parents[2]


def test_every_row_is_a_legal_objective_of_its_own():
    prepare()
    seen = set()
    for row in ablation.ROWS:
        words = [word.format(quarter=150) for word in row.words]
        GlobalHydra.instance().clear()
        with initialize_config_module("flowanchor.conf", version_base="1.3"):
            cfg = compose("train", overrides=words)
        seen.add(str(cfg.objective))
        objective = instantiate(cfg.objective, _convert_="all")
        told = {name: cfg.backbone[name] for name in ("auxiliary_time_cond", "end_time", "guidance_cond")}
        objective.check(LightningDiT(input_size=4, patch_size=2, hidden_size=16, depth=1, num_heads=2, **told))
        if isinstance(objective, WholeImprovedMeanFlow):
            assert row.calls == 5  # the teacher, three velocities of its own, the average
            continue
        calls = 1 + (objective.anchor is not None) + (objective.shortcut is not None)
        further = type(objective.shortcut).__name__ in ("ImprovedMeanFlowShortcut", "AlphaFlowShortcut")
        assert row.calls == calls + further, row.name
    assert len(seen) == len(ablation.ROWS)
    assert [row.name for row in ablation.RELATIVES] == [
        "FACM, expanded interval", "MeanFlow, r = t share 0.75",
        "iMF whole: guidance as an input, no velocity head", "iMF whole, without adaptive weight", "alpha-Flow",
        "alpha-Flow without adaptive weight", "MeanFlow, decoupled", "MeanFlow, gated",
    ]  # fmt: skip


def test_the_table():
    rows = ablation.ROWS[:3]

    def run(row, fd, broke=False):
        return {"row": row.name, "steps": 9, "fd": fd, "broke": broke, "curves": {}}

    good = {"1": 2.0, "2": 1.5, "4": 1.0}
    found = [
        run(rows[0], good), run(rows[0], {**good, "1": 4.0}), run(rows[1], {**good, "1": 30.0}), run(rows[1], good),
        run(rows[2], {}, broke=True),
    ]  # fmt: skip
    costs = {rows[0].name: 0.1, rows[1].name: 0.05, rows[2].name: 0.07}
    reference = {"fd": {"1": 20.0, "2": 9.0, "4": 3.0, "50": 1.0}}
    lines = ablation.table(rows, found, reference, costs).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]
    assert cells[0] == [rows[0].name, "9", "3.00 ± 1.41", "1.50 ± 0.00", "1.00 ± 0.00", "0 of 2", "0 of 2", "1.00"]
    assert cells[1][-3:] == ["0 of 2", "1 of 2", "0.50"]
    assert cells[2] == [rows[2].name, "9", "-", "-", "-", "1 of 1", "0 of 1", "0.70"]
    assert [row[2:5] for row in cells[3:]] == [["20.00", "9.00", "3.00"]], "as earlier records have it"
    lines = ablation.table(rows, found, {**reference, "midpoint": {"2": 2.5, "4": 1.25}}, costs).splitlines()
    assert lines[-2].startswith("| teacher, Euler steps |") and "| 20.00 | 9.00 | 3.00 |" in lines[-2]
    assert lines[-1].startswith("| teacher, midpoint steps |") and "| 20.00 | 2.50 | 1.25 |" in lines[-1]


def test_the_figure_has_a_panel_per_objective():
    curves = {"loss": ([0, 10], [1.0, 0.5]), "tangent_norm": ([0, 10], [3.0, 30.0])}
    figure = ablation_figure({f"row {i}": [curves, {"loss": ([0], [1.0])}] for i in range(5)}, columns=2)
    titles = [axes.get_title() for axes in figure.axes if axes.get_title()]
    assert titles == [f"row {i}" for i in range(5)]


@pytest.mark.slow
def test_a_quick_one(tmp_path):
    command = [sys.executable, str(ROOT / "benchmarks/ablation.py"), "--quick", "--folder", str(tmp_path / "ablation")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    assert "| sCM | 6 |" in done.stdout
