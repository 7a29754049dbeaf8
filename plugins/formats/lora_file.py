"""A few-step LoRA as one safetensors file that stock diffusers and ComfyUI read, with its scheduler and a card.

The scale alpha / rank is multiplied into B: readers differ in where they look for it, and some look nowhere.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

from safetensors import SafetensorError, safe_open
from torch import Tensor

from flowanchor.base.dtypes import DTYPES
from flowanchor.base.files import flush, remove, replace, unfinished
from flowanchor.base.trusted import build
from flowanchor.checkpoints.description import described_network
from flowanchor.checkpoints.format import DescribedWeights, Format
from flowanchor.checkpoints.outline import outline
from flowanchor.errors import CheckpointError, ConfigError
from flowanchor.interfaces import Backbone, Interval

WEIGHTS = "pytorch_lora_weights.safetensors"  # the name that diffusers looks for in a folder
MARK = "flowanchor_lora"  # the entry of the metadata that is ours; readers skip it
CARD = "README.md"


class LoraFile(Format):
    """The adapters of a student in a folder: one file for `load_lora_weights`, `scheduler/`, a card.

    Args:
        dtype: name of the type in which the adapters are written; None: as they are.
        steps: of the scheduler that is written; None: those of the run.
        base_model: the name of the model that they adapt, for card and metadata; None: none is named.
        licence: of the LoRA, which the base's licence may bind; None: "that of the base".

    Nothing is written that stock diffusers would load as nothing, or with another scale: its own loader is asked first.
    """

    name = "lora"
    suffix = ""
    casts = False

    def __init__(
        self,
        dtype: str | None = None,
        steps: int | None = None,
        base_model: str | None = None,
        licence: str | None = None,
    ) -> None:
        self.dtype, self.steps, self.base_model, self.licence = dtype, steps, base_model, licence

    def recognises(self, path: Path) -> bool:
        return False

    def replaces(self, output: Path) -> bool:
        try:
            with safe_open(output / WEIGHTS, framework="pt") as file:
                return MARK in (file.metadata() or {})
        except (SafetensorError, OSError):
            return False

    def write(self, given: DescribedWeights, output: Path) -> str:
        """Raises `CheckpointError` for weights that are no adapters, and for a network whose few steps no stock
        pipeline would repeat with them."""
        from flowanchor.plugins.formats.lora_pipeline import Exported, checked_by_stock, grid_of  # diffusers is slow

        network, interval = described_network(given.meta["config"], given.file)
        backbone = outline(network, given.file, given.weights)
        exported = Exported.of(backbone, given.file)
        tensors = self._tensors(given, exported, network["lora"])
        _check(given, backbone, cast(Interval, build(interval, "objective.interval", given.file)))
        grid = grid_of(given, exported, self.steps)
        checked_by_stock(tensors, exported, given.file)
        about = {
            "base_model": self.base_model,
            "pipeline": exported.pipeline.name, "rank": network["lora"]["rank"], "guidance": exported.asked,
            "licence": self.licence or "that of the base", "ema": given.ema, "step": given.meta["step"],
            "base_lora": Path(str(given.meta["config"].get("base_lora") or "")).name or None,
            "base_lora_scale": given.meta["config"].get("base_lora_scale", 1.0),
            **({} if grid is None else grid.told()),
        }  # fmt: skip
        partial = unfinished(output)
        remove(partial)
        partial.mkdir(parents=True)
        from safetensors.torch import save_file

        save_file(tensors, partial / WEIGHTS, {"format": "pt", MARK: json.dumps(about)})
        if grid is not None:
            grid.scheduler().save_pretrained(partial / "scheduler")
        (partial / CARD).write_text(exported.card(about, grid, WEIGHTS), encoding="utf-8")
        flush(partial)
        replace(partial, output)
        return f"{len(tensors) // 2} layers of rank {network['lora']['rank']}"

    def _tensors(self, given: DescribedWeights, exported: Any, lora: dict[str, Any]) -> dict[str, Tensor]:
        """By their names in the file, on the CPU; the scale is in B."""
        from flowanchor.plugins.backbones.lora import ADAPTER

        factor = (lora.get("alpha") or lora["rank"]) / lora["rank"]
        found: dict[str, Tensor] = {}
        ends = (f".lora_A.{ADAPTER}.weight", f".lora_B.{ADAPTER}.weight")
        for name in given.weights:
            end = next((end for end in ends if name.endswith(end)), None)
            if end is None:
                continue
            layer = name.removesuffix(end)
            theirs = exported.pipeline.exported(layer)
            if theirs is None:
                raise CheckpointError(
                    f"{given.file} has an adapter beside {layer}, for which LoRA files of {exported.stock} have no "
                    "name: train with other backbone.lora.targets, or write the whole network by format=diffusers."
                )
            value = given.weights[name].detach().cpu()
            value = value.float() * factor if end == ends[1] else value
            value = value.to(given.weights[name].dtype if self.dtype is None else DTYPES[self.dtype])
            found[f"{theirs}{'.lora_A.weight' if end == ends[0] else '.lora_B.weight'}"] = value.contiguous()
        return found

    def check(self) -> None:
        if self.steps is not None and (not isinstance(self.steps, int) or self.steps < 1):
            raise ConfigError(f"steps={self.steps} is no number of steps: use for example steps=4.")


def _check(given: DescribedWeights, backbone: Backbone, interval: Interval) -> None:
    if backbone.takes_end_time:
        raise CheckpointError(
            f"{given.file} is told where a jump ends (backbone.end_time={backbone.end_time}), which no LoRA file can "
            "teach a stock network: train with objective/interval=expanded, or write the whole network."
        )
    if interval.needs_end_time:
        raise CheckpointError(f"{given.file}: {type(interval).__name__} needs an end time, and the network takes none.")
