"""The name of a run folder: the same for the same settings, another for any other."""

from __future__ import annotations

import re

import pytest

from flowanchor.programs.folders import MAX_SLUG, digest, first_given, run_name, swept_name


def test_order_of_overrides_does_not_matter():
    assert run_name(None, ["seed=1", "objective=facm"]) == run_name(None, ["objective=facm", "seed=1"])
    assert digest(["a=1", "b=2"]) == digest(["b=2", "a=1"])


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (["seed=1"], ["seed=2"]),
        (["a.depth=4"], ["b.depth=4"]),  # the same readable part
        (["x=" + "long" * 40], ["x=" + "long" * 40 + "er"]),  # beyond the length of the slug
        ([], ["seed=1"]),
        (["+x=1"], ["x=1"]),
    ],
)
def test_other_settings_have_another_folder(one, other):
    assert run_name(None, one) != run_name(None, other)
    assert digest(one) != digest(other)


def test_reads_like_the_command():
    assert re.fullmatch(r"depth-4_objective-facm_[0-9a-f]{8}", run_name(None, ["objective=facm", "backbone.depth=4"]))
    assert run_name(None, []) == "default"


def test_needs_no_quoting_and_stays_one_folder():
    wild = ["checkpoint=outputs/train/a b/x.ckpt", "nfe=[1,2]", 'note="what, is; this\'?"', "+cb@a.b=../../etc"]
    name = run_name(None, wild)
    assert re.fullmatch(r"[\w.-]+", name)
    assert len(name) <= MAX_SLUG + 9


def test_a_name_wins_and_may_have_a_parent_folder():
    assert run_name("mine", ["seed=1"]) == "mine"
    assert run_name("paper/table 1", []) == "paper/table 1"
    assert run_name("../../mine", []) == "mine"
    assert run_name("/mine", []) == "mine"


def test_settings_that_compute_the_same_share_the_folder():
    assert run_name(None, ["seed=1", "debug=true"]) == run_name(None, ["seed=1"])


def test_names_that_differ_have_folders_that_differ():
    names = ["a+b", "a:b", "a-b", "a b", "a$b", 'a"b', "a\\b", "1.10", "1.1", "é", "2026_11_26"]
    assert len({run_name(name, []) for name in names}) == len(names)
    assert all(not re.search(r'["$\\]', run_name(name, [])) for name in names), "Hydra's quotes hold them"


def test_a_job_of_a_sweep_is_called_by_what_the_sweep_varies():
    job = ["objective=facm", "trainer.max_steps=40", "optimizer.lr=0.001", "seed=1"]
    assert swept_name("seed;optimizer.lr", job) == "seed-1_lr-0.001"
    assert swept_name("", job) == "default"


def test_a_search_space_is_replaced_as_a_whole():
    assert first_given(None, {"a": 1}) == {"a": 1} and first_given({"b": 2}, {"a": 1}) == {"b": 2}
