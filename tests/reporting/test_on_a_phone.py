"""A page of 420 pixels: nothing sticks out, what is wide scrolls under its first column, long rows become cards."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest

from flowanchor.reporting.html import Page
from flowanchor.reporting.plots import QualityCurve, quality_figure

BROWSER = Path("/usr/bin/chromium")
NEEDED = "FLOWANCHOR_NEEDS_BROWSER"  # CI sets it: there a missing browser is a failure
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-dev-shm-usage"]


@pytest.mark.slow
def test_a_page_fits_a_phone(tmp_path):
    if not BROWSER.exists() or importlib.util.find_spec("playwright") is None:
        assert NEEDED not in os.environ, f"no {BROWSER} or no playwright here"
        pytest.skip(f"no {BROWSER} or no playwright here")
    from playwright.sync_api import sync_playwright  # of the extra dev, which not everybody has

    wide = [{"run": f"run {i}", **{f"a long heading {k}": 1000.0 * k for k in range(12)}} for i in range(2)]
    long = [{"run": "a", "folder": "/scratch/" + "very_long_name_" * 12, "seed": i} for i in range(2)]
    curves = [QualityCurve("student", (1, 2), (2.0, 1.0))]
    page = Page("A_title_without_a_place_to_break_it_" * 3).heading("Table").table(wide).table(long, cards=True)
    page.pictures([(quality_figure(curves), "quality"), (quality_figure(curves), "again")])
    page.save(tmp_path / "page.html")
    with sync_playwright() as started:
        browser = started.chromium.launch(executable_path=str(BROWSER), args=FLAGS)
        shown = browser.new_page(viewport={"width": 420, "height": 900})
        asked: list[str] = []
        shown.on("request", lambda request: asked.append(request.url))
        shown.goto((tmp_path / "page.html").as_uri())
        assert shown.evaluate("document.documentElement.scrollWidth") <= 420
        first = shown.locator("table:not(.cards) td").first
        before = first.bounding_box()
        shown.locator(".scroll").first.evaluate("box => { box.scrollLeft = 300 }")
        assert first.bounding_box() == before  # the names stay while the numbers scroll
        assert shown.locator("table.cards td").nth(1).evaluate("cell => getComputedStyle(cell).display") == "block"
        pictures = [picture.bounding_box() for picture in shown.locator("img").all()]
        assert all(box is not None and box["x"] >= 0 and box["x"] + box["width"] <= 420 for box in pictures)
        shown.set_viewport_size({"width": 1200, "height": 900})
        left, right = (picture.bounding_box() for picture in shown.locator("img").all())
        assert left is not None and right is not None and left["y"] == right["y"]  # beside each other
        browser.close()
    assert [url for url in asked if not url.startswith(("file:", "data:"))] == []
