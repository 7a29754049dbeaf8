"""Whether a network keeps the contract of a `Backbone`, found out by running it.

    from flowanchor.testing import check_backbone
    check_backbone(MyNetwork(depth=2))

The engines themselves see most of it while they train; a parameter that no stage owns, or a tangent that is merely
wrong, nobody would see.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from flowanchor.errors import ConfigError, FlowAnchorError
from flowanchor.interfaces import Backbone, Question
from flowanchor.jvp import Chain, Full
from flowanchor.jvp.inside import tensors_inside
from flowanchor.jvp.stages import check_stages

BATCH = 3
DIFFERENCES = (1e-5, 1e-6, 1e-7)  # steps of the central differences, in float64: fine enough for times of 1,000 units
TOLERANCE = 1e-6  # of a tangent against them; roundoff makes 1e-9 or so


@dataclass(frozen=True)
class Finding:
    """One rule, and what was found: `fault` is None where it is kept, `skipped` says why it was not looked at."""

    rule: str
    fault: str | None = None
    skipped: str | None = None


@dataclass
class _Inputs:
    """What a network is asked: x [B, *], times [B], a condition of B samples, and in which direction it moves."""

    x: Tensor
    t: Tensor
    cond: Any
    r: Tensor | None
    along: tuple[Tensor, ...]  # the tangents of x, t and r

    @property
    def question(self) -> Question:
        return Question(self.t, self.r, self.along)


def check_backbone(network: Backbone, cond: Any = None, seed: int = 0) -> None:
    """Raise `ConfigError` with every rule of the contract that a network breaks.

    Args:
        network: a small one (it is copied, cast to float64 and given weights that are not zero).
        cond: a condition of 3 samples; None: labels, where the network has classes.
        seed: of weights and inputs.
    """
    broken = [finding for finding in examine_backbone(network, cond, seed) if finding.fault is not None]
    if broken:
        lines = "; ".join(f"{finding.rule}: {finding.fault}" for finding in broken)
        raise ConfigError(f"{type(network).__name__} breaks {len(broken)} of the rules of a backbone: {lines}")


def examine_backbone(network: Backbone, cond: Any = None, seed: int = 0) -> list[Finding]:
    """The findings of `check_backbone`, rule by rule."""
    try:
        check_stages(network)
    except FlowAnchorError as error:
        return [Finding("a chain of stages", str(error))]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tried = _awake(deepcopy(network).double().eval())
        inputs = _inputs(tried, cond)
        findings = []
        for rule, look in RULES.items():
            try:
                findings.append(Finding(rule, look(tried, inputs)))
            except _Skipped as reason:
                findings.append(Finding(rule, skipped=str(reason)))
            except Exception as error:  # whatever somebody's network raises
                findings.append(Finding(rule, f"{type(error).__name__}: {error}"))
    return findings


class _Skipped(Exception):
    """A rule that cannot be looked at here."""


def _awake(network: Backbone) -> Backbone:
    """Weights in place of zeros: what a gate of zero hides would go unseen."""
    for parameter in network.parameters():
        if parameter.is_floating_point() and parameter.requires_grad:
            nn.init.normal_(parameter, std=0.2)
    return network


def _inputs(network: Backbone, cond: Any) -> _Inputs:
    if cond is None and network.conditioning.classes:
        cond = torch.arange(BATCH) % network.conditioning.classes
    x, dx = torch.randn(2, BATCH, *network.sample_shape, dtype=torch.float64)
    t, dt = torch.rand(BATCH, dtype=torch.float64) * 0.8 + 0.1, torch.rand(BATCH, dtype=torch.float64)
    if not network.takes_end_time:
        return _Inputs(x, t, _double(cond), None, (dx, dt))
    return _Inputs(x, t, _double(cond), t + 0.05, (dx, dt, torch.rand_like(t)))


def _double(cond: Any) -> Any:
    return torch.utils._pytree.tree_map(
        lambda leaf: leaf.double() if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf, cond
    )


# --------------------------------------------------------------------------------------------------------------- rules


def _shape(network: Backbone, given: _Inputs) -> str | None:
    out = network.predict(given.x, given.t, given.cond, given.r)
    if out.shape != given.x.shape:
        return f"the velocity has the shape {tuple(out.shape)} and the sample {tuple(given.x.shape)}"
    return None if bool(out.isfinite().all()) else "the velocity is not finite"


def _repeatable(network: Backbone, given: _Inputs) -> str | None:
    first, second = (network.predict(given.x, given.t, given.cond, given.r) for _ in range(2))
    return None if torch.equal(first, second) else "asked twice in evaluation mode, it answers differently"


def _apart(network: Backbone, given: _Inputs) -> str | None:
    """A sample's velocity is its own affair."""
    whole = network.predict(given.x, given.t, given.cond, given.r)
    other = given.x.clone()
    other[1:] += 1
    moved = network.predict(other, given.t, given.cond, given.r)
    return None if torch.allclose(whole[0], moved[0], rtol=1e-9, atol=1e-12) else "samples of a batch see each other"


def _new_tensors(network: Backbone, given: _Inputs) -> str | None:
    """No stage returns its input, a view of it, or changes it."""
    with torch.no_grad():
        tokens, context = network.embed(given.x, given.t, given.cond, given.r)
        if _shares(tokens, given.x):
            return "embed returns its input or a view of it: return a new tensor"
        names = [f"blocks[{index}]" for index in range(len(network.blocks))]
        for name, call in zip([*names, "head"], [*network.blocks, network.head], strict=True):
            inside = [value for _, value in tensors_inside((tokens, context))]
            before = [value.clone() for value in inside]
            out = call(tokens, context)
            if any(not torch.equal(old, new) for old, new in zip(before, inside, strict=True)):
                return f"{name} changes what it was given in place: write x = x + y, not x += y"
            if _shares(out, tokens):
                return f"{name} returns its input or a view of it: return a new tensor (clone)"
            tokens = out
    return None


def _shares(a: Tensor, b: Tensor) -> bool:
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


def _owned(network: Backbone, given: _Inputs) -> str | None:
    """Each parameter belongs to a stage, to the backbone itself, or stays whole."""
    owned = {id(p) for stage in network.stage_modules() for module in stage for p in module.parameters()}
    owned |= {id(p) for p in (*network.parameters(recurse=False), *network.whole_parameters())}
    lost = [name for name, p in network.named_parameters() if id(p) not in owned]
    return f"no stage of stage_modules() has {', '.join(lost[:5])}" if lost else None


def _used(network: Backbone, given: _Inputs) -> str | None:
    """Each trained parameter reaches the velocity."""
    out = network.predict(given.x, given.t, given.cond, given.r)
    other, _ = network.without_training_parts()
    trained = {name: p for name, p in network.named_parameters() if p.requires_grad and name not in other}
    gradients = torch.autograd.grad(out.square().sum(), list(trained.values()), allow_unused=True)
    unused = [name for name, gradient in zip(trained, gradients, strict=True) if gradient is None]
    return f"no gradient reaches {', '.join(unused[:5])}: leave it out, or freeze it" if unused else None


def _tangent(network: Backbone, given: _Inputs) -> str | None:
    """Stage by stage, against central differences of the whole network."""
    if network.tangent_smoothing:
        raise _Skipped("its time embedding has a smoothed derivative, which differences do not see")
    (found,) = Chain()(network, given.x, given.cond, [given.question])
    assert found.tangent is not None
    errors = []
    for step in DIFFERENCES:
        with torch.no_grad():
            ahead, behind = (_moved(network, given, sign * step) for sign in (1, -1))
        wanted = (ahead - behind) / (2 * step)
        errors.append(float((found.tangent - wanted).norm() / wanted.norm().clamp_min(1e-12)))
    error = min(errors)
    return None if error <= TOLERANCE else f"off by {error:.1e} against central differences"


def _moved(network: Backbone, given: _Inputs, step: float) -> Tensor:
    times = (given.t,) if given.r is None else (given.t, given.r)
    x, t, *r = (value + step * d for value, d in zip((given.x, *times), given.along, strict=True))
    return network.predict(x, t, given.cond, *r)


def _gradient(network: Backbone, given: _Inputs) -> str | None:
    """Stage by stage, against one backward through the whole network."""
    trained = [p for p in network.parameters() if p.requires_grad]
    both = []
    for engine in (Chain(), Full()):
        (out,) = engine(network, given.x, given.cond, [given.question])
        found = torch.autograd.grad(out.prediction.square().sum(), trained, allow_unused=True)
        both.append(torch.cat([torch.zeros(1) if g is None else g.flatten() for g in found]))
    error = float((both[0] - both[1]).norm() / both[1].norm().clamp_min(1e-12))
    return None if error <= TOLERANCE else f"off by {error:.1e} against a backward through the whole network"


def _float32(network: Backbone, given: _Inputs) -> str | None:
    """As it is trained."""
    with _as_float32(network):
        r = None if given.r is None else given.r.float()
        cond = torch.utils._pytree.tree_map(
            lambda leaf: leaf.float() if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf, given.cond
        )
        out = network.predict(given.x.float(), given.t.float(), cond, r)
    return None if out.dtype == torch.float32 else f"float32 samples give a velocity in {out.dtype}"


@contextmanager
def _as_float32(network: Backbone) -> Iterator[None]:
    network.float()
    try:
        yield
    finally:
        network.double()


RULES: dict[str, Callable[[Backbone, _Inputs], str | None]] = {
    "the velocity has the sample's shape and is finite": _shape,
    "the same question has the same answer": _repeatable,
    "samples of a batch do not see each other": _apart,
    "stages return new tensors and leave what they are given alone": _new_tensors,
    "every parameter belongs to a stage": _owned,
    "every trained parameter is used": _used,
    "the tangent, stage by stage, is the derivative": _tangent,
    "the gradient, stage by stage, is that of the whole": _gradient,
    "float32 in, float32 out": _float32,
}
