"""Every cell of the compatibility matrix, and the page that tells of it."""

from __future__ import annotations

import itertools

import pytest

from flowanchor.jvp.full import TORCH

from .matrix import PAGE, ROWS, SPREADS, render, visit_all, without_figures, wrong

CHECKPOINTING = {"chain": ("off", "on", "selective")}
ENGINES = ("chain", "two_pass", "full", "finite_difference")


@pytest.fixture(scope="module")
def cells(tmp_path_factory):
    return visit_all(tmp_path_factory.mktemp("cells"))


def impossible(engine: str, spread: str, checkpointing: str) -> bool:
    if engine == "full":
        return checkpointing == "on" or TORCH < (2, 13) and spread.startswith("FSDP2")
    return engine == "finite_difference" and spread == "FSDP2 + bf16"


def test_every_cell_is_visited_once(cells):
    keys = ("network", "engine", "spread", "checkpointing", "attention", "compiled")
    visited = [tuple(cell[key] for key in keys) for cell in cells]
    wanted = [
        ("lightningdit", engine, *rest)
        for engine in ENGINES
        for rest in itertools.product(
            SPREADS, CHECKPOINTING.get(engine, ("off", "on")), ("math", "streaming"), (False, True)
        )
    ]
    assert len(wanted) == 4 * 4 * 2 * 2 * 2 + 16  # and `selective`
    wanted += [
        ("sd3", "chain", *rest, "math", False) for rest in itertools.product(SPREADS[:3], CHECKPOINTING["chain"])
    ]
    assert sorted(visited) == sorted(wanted)
    assert {cell[1:5:2] for cell in visited} == set(ROWS)


@pytest.mark.parametrize("spread", SPREADS)
@pytest.mark.parametrize("engine", ENGINES)
def test_cells_equal_one_process(cells, engine, spread):
    """What is possible equals `Full` in one process; what is not is refused, and nothing else is."""
    for cell in (cell for cell in cells if (cell["engine"], cell["spread"]) == (engine, spread)):
        if impossible(engine, spread, cell["checkpointing"]):
            assert cell["verdict"] == "no", cell
            continue
        assert cell["verdict"] == "yes", cell["reason"]
        assert not wrong(cell), cell
        assert (cell["compiled_calls"] > 0) == cell["compiled"], cell


def test_refusals_are_one_sentence_that_names_a_choice(cells):
    for sentence in {cell["reason"] for cell in cells if cell["verdict"] == "no"}:
        assert sentence.endswith(".") and ". " not in sentence and "choose jvp=chain" in sentence


@pytest.mark.skipif(TORCH < (2, 13), reason="the page tells of torch 2.13 and later")
def test_the_page_agrees(cells):
    assert without_figures(render(cells)) == without_figures(PAGE.read_text()), "run `make compatibility`"


def test_the_page_shows_what_goes_wrong(cells):
    """A cell that fails, and one that comes to something else, each change the page."""
    page = without_figures(render(cells))
    first = next(cell for cell in cells if cell["verdict"] == "yes")
    others = [cell for cell in cells if cell is not first]
    failing = {**first, "verdict": "fails", "reason": "an error"}
    mistaken = {**first, "errors": {**first["errors"], "tangent": 0.1}}
    assert "**fails**: math eager" in render([failing, *others])
    assert "**wrong**: math eager" in render([mistaken, *others])
    assert "**" not in page.split("| setting |")[1].split("\n\n")[0]
