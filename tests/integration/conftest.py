"""Whole runs through the programs' own command lines, on a network small enough for a test."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hydra.core.global_hydra import GlobalHydra

TINY = ["backbone.depth=1", "backbone.hidden_size=16", "backbone.num_heads=2", "data.batch_size=32", "callbacks=none"]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Path]:
    """`command("train", "objective=facm", ...)`: a program in this process, in an empty folder; returns that folder."""
    monkeypatch.chdir(tmp_path)

    def run(name: str, *overrides: str) -> Path:
        from importlib import import_module

        GlobalHydra.instance().clear()
        monkeypatch.setattr(sys, "argv", [f"src/{name}.py", *overrides])
        import_module(f"flowanchor.programs.{name}").main()
        return tmp_path

    return run


@pytest.fixture
def tiny() -> list[str]:
    return list(TINY)
