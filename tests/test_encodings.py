"""Text is written and read as UTF-8, whatever a machine's locale says."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1]
OPENERS = {"open", "read_text", "write_text", "fdopen", "TextIOWrapper", "FileHandler"}
OTHERS = {"os", "tarfile", "Image", "archive", "studio", "webbrowser"}  # whose `open` opens no text


def openings(source: str) -> list[str]:
    """Calls that open a text without saying how it is encoded."""
    found = []
    for call in ast.walk(ast.parse(source)):
        if not isinstance(call, ast.Call):
            continue
        owner = call.func.value if isinstance(call.func, ast.Attribute) else None
        name = call.func.attr if owner is not None else getattr(call.func, "id", "")
        values = [*call.args, *(keyword.value for keyword in call.keywords if keyword.arg == "mode")]
        binary = any(isinstance(v, ast.Constant) and isinstance(v.value, str) and "b" in v.value for v in values[:2])
        foreign = name == "open" and getattr(owner, "id", None) in OTHERS
        stated = any(keyword.arg == "encoding" for keyword in call.keywords)
        if name in OPENERS and not (binary or foreign or stated):
            found.append(f"{call.lineno}: {ast.unparse(call)}")
    return found


def test_openings_are_seen():
    plain = "path.open(); open(path, 'w'); path.read_text(); path.write_text(text); os.fdopen(handle)"
    assert len(openings(plain)) == 5
    fine = "path.open('rb'); open(path, mode='wb'); path.read_text(encoding='utf-8'); os.open(path, 0)"
    assert not openings(fine)


def test_every_text_says_how_it_is_encoded():
    files = [path for folder in ("src", "plugins", "examples") for path in (ROOT / folder).rglob("*.py")]
    assert len(files) > 200
    found = {str(path.relative_to(ROOT)): openings(path.read_text(encoding="utf-8")) for path in files}
    assert not {path: calls for path, calls in found.items() if calls}
