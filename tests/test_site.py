"""The documentation as a site: every page has its place; it is built and read without asking others for anything."""

from __future__ import annotations

import functools
import http.server
import importlib.util
import os
import re
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
BROWSER = Path("/usr/bin/chromium")
NEEDED = "FLOWANCHOR_NEEDS_BROWSER"  # CI sets it: there a missing browser is a failure
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-background-networking", "--disable-sync"]
FLAGS += ["--disable-component-update", "--disable-dev-shm-usage", "--no-first-run"]

needs_mkdocs = pytest.mark.skipif(importlib.util.find_spec("mkdocs") is None, reason='pip install "flowanchor[docs]"')


def pages(nav: object) -> list[str]:
    if isinstance(nav, str):
        return [nav]
    return [page for part in (nav.values() if isinstance(nav, dict) else nav) for page in pages(part)]


def test_every_page_has_its_place():
    settings = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    listed = [*pages(settings["nav"]), *settings["not_in_nav"].split()]
    there = [path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")]
    assert sorted(listed) == sorted([*there, "api/"]), "mkdocs.yml: nav lists other pages than docs/ has"


@pytest.fixture(scope="module")
def hooks():
    """docs/hooks.py"""
    spec = importlib.util.spec_from_file_location("docs_hooks", ROOT / "docs" / "hooks.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@needs_mkdocs
@pytest.mark.parametrize(
    ("text", "repository", "becomes"),
    [
        ("[`jvp/chain.py`](../src/flowanchor/jvp/chain.py)", None, "`jvp/chain.py` (`src/flowanchor/jvp/chain.py`)"),
        ("[`conf/train.yaml`](../conf/train.yaml)", None, "`conf/train.yaml`"),
        ("[map](../conf/train.yaml)", "https://host/me/it/", "[map](https://host/me/it/blob/main/conf/train.yaml)"),
        ("[words](concepts.md#words), [paper](https://arxiv.org/abs/1)", None, None),
        ("![picture](images/demo.png)", None, None),
        ("```\n[map](../conf/train.yaml)\n```", None, None),
        ("[gone](../conf/gone.yaml)", None, None),  # mkdocs says so
    ],
)
def test_links_that_leave_the_docs(hooks, text, repository, becomes):
    page = SimpleNamespace(file=SimpleNamespace(src_uri="rooms.md"))
    made = hooks.on_page_markdown(text, page, SimpleNamespace(repo_url=repository), None)
    assert made == (text if becomes is None else becomes)


@needs_mkdocs
def test_the_reference_has_every_public_module_once(hooks):
    told = [name for names in hooks.rooms().values() for name in names]
    files = [*(ROOT / "src" / "flowanchor").rglob("*.py"), *(ROOT / "plugins").rglob("*.py")]
    parts = [(file.relative_to(ROOT).with_suffix("").parts, file) for file in files if not file.name.startswith("_")]
    there = {".".join(part[1:] if part[0] == "src" else ("flowanchor", *part)) for part, _ in parts}
    assert sorted(told) == sorted({"flowanchor", *(name for name in there if ".programs." not in name)})


@pytest.mark.slow
@needs_mkdocs
@pytest.mark.cold
def test_the_site_asks_nobody_for_anything(tmp_path):
    site = tmp_path / "site"
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(site)],
        cwd=ROOT, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    for page in site.rglob("*.html"):
        loaded = re.findall(r'<(?:script|img|link)\b[^>]*\b(?:src|href)="(https?:[^"]+)"', page.read_text())
        assert not loaded, f"{page.name} loads {loaded}"
    assert "flowanchor.interfaces.Backbone" in (site / "api" / "contracts.html").read_text()
    if not BROWSER.exists() or importlib.util.find_spec("playwright") is None:
        assert NEEDED not in os.environ, f"no {BROWSER} or no playwright here"
        pytest.skip(f"built; not opened: no {BROWSER} or no playwright here")
    look(site)


def look(site: Path) -> None:
    """Home in a browser: pictures load, the search finds, nothing is asked of other hosts."""
    from playwright.sync_api import expect, sync_playwright  # of the extra dev, which not everybody has

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None: ...

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(site)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    outside: list[str] = []
    here = f"http://127.0.0.1:{server.server_port}/"
    try:
        with sync_playwright() as started:
            browser = started.chromium.launch(executable_path=str(BROWSER), args=FLAGS)
            page = browser.new_page(viewport={"width": 420, "height": 900})
            page.on(
                "request",
                lambda asked: outside.append(asked.url) if not asked.url.startswith((here, "data:", "blob:")) else None,
            )
            page.goto(here)
            assert page.locator("article img").first.evaluate("picture => picture.naturalWidth") > 100
            assert page.evaluate("document.documentElement.scrollWidth") <= 420
            page.set_viewport_size({"width": 1300, "height": 900})
            page.locator("input[name=query]").click()
            page.locator("input[name=query]").press_sequentially("MeanFlow")  # key by key: it listens to keys
            expect(page.locator(".md-search-result__item").first).to_be_visible(timeout=60_000)
            browser.close()
    finally:
        server.shutdown()
    assert not outside
