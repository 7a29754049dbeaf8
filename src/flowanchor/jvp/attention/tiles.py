"""In which tiles the Triton kernel computes: by head size, element type and card.

The tiles for heads of 64, 72 and 128 channels on Hopper are the fastest of those that were timed there, in bfloat16, at
1,024 and 8,192 tokens. All others are chosen by what the compiler reports: no spilled registers in half precision, and
the shared memory of the card. `jvp.attention.autotune=true` measures instead (`tuning`).
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch

CACHE = "~/.cache/flowanchor"
SMALL, LARGE = 99 << 10, 227 << 10  # bytes of shared memory that one program may have: sm_86, sm_89, sm_120; sm_90


class Tile(NamedTuple):
    """What one program computes at a time, and with what."""

    queries: int
    keys: int
    warps: int
    stages: int  # tiles of keys and values in flight


class Card(NamedTuple):
    """What a tile depends on."""

    name: str
    capability: tuple[int, int]
    shared: int  # bytes of shared memory that one program may have

    @classmethod
    def of(cls, device: torch.device) -> Card:
        """That of a device; Hopper's for one that is no GPU (Triton's interpreter)."""
        return _card(device) if device.type == "cuda" else cls("interpreter", (9, 0), LARGE)

    @property
    def hopper(self) -> bool:
        """Whether tensor cores read shared memory by themselves, which leaves registers for larger tiles."""
        return self.capability[0] == 9 and self.shared >= LARGE


# Largest head size -> on Hopper, elsewhere (no more than SMALL).
HALF = {
    64: (Tile(128, 64, 8, 3), Tile(64, 32, 4, 2)),
    80: (Tile(128, 64, 8, 3), Tile(128, 32, 8, 2)),
    96: (Tile(128, 64, 8, 3), Tile(32, 32, 4, 2)),
    127: (Tile(128, 32, 8, 3), Tile(32, 32, 4, 2)),
    128: (Tile(128, 64, 8, 2), Tile(64, 32, 8, 2)),
    160: (Tile(64, 16, 4, 2), Tile(16, 32, 8, 2)),
    256: (Tile(32, 32, 8, 2), Tile(32, 32, 8, 2)),
}
IEEE = {
    128: (Tile(32, 16, 8, 1), Tile(32, 16, 8, 1)),
    256: (Tile(16, 16, 8, 1), Tile(16, 16, 8, 1)),
}
TF32 = {
    128: (Tile(64, 16, 4, 2), Tile(32, 16, 8, 1)),
    256: (Tile(16, 16, 8, 1), Tile(16, 16, 8, 1)),
}
# What `tuning` tries beside the table's choice.
OTHERS = (
    Tile(64, 32, 4, 2), Tile(64, 32, 4, 3), Tile(64, 64, 4, 2), Tile(64, 64, 4, 3), Tile(64, 32, 8, 2),
    Tile(128, 32, 8, 2), Tile(128, 32, 8, 3), Tile(128, 64, 8, 2), Tile(128, 64, 8, 3), Tile(128, 128, 8, 2),
)  # fmt: skip


def choose(d: int, dtype: torch.dtype, card: Card, precision: str = "ieee") -> Tile:
    """The table's tile for heads of d channels; `precision` is that of float32."""
    table = HALF if dtype != torch.float32 else IEEE if precision == "ieee" else TF32
    hopper, elsewhere = next(tiles for largest, tiles in table.items() if d <= largest)
    return hopper if card.hopper else elsewhere


def candidates(d: int, dtype: torch.dtype, card: Card, precision: str = "ieee") -> list[Tile]:
    """The tiles worth timing, the table's first; those that do not fit are refused when they are launched."""
    return list(dict.fromkeys([choose(d, dtype, card, precision), *OTHERS]))


@cache
def _card(device: torch.device) -> Card:
    found = torch.cuda.get_device_properties(device)
    shared = getattr(found, "shared_memory_per_block_optin", SMALL)
    return Card(found.name, (found.major, found.minor), shared)
