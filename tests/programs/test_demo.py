"""The demo: its report from fabricated evaluations, and its order of work with stand-in programs."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig
from PIL import Image

import flowanchor.conf
from flowanchor.base.signals import Interrupted, listening
from flowanchor.errors import DataError, FlowAnchorError
from flowanchor.programs import demo as program
from flowanchor.programs.launch import prepare
from flowanchor.reporting.demo_report import Demo, bars_of

FD = {
    "teacher": {50: 2.26, 8: 3.9, 4: 9.0, 2: 24.0, 1: 79.0},
    "teacher_midpoint": {8: 2.4, 4: 2.7, 2: 3.0},
    "facm": {1: 2.6, 2: 2.91, 4: 2.5},
}
SAMPLERS = {"teacher": "flow-euler", "teacher_midpoint": "flow-midpoint", "facm": "consistency"}


def fabricate(evaluation: Path, model: str, fd: dict[int, float], digest: str = "0" * 12) -> None:
    """What the evaluation program leaves, with invented numbers and noise for images."""
    (evaluation / "samples").mkdir(parents=True)
    rng = np.random.default_rng(0)
    labels = np.arange(60) % 10
    for nfe in fd:
        images = (rng.random((60, 8, 8, 1)) * 25 * (labels[:, None, None, None] + 1)).astype(np.uint8)
        np.savez_compressed(evaluation / "samples" / f"nfe{nfe}.npz", images=images, labels=labels)
    sampler = SAMPLERS[model]
    rows = [
        {"sampler": sampler, "nfe": nfe, "network_calls": nfe, "n": 60, "fd": value, "floor": 1.2, "floor_n": 60,
         "kid": 0.01, "precision": 0.9, "recall": 0.8, "inception_score": 8.0, "seconds": 1.0}
        for nfe, value in fd.items()
    ]  # fmt: skip
    settings = {"checkpoint_hash": digest, "metric": "FD-digits", "ema": "power_0.2", "data": "digits", "seed": 0,
                "num_samples": 60, "protocol": "balanced", "step": 100, "repeats": 3}  # fmt: skip
    (evaluation / "metrics.json").write_text(json.dumps({"settings": settings, "floor": {"fd": 1.2}, "results": rows}))


def fabricate_run(run: Path) -> None:
    (run / "csv").mkdir(parents=True)
    lines = [f"0,{s},{1 / s:.5f},{0.4 / s:.5f},{0.6 / s:.5f}," for s in range(10, 500, 10)] + ["0,490,,,,0.004"]
    header = "epoch,step,train/loss,train/anchor,train/shortcut,val/loss\n"
    (run / "csv/metrics.csv").write_text(header + "\n".join(lines) + "\n")


@pytest.fixture
def fabricated(tmp_path: Path) -> Demo:
    for model, fd in FD.items():
        fabricate(tmp_path / "evaluations" / model, model, fd)
    runs = {model: tmp_path / "runs" / model for model in ("teacher", "facm")}
    for run in runs.values():
        fabricate_run(run)
    evaluations = {model: tmp_path / "evaluations" / model for model in FD}
    return Demo(
        folder=tmp_path,
        runs=runs,
        evaluations=evaluations,
        seconds={"teacher": 12.0},
        settings={"seed": 0},
        commands=["python src/train.py"],
    )


def test_report_from_evaluations(fabricated: Demo) -> None:
    bars = fabricated.assemble()
    folder = fabricated.folder
    assert [bar.met for bar in bars] == [True, True, True]
    results = json.loads((folder / "results.json").read_text())
    assert [(r["model"], r["sampler"], r["nfe"], r["fd"], r["floor"]) for r in results] == [
        (m, SAMPLERS[m], nfe, fd, 1.2) for m in FD for nfe, fd in FD[m].items()
    ]
    assert all(r["metric"] == "FD-digits" and r["checkpoint_hash"] == "0" * 12 for r in results)
    names = {p.name for p in (folder / "samples").iterdir()}
    assert names == {f"{m}_nfe{nfe}.npz" for m in FD for nfe in FD[m]}
    with np.load(folder / "samples/facm_nfe1.npz") as file:
        assert file["images"].shape == (60, 8, 8, 1) and len(file["labels"]) == 60
    with Image.open(folder / "overview.png") as picture:
        assert picture.width > 800 and picture.height > 700
    page = (folder / "report.html").read_text()
    assert "teacher, 1 midpoint step<" in page and "teacher, 4 midpoint steps<" in page
    for text in ("79", "2.6", "FD-digits", "power_0.2", "python src/train.py", "student FD at 1 step"):
        assert text in page
    assert page.count("data:image/png;base64") == 1 + 11 + 1  # quality, a grid for each evaluation, losses
    assert 'class="bad"' not in page


def test_missed_bars_are_told(fabricated: Demo) -> None:
    path = fabricated.evaluations["facm"] / "metrics.json"
    content = json.loads(path.read_text())
    content["results"][0]["fd"] = 9.0  # at one step
    path.write_text(json.dumps(content))
    bars = fabricated.assemble()
    assert [bar.met for bar in bars] == [False, True, False]
    assert "MISSED" in str(bars[0]) and "3.98" in str(bars[0]) and "1.35" in str(bars[0])
    assert 'class="bad"' in (fabricated.folder / "report.html").read_text()


def test_bars_are_ratios_of_the_right_numbers() -> None:
    rows = [{"model": m, "nfe": nfe, "fd": fd} for m in FD for nfe, fd in FD[m].items()]
    assert [bar.value for bar in bars_of(rows)] == pytest.approx([2.6 / 2.26, 2.91 / 2.26, 79 / 2.6])
    assert bars_of([row for row in rows if row["nfe"] == 4]) == []


def test_missing_evaluation(fabricated: Demo) -> None:
    (fabricated.evaluations["teacher"] / "samples/nfe8.npz").unlink()
    with pytest.raises(DataError, match="save_samples=true"):
        fabricated.assemble()
    (fabricated.evaluations["teacher"] / "metrics.json").unlink()
    with pytest.raises(DataError, match="run the demo again"):
        fabricated.assemble()


# ----------------------------------------------------------------------------------------------------- order of work


def config(folder: Path, *overrides: str) -> DictConfig:
    prepare()
    with initialize_config_dir(str(Path(next(iter(flowanchor.conf.__path__))).resolve()), version_base="1.3"):
        return compose("demo", overrides=[f"folder={folder}", "num_samples=60", *overrides])


@pytest.fixture
def programs(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, list[str]]]:
    """Stand-ins for the programs: they leave the files, and remember how they were called."""
    calls: list[tuple[str, list[str]]] = []

    def run(self: Any, title: str, name: str, arguments: list[str], finished: bool = False, margin: str = "") -> None:
        if finished:
            return
        calls.append((title, arguments))
        folder = Path(next(a.split("=")[1] for a in arguments if a.startswith("hydra.run.dir=")))
        if name == "train":
            steps = next(a.split("=")[1] for a in arguments if a.startswith("trainer.max_steps="))
            (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
            (folder / "checkpoints/last.ckpt").write_text(f"{folder.name} {len(calls)} {steps}")
            if not (folder / "csv").exists():
                fabricate_run(folder)
        else:
            model = folder.name.removesuffix("_quick")
            run_folder = Path(next(a.split("=")[1] for a in arguments if a.startswith("checkpoint=")))
            program.shutil.rmtree(folder, ignore_errors=True)
            fabricate(folder, model, FD[model], program.file_digest(run_folder / "checkpoints/last.ckpt")[:12])

    def steps_of(folder: Path) -> int:
        file = folder / "checkpoints/last.ckpt"
        return int(file.read_text().split()[-1]) if file.is_file() else 0

    monkeypatch.setattr(program.Parts, "run", run)
    monkeypatch.setattr(program, "_trained_steps", steps_of)
    return calls


def demo(cfg: DictConfig) -> None:
    program.demo(cfg)


def assert_order(calls: list[Any], whole: list[str]) -> None:
    """The teacher first, the student's evaluation last; in between the student trains while the teacher is measured."""
    titles = [title for title, _ in calls]
    assert titles[0] == whole[0] and titles[-1] == whole[-1] and sorted(titles) == sorted(whole)


def test_order_reuse_and_fresh(
    tmp_path: Path, programs: list[Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = config(tmp_path, "teacher.steps=30", "student.steps=20")
    demo(cfg)
    midpoint = "evaluation of the teacher by midpoint steps"
    whole = ["teacher", "FACM student", "evaluation of the teacher", midpoint, "evaluation of the student"]
    assert_order(programs, whole)
    arguments = dict(programs)
    assert f"teacher.checkpoint={tmp_path / 'runs/teacher'}" in arguments["FACM student"]
    asked = {"sampler=flow", "num_samples=60", "save_samples=true"}
    assert {"nfe=[50,8,4,2,1]", "sampler.solver=euler", *asked} <= set(arguments[whole[2]])
    assert {"nfe=[8,4,2]", "sampler.solver=midpoint", *asked} <= set(arguments[midpoint])
    assert {"nfe=[1,2,4]", "sampler=consistency"} <= set(arguments[whole[4]])
    assert "met" in capsys.readouterr().out and (tmp_path / "report.html").is_file()

    monkeypatch.setattr(Demo, "assemble", lambda self: [])  # once is enough
    programs.clear()
    demo(cfg)
    assert programs == []  # all of it is finished
    demo(config(tmp_path, "teacher.steps=30", "student.steps=25"))
    assert [title for title, _ in programs] == [whole[1], whole[4]]  # the student goes on, and is measured again
    programs.clear()
    demo(config(tmp_path, "teacher.steps=40", "student.steps=25"))
    assert_order(programs, whole)  # another teacher: its student starts anew
    programs.clear()
    demo(config(tmp_path, "teacher.steps=40", "student.steps=25", "fresh=true"))
    assert_order(programs, whole)


def test_quick_demo_leaves_the_long_one_alone(
    tmp_path: Path, programs: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Demo, "assemble", lambda self: [])
        demo(config(tmp_path, "teacher.steps=30", "student.steps=20"))
    before = (tmp_path / "runs/facm/checkpoints/last.ckpt").read_text()
    demo(config(tmp_path, "quick=true"))
    assert (tmp_path / "runs/facm/checkpoints/last.ckpt").read_text() == before
    assert "far too short" in capsys.readouterr().out and "quick run" in (tmp_path / "report.html").read_text()


def test_failing_part_stops_the_demo(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = [sys.executable, "-c", "import sys; print('what went wrong'); sys.exit(sys.argv[1])"]
    monkeypatch.setattr(program, "invocation", lambda name: (script, ["python", "src/train.py"]))
    parts = program.Parts(tmp_path / "seconds.json")
    with pytest.raises(FlowAnchorError, match="part 'teacher'"):
        parts.run("teacher", "train", ["reason"])
    assert "what went wrong" in capsys.readouterr().out
    assert parts.commands == ["python src/train.py reason"]


@pytest.mark.cold
def test_a_demo_that_is_stopped_passes_it_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    saves = "signal.signal(signal.SIGTERM, lambda *_: sys.exit('saved'))"
    code = f"import os, signal, sys, time; {saves}; os.kill(os.getppid(), signal.SIGTERM); time.sleep(30)"
    monkeypatch.setattr(program, "invocation", lambda name: ([sys.executable, "-c", code], ["python"]))
    with listening(), pytest.raises(Interrupted):
        program.Parts(tmp_path / "seconds.json").run("teacher", "train", [])
    assert "   saved\n" in capsys.readouterr().out


def test_parts_remember_their_times(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(program, "invocation", lambda name: ([sys.executable, "-c", ""], ["python"]))
    first = program.Parts(tmp_path / "seconds.json")
    first.run("teacher", "train", [])
    again = program.Parts(tmp_path / "seconds.json")
    again.run("teacher", "train", [], finished=True)
    assert again.seconds == first.seconds and first.seconds["teacher"] > 0


def test_programs_are_found_in_a_checkout() -> None:
    for name in ("train", "eval"):
        command, shown = program.invocation(name)
        assert command[0] == sys.executable and Path(command[1]).is_file()
        assert shown[0] == "python" and shown[1].endswith(f"{name}.py")
