"""Released checkpoints of FACM, LightningDiT, SiT and DiT: what such a file is, and the sets of weights in it.

| file | content |
|---|---|
| FACM stage 2 | `model`, `emas` (the state of `ema_pytorch.PostHocEMA`), `opt`, `args`, `epoch`, `step` |
| FACM stage 2, extracted | `ema`, `_extracted_from` |
| FACM stage 1, LightningDiT | `model`, `ema`, `opt`, `config` |
| SiT, DiT | `model`, `ema`, `opt`, `args`, or the state dict alone |
| one average of PostHocEMA | `ema_model.*`, `initted`, `step` |
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from flowanchor.base.trusted import brief
from flowanchor.checkpoints.inert import plain, read_inert
from flowanchor.errors import CheckpointError, FlowAnchorError
from flowanchor.weights import checked_weights

EXPORT = "flowanchor_export"  # what our own export adds beside the authors' entries

# What wrappers put in front of every name: DistributedDataParallel, torch.compile, ema_pytorch.
_WRAPPERS = ("module.", "_orig_mod.", "ema_model.")
_RELEASED_WIDTHS = (0.05, 0.2)  # sigma_rel of the two averages of FACM's stage 2; the second is evaluated


@dataclass(frozen=True)
class ForeignFile:
    """What a released file holds."""

    path: Path
    kind: str  # in words
    profiles: dict[str, dict[str, Tensor]]  # "none": the raw weights; names of averages as in our checkpoints
    default: str  # the profile that its own release evaluates
    objective: str | None  # "flow" or "shortcut" where the file tells
    step: int
    others: tuple[str, ...] = ()  # entries that are no weights
    ignored: tuple[str, ...] = ()  # names within the weights' entries that belong to no profile
    export: Mapping[str, Any] | None = None  # what an export of ours says about itself
    settings: Mapping[str, Any] = field(default_factory=dict)  # its `args` or `config`, as plain values

    def weights(self, ema: str | None = None) -> tuple[str, dict[str, Tensor]]:
        """The weights that a name stands for (None: those that the release evaluates), and that name."""
        chosen = self.default if ema is None else str(ema)
        if chosen not in self.profiles:
            raise CheckpointError(
                f"{self.path} holds no weights '{chosen}': choose ema_profile among {', '.join(self.profiles)}."
            )
        weights = checked_weights(self.profiles[chosen], self.path)
        return chosen, dict(weights)


def read_foreign(path: str | Path) -> ForeignFile:
    """Open a released file; raises `CheckpointError` for one that is damaged, unsafe, or holds no weights."""
    path = Path(path).expanduser()
    if not path.is_file():
        raise CheckpointError(f"There is no file {path}: give a released .pt, .pth, .ckpt or .safetensors file.")
    content = read_inert(path)
    try:
        return _understood(path, content)
    except FlowAnchorError:
        raise
    except Exception as error:  # entries of other types than releases have
        raise CheckpointError(
            f"{path} holds no weights that are known here ({brief(error)}): give a released checkpoint."
        ) from error


def _understood(path: Path, content: Any) -> ForeignFile:
    if isinstance(content, dict):
        content = dict(dict.items(content))  # an ordered dictionary out of a file may say anything about itself
    else:
        raise CheckpointError(f"{path} holds a {type(content).__name__} and no weights: give a released checkpoint.")
    if _is_state_dict(content):
        return _bare(path, content)
    for outer in ("state_dict", "model_state_dict"):
        if isinstance(content.get(outer), Mapping) and _is_state_dict(content[outer]):
            content = {**content, "model": content[outer]}
            del content[outer]
    return _training(path, content)


def _bare(path: Path, content: Mapping[str, Tensor]) -> ForeignFile:
    average = any(key.startswith("ema_model.") for key in content)
    weights = _unwrapped({key: value for key, value in content.items() if key not in ("initted", "step")})
    if not average:
        return ForeignFile(path, "a state dict", {"none": weights}, "none", None, 0)
    step = int(content["step"]) if "step" in content else 0
    return ForeignFile(path, "one average of PostHocEMA", {"ema": weights}, "ema", None, step)


def _training(path: Path, content: Mapping[str, Any]) -> ForeignFile:
    settings = plain(content.get("args", content.get("config")))
    settings = settings if isinstance(settings, dict) else {}
    profiles: dict[str, dict[str, Tensor]] = {}
    ignored: list[str] = []
    if isinstance(content.get("emas"), Mapping):
        width = settings.get("sigma_rel")  # of the second average; the first is always the same
        width = float(width) if isinstance(width, (int, float)) else _RELEASED_WIDTHS[1]
        profiles, ignored = _post_hoc(content["emas"], (_RELEASED_WIDTHS[0], width))
    origin = str(content.get("_extracted_from", ""))
    if _is_state_dict(content.get("ema")):
        # The authors' tool extracts the second average, 0.2 in every release.
        extracted = f"power_{_RELEASED_WIDTHS[0 if 'ema_models.0' in origin else 1]:g}"
        profiles[extracted if origin.startswith("PostHocEMA") else "ema"] = _unwrapped(content["ema"])
    if _is_state_dict(content.get("model")):
        profiles["none"] = _unwrapped(content["model"])
    if not profiles:
        shown = ", ".join(map(str, list(content)[:5])) or "nothing"
        raise CheckpointError(
            f"{path} holds no weights that are known here (it has {shown}): give a file with 'model', 'ema' or 'emas', "
            "or a bare state dict."
        )
    export = plain(content[EXPORT]) if isinstance(content.get(EXPORT), Mapping) else None
    shortcut = "emas" in content or origin.startswith("PostHocEMA")
    if export is not None:
        kind, objective = "an export of flowanchor in the authors' layout", str(export.get("kind"))
        profiles = {str(export.get("ema")) if name == "ema" else name: found for name, found in profiles.items()}
    elif shortcut:
        kind, objective = "FACM stage 2", "shortcut"
    else:
        kind, objective = "a training checkpoint (FACM stage 1, LightningDiT, SiT or DiT)", None
    return ForeignFile(
        path,
        kind,
        profiles,
        _default(profiles, None if export is None else str(export.get("ema"))),
        objective,
        _step(content, export),
        tuple(str(key) for key in content if key not in ("model", "ema", "emas")),
        tuple(ignored),
        export,
        settings,
    )


def _post_hoc(emas: Mapping[str, Any], widths: tuple[float, ...]) -> tuple[dict[str, dict[str, Tensor]], list[str]]:
    """The averages in the state of a PostHocEMA, by profile; and names that belong to none."""
    found: dict[int, dict[str, Tensor]] = {}
    ignored = []
    nested = emas.get("ema_models")
    if isinstance(nested, (list, tuple)):
        emas = {f"ema_models.{i}.{key}": value for i, state in enumerate(nested) for key, value in state.items()}
    for key, value in emas.items():
        match = re.fullmatch(r"(?:module\.)?ema_models\.(\d+)\.(?:module\.)?ema_model\.(.+)", key)
        if match is not None and isinstance(value, Tensor):
            found.setdefault(int(match[1]), {})[match[2]] = value
        elif not re.search(r"\.(initted|step)$", key):
            ignored.append(key)
    names = [f"power_{width:g}" for width in widths]
    return {
        names[index] if index < len(names) else f"emas_{index}": _unwrapped(found[index]) for index in sorted(found)
    }, ignored


def _default(profiles: Mapping[str, Any], exported: str | None) -> str:
    averages = [name for name in reversed(list(profiles)) if name.startswith("power_")]
    wanted = [*([] if exported is None else [exported]), *averages, "ema", "none"]
    return next((name for name in wanted if name in profiles), next(iter(profiles)))


def _step(content: Mapping[str, Any], export: Mapping[str, Any] | None) -> int:
    found: Any = (export or {}).get("step", content.get("step", content.get("train_steps")))
    if found is None and isinstance(content.get("emas"), Mapping):
        found = content["emas"].get("ema_models.0.step")
    return int(found) if isinstance(found, (int, float, Tensor)) else 0


def _is_state_dict(value: Any) -> bool:
    found = dict.items(value) if isinstance(value, dict) else ()
    return len(found) > 0 and all(isinstance(name, str) and isinstance(one, Tensor) for name, one in found)


def _unwrapped(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The entries without the prefixes that all of them share with a wrapper."""
    while wrapper := next((w for w in _WRAPPERS if state and all(key.startswith(w) for key in state)), None):
        state = {key.removeprefix(wrapper): value for key, value in state.items()}
    return dict(state)
