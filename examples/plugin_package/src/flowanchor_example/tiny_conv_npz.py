"""Weights of TinyConv in one `.npz` file, as a project without PyTorch would release them."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from flowanchor.base.files import write_whole
from flowanchor.checkpoints.consolidated import FORMAT
from flowanchor.checkpoints.format import Choices, DescribedWeights, Format
from flowanchor.checkpoints.summary import count
from flowanchor.errors import CheckpointError

INTERVAL = "flowanchor.plugins.objectives.intervals.plain.PlainInterval"


class TinyConvNpz(Format):
    """Arrays under the names of the network, and `size`, which no weight tells; every file holds a flow model."""

    name = "tiny_conv_npz"
    suffix = ".npz"
    in_place = True

    def recognises(self, path: Path) -> bool:
        if path.suffix != self.suffix or not zipfile.is_zipfile(path):
            return False
        return "stem.weight.npy" in zipfile.ZipFile(path).namelist()

    def read(self, path: Path, choices: Choices) -> DescribedWeights:
        with np.load(path) as file:  # without pickles
            weights = {name: torch.from_numpy(file[name]) for name in file.files}
        size, (width, channels, _, _) = weights.pop("size"), weights["stem.weight"].shape
        classes = weights["classes.weight"].shape[0] - 1 if "classes.weight" in weights else 0
        backbone = {
            "_target_": "flowanchor_example.tiny_conv.TinyConv", "channels": channels, "size": int(size),
            "num_classes": classes, "width": width, "depth": sum(name.endswith(".film.weight") for name in weights),
        }  # fmt: skip
        config = {"backbone": backbone, "objective": {"interval": {"_target_": INTERVAL}}}
        return DescribedWeights(path, weights, {"format": FORMAT, "kind": "flow", "step": 0, "config": config})

    def write(self, given: DescribedWeights, output: Path) -> str:
        backbone: dict[str, Any] = given.meta["config"]["backbone"]
        if not str(backbone["_target_"]).endswith(".TinyConv") or given.meta["kind"] != "flow":
            raise CheckpointError(f"{given.file} holds no flow model of TinyConv: use format=flowanchor.")
        arrays = {name: given.weights[name].detach().float().numpy() for name in given.weights}
        write_whole(output, {**arrays, "size": np.array(backbone["size"])})
        return count(given.weights)
