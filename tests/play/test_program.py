"""What `flowanchor play` says before there is a page."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest
from click.testing import CliRunner

from flowanchor.programs import play


def said(*words):
    done = CliRunner().invoke(play.main, [str(word) for word in words])
    assert "Traceback" not in done.output and not isinstance(done.exception, (TypeError, AttributeError))
    return done.exit_code, done.output


@pytest.mark.skipif(importlib.util.find_spec("gradio") is None, reason="gradio is not installed (extra [play])")
class TestWithGradio:
    def test_a_bad_checkpoint_ends_it_with_a_sentence(self, tmp_path):
        code, output = said(tmp_path / "nowhere.ckpt")
        assert code == 1 and "Error: There is no checkpoint at" in output
        (tmp_path / "bad.ckpt").write_bytes(b"nothing")
        code, output = said(tmp_path / "bad.ckpt")
        assert code == 1 and "is not a checkpoint that can be read safely" in output

    def test_a_bad_teacher_too(self, shortcut, tmp_path):
        code, output = said(shortcut.path, tmp_path / "nowhere.ckpt")
        assert code == 1 and "nowhere.ckpt" in output

    def test_a_setting_that_is_wrong(self, shortcut):
        assert said(shortcut.path, "--device", "tpu")[0] == 1
        assert said(shortcut.path, "--dtype", "int8")[0] == 1
        assert said(shortcut.path, "--port", "70000")[0] == 2


def test_without_gradio_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(play, "find_spec", lambda name: None)
    code, output = said("digits")
    assert code == 1 and 'pip install "flowanchor[play]"' in output


def test_only_this_machine_unless_told_otherwise():
    parameters = {parameter.name: parameter for parameter in play.main.params}
    assert parameters["host"].default == "127.0.0.1"
    assert play._is_loopback("127.0.0.1") and play._is_loopback("::1") and play._is_loopback("localhost")
    assert not play._is_loopback("0.0.0.0") and not play._is_loopback("box.example")


def test_only_the_page_knows_gradio():
    folder = Path(play.__file__).parents[1] / "play"
    knowing = [file.name for file in folder.glob("*.py") if re.search(r"^(import|from) gradio", file.read_text(), re.M)]
    assert knowing == ["page.py"]
