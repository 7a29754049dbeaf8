"""`report.py` over a sweep that was really run, and over folders without runs."""

from __future__ import annotations

import sys

import pytest
from hydra.core.global_hydra import GlobalHydra

from flowanchor.programs import report, train

TINY = ["backbone.depth=1", "backbone.hidden_size=16", "backbone.num_heads=2", "data.batch_size=32", "callbacks=none"]


def run(program, monkeypatch, *words):
    GlobalHydra.instance().clear()
    monkeypatch.setattr(sys, "argv", ["program", *words])
    program.main()


def test_a_sweep_in_one_page(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    short = ["trainer.max_steps=3", "trainer.limit_val_batches=0", "log_every_n_steps=1"]
    run(train, monkeypatch, "-m", "objective=facm,flow_matching", "seed=0,1", *TINY, *short)
    run(report, monkeypatch, "runs=outputs/multirun", "name=both")
    shown = capsys.readouterr().out
    assert "| objective=facm | FlowMatchingAnchor+ConsistencyShortcut | 2 of 2 |" in shown
    assert "| objective=flow_matching | FlowMatchingAnchor | 2 of 2 |" in shown
    assert "± " in shown and (tmp_path / "outputs/report/both/report.html").is_file()


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ((), "Which runs?"),
        (("runs=nowhere",), "There is no folder nowhere"),
        (("runs=.",), "There are no runs in ."),
        (("runs=.", "titel=x"), "titel"),
    ],
)
def test_mistakes_are_one_sentence(words, sentence, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        run(report, monkeypatch, *words)
    said = capsys.readouterr().err
    assert ended.value.code == 1 and sentence in said and said.count("\n") == 1
