"""Which scores may stand in one column: those measured in the same way."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import Any


@dataclass(frozen=True, order=True)
class Kind:
    """How a score was measured, but for the number of network evaluations; None: the record does not say."""

    metric: str | None
    reference: str | None
    n: int | None
    sampler: str | None
    ema: str | None
    checkpoint: str | None  # best or last
    protocol: str | None
    prompts: str | None
    dtype: str | None
    size: str | None

    @staticmethod
    def of(line: Mapping[str, Any], settings: Mapping[str, Any]) -> Kind:
        """Of a line of `metrics.json` and what its lines share."""
        reference, prompts = settings.get("reference") or {}, settings.get("prompts") or {}
        checkpoint = settings.get("checkpoint")
        return Kind(
            metric=settings.get("metric"),
            reference=" ".join(str(reference[key]) for key in ("name", "hash") if reference.get(key)) or None,
            n=settings.get("num_samples"),
            sampler=line.get("sampler"),
            ema=line.get("ema", settings.get("ema")),
            checkpoint=Path(checkpoint).name if checkpoint else None,
            protocol=settings.get("protocol"),
            prompts=prompts.get("hash"),
            dtype=settings.get("dtype"),
            size=settings.get("size"),
        )


def names(kinds: Iterable[Kind]) -> dict[Kind, str]:
    """What tells each kind from the others: its metric, and every setting that is not the same in all of them."""
    found = sorted(set(kinds), key=lambda kind: [str(value) for value in astuple(kind)])
    differing = [f.name for f in fields(Kind) if len({getattr(kind, f.name) for kind in found}) > 1]
    labels = {}
    for kind in found:
        parts = [_part(name, getattr(kind, name)) for name in differing if name != "metric"]
        labels[kind] = ", ".join([kind.metric or "FD", *parts])
    return labels


def _part(name: str, value: Any) -> str:
    if value is None:
        return f"{name} unknown"
    if name in ("n", "protocol", "prompts", "dtype", "size", "reference"):
        return f"{name}={value}"
    return f"EMA {value}" if name == "ema" else str(value)
