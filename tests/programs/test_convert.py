"""`convert.py consolidate`: one file that can be opened again, from a checkpoint of either kind."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from hydra.core.global_hydra import GlobalHydra
from safetensors import safe_open

from flowanchor.checkpoints import initialise_student, load_model
from flowanchor.checkpoints.consolidated import read_consolidated, write_consolidated
from flowanchor.checkpoints.sharded import write_sharded
from flowanchor.errors import CheckpointError
from flowanchor.plugins.teachers.checkpoint import CheckpointVelocity
from flowanchor.programs.convert import main

SIZES = ["backbone.depth=1", "backbone.hidden_size=16", "backbone.num_heads=2", "data.batch_size=32"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a checkpoint file, and the same checkpoint as a sharded folder."""
    from flowanchor.programs.train import main as train

    folder = tmp_path_factory.mktemp("convert")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        GlobalHydra.instance().clear()
        settings = [*SIZES, "objective=flow_matching", "~callbacks.sample_grid", "trainer.max_steps=2", "logger=none"]
        patch.setattr(sys, "argv", ["src/train.py", *settings, "hydra.run.dir=run", "ema.snapshot_every=1"])
        train()
    content = torch.load(folder / "run/checkpoints/last.ckpt", weights_only=True)
    write_sharded(folder / "sharded.ckpt", content)
    return folder


@pytest.fixture
def convert(runs, tmp_path, monkeypatch):
    def run(*arguments: str) -> Path:
        monkeypatch.chdir(tmp_path)
        GlobalHydra.instance().clear()
        monkeypatch.setattr(sys, "argv", ["src/convert.py", *(a.replace("{runs}", str(runs)) for a in arguments)])
        main()
        return tmp_path

    return run


@pytest.mark.parametrize(
    ("ema", "source"),
    [
        (None, "run"), ("power_0.05", "run"), ("none", "run"), ("posthoc:0.15", "run"),
        (None, "run/checkpoints/last.ckpt"), ("posthoc:0.15", "run/checkpoints/last.ckpt"),
        ("power_0.05", "sharded.ckpt"), ("none", "sharded.ckpt"),
        *(
            pytest.param(ema, source, marks=pytest.mark.slow)
            for ema, source in (
                ("power_0.05", "run/checkpoints/last.ckpt"), ("none", "run/checkpoints/last.ckpt"),
                (None, "sharded.ckpt"),
            )
        ),
    ],
)  # fmt: skip
def test_the_file_opens_as_the_checkpoint_does(convert, runs, source, ema):
    chosen = [] if ema is None else [f"ema_profile={ema}"]
    folder = convert("consolidate", f"checkpoint={{runs}}/{source}", "output=new/student.safetensors", *chosen)
    left = {path.relative_to(folder).as_posix() for path in folder.rglob("*")}
    assert left == {"new", "new/student.safetensors"}, "nothing else is left behind"
    expected, found = load_model(runs / source, ema=ema), load_model(folder / "new/student.safetensors")
    for what in ("ema", "kind", "step", "config"):
        assert getattr(found, what) == getattr(expected, what), what
    theirs = expected.backbone.state_dict()
    assert found.backbone.state_dict().keys() == theirs.keys()
    for name, value in found.backbone.state_dict().items():
        assert torch.equal(value, theirs[name]), name


def test_it_teaches_and_starts_a_student(convert, runs):
    path = convert("consolidate", "checkpoint={runs}/run", "output=student.safetensors") / "student.safetensors"
    expected = load_model(runs / "run").backbone
    teacher = CheckpointVelocity(str(path))
    assert torch.equal(teacher.network.blocks[0].attn.qkv.weight, expected.blocks[0].attn.qkv.weight)
    student = load_model(runs / "run", ema="none").backbone
    initialise_student(student, path)
    assert torch.equal(student.blocks[0].attn.qkv.weight, expected.blocks[0].attn.qkv.weight)
    with pytest.raises(CheckpointError, match="holds no EMA profile 'none': choose one of power_0.2"):
        load_model(path, ema="none")


def test_the_metadata_say_what_it_is(convert, runs):
    path = convert("consolidate", "checkpoint={runs}/run", "output=a.safetensors") / "a.safetensors"
    with safe_open(path, framework="pt") as file:
        meta = json.loads(file.metadata()["flowanchor"])
    assert meta["format"] == 1 and meta["kind"] == "flow" and meta["step"] == 2 and meta["ema"] == "power_0.2"
    assert meta["config"]["backbone"]["hidden_size"] == 16


def test_an_output_is_only_replaced_on_request(convert, capsys):
    folder = convert("consolidate", "checkpoint={runs}/run", "output=a.safetensors")
    before = (folder / "a.safetensors").read_bytes()
    with pytest.raises(SystemExit):
        convert("consolidate", "checkpoint={runs}/run", "output=a.safetensors", "ema_profile=none")
    assert "exists already: choose another output=, or add overwrite=true" in capsys.readouterr().err
    assert (folder / "a.safetensors").read_bytes() == before
    convert("consolidate", "checkpoint={runs}/run", "output=a.safetensors", "ema_profile=none", "overwrite=true")
    assert (folder / "a.safetensors").read_bytes() != before


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["consolidate", "output=a.safetensors"], "Which checkpoint. Add checkpoint=PATH"),
        (["consolidate", "checkpoint={runs}/run"], "Where to. Add output=FILE.safetensors"),
        (["consolidate", "checkpoint={runs}/run", "output=a.ckpt"], "Where to. Add output=FILE.safetensors"),
        (["consolidate", "checkpoint=nowhere", "output=a.safetensors"], "no checkpoint at nowhere"),
        (["merge", "checkpoint={runs}/run", "output=a.safetensors"], "cannot merge: write convert.py consolidate"),
        (["consolidate", "checkpoint={runs}/run", "output=a.safetensors", "ema_profile=x"], "no EMA profile 'x'"),
    ],
)
def test_mistakes_are_one_sentence(convert, capsys, tmp_path, arguments, expected):
    import re

    with pytest.raises(SystemExit) as exit:
        convert(*arguments)
    assert exit.value.code == 1 and re.search(expected, capsys.readouterr().err)
    assert not list(tmp_path.iterdir())


def test_a_cut_off_write_leaves_nothing_under_the_name(tmp_path):
    class Failing(dict):
        reads = 0

        def __getitem__(self, name):
            self.reads += 1
            if self.reads == 4:  # each of two tensors is asked for its size first
                raise OSError("no space left")
            return super().__getitem__(name)

    weights = Failing(a=torch.ones(3), b=torch.ones(2))
    path = tmp_path / "a.safetensors"
    with pytest.raises(OSError, match="no space"):
        write_consolidated(path, weights, {}, "none")
    assert not path.exists()


def test_every_kind_of_number_survives(tmp_path):
    numbers = {
        str(dtype): torch.tensor([[1, 0, 3]]).to(dtype)
        for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.bool)
    }
    numbers["scalar"], numbers["empty"] = torch.tensor(3.5), torch.zeros(0, 4)
    numbers["transposed"] = torch.arange(6.0).view(2, 3).T
    write_consolidated(tmp_path / "a.safetensors", numbers, {"kind": "flow"}, "none")
    found = read_consolidated(tmp_path / "a.safetensors")["state_dict"]
    for name, value in numbers.items():
        assert torch.equal(found[f"student.{name}"], value) and found[f"student.{name}"].dtype == value.dtype


def test_foreign_and_damaged_files_are_refused(tmp_path):
    from safetensors.torch import save_file

    save_file({"a": torch.ones(2)}, tmp_path / "foreign.safetensors")
    with pytest.raises(CheckpointError, match="was not written by flowanchor"):
        load_model(tmp_path / "foreign.safetensors")
    (tmp_path / "damaged.safetensors").write_bytes(b"no tensors here")
    with pytest.raises(CheckpointError, match="read safely"):
        load_model(tmp_path / "damaged.safetensors")


@pytest.mark.parametrize("format", ["flowanchor", "authors", "huggingface"])
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda weight: weight.fill_(float("nan")), "holds weights that are not finite"),
        (lambda weight: weight.to(torch.complex64), "holds complex64 numbers in"),
        (lambda weight: weight.long(), "has other numbers than floating-point ones in"),
        (lambda weight: weight[:1], "has another shape of"),
    ],
)
def test_what_should_not_be_handed_on_is_not_written(convert, runs, capsys, tmp_path, format, change, words):
    content = torch.load(runs / "run" / "checkpoints" / "last.ckpt", weights_only=True)
    average = next(iter(content["ema"].values()))
    average["x_embedder.proj.weight"] = change(average["x_embedder.proj.weight"])
    (tmp_path / "in").mkdir()
    torch.save(content, tmp_path / "in" / "a.ckpt")
    suffix = {"flowanchor": ".safetensors", "authors": ".pt", "huggingface": ""}[format]
    with pytest.raises(SystemExit):
        convert(f"checkpoint={tmp_path}/in/a.ckpt", f"output=b{suffix}", f"format={format}")
    assert words in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"in"}
