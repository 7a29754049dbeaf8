"""Which engine runs where: what cannot be is refused before training starts (docs/compatibility.md)."""

from __future__ import annotations

from collections.abc import Mapping
from textwrap import shorten
from typing import Any, Protocol, runtime_checkable

import torch

from flowanchor.errors import ConfigError
from flowanchor.interfaces import Backbone, TangentEngine


@runtime_checkable
class ChecksRun(Protocol):
    """An engine that knows where it cannot run."""

    def check_run(self, backbone: Backbone, *, sharded: bool, low_precision: bool) -> None:
        """Raise `ConfigError` where it cannot, in one sentence that names the nearest choice that can."""
        ...


def check(engine: TangentEngine, backbone: Backbone, *, sharded: bool, low_precision: bool) -> None:
    """Raise `ConfigError` where an engine cannot train this network in this way; nothing is computed.

    Args:
        sharded: whether the network is, or is about to be, sharded by its stages (FSDP2).
        low_precision: whether it runs in bfloat16 or float16, be it by autocast or by its parameters.
    """
    if isinstance(engine, ChecksRun):
        engine.check_run(backbone, sharded=sharded, low_precision=low_precision)


def is_low(precision: str | int) -> bool:
    """Whether a precision of a trainer ("32-true", "bf16-mixed", ...) computes in fewer than 32 bits."""
    return str(precision) not in ("32", "32-true", "64", "64-true")


def set_products(precision: str) -> None:
    """What a GPU does in float32 products of matrices, and of convolutions, which have a switch of their own."""
    torch.set_float32_matmul_precision(precision)
    torch.backends.cudnn.allow_tf32 = precision != "highest"


def said_of_products(device: str, precision: str | int) -> str | None:
    """What a GPU makes of float32 products unless it is told otherwise, in one line; None where nothing is lost."""
    matmul = torch.get_float32_matmul_precision()
    if device != "cuda" or str(precision) not in ("32", "32-true") or matmul == "highest":
        return None
    kind, digits = ("TF32", "three") if matmul == "high" else ("bfloat16", "two")
    return (
        f"float32 products run in {kind} (matmul_precision={matmul}): a tangent has about {digits} exact digits. "
        "matmul_precision=highest computes all of them, and takes longer."
    )


GRAPHED = ("reduce-overhead", "max-autotune")  # modes of torch.compile that capture CUDA graphs of their own


def compile_options(compile: Any) -> dict[str, Any] | None:
    """The config's `compile` as options of `compile_blocks`: false -> None, true -> {}, a mapping -> itself."""
    if isinstance(compile, bool):
        return {} if compile else None
    if isinstance(compile, Mapping):
        options = {str(key): value for key, value in compile.items()}
        try:
            torch.compile(_nothing, **options)
        except (TypeError, ValueError, RuntimeError) as error:
            said = shorten(str(error), 160)
            raise ConfigError(
                f"torch.compile refuses compile={options} ({said}): correct that option, or use compile=true."
            ) from error
        if options.get("mode") in GRAPHED or dict(options.get("options") or {}).get("triton.cudagraphs"):
            raise ConfigError(
                f"compile={options} keeps the results of a block where its next call overwrites them, and that is "
                "the next block's: use compile={mode:max-autotune-no-cudagraphs}, or compile=true."
            )
        return options
    raise ConfigError(
        f"compile={compile} is no choice: use compile=true, compile=false, or options of torch.compile, for instance "
        "compile={mode:max-autotune-no-cudagraphs}."
    )


def _nothing() -> None: ...
