"""A trainer's callbacks, and the module that it trains, by their types: Lightning says neither."""

from __future__ import annotations

from typing import Any, TypeVar, cast

import lightning.pytorch as pl

from flowanchor.module import FlowModule

C = TypeVar("C", bound=pl.Callback)


def callbacks_of(trainer: pl.Trainer) -> list[pl.Callback]:
    """All of them, in their order; the list itself."""
    found: list[pl.Callback] = cast(Any, trainer).callbacks
    return found


def callback_of(trainer: pl.Trainer, kind: type[C]) -> C | None:
    """The first one of a kind; None without one."""
    return next((callback for callback in callbacks_of(trainer) if isinstance(callback, kind)), None)


def is_trial(trainer: pl.Trainer) -> bool:
    """Whether it only tries a few batches (`fast_dev_run`)."""
    return bool(cast(Any, trainer).fast_dev_run)


def repeats_batches(trainer: pl.Trainer) -> bool:
    """Whether it trains on the same few batches again and again (`overfit_batches`)."""
    return bool(cast(Any, trainer).overfit_batches)


def trained(module: pl.LightningModule) -> FlowModule:
    """The same, by its type: for callbacks that stand beside a `FlowModule` alone."""
    return cast(FlowModule, module)
