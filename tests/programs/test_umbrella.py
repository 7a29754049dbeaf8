"""`flowanchor PROGRAM ...`: what it says, what it becomes, and that it is quick."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from flowanchor.programs import check, umbrella
from flowanchor.programs.options import options, packages
from flowanchor.programs.texts import quoted

ROOT = Path(__file__).parents[2]
SMALL = ["backbone.depth=1", "backbone.hidden_size=16", "backbone.num_heads=2"]
HEAVY = ("torch", "hydra", "omegaconf", "numpy", "lightning")


def flowanchor(folder: Path, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "flowanchor", *words]
    variables = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=240, env=variables)


@pytest.mark.cold
@pytest.mark.parametrize("words", [["--help"], ["train", "--help"], ["list"], ["version"]], ids=" ".join)
def test_what_it_tells_takes_half_a_second_and_no_library(tmp_path, words):
    code = (
        "import sys; from flowanchor.__main__ import main\n"
        f"sys.argv = ['flowanchor', *{words}]\n"
        "try:\n    main()\n"
        f"finally:\n    print([name for name in {HEAVY} if name in sys.modules])"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == "[]", done
    assert after.ru_utime - before.ru_utime < 0.5
    assert len(done.stdout.splitlines()) > 3 and not list(tmp_path.iterdir())


def said(capsys, monkeypatch, *words: str) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["flowanchor", *words])
    code = 0
    try:
        umbrella.main()
    except SystemExit as end:
        code = int(end.code or 0)
    return code, *capsys.readouterr()


@pytest.mark.parametrize(
    "words, sentence",
    [
        (["trian"], "Error: No such command 'trian'. Did you mean 'train'?"),
        (["list", "objectiv"], "Error: There is no group 'objectiv'. Did you mean 'objective'?"),
        (["check", "sample"], "Error: 'sample' cannot be checked: flowanchor check, or flowanchor check train ..."),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_typo_is_one_sentence(capsys, monkeypatch, words, sentence):
    code, out, error = said(capsys, monkeypatch, *words)
    assert (code, out, error.strip()) == (1, "", sentence)


def test_play_without_its_extra_says_what_to_install(capsys, monkeypatch):
    monkeypatch.setattr(umbrella, "find_spec", lambda name: None)
    code, _, error = said(capsys, monkeypatch, "play", "outputs/train/x", "--port", "7000")
    assert code == 1 and error.strip().endswith('pip install "flowanchor[play]"')


def test_play_becomes_its_program(capsys, monkeypatch):
    started = []
    monkeypatch.setattr(umbrella, "find_spec", lambda name: name)
    monkeypatch.setattr(umbrella, "start", lambda module, words: started.append((module, *words)))
    said(capsys, monkeypatch, "play", "RUN", "TEACHER", "--host", "0.0.0.0", "--help")
    assert started == [("flowanchor.programs.play", "RUN", "TEACHER", "--host", "0.0.0.0", "--help")]


def test_every_option_of_ours_is_listed_with_a_line(capsys, monkeypatch):
    _, out, _ = said(capsys, monkeypatch, "list")
    files = {file for file in (ROOT / "conf").glob("*/**/*.yaml") if file.parent.name != "hydra"}
    ours = [option for option in options() if not option.package]
    assert {(option.group, option.name) for option in ours} == {
        (file.parent.relative_to(ROOT / "conf").as_posix(), file.stem) for file in files
    }
    for option in ours:
        assert 10 < len(option.line) < 200 or option.group == "objective/time", option
        assert f"  {option.name} " in out and option.line in out, option
        assert not option.line.startswith("python ") and "_target_" not in option.line
    assert "experiment=   recipes that override the above" in out.splitlines()


def test_one_group_has_those_below_it_and_no_other(capsys, monkeypatch):
    _, out, _ = said(capsys, monkeypatch, "list", "objective")
    heads = [line.split("=")[0] for line in out.splitlines() if line and not line.startswith(" ")]
    assert heads[0] == "objective" and all(head.startswith("objective") for head in heads) and len(heads) == 6


def test_options_of_plugin_packages_are_listed(tmp_path):
    plugin = ROOT / "tests" / "fixtures" / "version_0_1" / "plugin_package"
    done = flowanchor(tmp_path, "list", "backbone", PYTHONPATH=f"{plugin}{os.pathsep}{ROOT / 'src'}")
    line = next(line for line in done.stdout.splitlines() if "earlier_lightningdit" in line)
    assert line.rstrip().endswith("[flowanchor-earlier]"), done
    assert isinstance(packages(), dict)


PLACES = [
    "outputs/train/x", "a b, c", "it's", "[1]", "{a: b}", "back\\slash\\", "ends\\'", "2026_11_26", "null", "1.10",
    "über/ß", "a:b", '"quoted"', "%(x)s", "$HOME", "#1", "a=b",
]  # fmt: skip


@pytest.mark.parametrize("place", PLACES)
def test_a_path_in_front_reaches_the_program_as_it_is(tmp_path, monkeypatch, place):
    monkeypatch.chdir(tmp_path)
    (tmp_path / place).mkdir(parents=True)
    for program, key in (("sample", "checkpoint"), ("eval", "checkpoint"), ("report", "runs")):
        first, *others = quoted(umbrella.overrides(program, [place, "seed=1"]))
        parsed = OverridesParser.create().parse_override(first)
        assert (parsed.key_or_group, parsed.value(), others) == (key, place, ["seed=1"])


def test_what_is_no_path_stays():
    for words in (["sampler.steps=2"], ["-m", "a"], ["~callbacks"], ["--cfg", "job"], []):
        assert umbrella.overrides("sample", words) == words
    assert umbrella.overrides("train", ["word"]) == ["word"]  # train.py says itself what is wrong with it
    assert umbrella.overrides("report", ["a", "b", "title=x"]) == ["runs=['a','b']", "title=x"]
    assert umbrella.overrides("sample", ["digits"]) == ["checkpoint='digits'"]


def test_bash_and_others_complete_groups_and_options(tmp_path):
    def asked(shell: str, words: str, count: str) -> list[str]:
        done = flowanchor(
            tmp_path, _FLOWANCHOR_COMPLETE=f"{shell}_complete", COMP_WORDS=words, COMP_CWORD=count
        )  # fmt: skip
        return [part for line in done.stdout.splitlines() for part in line.split(",")]

    assert "train" in asked("bash", "flowanchor tr", "1")
    assert "backbone=" in asked("bash", "flowanchor train back", "2")
    assert "lightningdit" in asked("bash", "flowanchor train backbone = lig", "4")  # bash takes it apart
    assert "backbone=lightningdit" in asked("zsh", "flowanchor train backbone=lig", "2")
    assert "digits_facm" in asked("bash", "flowanchor train experiment = digits", "4")
    assert "objective/shortcut" in asked("bash", "flowanchor list objective/sh", "2")


def test_two_ranks_train_through_it(tmp_path):
    """Lightning starts the second one by the command line of the first."""
    two = ["strategy=ddp", "trainer.devices=2", "trainer.accelerator=cpu", "trainer.max_steps=2"]
    done = flowanchor(tmp_path, "train", *SMALL, *two, "data.batch_size=8", "callbacks=none", "name=two")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 processes" in done.stdout + done.stderr or "MEMBER: 2/2" in done.stdout + done.stderr


def test_draws_and_reports_by_a_plain_path(tmp_path, tiny_checkpoint):
    run = tiny_checkpoint(tmp_path / "a run, mine" / "checkpoints" / "last.ckpt")
    done = flowanchor(tmp_path, "sample", "a run, mine", "num_samples=4", "name=drawn")
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "outputs" / "sample" / "drawn" / "grid.png").is_file() and run.is_file()
    failed = flowanchor(tmp_path, "report", "a run, mine")
    assert failed.returncode == 1 and "a run, mine" in failed.stderr and "Cannot read" not in failed.stderr


def test_a_program_is_a_module_too(tmp_path):
    command = [sys.executable, "-m", "flowanchor.programs.train", "--cfg", "job", "seed=7"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "seed: 7" in done.stdout.splitlines(), done


# ------------------------------------------------------------------------------------------------------------- check


def lines_of(capsys, *words: str) -> list[str]:
    check.main(list(words))
    return capsys.readouterr().out.splitlines()


def test_the_machine(capsys):
    found = lines_of(capsys)
    assert any(line.startswith("torch ") for line in found) and "Devices" in found and "Weights found" in found
    assert any(line.startswith("  cpu: ") for line in found)
    assert "  vavae: give codec.weights=PATH" in found and "  identity: no file to give" in found


def test_what_a_training_needs(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = lines_of(capsys, "train", *SMALL, "objective=flow_matching", "optimizer=adamw_bf16", "ema.sigma_rel=[0.1]")
    from flowanchor.plugins.backbones.lightningdit import LightningDiT

    network = LightningDiT.from_preset(
        "nano", depth=1, hidden_size=16, num_heads=2, input_size=8, in_channels=1, num_classes=10
    )
    values = sum(p.numel() for p in network.parameters())
    trained = sum(p.numel() for p in network.parameters() if p.requires_grad)

    def size(name: str) -> float:
        return float(next(line for line in found if line.strip().startswith(name)).split()[-2]) * 1e6

    for name, expected in (("weights", 4 * values), ("gradients", 4 * trained), ("optimizer", 4 * trained)):
        assert size(name) == pytest.approx(expected, abs=6e4), name
    assert size("averages") == pytest.approx(4 * values, abs=6e4)
    assert any("a step, forward and backward" in line and "fits" in line for line in found)
    assert not list(tmp_path.iterdir())


def test_what_is_missing_is_said(capsys, tmp_path):
    found = lines_of(capsys, "train", *SMALL, "experiment=digits_facm", "teacher.checkpoint=nowhere", "jvp=two_pass")
    assert "  teacher.checkpoint=nowhere: NOT FOUND" in found
    assert any("planned without its teacher" in line for line in found)
    with pytest.raises(SystemExit):
        check.main(["train", "objectiv=facm"])
    assert "did you mean objective" in capsys.readouterr().err


@pytest.fixture
def tiny_checkpoint():
    import importlib.util

    spec = importlib.util.spec_from_file_location("tiny_checkpoint", Path(__file__).with_name("tiny_checkpoint.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.save_checkpoint
