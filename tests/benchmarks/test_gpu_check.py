"""The check for GPUs, as far as a machine without one can try it: every row runs, and none of them claims a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import zipfile
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

import gpu_check
from flowanchor.testing.objective import small_student
from gpu import checks, made_up, table, training, wheels
from gpu.record import LATE, UNFINISHED, Record, Row

ROOT = Path(__file__).parents[2]
SCRIPT = str(ROOT / "benchmarks" / "gpu_check.py")


def run(*arguments: str, seconds: float = 400) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, SCRIPT, *arguments], capture_output=True, text=True, timeout=seconds)


# Rows that try nothing on a CPU, in the sizes of a trial, that another row does not: their batch is the trial's, and
# there is no graph.
LIKE_OTHERS = {
    "XL/1, 32, compiled", "XL/1, 128, compiled, graph", "XL/1, 128, flow matching, compiled, graph", "XL/1, 16, eager",
    "XL/1, 32, eager", "XL/1, 8, compiled, graph", "digits, 64, eager", "Wan 1.3B, 8 images, eager",
    "XL/1, 32, eager, graph",
}  # fmt: skip
# And what `torch.compile` is tried on in another network already.
COMPILED_AGAIN = {
    "digits, 64, compiled, graph", "Wan 1.3B, 8 images, compiled, graph", "Wan 1.3B, 81 frames, compiled, graph",
}  # fmt: skip
TESTS = {"tests", "graphs, tests"}  # by interpreters of their own


@pytest.mark.timeout(1500)  # half a minute on a core of its own
@pytest.mark.parametrize("rest", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["each kind", "the rest"])
def test_every_row_runs_on_a_cpu(rest, tmp_path):
    """By the training program, in a process of its own; tests/gpu in part, in `test-ways`."""
    before = (ROOT / "README.md").read_text()
    later = LIKE_OTHERS | COMPILED_AGAIN | TESTS
    names = [row.name for row in gpu_check.rows("cpu", True) if (row.name in later) == rest]
    done = run("--device", "cpu", "--tiny", "--results", str(tmp_path), "--only", *names, seconds=1400)
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.glob("*.json")
    record = json.loads(path.read_text())
    assert not path.name.startswith("gpu_") and not record["machine"]["gpu"], "only records of a GPU say so"
    rows = record["rows"]
    assert set(names) <= rows.keys()
    assert not {name: row for name, row in rows.items() if "missing" in row}
    steps = set(table.training_names()) & set(names)
    assert steps and all(rows[name]["step_ms"] > 0 and rows[name]["images_per_second"] > 0 for name in steps)
    if rest:
        assert rows["tests"]["passed"], rows["tests"]
        assert rows["graphs, tests"]["verdict"] == "7 tests collected", rows["graphs, tests"]
    else:
        assert list(rows) == names
        instead = rows["XL/1, 32, compiled, graph"]["instead"]
        assert len(instead) == 2, "a CPU has neither, and the record says what it did"
        assert rows["attention, heads of 64"]["32"]["tangent"]["error"] < 0.02
        assert "XL/1, 32, compiled | not measured" in done.stdout
    assert (ROOT / "README.md").read_text() == before


def test_a_row_that_is_left_to_the_slow_tests_differs_by_batch_and_graph_alone():
    def tried(row: Row) -> tuple[object, ...]:
        """The settings of a step in a trial on a CPU."""
        function, found = row.measure.func, row.measure.args  # a `partial` of tiny, [batch, [frames,]] and settings
        settings = [training.ON_A_CPU.get(word, word) for word in found if isinstance(word, str)]
        return (function.__name__, *(min(n, 2) for n in found[2:3] if isinstance(n, int)), *settings)

    made = (training.rows, training.more_rows, training.spread_rows, training.wan_rows)
    steps = {row.name: tried(row) for rows in made for row in rows(True)}
    kept = {what for name, what in steps.items() if name not in LIKE_OTHERS | COMPILED_AGAIN}
    assert kept == {what for name, what in steps.items() if name not in COMPILED_AGAIN}
    assert LIKE_OTHERS | COMPILED_AGAIN < steps.keys()


@pytest.mark.slow
def test_the_tests_for_a_gpu_pass_on_a_cpu():
    found = checks.run("cpu", tiny=False)
    assert found["passed"], found
    assert " skipped" not in found["verdict"]


def test_a_row_that_fails_costs_only_itself(tmp_path, capsys):
    def wrong() -> dict[str, float]:
        raise ValueError("no such kernel")

    record, ends = Record(tmp_path / "record.json"), time.time() + 60
    assert not record.run(Row("a", wrong), ends)
    assert record.run(Row("b", lambda: {"ms": 1.0}), ends)
    assert record.run(Row("c", wrong, least=100), ends), "not begun"
    rows = Record(record.path).rows
    assert rows["a"]["missing"] == "ValueError: no such kernel" and "in wrong" in rows["a"]["where"]
    assert rows["b"]["ms"] == 1.0 and rows["c"] == {"missing": LATE}
    assert record.run(Row("a", wrong), ends), "is not tried again"


@pytest.mark.cold
def test_a_row_that_ends_or_holds_its_process_costs_only_itself(tmp_path, monkeypatch):
    """Another worker goes on behind it, and nothing of the first one."""
    path = tmp_path / "record.json"
    every = [Row("ends", dict), Row("holds", dict, limit=1.0), Row("works", dict)]
    worker = tmp_path / "worker.py"
    worker.write_text(
        "import json, os, subprocess, sys, time\n"
        f"path = {str(path)!r}\n"
        "rows = json.load(open(path))['rows']\n"
        "for name in ('ends', 'holds', 'works'):\n"
        "    if name in rows: continue\n"
        f"    rows[name] = {{'missing': {UNFINISHED!r}}}\n"
        "    json.dump({'rows': rows}, open(path + '.new', 'w')); os.replace(path + '.new', path)\n"
        "    if name == 'ends': os._exit(9)\n"
        "    if name == 'holds':\n"
        "        started = subprocess.Popen(['sleep', '60'])\n"
        f"        open({str(tmp_path / 'started')!r}, 'w').write(str(started.pid))\n"
        "        time.sleep(60)\n"
        "    rows[name] = {'ms': 1}\n"
        "    json.dump({'rows': rows}, open(path + '.new', 'w')); os.replace(path + '.new', path)\n"
    )
    own = subprocess.Popen
    monkeypatch.setattr(gpu_check.subprocess, "Popen", lambda command, **o: own([sys.executable, str(worker)], **o))
    monkeypatch.setitem(gpu_check.PATIENCE, "cpu", 1)
    monkeypatch.setattr(gpu_check, "chosen_rows", lambda chosen: every)
    Record(path).write()
    chosen = gpu_check.argparse.Namespace(seconds=30.0, device="cpu", tiny=True, only=[])
    gpu_check.supervise(chosen, path)
    assert Record(path).rows == {"ends": {"missing": UNFINISHED}, "holds": {"missing": UNFINISHED}, "works": {"ms": 1}}
    assert not _runs(int((tmp_path / "started").read_text())), "what a worker started has ended with it"


def _runs(process: int) -> bool:
    """Whether it does, beyond being a dead one that nobody has asked for."""
    done = subprocess.run(["ps", "-o", "stat=", "-p", str(process)], capture_output=True, text=True)
    return bool(done.stdout.strip()) and not done.stdout.startswith("Z")


@pytest.mark.cold
def test_no_row_is_begun_or_goes_on_beyond_the_time(tmp_path, monkeypatch):
    """It ends `AFTER` seconds after the last moment to begin one, and the record says what was left out."""
    path = tmp_path / "record.json"
    every = [Row("long", dict, limit=1000.0), Row("other", dict)]
    worker = tmp_path / "worker.py"
    worker.write_text(
        "import json, os, time\n"
        f"path = {str(path)!r}\n"
        f"json.dump({{'rows': {{'long': {{'missing': {UNFINISHED!r}}}}}}}, open(path + '.new', 'w'))\n"
        "os.replace(path + '.new', path); time.sleep(60)\n"
    )
    own = subprocess.Popen
    monkeypatch.setattr(gpu_check.subprocess, "Popen", lambda command, **o: own([sys.executable, str(worker)], **o))
    monkeypatch.setattr(gpu_check, "chosen_rows", lambda chosen: every)
    monkeypatch.setattr(gpu_check, "AFTER", 1.0)
    Record(path).write()
    began = time.time()
    gpu_check.supervise(gpu_check.argparse.Namespace(seconds=2.0, device="cpu", tiny=True, only=[]), path)
    assert time.time() - began < 30
    assert Record(path).rows == {"long": {"missing": UNFINISHED}, "other": {"missing": LATE}}
    assert gpu_check.SECONDS["cuda"] + 60 + 30 < 9 * 60


def test_a_trial_needs_a_folder_of_its_own():
    assert "--results" in run("--device", "cpu", "--tiny").stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_one_sentence():
    done = run()
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1].startswith("This machine has no CUDA device")


def test_without_a_record_nothing_is_claimed():
    steps = len(table.training_names())
    assert table.table(None).count("not measured") == steps + len(table.HEAD_SIZES) * len(table.SHOWN) * 4
    assert " yes " not in table.runs(None) and "not yet" in table.runs(None)


def test_the_table_is_the_records():
    step = {"step_ms": 250.0, "host_ms": 4.0, "device_ms": 240.0, "images_per_second": 128.0, "tflops": 350.0}
    name, beside = next(iter(table.BESIDE.items()))
    rows = {"card": {"matrix_tflops": 700.0, "copy_tb_s": 4.0}, name: step, beside: {**step, "step_ms": 100.0}}
    about = {"device": "A card", "torch": "2.11.0", "date": "2026-01-01", "commit": "abc"}
    text = table.table({"machine": about, "rows": rows})
    assert f"| {name} | 250.0 | 4.0 | 240.0 | 128.0 | 350 (50 %) |  | 2.50 |" in text
    assert "on A card, torch 2.11.0" in text
    assert set(table.BESIDE) | set(table.BESIDE.values()) <= set(table.training_names())
    assert {name for names in table.RUNS.values() for name in names} <= set(table.training_names())


def test_a_skipped_step_is_no_run():
    names = table.RUNS["one process, eager"]
    record = {"machine": {"device": "A card"}, "rows": {names[0]: {"step_ms": 1.0, "skipped_steps": 0.0}}}
    assert "| one process, eager | yes |" in table.runs(record)
    record["rows"][names[0]]["skipped_steps"] = 2.0
    assert "| one process, eager | not yet |" in table.runs(record)


def test_a_record_from_elsewhere(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_check, "RESULTS", tmp_path / "results")
    foreign = tmp_path / "found.json"
    foreign.write_text(json.dumps({"machine": {"device": "cpu", "gpu": False}, "rows": {"card": {}}}))
    with pytest.raises(SystemExit, match="is no record of a GPU"):
        gpu_check.take_home(foreign)
    foreign.write_text(
        json.dumps({"machine": {"device": "NVIDIA X1", "gpu": True, "date": "2026-01-01"}, "rows": {"card": {}}})
    )
    gpu_check.take_home(foreign)
    assert gpu_check.recorded()["machine"]["device"] == "NVIDIA X1"
    assert [path.name for path in (tmp_path / "results").iterdir()] == ["gpu_nvidia_x1.json"]


def test_products_are_counted():
    """LightningDiT-XL/1, two images: linear layers and attention, two operations per multiplication."""
    depth, width, tokens, hidden, batch = 28, 1152, 256, 3072, 2
    linear = 2 * batch * tokens * width * (4 * width + 3 * hidden)  # qkv, out; SwiGLU's three
    attention = 2 * 2 * batch * tokens**2 * width
    modulation = 2 * batch * width * 6 * width
    blocks = depth * (linear + attention + modulation)
    assert training.forward_flops("latents", batch) == pytest.approx(blocks, rel=0.01)


@pytest.mark.parametrize(("precision", "kept"), [("bf16-mixed", torch.bfloat16), ("32-true", torch.float32)])
def test_its_teacher_is_kept_as_a_checkpoints_is(precision, kept):
    field = made_up.teacher(small_student(), 1.75, 0.125, 1.0, "auto", precision)
    assert field.network.blocks[0].attn.qkv.weight.dtype is kept and field.low == (kept is torch.bfloat16)


def test_packages_come_from_wheels_that_lie_there(tmp_path):
    """Without a network, for this process and those that it starts; what is installed is left alone."""
    info = "flowanchor_test_wheel-1.0.dist-info"
    lines = "Metadata-Version: 2.1\nName: flowanchor-test-wheel\nVersion: 1.0\n"
    tag = "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    (tmp_path / ".whl").mkdir()
    with zipfile.ZipFile(tmp_path / ".whl" / "flowanchor_test_wheel-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("flowanchor_test_wheel.py", "answer = 42\n")
        wheel.writestr(f"{info}/METADATA", lines)
        wheel.writestr(f"{info}/WHEEL", tag)
        wheel.writestr(f"{info}/RECORD", "")
    code = (
        f"import subprocess, sys; sys.path.insert(0, {str(ROOT / 'benchmarks')!r})\n"
        "from pathlib import Path\n"
        "from gpu.wheels import unpack\n"
        f"folder = Path({str(tmp_path / '.whl')!r})\n"
        "assert unpack(folder / 'none') is None and 'flowanchor_wheels_' not in str(sys.path)\n"
        "(folder / 'numpy-0.0.1-py3-none-any.whl').write_text('')\n"
        "assert unpack(folder) is None\n"
        "import flowanchor_test_wheel\n"
        "subprocess.run([sys.executable, '-c', 'import flowanchor_test_wheel; print(flowanchor_test_wheel.answer)'])\n"
        "(folder / 'broken-1.0-py3-none-any.whl').write_text('')\n"
        "assert 'broken' in unpack(folder)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "42"


def without(packages: Sequence[str], folder: Path) -> dict[str, str]:
    """The environment of an interpreter that finds none of these."""
    (folder / "sitecustomize.py").write_text(
        "import sys\n"
        "from importlib.machinery import PathFinder\n"
        "class Without(PathFinder):\n"
        "    @classmethod\n"
        "    def find_spec(cls, name, path=None, target=None):\n"
        f"        absent = name.partition('.')[0] in {packages!r}\n"
        "        return None if absent else super().find_spec(name, path, target)\n"
        "sys.meta_path[:] = [Without if finder is PathFinder else finder for finder in sys.meta_path]\n"
    )
    return {**os.environ, "PYTHONPATH": str(folder)}


PROGRAMS = ("hydra", "omegaconf", "webdataset", "torch_fidelity", "diffusers", "transformers", "matplotlib", "sklearn")


# The rows in the process that would start one for them, which lacks the same packages.
IN_ONE = """
import sys
sys.path.insert(0, {folder!r})
import gpu_check
def work(chosen, path):
    chosen.record, chosen.ends = path, gpu_check.time.time() + chosen.seconds
    gpu_check.work(chosen)
gpu_check.supervise = work
gpu_check.main()
"""


@pytest.mark.cold
def test_without_the_packages_of_the_programs(tmp_path):
    """What needs them says so in its row, and the others are measured."""
    names = ["card", "digits, 64, eager, graph", "attention, heads of 72"]
    code = IN_ONE.format(folder=str(ROOT / "benchmarks"))
    command = [sys.executable, "-c", code, "--device", "cpu", "--tiny", "--results", str(tmp_path), "--only", *names]
    environment = without(PROGRAMS, tmp_path)
    done = subprocess.run(command, capture_output=True, text=True, timeout=400, env=environment)
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.glob("*.json")
    rows = json.loads(path.read_text())["rows"]
    assert list(rows) == names
    assert rows["card"]["matrix_tflops"] > 0 and rows["attention, heads of 72"]["16"]["tangent"]["ms"] > 0
    assert rows["digits, 64, eager, graph"]["missing"] == "ModuleNotFoundError: No module named 'hydra'"
    assert "XL/1, 32, eager | not measured" in done.stdout


@pytest.mark.cold
def test_without_what_the_check_itself_needs_one_sentence(tmp_path):
    environment = without(("einops", "safetensors"), tmp_path)
    done = subprocess.run([sys.executable, SCRIPT], capture_output=True, text=True, timeout=400, env=environment)
    assert done.returncode == 1
    assert done.stderr.startswith("Not installed here, and not among the wheels in .whl/: einops, safetensors.")


def test_what_is_to_be_sent():
    """All that the project names and what that needs, but nothing of PyTorch's or Lightning's."""
    names = {package.partition("==")[0] for package in wheels.needed()}
    assert {"hydra-core", "omegaconf", "antlr4-python3-runtime", "safetensors", "einops", "diffusers", "scipy"} <= names
    assert not {"torch", "triton", "torchvision", "lightning", "numpy", "torchmetrics", "flowanchor"} & names
