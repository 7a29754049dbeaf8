"""Writing the layout of FACM's authors: a `.pt` file whose `ema` (and `model`) are state dicts of LightningDiT.

Their evaluation reads `ema` where a file has no `emas`; their training starts a student from `ema`, and takes the
teacher from there, where a file has no `step`. Both ask `load_state_dict` with `strict=False`, which would not notice
missing names, so the names are checked here.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from flowanchor.base.files import replacing, save_torch
from flowanchor.checkpoints.foreign import EXPORT
from flowanchor.checkpoints.importing import describe_misfit
from flowanchor.checkpoints.infer import compare
from flowanchor.errors import CheckpointError


def write_authors(
    path: Path, weights: Mapping[str, Tensor], meta: Mapping[str, Any], ema: str, raw: Mapping[str, Tensor] | None
) -> None:
    """Write `weights` as `ema` and the raw ones, where they are known, as `model`.

    A further entry of plain values keeps what their layout has no place for (kind, step, configuration), so that
    reading the file back loses nothing. Raises `CheckpointError` for a network that theirs is not.
    """
    backbone = meta["config"]["backbone"]
    if ".lightningdit." not in str(backbone.get("_target_")):
        raise CheckpointError(
            f"The authors' code knows LightningDiT alone, and this is a {backbone.get('_target_')}: "
            "use format=flowanchor or format=huggingface."
        )
    fit = compare(weights, backbone, path)
    if not fit.complete:
        raise CheckpointError(f"The weights {ema} cannot be exported: their set {describe_misfit(fit)}.")
    content: dict[str, Any] = {"ema": _whole(weights)}
    if raw is not None and ema != "none":
        content["model"] = _whole(raw)
    content[EXPORT] = {"kind": meta["kind"], "step": int(meta["step"]), "ema": ema, "config": meta["config"]}
    with replacing(path) as draft:
        save_torch(draft, content)


def _whole(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: weights[name].detach().clone() for name in weights}  # clone: no larger storage behind a view
