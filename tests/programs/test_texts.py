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
            "nfe=[1,2]", "prompts=a,b", "-c", "job"]  # fmt: skip
    assert quoted(same) == same
    assert value(quoted(["prompt=['a fox, red','a dog']"])[0]) == ["a fox, red", "a dog"]
    assert quoted(["-m", "prompt=a fox,a dog"]) == ["-m", "prompt=a fox,a dog"], "a sweep over two prompts"
