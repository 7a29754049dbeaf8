"""A Wan that is told the end through a gate, as the network and scheduler of stock `diffusers.AnyFlowPipeline`.

Facts of diffusers 0.42: the network is Wan's with a second time embedder, `delta_embedder`, mixed in by a gate that is
a setting; its scheduler steps from one noise level to the next and tells the network both.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch
from diffusers import AnyFlowTransformer3DModel, FlowMapEulerDiscreteScheduler

from flowanchor.errors import CheckpointError
from flowanchor.plugins.backbones.lora import merged
from flowanchor.plugins.backbones.wan import Wan
from flowanchor.plugins.formats.wan_weights import OURS, THEIRS
from flowanchor.plugins.samplers.meanflow import MeanFlowSampler

NETWORK = ["diffusers", "AnyFlowTransformer3DModel"]
SCHEDULER = ["diffusers", "FlowMapEulerDiscreteScheduler"]

_CARD = """\
---
library_name: diffusers
---
# A few-step Wan

Distilled by flowanchor; every part is a stock one of diffusers.

```python
import torch
from diffusers import AnyFlowPipeline

pipe = AnyFlowPipeline.from_pretrained("path/of/this/folder", torch_dtype=torch.bfloat16)
steps = dict({steps}, guidance_scale={scale:g}, max_sequence_length={text_len})
frames = pipe("a red fox in the snow", height=1024, width=1024, num_frames=1, output_type="pil", **steps).frames[0]
frames[0].save("fox.png")
```
"""


def anyflow_transformer(network: Wan, file: object) -> Any:
    """A stock network that shares the weights (adapters are added to them).

    Raises `CheckpointError` for a shape that the stock one cannot have.
    """
    settings: dict[str, Any] = dict(network.settings)
    depth, height, width = network.patch_size
    if settings.pop("qk_norm") != "rms_norm_across_heads" or depth != 1 or height != width:
        raise CheckpointError(
            f"{file} has backbone.qk_norm={network.settings['qk_norm']} and patches of {depth} x {height} x {width}, "
            "and an AnyFlowPipeline knows rms_norm_across_heads and square patches of one frame only: use "
            "format=huggingface."
        )
    with torch.device("meta"):
        stock: Any = AnyFlowTransformer3DModel(**settings, gate_value=network.told_end.gate, deltatime_type="r")
    stock.condition_embedder.delta_emb_gate = torch.tensor([network.told_end.gate])  # no weight of it
    state = {name.replace(OURS, THEIRS, 1): tensor for name, tensor in merged(network).items()}
    stock.load_state_dict(state, assign=True)
    return stock.eval()


def write_scheduler(folder: Path, sampler: MeanFlowSampler) -> None:
    """Its shift, along falling noise levels, is one over ours."""
    scheduler: Any = FlowMapEulerDiscreteScheduler(shift=shift_of(sampler))
    scheduler.save_pretrained(folder)


def shift_of(sampler: MeanFlowSampler) -> float:
    """The shift of a uniform grid of noise levels."""
    return 1 / sampler.timestep_shift if sampler.grid is None and sampler.timestep_shift else 1.0


def anyflow_card(network: Wan, sampler: MeanFlowSampler) -> str:
    """README.md of the folder."""
    steps = f"num_inference_steps={sampler.nfe}"
    if sampler.grid is not None:
        steps = f"sigmas={[1 - float(t) for t in sampler.grid]}"
    scale = cast(float, sampler.guidance.scale)
    return _CARD.format(steps=steps, scale=scale, text_len=network.text_len)
