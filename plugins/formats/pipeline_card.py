"""README.md of an exported pipeline: the lines that draw an image with it."""

from __future__ import annotations

from typing import Any

from flowanchor.plugins.samplers.consistency import ConsistencySampler
from flowanchor.plugins.samplers.jump_flow import JumpFlowSampler

_TEXT = """\
---
library_name: diffusers
---
# A few-step Wan

Distilled by flowanchor. `scheduler/{scheduler}.py` draws as the run did ({told}): read it, then trust
it.

```python
import torch
from diffusers import WanPipeline

pipe = WanPipeline.from_pretrained("path/of/this/folder", torch_dtype=torch.bfloat16, trust_remote_code=True)
steps = dict(num_inference_steps={steps}, guidance_scale={scale:g}, max_sequence_length={text_len})
frames = pipe("a red fox in the snow", height=1024, width=1024, num_frames=1, output_type="pil", **steps).frames[0]
frames[0].save("fox.png")
```
{guided}
For images that depend on a seed alone, whatever the batch, start from the scheduler's own noise:
`latents = pipe.scheduler.initial_latents((batch, {channels}, frames, height, width), seed=0)`, in sizes of latents, and
`pipe(..., latents=latents)`. A `generator=` alone decides the first noise, not that between the steps.
"""

_UNGUIDED = "\nGuidance is part of the weights: leave `guidance_scale=1`, one call of the network per step.\n"
_GUIDED = "\nThe network is guided as it samples, for t in [{low:g}, {high:g}] in training and here at every step.\n"


def pipeline_card(network: Any, sampler: ConsistencySampler | JumpFlowSampler, scheduler: str) -> str:
    """The text, for a Wan and the sampler of its run."""
    guidance = sampler.guidance
    return _TEXT.format(
        scheduler=scheduler,
        told=sampler.told(),
        steps=sampler.nfe,
        scale=guidance.scale,
        text_len=network.text_len,
        channels=network.sample_shape[0],
        guided=_UNGUIDED if guidance.scale == 1 else _GUIDED.format(low=guidance.low, high=guidance.high),
    )
