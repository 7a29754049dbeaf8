"""The record of a run, and the refusal to continue another run in its folder."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from omegaconf import OmegaConf

from flowanchor.errors import ConfigError
from flowanchor.provenance import check_same_run, differences, git_state, write_run_record


def config(**changes):
    base = {
        "seed": 0,
        "data": {"channels": 1, "size": 8},
        "backbone": {"depth": 4, "in_channels": "${data.channels}"},
        "objective": {"shortcut": {"power": 0.5}},
        "teacher": {"_target_": "none"},
        "trainer": {"max_steps": 10},
    }
    cfg = OmegaConf.create(base)
    for key, value in changes.items():
        OmegaConf.update(cfg, key.replace("__", "."), value, force_add=True)
    return cfg


def git(folder, *arguments):
    identity = ["-c", "user.name=n", "-c", "user.email=e@example.org", "-c", "commit.gpgsign=false"]
    subprocess.run(["git", "-C", str(folder), *identity, *arguments], check=True, capture_output=True)


def test_record_is_resolved_and_complete(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/some/where/src/train.py", "seed=0", "note=two words"])
    write_run_record(tmp_path / "new" / "run", config())
    recorded = OmegaConf.load(tmp_path / "new" / "run" / "config.yaml")
    assert OmegaConf.to_container(recorded)["backbone"] == {"depth": 4, "in_channels": 1}
    record = json.loads((tmp_path / "new" / "run" / "provenance.json").read_text())
    assert record["packages"]["torch"] == torch.__version__.split("+")[0]
    assert record["command"] == "train.py seed=0 'note=two words'"
    assert {"git_revision", "git_dirty", "python", "date"} <= set(record)


def test_only_the_first_process_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    write_run_record(tmp_path / "run", config())
    assert not (tmp_path / "run").exists()


def test_unwritable_folder_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"cannot be written \(.*\): choose another one with hydra.run.dir=FOLDER\.$"):
        write_run_record(tmp_path / "file", config())


def test_git_state_names_the_revision_and_changes(tmp_path):
    assert git_state(tmp_path) == (None, None)
    git(tmp_path, "init")
    package = tmp_path / "package"
    package.mkdir()
    (package / "code.py").write_text("1")
    assert git_state(package) == (None, None)  # not tracked: the repository around it is not ours
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-m", "first")
    revision, dirty = git_state(package)
    assert revision is not None and len(revision) == 40 and dirty is False
    (package / "code.py").write_text("2")
    assert git_state(package) == (revision, True)


def test_the_same_run_may_go_on_longer(tmp_path):
    check_same_run(tmp_path, config())  # an empty folder
    write_run_record(tmp_path, config())
    check_same_run(tmp_path, config())
    check_same_run(tmp_path, config(trainer__max_steps=20, seed=1))
    check_same_run(tmp_path, config(data__max_bad=3))  # as the message of a bad sample advises
    # How a teacher is kept follows the precision, and a run from before there was a choice has none.
    check_same_run(tmp_path, config(teacher__dtype="auto", teacher__precision="bf16-mixed"))


def test_a_path_may_be_spelled_in_another_way(tmp_path, monkeypatch):
    (tmp_path / "set").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "link").symlink_to("set")
    monkeypatch.chdir(tmp_path)
    write_run_record(tmp_path / "run", config(data__root="set"))
    for root in ("./set", str(tmp_path / "set"), "link"):
        check_same_run(tmp_path / "run", config(data__root=root))
    for root in ("other", "nowhere"):
        with pytest.raises(ConfigError, match="data.root"):
            check_same_run(tmp_path / "run", config(data__root=root))


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"backbone__depth": 5}, "backbone.depth"),
        ({"objective__shortcut": None}, "objective.shortcut"),
        ({"data__size": 16}, "data.size"),
        ({"teacher__guidance_scale": 2.0}, "teacher.guidance_scale"),
    ],
)
def test_another_run_is_refused_by_the_key_that_differs(tmp_path, change, key):
    write_run_record(tmp_path, config())
    with pytest.raises(ConfigError, match=rf"\({key}\): pick another name=NAME"):
        check_same_run(tmp_path, config(**change))


def test_unreadable_record_is_one_sentence(tmp_path):
    (tmp_path / "config.yaml").write_text("{: [")
    with pytest.raises(ConfigError, match="pick another folder with name=NAME"):
        check_same_run(tmp_path, config())


def test_nothing_is_nothing_however_it_was_recorded():
    assert differences({"objective": {"weight": {}, "anchor": {}}}, {"objective": {"weight": None}}) == {}
    assert differences({"seed": 0}, {"seed": None}) == {"seed": (0, None)}
    assert differences({"a": {}}, {"a": {"b": 1}}) == {"a.b": (None, 1)}


def test_a_setting_that_came_later_had_the_value_of_before():
    earlier = {"objective": {"shortcut": {"weight_epsilon": 1e-3}}}
    assert differences(earlier, {"objective": {"shortcut": {"weight_epsilon": 1e-3, "weight_reduction": "mean"}}}) == {}
    now = {"objective": {"shortcut": {"weight_epsilon": 1e-3, "weight_reduction": "sum"}}}
    assert differences(earlier, now) == {"objective.shortcut.weight_reduction": ("mean", "sum")}
    earlier, now = {"backbone": {"depth": 1}, "sampler": {}}, {"depth": 1, "predicts": "v"}
    assert differences(earlier, {"backbone": now, "sampler": {"timestep_shift": 0.0, "final_euler": False}}) == {}
    changed = differences(earlier, {"backbone": {**now, "predicts": "x"}, "sampler": {}})
    assert changed == {"backbone.predicts": ("v", "x")}
