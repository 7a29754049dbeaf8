"""The page in a browser: it opens, draws, changes, tells errors, and asks nobody else for anything."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

BROWSER = Path("/usr/bin/chromium")
NEEDED = "FLOWANCHOR_NEEDS_BROWSER"  # CI sets it: there a missing browser is a failure
FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-background-networking", "--disable-component-update",
    "--disable-sync", "--disable-dev-shm-usage", "--no-first-run",
]  # fmt: skip
HOME = ("127.0.0.1", "localhost", "::1", "0.0.0.0", "None")
OPACITY = "e => { let o = 1; for (; e; e = e.parentElement) o *= getComputedStyle(e).opacity; return o }"
pytestmark = pytest.mark.slow  # CI runs it: make test-ways
WAIT = 60_000  # milliseconds for anything to appear: until it does, never longer


def _missing() -> str | None:
    if not BROWSER.is_file():
        return f"no {BROWSER} here (Debian, Ubuntu: apt-get install chromium)"
    absent = [name for name in ("playwright", "gradio") if importlib.util.find_spec(name) is None]
    return f"not installed: {', '.join(absent)}" if absent else None


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """The page of a run that has saved nothing yet, with its teacher: address, run, names that were looked up."""
    missing = _missing()
    if missing:
        assert NEEDED not in os.environ, missing
        pytest.skip(missing)
    folder = tmp_path_factory.mktemp("page")
    here = importlib.util.spec_from_file_location("play_conftest", Path(__file__).with_name("conftest.py"))
    writing = importlib.util.module_from_spec(here)
    here.loader.exec_module(writing)
    run = writing.write_run(folder / "run", checkpoint=False)
    teacher = writing._module.save_checkpoint(folder / "teacher" / "checkpoints" / "last.ckpt", kind="flow")
    lookups, log = folder / "lookups", folder / "log"
    command = [sys.executable, str(Path(__file__).with_name("server.py")), str(lookups), str(run), str(teacher)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HTTP_PROXY": "", "PYTHONUNBUFFERED": "1"}
    with log.open("w") as output:
        process = subprocess.Popen(command, cwd=folder, stdout=output, stderr=subprocess.STDOUT, env=environment)
    try:
        for _ in range(1200):
            found = re.search(r"The page: (http://127\.0\.0\.1:\d+)", log.read_text())
            if found or process.poll() is not None:
                break
            time.sleep(0.1)
        assert found, log.read_text()
        yield found[1], run, lookups, lambda: writing._module.save_checkpoint(run / "checkpoints" / "last.ckpt")
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0, log.read_text()
        assert "Traceback" not in log.read_text()
    finally:
        process.kill()


@pytest.fixture(scope="module")
def browser(served):
    from playwright.sync_api import sync_playwright

    with sync_playwright() as started:
        chromium = started.chromium.launch(executable_path=str(BROWSER), args=FLAGS)
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def requests():
    """Every address that the browser has asked for."""
    return []


@pytest.fixture(scope="module")
def page(browser, served, requests):
    """A page that has drawn once: it was opened before there was a checkpoint, said so, and opened the first one."""
    opened = browser.new_page(viewport={"width": 1280, "height": 900})
    opened.set_default_timeout(WAIT)
    opened.on("request", lambda request: requests.append(request.url))
    opened.goto(served[0])
    opened.locator("#go").click()
    opened.locator(".toast-wrap").get_by_text("has saved no checkpoint yet").wait_for()
    assert "nothing saved yet" in opened.locator("#title").inner_text()
    served[3]()
    opened.locator("#open").click()
    opened.locator("#title").filter(has_text="few-step model, step 7").wait_for()
    opened.locator("#drawing img").wait_for()
    yield opened
    opened.close()


def text_of(page, name, wanted):
    """The text of a part of the page, once it contains what is wanted."""
    part = page.locator(f"#{name}").filter(has_text=wanted)
    part.wait_for()
    return part.inner_text()


def test_it_draws_and_another_number_of_steps_changes_the_picture(page):
    cost = text_of(page, "cost", "2 network")
    assert re.search(r"40 pictures in .* m?s, 2 network calls each, consistency, seed 0", cost)
    assert "2 network calls each, flow-euler, seed 0" in text_of(page, "teacher-cost", "Teacher: 40 pictures")
    drawing = page.locator("#drawing img")
    before = drawing.get_attribute("src")
    assert drawing.evaluate("e => getComputedStyle(e).imageRendering") == "pixelated"
    assert drawing.evaluate("e => e.naturalWidth") > 200  # 4 x 8 pixels, enlarged on the server
    slider = page.locator("#steps input[type=range]")
    slider.focus()
    slider.press("ArrowRight")
    slider.dispatch_event("pointerup")
    assert "3 network calls each" in text_of(page, "cost", "3 network")
    assert drawing.get_attribute("src") != before


def test_a_picture_is_downloaded(page, tmp_path):
    text_of(page, "cost", "3 network")
    with page.expect_download() as asked:
        page.locator("#download").click()
    name = asked.value.suggested_filename
    assert name == "run_seed0_consistency3.png"
    asked.value.save_as(tmp_path / name)
    with Image.open(tmp_path / name) as kept:
        assert json.loads(kept.text["flowanchor"])["seed"] == 0 and kept.width > 400  # student and teacher


def test_the_way_and_the_walk(page):
    page.get_by_role("tab", name="Noise to picture").click()
    page.locator("#follow").click()
    text_of(page, "way-text", "24 steps of flow-euler")
    frame = page.locator("#frame img")
    frame.wait_for()
    last = frame.get_attribute("src")
    slider = page.locator("#stop input[type=range]")
    slider.focus()
    slider.press("Home")
    page.wait_for_function("old => document.querySelector('#frame img').src !== old", arg=last)
    page.get_by_role("tab", name="Between two seeds").click()
    page.locator("#walk").click()
    assert "80 pictures" in text_of(page, "between-cost", "From seed 0 to seed 1")
    page.locator("#between img").wait_for()


def test_a_bad_checkpoint_is_told_and_the_page_goes_on(page, served):
    path = page.locator("#path textarea, #path input").first
    path.fill("nowhere.ckpt")
    page.locator("#open").click()
    toast = page.locator(".toast-wrap").get_by_text("There is no checkpoint at nowhere.ckpt")
    toast.wait_for()
    for part in page.locator("#steps").get_by_text("Error").all():  # what is open stays as it was, to the eye
        assert part.evaluate(OPACITY) == 0
    page.locator("#dice").click()
    page.get_by_role("tab", name="Draw").click()
    page.locator("#cost").filter(has_not_text="seed 0").filter(has_text="3 network calls each").wait_for()


def test_training_is_seen_as_it_goes_on(page, served):
    run = served[1]
    page.get_by_role("tab", name="Training").click()
    assert "step 19 of 100" in text_of(page, "state", "step 19")
    losses = page.locator("#losses img")
    losses.wait_for()
    before = losses.get_attribute("src")
    with (run / "csv" / "metrics.csv").open("a") as file:
        file.write("0,140.0,29,0.5,\n")
    assert "140 images/s" in text_of(page, "state", "step 29 of 100")
    page.wait_for_function("old => document.querySelector('#losses img').src !== old", arg=before)
    assert "step 29" in page.locator("#scores").inner_text()


def test_nobody_else_was_asked(page, served, requests):
    """No request of the browser, no telemetry of the server: each name that its process looked up is this machine's."""
    assert len(requests) > 20
    assert [url for url in requests if not url.startswith((served[0], "data:", "blob:"))] == []
    names = set(served[2].read_text().split())
    assert names and names <= set(HOME), names
