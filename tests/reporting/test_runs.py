"""Runs are found, put together by kind and summarised; what is half-written is read as far as it goes."""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path

import pytest
import yaml
from PIL import Image

from flowanchor.errors import DataError
from flowanchor.programs.folders import run_name
from flowanchor.reporting.run_report import curve_panels, markdown, quality_panels, summarise, write_report
from flowanchor.reporting.run_samples import about, newest_pictures
from flowanchor.reporting.runs import find_runs, group_runs


def make_run(
    folder: Path, *overrides: str, seed: int = 0, max_steps: int = 40, losses: tuple[float, ...] = (4.0, 2.0, 1.0, 1.0)
) -> Path:
    """A folder as train.py leaves it, with a loss every ten steps."""
    (folder / "csv").mkdir(parents=True)
    (folder / ".hydra").mkdir()
    settings = {"objective": {}, "trainer": {"max_steps": max_steps}, "seed": seed}
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    (folder / ".hydra" / "overrides.yaml").write_text(yaml.safe_dump([*overrides, f"seed={seed}"]))
    (folder / ".hydra" / "config.yaml").write_text("objective: {}\ntrainer: {}\n")
    rows = [f"{9 + 10 * i},{loss},{loss / 2},0.0" for i, loss in enumerate(losses)]
    header = "step,train/loss,train/tangent_norm,train/nonfinite_steps"
    (folder / "csv" / "metrics.csv").write_text("\n".join([header, *rows]) + "\n")
    return folder


def evaluate(run: Path, distances: dict[int, float], folder: Path | None = None) -> None:
    """What eval.py leaves, in the run's folder or elsewhere."""
    where = folder or run / "eval"
    where.mkdir(parents=True)
    results = [{"nfe": nfe, "fd": value} for nfe, value in distances.items()]
    settings = {"checkpoint": str(run / "checkpoints" / "last.ckpt"), "metric": "FD-digits"}
    (where / "metrics.json").write_text(json.dumps({"settings": settings, "floor": None, "results": results}))


@pytest.fixture
def sweep(tmp_path):
    for seed, distance in ((0, 1.0), (1, 2.0), (2, 4.0)):
        run = make_run(tmp_path / f"sweep/facm_{seed}", "objective=facm", "trainer.max_steps=40", seed=seed)
        evaluate(run, {1: distance, 2: distance / 2}, tmp_path / f"sweep/eval_{seed}" if seed else None)
    make_run(tmp_path / "sweep/flow", "objective=flow_matching", "trainer.max_steps=40", losses=(3.0, 2.5))
    return tmp_path / "sweep"


def test_runs_in_linked_folders_are_found_once(sweep, tmp_path):
    """As where outputs/ is a link to a scratch disk; a link that leads back ends."""
    (tmp_path / "outputs").mkdir()
    (tmp_path / "outputs" / "scratch").symlink_to(sweep)
    (sweep / "back").symlink_to(tmp_path / "outputs")
    for folders in ([tmp_path / "outputs"], [tmp_path / "outputs", sweep]):
        runs = find_runs(folders)
        assert [run.seed for run in runs] == [0, 1, 2, 0] and [len(run.results) for run in runs] == [2, 2, 2, 0]


def test_seeds_are_put_together_and_the_label_says_what_differs(sweep):
    flow, facm = sorted(group_runs(find_runs([sweep])), key=lambda group: len(group.runs))
    assert (facm.label, flow.label) == ("objective=facm", "objective=flow_matching")
    assert [run.seed for run in facm.runs] == [0, 1, 2]
    assert flow.runs[0].state == "step 19 of 40" and facm.runs[0].state == "finished"


def test_mean_and_spread_over_the_seeds(sweep):
    rows = {row["label"]: row for row in summarise(group_runs(find_runs([sweep])))}
    facm = rows["objective=facm"]
    assert facm["fd_1"] == pytest.approx(7 / 3) and facm["fd_1_spread"] == pytest.approx(statistics.stdev([1, 2, 4]))
    assert facm["fd_2"] == pytest.approx(7 / 6) and (facm["finished"], facm["loss"]) == (3, 1.0)
    assert rows["objective=flow_matching"]["fd_1"] is None and rows["objective=flow_matching"]["loss"] == 2.5


def test_the_page_holds_everything_itself(sweep, tmp_path):
    rows = write_report(find_runs([sweep]), tmp_path / "report", "A & B")
    page = (tmp_path / "report" / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 3 and "http" not in page.replace("http://www.w3.org", "")
    assert '<meta name="viewport" content="width=device-width' in page
    assert "A &amp; B" in page and "2.333 ± 1.5" in page
    assert json.loads((tmp_path / "report" / "table.json").read_text()) == rows
    assert "| objective=facm | 3 of 3 |" in markdown(rows)
    assert {p.name for p in (tmp_path / "report").iterdir()} == {
        "report.html", "table.json", "table.md", "curves.png", "quality.png",
    }  # fmt: skip


def test_short_labels_leave_out_what_goes_without_saying(tmp_path):
    for folder, words in {
        "a": ["objective=facm", "optimizer.lr=1e-4", "experiment=x"],
        "b": ["objective=facm", "optimizer.lr=2e-4", "experiment=x"],
        "c": ["objective=meanflow", "optimizer.lr=2e-4", "experiment=x"],
    }.items():
        make_run(tmp_path / folder, *words)
    groups = group_runs(find_runs([tmp_path]))
    assert [group.label for group in groups][0] == "objective=facm optimizer.lr=1e-4"
    assert [group.short for group in groups] == ["facm lr=1e-4", "facm lr=2e-4", "meanflow lr=2e-4"]


def test_short_labels_stay_distinct(tmp_path):
    """Two settings that end alike, a choice that not every run makes, words that become alike."""
    for folder, words in {
        "a": ["teacher.size=8"], "b": ["student.size=8"], "c": ["objective=ect"], "d": [], "e": ["objective=facm"],
    }.items():  # fmt: skip
        make_run(tmp_path / folder, *words)
    short = [group.short for group in group_runs(find_runs([tmp_path]))]
    assert short == ["teacher.size=8", "student.size=8", "objective=ect", "default", "objective=facm"]


def draw(run: Path, shade: int, grid: dict, size: tuple[int, int] = (60, 40)) -> None:
    """A grid of samples as the callback leaves it, and an older one."""
    (run / "samples").mkdir()
    for step, level in ((500, 0), (1000, shade)):
        Image.new("RGB", size, (level, level, level)).save(run / "samples" / f"step_{step:08d}.png")
    settings = yaml.safe_load((run / "config.yaml").read_text())
    settings |= {"callbacks": {"sample_grid": grid}, "data": {"_target_": "digits", "size": 8}}
    (run / "config.yaml").write_text(yaml.safe_dump(settings))


def test_the_newest_pictures_stand_side_by_side(tmp_path):
    same = {"seed": 0, "per_class": 4, "max_classes": 10}
    for i, name in enumerate(("a", "b", "c")):
        draw(make_run(tmp_path / name, f"x={i}"), 50 * i + 50, same)
    (tmp_path / "c" / "samples" / "step_00001000.png").write_bytes(b"half")
    drawn = newest_pictures(group_runs(find_runs([tmp_path])))
    assert [(one.caption, one.picture.getpixel((0, 0))[0]) for one in drawn] == [
        ("x=0, step 1,000", 50),
        ("x=1, step 1,000", 100),
    ]
    assert "same noise and classes: compare pictures at the same place" in about(drawn)
    write_report(find_runs([tmp_path]), tmp_path / "report", "pictures")
    assert "same place" in (tmp_path / "report" / "report.html").read_text()


def test_pictures_of_other_noise_are_not_called_comparable(tmp_path):
    for i, name in enumerate(("a", "b")):
        draw(make_run(tmp_path / name, f"x={i}"), 50, {"seed": i, "per_class": 4, "max_classes": 10})
    assert "Not all were drawn of the same noise" in about(newest_pictures(group_runs(find_runs([tmp_path]))))


def test_thirty_kinds_fit_into_the_figures(tmp_path):
    for i in range(30):
        run = make_run(tmp_path / f"{i:02d}", f"optimizer.lr={i}", losses=(4.0, math.nan) if i == 3 else (4.0, 1.0 + i))
        evaluate(run, {1: 30.0 - i, 2: 5.0})
    groups = group_runs(find_runs([tmp_path]))
    figure = curve_panels(groups)["train/loss"]
    assert [text.get_text() for text in figure.legends[0].get_texts()][-1] == "23 others"
    panels = quality_panels(groups, summarise(groups))
    assert [len(panel.axes[0].get_yticklabels()) for panel in panels.values()] == [30]


def test_a_teacher_and_its_student_share_a_figure(tmp_path):
    """What differs by the sampler alone is compared; what differs otherwise stands in a figure of its own."""
    for i, (name, sampler) in enumerate((("teacher", "flow-euler"), ("student", "consistency"))):
        run = make_run(tmp_path / name, f"x={i}")
        measured(run, name, 2.0 + i, {"sampler": sampler})
    measured(run, "few", 9.0, {"sampler": "consistency"}, num_samples=50)
    groups = group_runs(find_runs([tmp_path]))
    panels = quality_panels(groups, summarise(groups))
    assert list(panels) == ["FD-digits, n=1000", "FD-digits, n=50"]
    shown = [label.get_text() for label in panels["FD-digits, n=1000"].axes[0].get_yticklabels()]
    assert shown == ["x=0, flow-euler", "x=1, consistency"]


def test_half_written_files_are_read_as_far_as_they_go(tmp_path):
    cut = make_run(tmp_path / "cut", "a=1")
    with (cut / "csv" / "metrics.csv").open("a") as file:
        file.write("49,1.5e-")
    (cut / "metrics.json").write_text('{"settings": {')
    new = make_run(tmp_path / "new", "a=2")
    (new / "csv" / "metrics.csv").unlink()
    broken = make_run(tmp_path / "broken", "a=3")
    (broken / "config.yaml").write_text("objective: [")
    diverged = make_run(tmp_path / "diverged", "a=4", losses=(1.0, float("nan"), float("nan")))
    runs = {run.folder.name: run for run in find_runs([tmp_path])}
    assert runs["cut"].series["train/loss"][1] == [4.0, 2.0, 1.0, 1.0]
    assert runs["new"].state == "not started" and runs["new"].last("train/loss") is None
    assert runs["broken"].problems and runs["broken"].last("train/loss") == 1.0
    assert runs[diverged.name].last("train/loss") == 1.0
    write_report(list(runs.values()), tmp_path / "report", "half")


def test_other_folders_are_left_out_and_none_at_all_is_an_error(tmp_path):
    (tmp_path / "evaluation").mkdir()
    (tmp_path / "evaluation" / "config.yaml").write_text("checkpoint: x\n")
    with pytest.raises(DataError, match="no runs in"):
        find_runs([tmp_path])
    with pytest.raises(DataError, match="no folder"):
        find_runs([tmp_path / "nowhere"])


def measured(run: Path, name: str, fd: float, line: dict | None = None, **settings) -> None:
    """An evaluation at two steps, in a folder of its own."""
    where = run.parent / f"eval_{name}"
    where.mkdir()
    common = {"checkpoint": str(run / "checkpoints" / "last.ckpt"), "metric": "FD-digits", "num_samples": 1000,
              "reference": {"name": "digits", "hash": "1a"}, "ema": "power_0.1", "protocol": "balanced"}  # fmt: skip
    results = [{"nfe": 2, "fd": fd, "sampler": "consistency", **(line or {})}]
    (where / "metrics.json").write_text(json.dumps({"settings": common | settings, "floor": None, "results": results}))


def test_scores_measured_differently_stand_in_different_columns(tmp_path):
    run, other = make_run(tmp_path / "a", "x=1"), make_run(tmp_path / "b", "x=1", seed=1)
    measured(run, "1", 1.0)
    measured(other, "2", 3.0)
    for name, settings in {
        "n": {"num_samples": 50}, "metric": {"metric": "FD-random"}, "ema": {"ema": "none"},
        "best": {"checkpoint": str(run / "checkpoints" / "best.ckpt")}, "protocol": {"protocol": "random"},
        "reference": {"reference": {"name": "folder", "hash": "2b"}}, "dtype": {"dtype": "bfloat16"},
    }.items():  # fmt: skip
        measured(run, name, 100.0, **settings)
    measured(run, "sampler", 100.0, {"sampler": "flow-euler"})
    (row,) = summarise(group_runs(find_runs([tmp_path])))
    scores = {key: row[key] for key in row if key.startswith("fd_2") and f"{key}_n" in row}
    assert len(scores) == 9 and sorted(scores.values()) == [2.0, *[100.0] * 8]
    names = " | ".join(scores)
    assert all(part in names for part in ("n=50", "FD-random", "EMA none", "best.ckpt", "protocol=random", "folder 2b",
                                          "dtype=bfloat16", "flow-euler"))  # fmt: skip
    write_report(find_runs([tmp_path]), tmp_path / "report", "nine ways")


def test_of_two_measured_alike_the_newest_counts(tmp_path):
    import os

    run = make_run(tmp_path / "a", "x=1")
    for age, (name, fd) in enumerate((("z", 1.0), ("m", 2.0), ("a", 3.0))):
        measured(run, name, fd)
        os.utime(tmp_path / f"eval_{name}" / "metrics.json", (1000 + (age != 1), 1000 + (age == 1)))
    (row,) = summarise(group_runs(find_runs([tmp_path])))
    assert row["fd_2"] == 2.0


def test_a_runs_own_spread_is_that_of_its_repeats(tmp_path):
    run = make_run(tmp_path / "a", "x=1")
    measured(run, "r", 1.5, {"spread": {"fd": 0.25}})
    rows = summarise(group_runs(find_runs([tmp_path])))
    assert rows[0]["fd_2_spread"] == 0.25 and "1.5 ± 0.25" in markdown(rows)


def test_evaluations_are_found_from_any_folder(tmp_path, monkeypatch):
    """Also older ones, which hold the path as it was typed in the folder of the training."""
    run = make_run(tmp_path / "outputs" / "train" / "a", "x=1")
    measured(run, "old", 1.5, checkpoint="outputs/train/a/checkpoints/last.ckpt")
    for folder in (tmp_path, tmp_path / "outputs", Path("/")):
        monkeypatch.chdir(folder)
        (found,) = find_runs([tmp_path / "outputs"])
        assert [score.fd for score in found.results] == [1.5]


def test_names_that_were_given_are_the_labels(tmp_path):
    for name, *words in (("teacher", "objective=flow_matching"), ("student", "objective=facm", "data.batch_size=16")):
        run = make_run(tmp_path / name, *words)
        settings = yaml.safe_load((run / "config.yaml").read_text())
        (run / "config.yaml").write_text(yaml.safe_dump(settings | {"name": name}))
    assert [group.label for group in group_runs(find_runs([tmp_path]))] == ["student", "teacher"]


def test_a_name_that_its_folder_cannot_hold_is_the_label_all_the_same(tmp_path):
    run = make_run(tmp_path / run_name('p "x"', []), "x=1")
    settings = yaml.safe_load((run / "config.yaml").read_text())
    (run / "config.yaml").write_text(yaml.safe_dump(settings | {"name": 'p "x"'}))
    (group,) = group_runs(find_runs([tmp_path]))
    assert group.label == 'p "x"'


def test_a_run_too_short_to_log_is_no_run_that_has_not_begun(tmp_path):
    run = make_run(tmp_path / "a", "x=1")
    (run / "csv" / "metrics.csv").unlink()
    (run / "checkpoints").mkdir()
    assert find_runs([tmp_path])[0].state == "nothing logged"
