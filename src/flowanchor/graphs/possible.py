"""Where a training step cannot be a CUDA graph, and why."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.strategies import SingleDeviceStrategy

from flowanchor.errors import ConfigError
from flowanchor.strategies.abilities import abilities

CHOICES = ("auto", True, False)


def check_choice(cuda_graph: Any) -> None:
    """Raise `ConfigError` for a setting that is none."""
    if not any(cuda_graph is choice or cuda_graph == choice == "auto" for choice in CHOICES):
        raise ConfigError(f"cuda_graph={cuda_graph} is no choice: use cuda_graph=auto, true or false.")


def why_not(trainer: pl.Trainer, compile_options: dict[str, Any] | None) -> str | None:
    """The reason, and what to choose instead, as the end of a sentence; None where it can be, given a CUDA device."""
    strategy = trainer.strategy
    if abilities(strategy).shards:
        return (
            "a sharded network (FSDP2) gathers its weights and reduces its gradients into other memory at every step: "
            "use strategy=ddp where the network fits on each device"
        )
    if not (isinstance(strategy, SingleDeviceStrategy) or abilities(strategy).allows_graphs):
        return (
            f"{type(strategy).__name__} wraps the module in one whose hooks run in the backward pass: use strategy=ddp"
        )
    if trainer._detect_anomaly:
        return "trainer.detect_anomaly=true reads every gradient on the host: leave it out"
    if getattr(trainer.precision_plugin, "scaler", None) is not None:
        return "trainer.precision=16-mixed scales the loss by a number of the host: use trainer.precision=bf16-mixed"
    mode = (compile_options or {}).get("mode")
    if mode in ("reduce-overhead", "max-autotune"):
        return f"compile.mode={mode} makes graphs of its own: use compile={{mode:max-autotune-no-cudagraphs}}"
    return None
