"""Every cell of the compatibility matrix, and the page that tells of it."""

from __future__ import annotations

import itertools

import pytest

from flowanchor.jvp.full import TORCH

from .matrix import PAGE, ROWS, SPREADS, render, visit, without_figures, wrong

CHECKPOINTING = {"chain": ("off", "on", "selective")}
ENGINES = ("chain", "two_pass", "full", "finite_difference")


KEYS = ("network", "engine", "spread", "checkpointing", "attention", "compiled")


@pytest.fixture(scope="module", params=["part", pytest.param("all", marks=pytest.mark.slow)])
def extent(request):
    """Cells that stand for all (cells.py), or all."""
    return request.param


@pytest.fixture(scope="module")
def cells(tmp_path_factory, extent):
    return visit(tmp_path_factory.mktemp("cells"), extent)


def impossible(engine: str, spread: str, checkpointing: str) -> bool:
    if engine == "full":
        return checkpointing == "on" or TORCH < (2, 13) and spread.startswith("FSDP2")
    return engine == "finite_difference" and spread == "FSDP2 + bf16"


def every_cell():
    """As tuples of `KEYS`."""
    found = [
        ("lightningdit", engine, *rest)
        for engine in ENGINES
        for rest in itertools.product(
            SPREADS, CHECKPOINTING.get(engine, ("off", "on")), ("math", "streaming"), (False, True)
        )
    ]
    assert len(found) == 4 * 4 * 2 * 2 * 2 + 16  # and `selective`
    return found + [
        ("sd3", "chain", *rest, "math", False) for rest in itertools.product(SPREADS[:3], CHECKPOINTING["chain"])
    ]


def combinations(cells):
    """Every pair of settings, every entry of the page, and engine, spread and compilation together, that occur."""
    of_three = [("engine", "spread", "checkpointing"), ("engine", "spread", "compiled")]
    chosen = [*itertools.combinations(KEYS, 2), *of_three]
    return {tuple((key, cell[KEYS.index(key)]) for key in keys) for keys in chosen for cell in cells}


def test_every_cell_is_visited_once(cells, extent):
    visited, wanted = [tuple(cell[key] for key in KEYS) for cell in cells], every_cell()
    if extent == "all":
        assert sorted(visited) == sorted(wanted)
    assert len(visited) == len(set(visited)) and set(visited) <= set(wanted)
    assert combinations(visited) == combinations(wanted)
    assert {cell[1:5:2] for cell in visited} == set(ROWS)


@pytest.mark.parametrize("spread", SPREADS)
@pytest.mark.parametrize("engine", ENGINES)
def test_cells_equal_one_process(cells, engine, spread):
    """What is possible equals `Full` in one process; what is not is refused, and nothing else is."""
    chosen = [cell for cell in cells if (cell["engine"], cell["spread"]) == (engine, spread)]
    assert chosen
    for cell in chosen:
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
    """Of a part of the cells too: an entry is one word where all of its cells agree, as all do that are visited."""
    assert without_figures(render(cells)) == without_figures(PAGE.read_text()), "run `make compatibility`"


def test_the_page_shows_what_goes_wrong(cells):
    """A cell that fails, and one that comes to something else, each change the page."""
    page = without_figures(render(cells))
    one = next(cell for cell in cells if cell["verdict"] == "yes")
    forms = itertools.product(("math", "streaming"), (False, True))  # all four of the entry, also where one was visited
    first, *entry = ({**one, "attention": attention, "compiled": compiled} for attention, compiled in forms)
    place = ("network", "engine", "spread", "checkpointing")
    others = [*entry, *(cell for cell in cells if any(cell[key] != one[key] for key in place))]
    failing = {**first, "verdict": "fails", "reason": "an error"}
    mistaken = {**first, "errors": {**first["errors"], "tangent": 0.1}}
    assert "**fails**: math eager" in render([failing, *others])
    assert "**wrong**: math eager" in render([mistaken, *others])
    assert "**" not in page.split("| setting |")[1].split("\n\n")[0]
