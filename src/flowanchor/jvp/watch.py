"""The first walk along a network is watched: what moves and leaves the chain of stages would lose its derivative.

A dual number lives as long as the stage that made it. What a stage keeps elsewhere (an attribute, a closure, a list of
skip connections) is a constant for the stages that read it, and nothing fails. So the first walk looks at each call of
a PyTorch function: a tensor that moved in an earlier stage must not enter a result by another way than as tokens or in
`StageContext.carried`. Later walks cost nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.weak import WeakTensorKeyDictionary

from flowanchor.errors import ConfigError
from flowanchor.jvp.compiled import eager_forwards
from flowanchor.jvp.surroundings import Surroundings

_WATCH: ContextVar[Watch | None] = ContextVar("watch", default=None)
_SEEN: WeakKeyDictionary[nn.Module, set[tuple[bool, bool]]] = WeakKeyDictionary()
_INTERNAL = frozenset(vars(nn.Module()))  # attributes of every module, none of which is a user's tensor

Call = Callable[[Sequence[Tensor]], Any]  # a stage as a function of what may move


def seen(backbone: nn.Module, joint: bool) -> bool:
    """Whether a walk along this network has been watched, in its present mode (training, evaluation)."""
    return (backbone.training, joint) in _SEEN.setdefault(backbone, set())


def take_as_seen(backbone: nn.Module) -> None:
    """Watch no walk along this network: its tensors have no values (`flowanchor.jvp.memory_plan`)."""
    _SEEN[backbone] = {(training, joint) for training in (True, False) for joint in (True, False)}


@contextmanager
def watched(backbone: nn.Module, joint: bool = False) -> Iterator[None]:
    """A walk along the stages of a network, `joint` with an ordinary branch; watched if it is the first such one."""
    if seen(backbone, joint):
        yield
        return
    token = _WATCH.set(Watch(backbone))
    try:
        yield
    finally:
        _WATCH.reset(token)
    _SEEN[backbone].add((backbone.training, joint))


def watch() -> Watch | None:
    """What watches the present walk, if anything does."""
    return _WATCH.get()


@contextmanager
def other_branch() -> Iterator[None]:
    """A call of a stage for the ordinary prediction of a joint walk, in between those for the tangent."""
    watch = _WATCH.get()
    if watch is None:
        yield
        return
    before = watch.kept()
    yield
    watch.learn_replaced(before)


class Watch:
    """What one walk has seen: tensors that no later stage may use but as tokens or in `carried`."""

    def __init__(self, backbone: nn.Module) -> None:
        self.backbone = backbone
        # What no later stage may use; where the ordinary branch has put it in the place of another tensor, that one.
        self.outside = WeakTensorKeyDictionary()

    @contextmanager
    def calls(self, name: str, given: Iterable[Tensor]) -> Iterator[None]:
        """The tangent pass of one stage, within a level of forward-mode AD; `given` moves into it."""
        calls = _Calls(self, name)
        calls.note(given)
        with calls:
            yield
        self.outside.update(calls.moving)

    def kept(self) -> dict[tuple[int, str], list[Tensor]]:
        """The tensors that the network's modules keep in attributes, parameters apart."""
        found = {}
        for module in self.backbone.modules():
            for name, value in (*vars(module).items(), *module._buffers.items()):
                if name not in _INTERNAL:
                    found[id(module), name] = [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]
        return found

    def learn_replaced(self, before: dict[tuple[int, str], list[Tensor]]) -> None:
        """Since `before` the ordinary branch has kept tensors where the moving branch had kept other ones."""
        for place, new in self.kept().items():
            old = before.get(place, [])
            if len(old) == len(new):
                pairs = zip(new, old, strict=True)
                self.outside.update({a: b for a, b in pairs if a is not b and (b in self.outside or not _same(a, b))})
            elif any(tensor in self.outside for tensor in old):
                self.outside.update({a: None for a in new if not any(a is b for b in old)})

    def check_still(
        self,
        name: str,
        before: Surroundings,
        call: Call,
        moving: Sequence[tuple[Tensor, Tensor | None]],
        tangents: Sequence[Tensor | None],
    ) -> None:
        """Raise `ConfigError` where what came in moves and something that depends on it came out without a tangent.

        Seen by running the stage again, and at displaced inputs: what does not depend on them is right to stand still.
        """
        if all(tangent is not None for tangent in tangents):
            return
        with torch.no_grad(), eager_forwards():
            with before:
                rest = _tensors(call([value for value, _ in moving]))
            with before:
                moved = _tensors(call([_displaced(*pair) for pair in moving]))
        for index, tangent in enumerate(tangents):
            # Roundoff hides so small a step in low precision; a larger one would cross to other entries of a table.
            hidden = rest[index].dtype in _STEPS and index > 0
            if tangent is None and not hidden and float((rest[index] != moved[index]).double().mean()) > 0.5:
                what = f"carried[{index - 1}]" if index else "a tensor"
                raise ConfigError(
                    f"The stage {name} returns {what} of shape {tuple(rest[index].shape)} that depends on x or a time "
                    "and has no tangent: compute it by differentiable operations of PyTorch (no detach, item or numpy)."
                )


_STEPS = {torch.bfloat16: 2e-2, torch.float16: 2e-2}


def _tensors(out: tuple[Tensor, Any]) -> list[Tensor]:
    """The tokens that a stage returns, and what it carries on."""
    return [out[0], *tree_leaves(out[1].carried)]


def _displaced(value: Tensor, tangent: Tensor | None) -> Tensor:
    """A value a little further along its tangent; so little that hardly one crosses to another entry of a table."""
    if tangent is None or not bool(tangent.any()):
        return value
    size = float(value.abs().max()) or 1.0
    return value + _STEPS.get(value.dtype, 1e-4) * size / tangent.abs().max() * tangent


class _Calls(TorchFunctionMode):
    """Each call of a PyTorch function in a stage: what moves there, and whether a tensor enters from outside."""

    def __init__(self, watch: Watch, name: str) -> None:
        super().__init__()
        self.watch, self.name = watch, name
        self.moving = WeakTensorKeyDictionary()

    def note(self, values: Iterable[Any]) -> None:
        self.moving.update({value: None for value in values if _tangent(value) is not None})

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        generator = kwargs.get("generator")
        if self.name != "embed" and generator is not None and generator not in _default_generators():
            raise ConfigError(
                f"The stage {self.name} draws from a generator of its own, which cannot be set back when it is run a "
                "second time: draw from PyTorch's default generator."
            )
        outside = [value for value in tree_leaves((args, kwargs)) if self._is_outside(value)]
        if outside:
            return self._call_with(outside, func, args, kwargs)
        out = func(*args, **kwargs)
        self.note(tree_leaves((out, args, kwargs)))
        return out

    def _is_outside(self, value: Any) -> bool:
        return isinstance(value, Tensor) and value in self.watch.outside and _tangent(value) is None

    def _call_with(
        self, outside: list[Tensor], func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """A call with tensors from outside, each with a tangent of NaN that shows whether the result depends on it.

        Where a tensor stands in the place of another one, the result must be the same with that one.
        """
        replaced = self.watch.outside

        def probe(value: Any) -> Any:
            if not self._is_outside(value) or not value.is_floating_point():
                return value
            return forward_ad.make_dual(value, torch.full_like(value, torch.nan))

        def former(value: Any) -> Any:
            return replaced[value] if self._is_outside(value) and replaced[value] is not None else value

        with torch.random.fork_rng([]):
            wanted = func(*tree_map(former, args), **tree_map(former, kwargs))
        out = func(*tree_map(probe, args), **tree_map(probe, kwargs))
        met = tree_leaves((out, args, kwargs))
        if any(map(_has_nan_tangent, met)) or not all(map(_same, tree_leaves(out), tree_leaves(wanted))):
            raise ConfigError(
                f"The stage {self.name} uses a tensor of shape {tuple(outside[0].shape)} that depends on x or a time "
                "and came to it neither as tokens nor in context.carried (kept in an attribute, a closure or a "
                "global?), so its derivative would be lost: pass it on in StageContext.carried."
            )
        self.note(met)
        return out


def _default_generators() -> tuple[torch.Generator, ...]:
    return (torch.default_generator, *(torch.cuda.default_generators if torch.cuda.is_initialized() else ()))


def _tangent(value: Any) -> Tensor | None:
    return forward_ad.unpack_dual(value).tangent if isinstance(value, Tensor) else None


def _has_nan_tangent(value: Any) -> bool:
    tangent = _tangent(value)
    return tangent is not None and bool(tangent.isnan().any())


def _same(a: Any, b: Any) -> bool:
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        return bool(a == b)
    return a.shape == b.shape and a.dtype == b.dtype and a.device == b.device and torch.equal(a, b)
