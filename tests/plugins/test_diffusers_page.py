"""docs/add_a_diffusers_model.md is enough: its class, which no plugin describes, by its snippets alone."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

from flowanchor.plugins.backbones.diffusers.description import is_described

PAGE = Path(__file__).parents[2] / "docs" / "add_a_diffusers_model.md"
MODULE = "flowanchor.plugins.backbones.diffusers.auraflow"


@pytest.fixture
def written(monkeypatch):
    """The snippets of the page; its description as the module that it is written to."""
    snippets = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.M | re.S)
    described = next(text for text in snippets if text.startswith("# plugins/"))
    module = ModuleType(MODULE)
    monkeypatch.setitem(sys.modules, MODULE, module)
    exec(described, module.__dict__)
    return next(text for text in snippets if "check_backbone" in text), described, module


def test_the_page_describes_a_class_that_nobody_has(written):
    check, described, module = written
    assert not is_described(module.AuraFlow.stock), "the page needs another example"
    exec(check, {})
    exec(described.replace('"timestep": 1 - t', '"timestep": t'), module.__dict__)
    with pytest.raises(AssertionError):
        exec(check, {})
