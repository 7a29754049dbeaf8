"""What a user gets wrong costs one sentence on stderr that says what to type instead, exit code 1 and no traceback."""

from __future__ import annotations

import os
import pickle
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.core.global_hydra import GlobalHydra
from PIL import Image

from flowanchor.checkpoints import load_model
from flowanchor.errors import CheckpointError

ROOT = Path(__file__).parents[2]
SIZE = ["backbone.depth=1", "backbone.hidden_size=16", "backbone.num_heads=2", "trainer.max_steps=1"]
TRAIN = ["train", *SIZE, "data.batch_size=32", "callbacks=none", "logger=none"]
SAMPLE = ["sample", "checkpoint={runs}/teacher", "num_samples=4"]
STUDENT = ["sample", "checkpoint={runs}/student", "num_samples=4", "sampler=consistency"]
EVAL = ["evaluate", "checkpoint={runs}/teacher", "num_samples=20"]
TEACHER = ["teacher=checkpoint", "teacher.checkpoint={runs}/teacher"]
FOLDER = ["data=image_folder", "data.num_workers=0", "data.size=8"]

NOTICES = ("GPU available", "TPU available", "💡 Tip")  # Lightning's, about the machine


class Bomb:
    """Unpickling it creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs of one step, checkpoints that are none, and image folders with something amiss."""
    from flowanchor.programs.train import main

    folder = tmp_path_factory.mktemp("bad_input")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        quick = [*SIZE, "~callbacks.sample_grid", "trainer.limit_val_batches=0", "logger=none"]
        for name, choice in (("teacher", ["experiment=digits_teacher"]), ("student", [])):
            GlobalHydra.instance().clear()
            patch.setattr(sys, "argv", ["src/train.py", *quick, *choice, f"name={name}", f"hydra.run.dir=runs/{name}"])
            main()

    bomb = Bomb(folder / "sprung")
    torch.save({"state_dict": {}, "epoch": 3}, folder / "foreign.ckpt")
    torch.save({"flowanchor": {"format": 1}, "state_dict": bomb}, folder / "malicious.ckpt")
    (folder / "malicious.pkl").write_bytes(pickle.dumps(bomb))
    torch.save({"flowanchor": {"format": 1}}, folder / "hollow.ckpt")
    (folder / "text.ckpt").write_text("these are no weights")
    trained = torch.load(folder / "runs" / "teacher" / "checkpoints" / "last.ckpt", weights_only=True)
    settings = trained["flowanchor"]["config"]
    backbone = settings["backbone"]
    settings["backbone"] = {"_target_": "flowanchor.provenance.Path.touch", "self": str(folder / "sprung")}
    torch.save(trained, folder / "disguised.ckpt")

    trained["flowanchor"]["config"]["backbone"] = backbone
    kept = {key: value for key, value in trained.items() if key != "optimizer_states"}
    (folder / "stateless" / "checkpoints").mkdir(parents=True)
    torch.save(kept, folder / "stateless" / "checkpoints" / "last.ckpt")
    for weights in (trained["state_dict"], *trained["ema"].values()):
        next(iter(weights.values())).fill_(float("nan"))
    torch.save(trained, folder / "diverged.ckpt")

    for path in ("flat", "two/a", "two/b", "hole/a", "hole/b", "broken/a", "broken/b"):
        (folder / path).mkdir(parents=True)
    (folder / "empty").mkdir()
    for path in ("flat", "two/a", "two/b", "hole/a"):
        for i in range(3):
            Image.new("RGB", (9, 9)).save(folder / path / f"{i}.png")
    for path in ("broken/a", "broken/b"):
        for i in range(3):
            (folder / path / f"{i}.png").write_text("no image")
    return folder


def filled(arguments: list[str], folder: Path) -> list[str]:
    return [text.replace("{runs}", f"{folder}/runs").replace("{folder}", str(folder)) for text in arguments]


def the_sentence(stderr: str) -> str:
    lines = [line for line in stderr.splitlines() if line.strip() and not line.startswith(NOTICES)]
    assert len(lines) == 1, stderr
    assert lines[0].startswith("Error: ") and lines[0].endswith((".", "?")), lines[0]
    assert not re.search(r"\. [A-Z]", lines[0]), f"more than one sentence: {lines[0]}"
    return lines[0]


CASES = [
    # options, plugins, keys
    (
        [*TRAIN, "objective=facn"],
        "Unknown option 'facn' for objective: did you mean facm. The options are alpha_flow, dmf, facm, ",
    ),
    ([*TRAIN, "backbone=zebra"], "Unknown option 'zebra' for backbone: choose one of .*lightningdit"),
    (
        [*EVAL, "metric=fid"],
        "Unknown option 'fid' for metric: choose one of dinov2, efficientnet, inception, random, small",
    ),
    ([*TRAIN, "teacher=null"], "teacher=null chooses no option: write teacher=OPTION"),
    ([*TRAIN, "~objective"], "cannot do without objective: leave out ~objective"),
    ([*TRAIN, "backbone._target_=nowhere.Net"], "backbone._target_ names nowhere.Net, which cannot be .*install"),
    ([*TRAIN, "objective.shortcut._target_=flowanchor.plugins.no.X"], "objective.shortcut._target_ names .* imported"),
    ([*TRAIN, "trainer.max_stepz=1"], r"Unknown key 'trainer.max_stepz': did you mean trainer.max_steps\?"),
    ([*SAMPLE, "num_sample=3"], r"Unknown key 'num_sample': did you mean num_samples\?"),
    ([*TRAIN, "+backbone.headz=2"], "Unknown setting backbone.headz: LightningDiT.* has no argument headz; remove it"),
    ([*TRAIN, "--batch-size", "4"], "unrecognized arguments: --batch-size.*key=value without dashes"),
    ([*TRAIN, "-m", "seed=0,1"], "unrecognized arguments: seed=0,1.*-m, first"),
    # checkpoints
    (["sample"], "No checkpoint was given: add checkpoint=PATH"),
    (["evaluate"], "Add checkpoint=PATH"),
    (["sample", "checkpoint=nowhere.ckpt"], "There is no checkpoint at nowhere.ckpt: give a .ckpt"),
    (["evaluate", "checkpoint={folder}/empty"], "empty holds no checkpoints/last.ckpt: give a run folder"),
    ([*TRAIN, "initialise_from=nowhere"], "There is no checkpoint at nowhere: give a .ckpt file"),
    ([*TRAIN, "teacher=checkpoint"], "The teacher needs a checkpoint: add teacher.checkpoint=PATH"),
    (["sample", "checkpoint={folder}/foreign.ckpt"], "foreign.ckpt was not written by .*: give a .ckpt file"),
    (["evaluate", "checkpoint={folder}/text.ckpt"], r"text.ckpt .* \(it is no complete file of torch.save\): give"),
    (["sample", "checkpoint={folder}/malicious.ckpt"], r"malicious.ckpt .* \(it holds more than tensors.*: give"),
    ([*TRAIN, "initialise_from={folder}/malicious.pkl"], "malicious.pkl is not .* safely .*: give"),
    (["sample", "checkpoint={folder}/hollow.ckpt"], "hollow.ckpt lacks flowanchor.config, .*: give a .ckpt file"),
    (["sample", "checkpoint={folder}/disguised.ckpt"], "asks for '.*.Path.touch' as its backbone, and neither"),
    (["sample", "checkpoint={folder}/diverged.ckpt"], r"not finite \(1 of \d+ tensors, .*: the run has diverged; use"),
    (
        [*TRAIN, "teacher=checkpoint", "teacher.checkpoint={folder}/diverged.ckpt"],
        "not finite .*: the run has diverged",
    ),
    ([*TRAIN, "initialise_from={folder}/diverged.ckpt"], "not finite .*: the run has diverged; use an earlier"),
    (
        ["train", *SIZE, "trainer.max_steps=2", "hydra.run.dir={folder}/stateless"],
        "lacks optimizer_states.*: start a new run from it with",
    ),
    ([*SAMPLE, "ema_profile=zebra"], "no EMA profile 'zebra': choose one of power_0.1, power_0.05, none"),
    ([*EVAL, "ema_profile=posthoc:wide"], "no EMA profile 'posthoc:wide': write for example posthoc:0.15"),
    # what does not fit
    ([*TRAIN, *TEACHER, "backbone.input_size=16"], r"trained on samples of shape \(1, 8, 8\).* \(1, 16, 16\): choose"),
    ([*TRAIN, *TEACHER, "data.num_classes=0"], "trained on 10 classes, this student has 0 classes: choose"),
    ([*TRAIN, "initialise_from={runs}/teacher", "backbone.hidden_size=32"], "another shape of .*; use the backbone"),
    ([*TRAIN, "initialise_from={runs}/teacher", "backbone.depth=2"], "lacks blocks.1.*; use the backbone settings"),
    ([*TRAIN, "backbone.patch_size=3"], "size 8 is not divisible by backbone.patch_size=3: choose .* 1, 2, 4, 8"),
    ([*TRAIN, "backbone.num_heads=3"], "hidden_size=16 is not divisible by backbone.num_heads=3: change either"),
    ([*TRAIN, "backbone.in_channels=3"], "takes samples of 3 x 8 x 8 and the data has 1 x 8 x 8: leave out"),
    ([*TRAIN, "backbone.num_classes=3"], "has 3 classes and the data 10: leave out backbone.num_classes"),
    ([*TRAIN, "objective/interval=auxiliary"], "no embedder for it: add backbone.auxiliary_time_cond=true"),
    ([*TRAIN, "teacher=self", "backbone.disable_label_dropout=true"], "set backbone.disable_label_dropout=false"),
    ([*TRAIN, "teacher=base"], "asks the student without its adapters, and this one has none: add backbone.lora.rank"),
    ([*TRAIN, "base_lora=mine.safetensors"], "merged into the weights that a run starts from: add initialise_from"),
    ([*TRAIN, "teacher=self", "data.num_classes=0"], "guides by labels, and the data has none: choose teacher=none"),
    ([*TRAIN, "objective/anchor=none", "objective/shortcut=none"], "neither anchor nor shortcut: choose objective"),
    ([*TRAIN, "objective=flow_matching", "sampler=consistency"], "has no shortcut to jump along: use sampler=flow"),
    ([*SAMPLE, "sampler=consistency"], "has no shortcut to jump along: use sampler=flow"),
    ([*EVAL, "data=fashion_mnist"], "draws 1 x 8 x 8 samples and the data has 1 x 28 x 28: leave out data="),
    # data
    ([*TRAIN, *FOLDER], "data=image_folder needs to know the folder: add data.root=FOLDER"),
    ([*TRAIN, *FOLDER, "data.root=nowhere"], "There is no folder nowhere: set data.root=FOLDER"),
    ([*TRAIN, *FOLDER, "data.root={folder}/empty"], "empty has neither images nor class subfolders: sort the images"),
    ([*TRAIN, *FOLDER, "data.root={folder}/flat"], "flat has images but no class subfolders: .*data.labelled=false"),
    ([*TRAIN, *FOLDER, "data.root={folder}/hole", "data.num_classes=2"], "hole has a class folder without images"),
    ([*TRAIN, *FOLDER, "data.root={folder}/two"], "two has 2 class folders, .*: add data.num_classes=2"),
    (
        [*TRAIN, *FOLDER, "data.root={folder}/empty", "data.labelled=false", "data.num_classes=0"],
        "There are no images in .*empty: set data.root=FOLDER",
    ),
    (
        [*TRAIN, *FOLDER, "data.root={folder}/broken", "data.num_classes=2", "data.batch_size=4"],
        "broken/./..png cannot be read as an image .*: repair the file or remove it",
    ),
    ([*TRAIN, "data.batch_size=5000"], "A batch of 5000 is larger than the data, .*: use data.batch_size=1297"),
    # numbers
    ([*SAMPLE, "sampler.steps=0"], "sampler.steps=0 is too few: .*sampler.steps=1"),
    ([*SAMPLE, "sampler.steps=few"], "sampler.steps=few is not a whole number: use for example sampler.steps=2"),
    ([*STUDENT, "sampler.grid=[]"], r"sampler.times=\[\] must be increasing times in \[0, 1\), for example \[0, 0.5\]"),
    ([*STUDENT, "sampler.grid=[0.5,0.2]"], r"sampler.times=\[0.5, 0.2\] must be increasing times"),
    ([*STUDENT, "sampler.grid=[a,b]"], r"sampler.times=.* is no list of times: .*sampler.times=\[0,0.5\]"),
    ([*TRAIN, "callbacks=default", "callbacks.sample_grid.nfe=[0]"], r"sample_grid.nfe has 0: use .*\[1,2,4\]"),
    ([*SAMPLE, "num_samples=0"], "num_samples=0 is too small: it must be at least 1"),
    ([*EVAL, "num_samples=many"], "num_samples=many is not a whole number: use for example num_samples="),
    ([*EVAL, "batch_size=0"], "batch_size=0 is too small: it must be at least 1"),
    ([*SAMPLE, "classes=[3,10]"], r"classes=\[3, 10\]: .* must be .* between 0 and 9, for example classes=\[0,1\]"),
    ([*SAMPLE, "classes=[cat]"], "There is no class .cat.: it has 0, 1, 2, 3"),
    ([*SAMPLE, "device=warp"], "device=warp is not known: use device=cpu"),
    ([*TRAIN, "data.batch_size=0"], "data.batch_size=0 is too small: it must be at least 1"),
    ([*TRAIN, "trainer.max_steps=abc"], "trainer.max_steps=abc is not a whole number: use for example"),
    # values that only a library refuses: the setting is named, and its default
    ([*TRAIN, "optimizer.lr=fast"], r"optimizer.lr=fast cannot be used here.*default is optimizer.lr=0.001"),
    ([*TRAIN, "optimizer.lr=-1"], "optimizer refuses its settings .*-1.*correct them under optimizer"),
    ([*TRAIN, "backbone.patch_size=0"], "backbone.patch_size=0 must be at least 1"),
    ([*TRAIN, "trainer.accelerator=warp"], "trainer.accelerator=warp cannot be used .*names are: .*cpu"),
    ([*TRAIN, "trainer.accumulate_grad_batches=0"], "accumulate_grad_batches=0 is too small: it must be at least 1"),
    # output
    ([*TRAIN, "hydra.run.dir={folder}/text.ckpt/run"], "Cannot use .*text.ckpt/run .*hydra.run.dir=FOLDER"),
]

# The same sentences for another program or setting.
AGAIN = [
    ([*SAMPLE, "sampler=consistensy"], "Unknown option .* did you mean consistency"),
    ([*TRAIN, "objective.shortcut.clmp=1"], r"did you mean objective.shortcut.clamp\?"),
    ([*EVAL, "nef=1"], r"Unknown key 'nef': did you mean nfe\?"),
    (["train", "experiment=digits_facm"], "The teacher needs a checkpoint: add teacher.checkpoint=PATH"),
    (["evaluate", "checkpoint={folder}/malicious.pkl"], "malicious.pkl .* can be read safely.*: give"),
    ([*TRAIN, "teacher=checkpoint", "teacher.checkpoint={folder}/malicious.ckpt"], "malicious.ckpt .* safely .*: give"),
    (["evaluate", "checkpoint={folder}/diverged.ckpt"], "not finite .*: the run has diverged; use an earlier"),
    ([*TRAIN, "objective=flow_matching", "objective/anchor=none"], "neither anchor nor shortcut: choose objective"),
    ([*EVAL, "sampler=consistency"], "has no shortcut to jump along: use sampler=flow"),
    ([*TRAIN, *FOLDER, "data.root={folder}/text.ckpt"], "There is no folder .*text.ckpt: set data.root=FOLDER"),
    ([*EVAL, "nfe=0"], r"nfe asks for '0' .*: use for example nfe=\[1,2,4\]"),
    ([*EVAL, "num_samples=0"], "num_samples=0 is too small: it must be at least 1"),
    ([*TRAIN, "data.batch_size=1.5"], "data.batch_size=1.5 is not a whole number: use for example data.batch_size="),
    ([*TRAIN, "trainer.max_steps=-5"], "trainer.max_steps=-5 is too small: it must be at least -1"),
    ([*TRAIN, "seed=-1"], "seed=-1 is too small: it must be at least 0"),
    ([*TRAIN, "backbone.depth=abc"], "backbone.depth=abc cannot be used here"),
    ([*SAMPLE, "hydra.run.dir={folder}/text.ckpt/run"], "Cannot use .*text.ckpt/run .*hydra.run.dir=FOLDER"),
    ([*EVAL, "hydra.run.dir={folder}/text.ckpt/run"], "Cannot use .*text.ckpt/run .*hydra.run.dir=FOLDER"),
]


def params(cases: list[tuple[list[str], str]], *marks: pytest.MarkDecorator) -> list[Any]:
    names = [" ".join([case[0], *(a for a in case[1:] if a not in (*TRAIN, *SAMPLE, *EVAL))]) for case, _ in cases]
    return [pytest.param(*case, id=name, marks=marks) for case, name in zip(cases, names, strict=True)]


@pytest.mark.parametrize(("arguments", "expected"), params(CASES) + params(AGAIN, pytest.mark.slow))
def test_one_sentence(command, folder, capsys, arguments, expected):
    with pytest.raises(SystemExit) as exit:
        command(*filled(arguments, folder))
    assert exit.value.code == 1
    assert re.search(expected, the_sentence(capsys.readouterr().err))
    assert not (folder / "sprung").exists(), "a checkpoint ran code"


def test_the_malicious_files_are_real(folder, tmp_path):
    """Without this, a bomb that never goes off would prove nothing."""
    torch.save(Bomb(tmp_path / "sprung"), tmp_path / "bomb")
    torch.load(tmp_path / "bomb", weights_only=False).close()
    assert (tmp_path / "sprung").exists()


def test_good_input_next_to_the_bad(command, folder, capsys):
    """The runs that the cases above vary do work."""
    command(*filled([*SAMPLE, "sampler.steps=1", "name=a"], folder))
    command(*filled([*STUDENT, "sampler.grid=[0,0.5]", "classes=[3]", "name=b"], folder))
    command(*filled([*TRAIN, *TEACHER, "initialise_from={runs}/teacher"], folder))
    command(*filled([*TRAIN, *FOLDER, "data.root={folder}/two", "data.num_classes=2", "data.batch_size=2"], folder))


# ------------------------------------------------------------------------------------------------------ as a process


def start(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    name, *rest = filled(list(arguments), folder)
    return subprocess.run(
        [sys.executable, str(ROOT / "src" / f"{name}.py"), *rest], cwd=folder, capture_output=True, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment, timeout=240,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["train", "backbone.patch_size=3"], "choose a patch size among 1, 2, 4, 8"),
        (["eval", "checkpoint={runs}/teacher", "nfe=0"], "use for example nfe="),
    ],
    ids=["train", "eval"],
)
def test_one_sentence_from_a_shell(folder, arguments, expected):
    done = start(folder, *arguments, HYDRA_FULL_ERROR="0")
    assert done.returncode == 1 and expected in the_sentence(done.stderr)


def test_debug_shows_the_traceback(folder):
    done = start(folder, "sample", "checkpoint=nowhere.ckpt", "debug=true", HYDRA_FULL_ERROR="0")
    assert done.returncode == 1
    assert "Traceback" in done.stderr and "CheckpointError: There is no checkpoint at nowhere.ckpt" in done.stderr


def test_hydra_full_error_shows_the_traceback(command, monkeypatch):
    """The error leaves the program, so that Python prints it."""
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    with pytest.raises(CheckpointError, match="There is no checkpoint at nowhere.ckpt"):
        command("sample", "checkpoint=nowhere.ckpt")


# --------------------------------------------------------------------------------------------------------- non-finite


def test_a_loss_that_stays_non_finite_stops_the_run(command, capsys):
    """One step at this rate leaves weights of 1e30: finite, and the last for which that can be said."""
    bad = [*SIZE, "trainer.max_steps=50", "optimizer.lr=1e30", "max_nonfinite_steps=3", "name=bad"]
    often = ["callbacks.last.every_n_train_steps=1", "~callbacks.sample_grid", "data.batch_size=32", "logger=none"]
    skipped = r"Step \d+ was skipped: the anchor loss was not finite \(1 in a row"
    with pytest.warns(UserWarning, match=skipped), pytest.raises(SystemExit) as exit:
        command("train", *bad, *often)
    assert exit.value.code == 1
    sentence = the_sentence(capsys.readouterr().err)
    assert re.search(r"Training stopped at step 3: the anchor loss was not finite 3 times in a row", sentence)
    assert "lower optimizer.lr" in sentence

    run = Path("outputs/train/bad")  # `command` has made its folder the working directory
    content = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    assert content["global_step"] == 1, "the last that was taken: nothing is written while steps are skipped"
    assert content["flowanchor"]["nonfinite_steps"] == 0
    tensors = [*content["state_dict"].values(), *(t for profile in content["ema"].values() for t in profile.values())]
    assert all(bool(torch.isfinite(value).all()) for value in tensors)
    assert max(float(value.abs().max()) for value in tensors) > 1e29, "the step before was taken"
    for weights in (None, "none"):
        model = load_model(run, ema=weights)
        assert all(bool(torch.isfinite(value).all()) for value in model.backbone.parameters())
