"""What an evaluation measures: numbers of network evaluations."""

from __future__ import annotations

from typing import Any

from flowanchor.errors import ConfigError


def parse_nfe(value: Any) -> list[int | None]:
    """`1`, `"1,2"` or `[1, 2]` as a list; None (the sampler's own number of steps) as `[None]`."""
    if value is None:
        return [None]
    if isinstance(value, str):
        value = value.split(",")
    entries = [value] if isinstance(value, (int, float)) else list(value)
    numbers: list[int | None] = []
    for entry in entries:
        try:
            number = int(str(entry))
        except ValueError:
            number = 0
        if number < 1:
            raise ConfigError(
                f"nfe asks for '{str(entry).strip()}' network evaluations, which is not a whole number from 1: "
                "use for example nfe=[1,2,4]."
            )
        if number not in numbers:
            numbers.append(number)
    if not numbers:
        raise ConfigError("nfe=[] asks for nothing: use for example nfe=[1,2,4].")
    return numbers
