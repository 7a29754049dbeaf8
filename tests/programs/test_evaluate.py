"""The evaluation program, on a checkpoint with random weights: its numbers are those of the images it generates."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_module
from hydra.utils import instantiate

from flowanchor.checkpoints import load_model
from flowanchor.data.images import ArrayImages
from flowanchor.errors import ConfigError
from flowanchor.generation.generator import Generator
from flowanchor.metrics.evaluator import Evaluator
from flowanchor.plugins.data.digits import DigitsDataModule
from flowanchor.programs.evaluate import evaluate
from flowanchor.programs.launch import prepare

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.usefixtures("no_plot")
_spec = importlib.util.spec_from_file_location("tiny_checkpoint", Path(__file__).with_name("tiny_checkpoint.py"))
assert _spec is not None and _spec.loader is not None
_module = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_module)
save_checkpoint = _module.save_checkpoint


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("evaluation")


@pytest.fixture(scope="module")
def run(place):
    save_checkpoint(place / "run" / "checkpoints" / "last.ckpt")
    return place / "run"


@pytest.fixture(scope="module")
def config(place, run):
    def make(*overrides, checkpoint=run):
        prepare()
        settings = [f"checkpoint={checkpoint}", f"metric.cache_dir={place / 'cache'}", "metric.steps=20", "device=cpu"]
        with initialize_config_module("flowanchor.conf", version_base="1.3"):
            return compose("eval", [*settings, "num_samples=600", "batch_size=64", *overrides])

    return make


@pytest.fixture(scope="module")
def report(place, config):
    return evaluate(config("nfe=[1,3]", "save_samples=true"), place / "out")


def test_files(report, place):
    assert json.loads((place / "out" / "metrics.json").read_text()) == report
    assert (place / "out" / "quality.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in (place / "out" / "samples").iterdir()) == ["nfe1.npz", "nfe3.npz"]


def test_every_line_says_what_it_is(report, run):
    model = load_model(run)
    assert [line["nfe"] for line in report["results"]] == [1, 3]
    for line in report["results"]:
        assert line["sampler"] == "consistency" and line["network_calls"] == line["nfe"]
        assert (line["n"], line["protocol"], line["seed"], line["ema"]) == (600, "balanced", 0, "short")
        assert line["checkpoint_hash"] == model.digest and line["seconds"] > 0
        assert line["floor"] == report["floor"]["fd"] and line["floor_n"] == report["floor"]["n"] == 500
        assert line["fd"] > 10 * line["floor"]  # random weights
        assert line["fd"] != line["fd_at_floor_n"]
    settings = report["settings"]
    assert settings["metric"] == "FD-digits" and settings["step"] == 7 and settings["reference"]["n"] == 1297


@pytest.mark.parametrize("nfe", [1, 3])
def test_scores_are_those_of_the_images(report, place, config, run, nfe):
    """Generated here in one piece, with another batch size, and scored from memory."""
    cfg, model = config(), load_model(run)
    generator = Generator.of(model, cfg.sampler)
    generator.sampler = generator.sampler.with_nfe(nfe)
    labels = torch.arange(600) % 10
    images = torch.cat(list(generator.draw(model.backbone.conditioning.request(600, classes=labels), 0, 200)))
    with np.load(place / "out" / "samples" / f"nfe{nfe}.npz") as saved:
        assert np.abs(saved["images"].astype(int) - images.numpy().astype(int)).max() <= 1
        assert saved["labels"].tolist() == labels.tolist()
        pixels = torch.from_numpy(saved["images"]).permute(0, 3, 1, 2).contiguous()
    evaluator = Evaluator(cfg.metric, instantiate(model.config["data"]))
    scores = evaluator.score(ArrayImages(pixels, None))
    line = next(line for line in report["results"] if line["nfe"] == nfe)
    for name, value in scores.as_dict().items():
        assert line[name] == value or line[name] == pytest.approx(value, rel=1e-4), name
    assert line["fd_at_floor_n"] == pytest.approx(evaluator.score(ArrayImages(pixels[:500], None)).fd, rel=1e-4)


def test_small_samples_have_a_floor_of_their_size(place, config):
    report = evaluate(config("nfe=1", "num_samples=100", "ema_profile=none", "protocol=random"), place / "few")
    line = report["results"][0]
    assert line["floor_n"] == 100 and line["fd"] == line["fd_at_floor_n"]
    assert line["ema"] == "none" and line["protocol"] == "random"
    assert not (place / "few" / "samples").exists()


def test_another_sampler(place, config):
    report = evaluate(config("sampler=flow", "sampler.solver=heun", "nfe=5", "num_samples=50"), place / "flow")
    assert [(line["sampler"], line["nfe"]) for line in report["results"]] == [("flow-heun", 5)]


def test_the_samplers_own_steps(place, config):
    report = evaluate(config("nfe=null", "num_samples=50"), place / "own")
    assert [line["nfe"] for line in report["results"]] == [2]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["nfe=0"], r"nfe=\[1,2,4\]"),
        (["nfe=[1,-2]"], r"nfe=\[1,2,4\]"),
        (["protocol=even"], "protocol=balanced"),
        (["num_samples=0"], "num_samples=1000"),
        (["checkpoint=null"], "checkpoint=PATH"),
        (["+data_overrides.root=x"], "data_overrides has root.*batch_size"),
        (["save_every=0"], "save_every=5000"),
        (["reference=nowhere", "data=digits"], "takes the place of the data"),
    ],
)
def test_wrong_settings_are_told_before_any_work(place, config, overrides, message):
    with pytest.raises(ConfigError, match=message):
        evaluate(config(*overrides), place / "wrong")
    assert not (place / "wrong").exists()


def test_data_of_another_shape(place, config):
    with pytest.raises(ConfigError, match="1 x 8 x 8 .*1 x 28 x 28"):
        evaluate(config("data=fashion_mnist"), place / "wrong")


def test_a_flow_model_has_no_shortcut(place, config):
    path = save_checkpoint(place / "flow.ckpt", kind="flow")
    with pytest.raises(ConfigError, match="sampler=flow"):
        evaluate(config("sampler=consistency", checkpoint=path), place / "wrong")
    report = evaluate(config("nfe=2", "num_samples=50", checkpoint=path), place / "flow2")
    assert report["results"][0]["sampler"] == "flow-euler"


def command(*arguments, cwd):
    return subprocess.run(
        [sys.executable, str(ROOT / "src" / "eval.py"), *arguments],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_command_line(place, run):
    done = command(
        f"checkpoint={run}", "nfe='1,2'", "num_samples=60", "metric.steps=20", f"metric.cache_dir={place / 'cache'}",
        "name=mine", cwd=place,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for word in ("FD-digits", "consistency", "floor", load_model(run).digest, "balanced"):
        assert word in done.stdout
    report = json.loads((place / "outputs" / "eval" / "mine" / "metrics.json").read_text())
    assert [line["nfe"] for line in report["results"]] == [1, 2]


@pytest.mark.parametrize(
    ("arguments", "word"), [((), "checkpoint=PATH"), (("checkpoint=RUN", "+data_overrides.size=16"), "data.size=8")]
)
def test_command_line_errors_are_one_sentence(place, run, arguments, word):
    done = command(*(argument.replace("RUN", str(run)) for argument in arguments), cwd=place)
    assert done.returncode == 1
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1 and word in lines[0], done.stderr


def test_repeats_are_independent_sets_and_their_mean(place, config, report):
    """The first set is that of an evaluation without repeats; the others have seeds of their own."""
    several = evaluate(config("nfe=1", "save_samples=true", "repeats=3", "protocol=balanced"), place / "several")
    for one, mean in zip(report["results"][:1], several["results"], strict=True):
        assert mean["repeats"] == 3 and mean["seeds"][0] == one["seed"] and len(set(mean["seeds"])) == 3
        parts = [json.loads(path.read_text()) for path in sorted((place / "several" / ".evaluation").rglob("*.json"))]
        fds = [part["fd"] for part in parts if part["nfe"] == one["nfe"]]
        assert len(fds) == 3 and one["fd"] in fds
        assert mean["fd"] == pytest.approx(np.mean(fds)) and mean["spread"]["fd"] == pytest.approx(np.std(fds, ddof=1))
        assert len(set(fds)) == 3 and sorted(mean["sets"]["fd"]) == sorted(fds) and mean["sets"]["fd"][0] == one["fd"]
        assert mean["spread"]["kid"] > 0 and mean["seconds"] == pytest.approx(
            sum(p["seconds"] for p in parts if p["nfe"] == one["nfe"])
        )
    assert report["results"][0]["spread"] is None
    images = [np.load(path)["images"] for path in sorted((place / "several" / "samples").glob("nfe1*.npz"))]
    assert len(images) == 3 and not np.array_equal(images[0], images[1])


def test_more_repeats_go_on_from_fewer(place, config, capsys):
    evaluate(config("nfe=1", "num_samples=60"), place / "more")
    capsys.readouterr()
    found = evaluate(config("nfe=1", "num_samples=60", "repeats=2"), place / "more")
    assert capsys.readouterr().out.count("measured by an earlier run") == 1 and found["results"][0]["repeats"] == 2


def test_flow_errors_are_those_of_held_out_data(place, config, run):
    """Each number from the images themselves; the network as its own teacher is no distance from it."""
    report = evaluate(config("nfe=1", "num_samples=60", "flow_error=true", f"flow_teacher={run}"), place / "flow")
    assert json.loads((place / "flow" / "metrics.json").read_text())["flow"] == report["flow"]
    assert report["flow"]["samples"] == 60 and [line["t"] for line in report["flow"]["lines"]] == [
        0.05, 0.25, 0.5, 0.75, 0.95
    ]  # fmt: skip
    model, data = load_model(run), DigitsDataModule(batch_size=64, channels=1, size=8, num_classes=10)
    held_out = data.images("heldout")
    x1 = held_out.stack(range(60)).double() / 127.5 - 1
    labels = torch.as_tensor(held_out.labels[:60])
    x0 = torch.stack([
        torch.from_numpy(np.random.Generator(np.random.Philox(np.random.SeedSequence((0, 0, i)))).standard_normal(
            (1, 8, 8)
        ))
        for i in range(60)
    ])  # fmt: skip
    for line in report["flow"]["lines"]:
        t = line["t"]
        with torch.no_grad():  # the checkpoint is FACM's: its anchor is asked at 2 - t
            x_t = ((1 - t) * x0 + t * x1).float()
            answer = model.backbone.predict(x_t, torch.full((60,), 2 - t), labels).double()
        assert line["error"] == pytest.approx(float((answer - (x1 - x0)).square().mean()), rel=1e-5)
        assert line["from_teacher"] == 0 and line["cosine"] == pytest.approx(1, abs=1e-6)
    with pytest.raises(ConfigError, match="add flow_error=true"):
        evaluate(config("nfe=1", f"flow_teacher={run}"), place / "flow_without")
