"""Self-contained HTML pages: pictures inside, nothing fetched from elsewhere."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from PIL import Image

from flowanchor.base.files import write_whole

STYLE = """
:root { color-scheme: light dark; --ink: #1f2328; --paper: #ffffff; --line: #d8dee4; --soft: #f6f8fa;
        --good: #1a7f37; --bad: #b42318; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e8eb; --paper: #16181c; --line: #3a3f46; --soft: #1f2328; --good: #57c27a; --bad: #ff8a80; }
}
body { margin: 2rem auto; max-width: 62rem; padding: 0 1.2rem; background: var(--paper); color: var(--ink);
       font: 16px/1.55 system-ui, sans-serif; }
h1 { font-size: 1.7rem; } h2 { font-size: 1.25rem; margin-top: 2.4rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { border-bottom: 1px solid var(--line); padding: .32rem .8rem; text-align: right; }
th:first-child, td:first-child { text-align: left; }
th { background: var(--soft); }
table.settings td, table.settings th { text-align: left; }
figure { margin: 1rem 0; } figcaption { font-size: .9rem; opacity: .8; }
img { max-width: 100%; background: #fff; border: 1px solid var(--line); border-radius: 4px; }
.row { display: flex; flex-wrap: wrap; gap: 1rem; }
.good { color: var(--good); font-weight: 600; } .bad { color: var(--bad); font-weight: 600; }
pre { background: var(--soft); padding: .7rem 1rem; overflow-x: auto; border-radius: 4px; font-size: .85rem; }
.scroll { overflow-x: auto; }
"""


class Raw(str):
    """Text that is HTML already."""


def _text(value: Any) -> str:
    if isinstance(value, Raw):
        return value
    if isinstance(value, bool) or value is None:
        return "" if value is None else str(value).lower()
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 10000 else f"{value:.4g}"
    return escape(str(value))


class Page:
    """A page that is filled from top to bottom.

    >>> page = Page("Run").heading("Scores").table([{"nfe": 1, "fd": 2.6}])
    >>> page.save("report.html")  # doctest: +SKIP
    """

    def __init__(self, title: str) -> None:
        self.title = title
        self.parts = [f"<h1>{escape(title)}</h1>"]

    def heading(self, text: str) -> Page:
        self.parts.append(f"<h2>{escape(text)}</h2>")
        return self

    def paragraph(self, text: str) -> Page:
        self.parts.append(f"<p>{_text(text)}</p>")
        return self

    def code(self, text: str) -> Page:
        self.parts.append(f"<pre>{escape(text)}</pre>")
        return self

    def table(self, rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str] | None = None) -> Page:
        """Rows as dicts; `columns` maps keys to headings, and leaves out the others."""
        heads = columns or {key: key for key in (rows[0] if rows else {})}
        head = "".join(f"<th>{escape(title)}</th>" for title in heads.values())
        body = "".join("<tr>" + "".join(f"<td>{_text(row.get(k))}</td>" for k in heads) + "</tr>\n" for row in rows)
        self.parts.append(f'<div class="scroll"><table><tr>{head}</tr>\n{body}</table></div>')
        return self

    def settings(self, values: Mapping[str, Any]) -> Page:
        """Names and values below each other."""
        body = "".join(f"<tr><td>{escape(str(k))}</td><td>{_text(v)}</td></tr>\n" for k, v in values.items())
        self.parts.append(f'<div class="scroll"><table class="settings">{body}</table></div>')
        return self

    def picture(self, picture: Image.Image | Figure | str | Path, caption: str = "") -> Page:
        """A PIL image, a matplotlib figure or a PNG file, put into the page itself."""
        self.parts.append(self._figure(picture, caption))
        return self

    def pictures(self, pictures: Mapping[str, Image.Image | Figure | str | Path]) -> Page:
        """Pictures beside each other, by caption."""
        self.parts.append(
            '<div class="row">' + "".join(self._figure(p, caption) for caption, p in pictures.items()) + "</div>"
        )
        return self

    @staticmethod
    def _figure(picture: Image.Image | Figure | str | Path, caption: str) -> str:
        data = io.BytesIO()
        if isinstance(picture, Figure):
            picture.savefig(data, format="png")
        elif isinstance(picture, Image.Image):
            picture.save(data, format="png")
        else:
            data.write(Path(picture).read_bytes())
        encoded = base64.b64encode(data.getvalue()).decode()
        source = f"data:image/png;base64,{encoded}"
        note = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
        return f'<figure><img alt="{escape(caption)}" src="{source}">{note}</figure>\n'

    def html(self) -> str:
        """The whole document."""
        body = "\n".join(self.parts)
        return (
            f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{escape(self.title)}</title>\n'
            f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<style>{STYLE}</style>\n</head>\n'
            f"<body>\n{body}\n</body>\n</html>\n"
        )

    def save(self, path: str | Path) -> Path:
        """Write the document; creates its folder."""
        target = Path(path)
        write_whole(target, self.html())
        return target
