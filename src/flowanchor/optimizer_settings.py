"""Settings of an optimizer: fused where that can be, and after a resume its own beside the checkpoint's moments."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Container, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from flowanchor.errors import CheckpointError, ConfigError

Make = Callable[..., torch.optim.Optimizer]
LARGE = 4096  # values of a parameter, from which on every optimizer treats it as a large one


def fused_on_cuda(make: Make, device: torch.device, scaled: bool) -> Make:
    """What makes an optimizer, with `fused=null` decided: true on CUDA.

    `scaled`: gradients arrive multiplied by a factor (trainer.precision=16-mixed), and a fused optimizer would divide
    by it only after they are clipped: null is then false, and true raises `ConfigError`.
    """
    settings = getattr(make, "keywords", {})
    if "fused" not in settings:
        return make
    if settings["fused"] and scaled:
        raise ConfigError(
            "optimizer.fused=true divides the gradients of trainer.precision=16-mixed by their scale after they are "
            "clipped: leave it out, or train with trainer.precision=bf16-mixed."
        )
    return partial(make, fused=device.type == "cuda" and not scaled) if settings["fused"] is None else make


def with_own_settings(optimizer: torch.optim.Optimizer, kept: Container[str] = ()) -> torch.optim.Optimizer:
    """Have an optimizer keep its own settings of every group when the state of another one is loaded into it.

    Settings are what its constructor takes: the rate, betas, decay. What a training changes in a group (a scheduler's
    rate, counters of an optimizer's own) comes from the state, as do the settings in `kept`. Whatever loads the state,
    loads it through here. Loading raises `CheckpointError` where the groups are others.
    """
    named = set(inspect.signature(type(optimizer).__init__).parameters) - {"self", "params"}
    own = [{key: value for key, value in group.items() if key in named} for group in optimizer.param_groups]

    def load(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        theirs = state["param_groups"]
        sizes = [[len(group["params"]) for group in groups] for groups in (theirs, optimizer.param_groups)]
        if sizes[0] != sizes[1]:
            raise CheckpointError(
                f"The checkpoint's optimizer has groups of {sizes[0]} parameters and this one of {sizes[1]}: resume "
                "with the settings of the run, or train into a new folder with name=NAME."
            )
        groups = []
        for settings, group in zip(own, theirs, strict=True):
            if group.get("initial_lr", settings.get("lr")) != settings.get("lr"):
                raise CheckpointError(
                    f"optimizer.lr={settings['lr']} cannot take the place of {group['initial_lr']} on a resume, "
                    "because a scheduler sets the rate: repeat that one, or train into a new folder with name=NAME."
                )
            scheduled = {"lr"} if "initial_lr" in group else set()  # the scheduler's present rate
            new = {key: value for key, value in settings.items() if key not in kept and key not in scheduled}
            groups.append({**group, **new})
        return {**state, "param_groups": groups}

    optimizer.register_load_state_dict_pre_hook(load)
    return optimizer


def kept_bytes(make: Make, parameters: Iterable[Tensor]) -> int:
    """Bytes that an optimizer keeps of parameters from step to step, beside counters.

    It is asked: a step is made of stand-ins on the CPU that have fewer rows (entries of the first dimension), with
    which its state grows. Of sharded parameters give this process' parts.
    """
    shapes: Counter[tuple[tuple[int, ...], torch.dtype]] = Counter()  # of a stand-in -> how many rows it stands for
    for p in parameters:
        rows, *rest = p.shape or (1,)
        if p.numel():
            few = min(rows, -(-LARGE * rows // p.numel()))
            shapes[(few, *rest), p.dtype] += rows
    stand_ins = [nn.Parameter(torch.zeros(shape, dtype=dtype)) for shape, dtype in shapes]
    if not stand_ins:
        return 0
    with torch.random.fork_rng(devices=[]):
        optimizer = make(stand_ins)
        for p in stand_ins:
            p.grad = torch.ones_like(p)
        optimizer.step()
    sizes = (sum(v.nbytes for v in optimizer.state[p].values() if isinstance(v, Tensor) and v.ndim) for p in stand_ins)
    rows_of = zip(stand_ins, shapes.values(), strict=True)
    return sum(size * rows // p.shape[0] for size, (p, rows) in zip(sizes, rows_of, strict=True))
