"""A colour font of the test's own, for `data=emoji`: each character is a rectangle of one colour on a square."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from fontTools.colorLib.builder import buildCOLR, buildCPAL
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen

EM = 1000


def write_font(path: Path, colours: Mapping[int, tuple[int, int, int]], layered: bool = True) -> Path:
    """A TrueType font in which each character fills its square with its colour; with `layered=False` in black.

    At size 109, where pictures of 136 x 128 are drawn, the square reaches from their corner to pixel 109.
    """
    order = [".notdef", *(f"u{code:X}" for code in colours)]
    layers = [f"u{code:X}.layer" for code in colours]
    square = TTGlyphPen(None)
    square.moveTo((0, 0))
    for corner in ((0, EM), (EM, EM), (EM, 0)):
        square.lineTo(corner)
    square.closePath()
    drawn, empty = square.glyph(), TTGlyphPen(None).glyph()
    font = FontBuilder(EM, isTTF=True)
    font.setupGlyphOrder(order + layers)
    font.setupCharacterMap({code: f"u{code:X}" for code in colours})
    font.setupGlyf({name: empty if name == ".notdef" else drawn for name in order + layers})
    font.setupHorizontalMetrics({name: (EM, 0) for name in order + layers})
    font.setupHorizontalHeader(ascent=EM, descent=0)
    font.setupNameTable({"familyName": "Squares", "styleName": "Regular"})
    font.setupOS2(sTypoAscender=EM, sTypoDescender=0, usWinAscent=EM, usWinDescent=0)
    font.setupPost()
    if layered:
        palette = [tuple(level / 255 for level in colour) + (1.0,) for colour in colours.values()]
        font.font["CPAL"] = buildCPAL([palette])
        font.font["COLR"] = buildCOLR({f"u{code:X}": [(f"u{code:X}.layer", i)] for i, code in enumerate(colours)})
    font.save(path)
    return path
