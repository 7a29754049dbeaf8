"""Self-contained HTML pages: pictures inside, nothing fetched from elsewhere."""

from __future__ import annotations

import base64
import io
from collections.abc import Collection, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from PIL import Image

from flowanchor.base.files import write_whole

STYLE = """
:root { color-scheme: light dark; --ink: #1f2328; --paper: #ffffff; --line: #d8dee4; --soft: #f6f8fa; --faint: #656d76;
        --good: #1a7f37; --bad: #b42318; --accent: #00798c; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e8eb; --paper: #16181c; --line: #3a3f46; --soft: #1f2328; --faint: #9aa3ad;
          --good: #57c27a; --bad: #ff8a80; --accent: #4bb6c8; }
}
* { box-sizing: border-box; }
body { margin: 2rem auto; max-width: 76rem; padding: 0 1.2rem; background: var(--paper); color: var(--ink);
       font: 16px/1.55 system-ui, sans-serif; -webkit-text-size-adjust: 100%; }
p, h1 { max-width: 46rem; }
h1 { font-size: 1.7rem; line-height: 1.25; overflow-wrap: anywhere; }
h2 { font-size: 1.25rem; margin-top: 2.4rem; padding-bottom: .2rem; border-bottom: 2px solid var(--accent);
     display: inline-block; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .92rem; }
th, td { border-bottom: 1px solid var(--line); padding: .32rem .8rem; text-align: right; }
th:first-child, td:first-child { text-align: left; }
th { background: var(--soft); vertical-align: bottom; }
td { white-space: nowrap; }
td.words, th.words { text-align: left; }
td.words { white-space: normal; overflow-wrap: break-word; min-width: 7rem; }
td.best { color: var(--good); font-weight: 600; }
table.settings td, table.settings th { text-align: left; }
table.settings td { white-space: normal; overflow-wrap: anywhere; }
table.settings td:first-child { overflow-wrap: normal; }
figure { margin: 0; } figcaption { font-size: .9rem; color: var(--faint); overflow-wrap: anywhere; }
body > figure { margin: 1rem 0; }
img { max-width: 100%; height: auto; background: #fff; border: 1px solid var(--line); border-radius: 4px; }
.row { display: flex; flex-wrap: wrap; gap: 1.2rem; margin: 1rem 0; align-items: start; }
.row figure { max-width: calc(50% - .6rem); }
.good { color: var(--good); font-weight: 600; } .bad { color: var(--bad); font-weight: 600; }
pre { background: var(--soft); padding: .7rem 1rem; overflow-x: auto; border-radius: 4px; font-size: .85rem; }
summary { cursor: pointer; color: var(--accent); font-weight: 600; padding: .4rem 0; }
.scroll { overflow-x: auto; margin: 1rem 0; }
@media (max-width: 40rem) {
  body { margin: 1rem auto; padding: 0 .8rem; }
  .row figure { max-width: 100%; }
  h1 { font-size: 1.35rem; }
  th, td { padding: .32rem .5rem; }
  /* A wide table scrolls under its first column; one of cards stands in a card for each row. */
  .scroll table:not(.settings) th:first-child, .scroll table:not(.settings) td:first-child {
    position: sticky; left: 0; background: var(--soft); max-width: 9.5rem; min-width: 6rem;
    white-space: normal; overflow-wrap: break-word; }
  table.cards, table.cards tbody, table.cards tr, table.cards td { display: block; }
  table.cards tr.head { display: none; }
  table.cards tr { border: 1px solid var(--line); border-radius: 4px; margin: .6rem 0; padding: .3rem .2rem; }
  .scroll table.cards td, .scroll table.cards td:first-child {
    position: static; min-width: 0; max-width: none; border: 0; white-space: normal; overflow-wrap: anywhere;
    padding: .12rem .6rem; text-align: left; background: none; }
  table.cards td:empty { display: none; }
  table.cards td::before { content: attr(data-name) ": "; color: var(--faint); }
  table.cards td:first-child { font-weight: 600; } table.cards td:first-child::before { content: ""; }
}
"""


Picture = Image.Image | Figure | str | Path
LARGE, COLOURS = 700 * 700, 2**14  # a picture of more pixels and of more colours is compressed with loss


class Raw(str):
    """Text that is HTML already."""


def _text(value: Any) -> str:
    if isinstance(value, Raw):
        return value
    if isinstance(value, bool) or value is None:
        return "" if value is None else str(value).lower()
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 10000 else f"{value:.4g}"
    return escape(str(value)).replace("/", "/<wbr>")  # a path may be broken there


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

    def table(
        self,
        rows: Sequence[Mapping[str, Any]],
        columns: Mapping[str, str] | None = None,
        best: Collection[tuple[int, str]] = (),
        cards: bool = False,
        folded: bool = False,
    ) -> Page:
        """Rows as dicts; `columns` maps keys to headings, and leaves out the others.

        `best` holds (row, key) of the cells to mark. On a narrow screen the table scrolls under its first column; with
        `cards` each row becomes a card there, which suits long texts. A `folded` table opens by a touch.
        """
        heads = columns or {key: key for key in (rows[0] if rows else {})}
        kinds = {key: "words" if any(_is_words(row.get(key)) for row in rows) else "" for key in heads}
        head = "".join(f"<th{_classes(kinds[key])}>{escape(title)}</th>" for key, title in heads.items())
        body = ""
        for i, row in enumerate(rows):
            for key, title in heads.items():
                name = f' data-name="{escape(title)}"' if cards else ""
                marked = _classes(kinds[key], "best" if (i, key) in best else "")
                body += f"{'<tr>' if key == next(iter(heads)) else ''}<td{marked}{name}>{_text(row.get(key))}</td>"
            body += "</tr>\n"
        table = (
            f'<div class="scroll"><table{_classes("cards" if cards else "")}><tr{_classes("head" if cards else "")}>'
            f"{head}</tr>\n{body}</table></div>"
        )
        self.parts.append(f"<details><summary>{len(rows)} rows</summary>\n{table}</details>" if folded else table)
        return self

    def settings(self, values: Mapping[str, Any]) -> Page:
        """Names and values below each other."""
        body = "".join(f"<tr><td>{escape(str(k))}</td><td>{_text(v)}</td></tr>\n" for k, v in values.items())
        self.parts.append(f'<div class="scroll"><table class="settings">{body}</table></div>')
        return self

    def picture(self, picture: Picture, caption: str = "") -> Page:
        """A PIL image, a matplotlib figure or a PNG file, put into the page itself."""
        self.parts.append(_figure(picture, caption))
        return self

    def pictures(
        self, pictures: Mapping[str, Picture] | Sequence[tuple[Picture, str]], shown: int | None = None
    ) -> Page:
        """Pictures beside each other, by caption or as pairs with it; those after the first `shown` unfold."""
        pairs = [(p, caption) for caption, p in pictures.items()] if isinstance(pictures, Mapping) else list(pictures)
        open_ones, others = (pairs, []) if shown is None else (pairs[:shown], pairs[shown:])
        self.parts.append(_row(open_ones))
        if others:
            self.parts.append(f"<details><summary>{len(others)} more</summary>\n{_row(others)}</details>")
        return self

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


def _row(pictures: Sequence[tuple[Picture, str]]) -> str:
    return '<div class="row">' + "".join(_figure(picture, caption) for picture, caption in pictures) + "</div>"


def _figure(picture: Picture, caption: str) -> str:
    data, kind = io.BytesIO(), "png"
    if isinstance(picture, Figure):
        picture.savefig(data, format="png")
    elif isinstance(picture, Image.Image):
        if picture.width * picture.height > LARGE and picture.getcolors(COLOURS) is None:
            picture.convert("RGB").save(data, format="jpeg", quality=88)
            kind = "jpeg"
        else:
            picture.save(data, format="png")
    else:
        data.write(Path(picture).read_bytes())
    encoded = base64.b64encode(data.getvalue()).decode()
    note = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    return f'<figure><img alt="{escape(caption)}" src="data:image/{kind};base64,{encoded}">{note}</figure>\n'


def _classes(*names: str) -> str:
    given = " ".join(name for name in names if name)
    return f' class="{given}"' if given else ""


def _is_words(value: Any) -> bool:
    """Whether a cell is read, and not compared by its digits."""
    return isinstance(value, str) and not isinstance(value, Raw) and not value[:1].isdigit() and len(value) > 12
