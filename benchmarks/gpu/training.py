"""Whole training steps, by `train.py` itself: settings in, what the clock in its trainer found out."""

from __future__ import annotations

import gc
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from flowanchor.plugins.backbones.lightningdit import LightningDiT
from flowanchor.text.base import Tokens
from gpu.record import Row

CONF = Path(__file__).with_name("conf")
# Forward passes that a step's products amount to; a backward pass is two. FACM: a teacher asked twice, the anchor, the
# shortcut with its tangent (2), two backward passes (4); and what is computed again. Flow matching: 1 + 2.
FORWARDS = {"chain": 11, "chain, kept": 9, "two_pass": 11, "full": 9, "flow": 3}

NO_GRAPH, AS_A_GRAPH = "++cuda_graph=false", "cuda_graph=true"
EAGER = ("compile=false", NO_GRAPH)
COMPILED = ("compile=true", NO_GRAPH)
GRAPH = ("compile=true", AS_A_GRAPH)
KEPT_GRAPH = ("jvp.recompute=false", *GRAPH)
EAGER_GRAPH = ("compile=false", AS_A_GRAPH)
# What a CPU has instead.
ON_A_CPU = {AS_A_GRAPH: NO_GRAPH, "compile=true": "compile={backend:eager}"}
FULL = ("jvp=full", "jvp/attention=math")
TWO_PASS = ("jvp=two_pass", "jvp.checkpoint=true")
FLOW = ("objective=flow_matching", "teacher=none")

QUIET = (
    "~callbacks.last", "~callbacks.best", "~callbacks.sample_grid", "ema.snapshot_every=null", "logger=none",
    "trainer.limit_val_batches=0", "trainer.max_steps=1000000", "debug=true", "optimizer.lr=1e-6",
)  # fmt: skip
CLOCK = "+callbacks.clock._target_=gpu.clock.Clock"


def digits(tiny: bool, *settings: str) -> dict[str, Any]:
    """The digits demo's student, FACM from scratch."""
    small = ("backbone.depth=1", "data.batch_size=16") if tiny else ()
    return train("digits", settings, small, tiny)


def latents(tiny: bool, batch: int, *settings: str) -> dict[str, Any]:
    """LightningDiT-XL/1 on 256 tokens of 32 channels, a guided teacher of its size."""
    network = ["backbone=lightningdit", "backbone._target_=gpu.made_up.lightningdit", "backbone.preset=XL/1"]
    network += ["backbone.disable_label_dropout=true", "data=made_up", "teacher=made_up", f"data.batch_size={batch}"]
    small: list[str] = []
    if tiny:
        small = ["backbone.preset=nano", "backbone.depth=1", "backbone.hidden_size=32", "backbone.num_heads=2"]
        small += ["data.size=4", "data.channels=4", "data.num_classes=10", "data.samples=16", "data.batch_size=2"]
    return train("latents", (*network, *settings), small, tiny)


def wan(tiny: bool, batch: int, frames: int, *settings: str) -> dict[str, Any]:
    """Wan 2.1 1.3B at 480 x 832, 512 tokens of text, a guided teacher of its size; one image, or 4 (frames - 1) + 1."""
    network = ["backbone=wan", "backbone._target_=gpu.made_up.wan", "backbone.preset=1.3B", "data=made_up"]
    network += ["teacher=made_up", "teacher.guidance_scale=5.0", "teacher.guidance_low=0.0", "data.num_classes=0"]
    network += ["data.channels=16", f"data.frames={frames}", "data.height=60", "data.width=104", "data.text_len=512"]
    network += ["objective/time=shifted", "backbone.tangent_smoothing=0.01", f"data.samples={2 * batch}"]
    network += [f"data.batch_size={batch}", "ema.sigma_rel=[0.1]", "data.repeat=64"]
    small: list[str] = []
    if tiny:
        small = ["backbone.preset=nano", "backbone.num_layers=1", "backbone.num_attention_heads=2"]
        small += ["backbone.ffn_dim=48", "backbone.freq_dim=32", "backbone.text_len=8", "data.text_len=8"]
        small += ["data.text_dim=12", "data.height=4", "data.width=4", f"data.frames={min(frames, 2)}"]
        small += ["data.channels=4", "data.samples=2", "data.batch_size=1"]
    return train("wan", (*network, *settings), small, tiny)


def train(what: str, settings: Sequence[str], small: Sequence[str], tiny: bool) -> dict[str, Any]:
    """One run of the training program in this process; `small`: settings of a trial, which win."""
    from hydra.core.global_hydra import GlobalHydra

    from flowanchor.programs.train import main
    from gpu.clock import Clock

    folder = tempfile.mkdtemp(prefix=f"flowanchor_{what}_")
    overrides = [f"hydra.searchpath=[file://{CONF}]", f"hydra.run.dir={folder}", "trainer.precision=bf16-mixed"]
    overrides += [*settings, *QUIET, CLOCK, *small]
    if tiny:
        overrides += ["+callbacks.clock.warm=1", "+callbacks.clock.steps=1", "+callbacks.clock.alone=1", "threads=1"]
        overrides += ["data.pin_memory=false"]
    elif what == "wan":
        overrides += ["+callbacks.clock.warm=3", "+callbacks.clock.steps=3", "+callbacks.clock.alone=1"]
    if not torch.cuda.is_available():
        overrides = [ON_A_CPU.get(override, override) for override in overrides]
        overrides.append("trainer.accelerator=cpu")
    if "teacher=none" in settings:
        overrides = [override for override in overrides if not override.startswith("teacher.")]
    own, here = sys.argv, os.getcwd()
    GlobalHydra.instance().clear()
    if tiny:
        torch._dynamo.config.recompile_limit = 64  # rows share what has been compiled
    else:
        torch._dynamo.reset()
    sys.argv = ["train.py", *_last_of_each(overrides)]
    try:
        main()
        instead = [] if torch.cuda.is_available() else [ON_A_CPU[s] for s in settings if s in ON_A_CPU]
        return {**Clock.found, **({"instead": instead} if instead else {})}
    finally:
        sys.argv = own
        os.chdir(here)
        shutil.rmtree(folder, ignore_errors=True)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _last_of_each(overrides: Sequence[str]) -> list[str]:
    """Hydra refuses a choice of a group that is made twice."""
    return list({override.partition("=")[0]: override for override in overrides}.values())


# ------------------------------------------------------------------------------------------------------------- products


def forward_flops(network: str, batch: int, frames: int = 1) -> int:
    """Operations of one forward pass, by PyTorch's own count on tensors without values."""
    released = {"use_qknorm": True, "use_swiglu": True, "use_rope": True, "use_rmsnorm": True}
    with torch.device("meta"):
        if network == "latents":
            made: Any = LightningDiT.from_preset("XL/1", input_size=16, in_channels=32, **released)
        else:
            from flowanchor.plugins.backbones.wan import Wan  # needs diffusers

            made = Wan.from_preset("1.3B", frames=frames)
    # Of attention its plain form is counted, which the fused ones equal.
    shapes, plainly = FakeTensorMode(allow_non_fake_inputs=True), sdpa_kernel(SDPBackend.MATH)
    with shapes, torch.no_grad(), plainly, FlopCounterMode(display=False) as counter:
        made._apply(lambda tensor: torch.empty(tensor.shape, dtype=tensor.dtype))
        labels = torch.zeros(batch, dtype=torch.int64)
        cond = labels if network == "latents" else Tokens(torch.empty(batch, 512, 4096))
        made.predict(torch.empty(batch, *made.sample_shape), torch.empty(batch), cond, None)
    return counter.get_total_flops()


def counted(found: dict[str, Any], forwards: str, network: str, batch: int, frames: int, tiny: bool) -> dict[str, Any]:
    """With the rate at which the step's products were done, TFLOP/s."""
    if tiny or "step_ms" not in found:
        return {**found, "batch": batch, "forwards": FORWARDS[forwards]}
    work = FORWARDS[forwards] * forward_flops(network, batch, frames)
    return {**found, "batch": batch, "forwards": FORWARDS[forwards], "tflops": work / found["step_ms"] / 1e9}


# ----------------------------------------------------------------------------------------------------------------- rows


def _xl(tiny: bool, batch: int, forwards: str, *settings: str) -> dict[str, Any]:
    return counted(latents(tiny, batch, *settings), forwards, "latents", batch, 1, tiny)


def _wan(tiny: bool, batch: int, frames: int, forwards: str, *settings: str) -> dict[str, Any]:
    return counted(wan(tiny, batch, frames, *settings), forwards, "wan", batch, frames, tiny)


def rows(tiny: bool) -> list[Row]:
    """The first rows: what a user trains with, and flow matching beside it."""
    found = [
        Row("XL/1, 32, eager", partial(_xl, tiny, 32, "chain", *EAGER), 60),
        Row("XL/1, 32, compiled, graph", partial(_xl, tiny, 32, "chain", *GRAPH), 150, 30),
        Row("XL/1, 32, recompute=false, compiled, graph", partial(_xl, tiny, 32, "chain, kept", *KEPT_GRAPH), 150, 30),
        Row("XL/1, 32, compiled", partial(_xl, tiny, 32, "chain", *COMPILED), 120, 20),
        Row("XL/1, 32, flow matching, compiled, graph", partial(_xl, tiny, 32, "flow", *FLOW, *GRAPH), 90, 15),
        Row("digits, 64, eager", partial(digits, tiny, *EAGER), 30),
        Row("digits, 64, eager, graph", partial(digits, tiny, *EAGER_GRAPH), 30),
        Row("digits, 64, compiled, graph", partial(digits, tiny, *GRAPH), 60, 15),
        Row("digits, 64, flow matching, compiled, graph", partial(digits, tiny, *FLOW, *GRAPH), 60, 15),
    ]
    return found


def more_rows(tiny: bool) -> list[Row]:
    """Other batches, other engines."""
    return [
        Row("XL/1, 128, compiled, graph", partial(_xl, tiny, 128, "chain", *GRAPH), 150, 35),
        Row("XL/1, 128, flow matching, compiled, graph", partial(_xl, tiny, 128, "flow", *FLOW, *GRAPH), 90, 15),
        Row(
            "XL/1, 128, recompute=false, compiled, graph", partial(_xl, tiny, 128, "chain, kept", *KEPT_GRAPH), 150, 35
        ),
        Row("XL/1, 16, jvp=full, eager", partial(_xl, tiny, 16, "full", *FULL, *EAGER), 60, 15),
        Row("XL/1, 16, eager", partial(_xl, tiny, 16, "chain", *EAGER), 60, 12),
        Row("XL/1, 16, jvp=two_pass, eager", partial(_xl, tiny, 16, "two_pass", *TWO_PASS, *EAGER), 60, 12),
        Row("XL/1, 32, eager, graph", partial(_xl, tiny, 32, "chain", *EAGER_GRAPH), 90, 15),
        Row("XL/1, 32, flow matching, eager", partial(_xl, tiny, 32, "flow", *FLOW, *EAGER), 60, 10),
        Row("XL/1, 8, eager", partial(_xl, tiny, 8, "chain", *EAGER), 60, 12),
        Row("XL/1, 8, compiled, graph", partial(_xl, tiny, 8, "chain", *GRAPH), 150, 30),
        Row("XL/1, 8, flow matching, compiled, graph", partial(_xl, tiny, 8, "flow", *FLOW, *GRAPH), 90, 15),
    ]


def spread_rows(tiny: bool) -> list[Row]:
    """One process of FSDP2 and of DDP on one card: NCCL, hooks, streams, and what they cost beside a plain run."""
    sharded, ddp, graph = ("strategy=fsdp_chain_jvp", *EAGER), ("strategy=ddp", *EAGER), ("strategy=ddp", *GRAPH)
    return [
        Row("XL/1, 32, FSDP2 on one card, eager", partial(_xl, tiny, 32, "chain", *sharded), 90, 15),
        Row("XL/1, 32, DDP on one card, eager", partial(_xl, tiny, 32, "chain", *ddp), 90, 15),
        Row("XL/1, 32, DDP on one card, compiled, graph", partial(_xl, tiny, 32, "chain", *graph), 150, 30),
    ]


def wan_rows(tiny: bool) -> list[Row]:
    eager, graph = (*EAGER,), (*GRAPH,)
    return [
        Row("Wan 1.3B, 8 images, eager", partial(_wan, tiny, 8, 1, "chain", *eager), 90, 25),
        Row("Wan 1.3B, 81 frames, eager", partial(_wan, tiny, 1, 21, "chain", *eager), 150, 60),
        Row("Wan 1.3B, 81 frames, compiled, graph", partial(_wan, tiny, 1, 21, "chain", *graph), 200, 75),
        Row("Wan 1.3B, 8 images, compiled, graph", partial(_wan, tiny, 8, 1, "chain", *graph), 150, 40),
        Row("Wan 1.3B, 2 images, eager", partial(_wan, tiny, 2, 1, "chain", *eager), 90, 20),
        Row("Wan 1.3B, 2 images, flow matching, eager", partial(_wan, tiny, 2, 1, "flow", *FLOW, *eager), 90, 20),
    ]
