"""The name of a run folder: the same for the same settings, another for any other."""

from __future__ import annotations

import re

import pytest

from flowanchor.programs.folders import MAX_SLUG, digest, run_name


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
    assert run_name("paper/table 1", []) == "paper/table-1"
    assert run_name("../../mine", []) == "mine"
    assert run_name("/mine", []) == "mine"


def test_settings_that_compute_the_same_share_the_folder():
    assert run_name(None, ["seed=1", "debug=true"]) == run_name(None, ["seed=1"])
