"""A text in Hydra's quotes, in which commas, colons and brackets are letters."""

from __future__ import annotations

import re


def in_quotes(value: str) -> str:
    """`'value'`: in Hydra's quotes a backslash escapes a quote, and backslashes before one."""
    inside = re.sub(r"(\\*)'", lambda found: f"{2 * found[1]}\\'", value)
    inside = re.sub(r"(\\+)$", lambda found: 2 * found[1], inside)
    return f"'{inside}'"
