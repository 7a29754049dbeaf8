"""Prompts with every sign that Hydra's grammar knows arrive as they were written."""

from __future__ import annotations

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from flowanchor.programs.texts import quoted

PROMPTS = [
    "a red fox", "a red fox, in the snow", "light: a fox (red), 35mm", "snow's light", 'a sign that says "stop"',
    "'tis so", "a=b", "{braces} [brackets", "50% & more; #1!", "C:\\snow\\", "it\\'s", "ends with a \\", "[1, 2] and 3",
    "42", "true", "ein Fuchs über dem Fluß", "红色的狐狸，在雪中",
    "a 'quoted' word, and 'another'", "'", '"', "[", "\\\\'",
]  # fmt: skip


def value(argument: str):
    (override,) = OverridesParser.create().parse_overrides([argument])
    return override.value()


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("name", ["prompt", "negative", "captions.negative", "++prompt"])
def test_a_text_arrives_as_it_was_written(prompt, name):
    (argument,) = quoted([f"{name}={prompt}"])
    assert value(argument) == prompt
    assert quoted([argument]) == [argument], "once is enough"


def test_what_is_written_for_hydra_stays():
    same = ["prompt=['a fox, red','a dog']", "prompt='a fox, red'", 'prompt="a, b"', "prompt=null", "prompt=", "seed=1",
            "nfe=[1,2]", "prompts=a.txt", "-c", "job", "checkpoint={high: a, low: b}", "runs=[a,b]", "name=plain-1.a",
            "teacher.checkpoint=${initialise_from}", "~name",
            "hydra.run.dir=/tmp/x"]  # fmt: skip
    assert quoted(same) == same
    assert value(quoted(["prompt=['a fox, red','a dog']"])[0]) == ["a fox, red", "a dog"]
    assert quoted(["-m", "prompt=a fox,a dog"]) == ["-m", "prompt=a fox,a dog"], "a sweep over two prompts"


NAMES = [
    "2026_11_26", "1e3", "7e1234567", "true", "1.10", "0x10", "a,b", "/d/é", "/d/p=q", "/d/it's", "/d/(1)", "/d/x~y",
    "/d/a&b", "/d/#e", "/d/a b", "a: b", "nan", "-1", "1_000", "/d/{a}/x", "/d/[1]", "ends\\", "on", "/d/a,b c/ü",
    "s3://bucket/{000..003}.tar",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "key", ["name", "data.root", "checkpoint", "teacher.checkpoint", "runs", "++out", "hydra.run.dir"]
)
def test_a_name_or_a_path_stays_what_was_typed(name, key):
    (argument,) = quoted([f"{key}={name}"])
    assert value(argument) == name
    assert quoted([argument]) == [argument]


def test_several_names_of_a_sweep():
    (_, argument, chosen) = quoted(["-m", "name=1_0,b,1.10", "name=choice(a,b)"])
    (override,) = OverridesParser.create().parse_overrides([argument])
    assert list(override.sweep_string_iterator()) == ["'1_0'", "b", "'1.10'"] and chosen == "name=choice(a,b)"


def test_lists_of_names_hold_what_was_typed():
    typed = ["2026_11_26", "1.10", "a=b", "/d/(new) set", "a'b", "x/{0..3}", "true"]
    (argument,) = quoted([f"runs=[{','.join(typed)}]"])
    assert value(argument) == typed and quoted([argument]) == [argument]
    (argument,) = quoted(["runs=['a,b', \"c d\" ,[1.10, e]]"])
    assert value(argument) == ["a,b", "c d", ["1.10", "e"]]


def test_a_name_is_never_a_list():
    for name in ("[v2]", "{a: b}", "'a' and 'b'", "[a,b]"):
        assert value(quoted([f"name={name}"])[0]) == name


@pytest.mark.parametrize(
    ("typed", "jobs"),
    [
        ("name='a,b',1.10", ["'a,b'", "'1.10'"]),
        ("name=c,'a,b'", ["c", "'a,b'"]),
        ("runs=[a,b],c", ["[a,b]", "c"]),
        ("checkpoint={high: a, low: b},x=y", ["{high:a,low:b}", "'x=y'"]),
    ],
)
def test_commas_in_quotes_and_brackets_separate_no_jobs(typed, jobs):
    (override,) = OverridesParser.create().parse_overrides(quoted(["-m", typed])[1:])
    assert [job.replace(" ", "") for job in override.sweep_string_iterator()] == jobs


def test_a_folder_of_hydras_own_is_never_swept():
    assert value(quoted(["-m", "hydra.sweep.dir=sw'1, x"])[1]) == "sw'1, x"
