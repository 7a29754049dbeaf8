"""Chain-JVP: values and tangents pass from stage to stage, and the graph of a tangent never outlives its stage.

A tangent carries no gradient, so dropping its graph between two stages changes nothing: the engine is exact. What a
stage keeps for the backward pass is a choice (`recompute`), and a sharded network is whole one stage at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from itertools import repeat
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.autograd.graph import get_gradient_edge
from torch.utils._pytree import tree_leaves

from flowanchor.errors import ConfigError
from flowanchor.interfaces import Answer, Backbone, Question, StageContext
from flowanchor.jvp.attention import AttentionTangent, resolve
from flowanchor.jvp.compiled import eager_forwards
from flowanchor.jvp.compiled_replay import recorded, replayed
from flowanchor.jvp.dual import Directions, Moving, embed_dual, run_network, stage_dual, still_or
from flowanchor.jvp.inside import mapped
from flowanchor.jvp.replay import Recording
from flowanchor.jvp.stages import Stage, ask, check_stages, is_sharded, silenced, stages, through
from flowanchor.jvp.surroundings import Surroundings
from flowanchor.jvp.watch import other_branch, seen, watch, watched

MODES = (True, False, "selective", "auto")


class Chain:
    """Exact prediction and tangent, stage by stage, at the memory of a checkpointed forward (Chain-JVP).

    Args:
        recompute: what a stage keeps for the backward pass. True: its input; the backward pass runs the plain forward
            again (fused attention, same autocast and random state). "selective": its input and the outputs of its
            linear layers; only what lies between them is computed again. False: the whole graph of the values. "auto":
            the fastest of these that fits, which a training run decides in its first step (`flowanchor.recompute`);
            elsewhere True.
        attention: how attention's tangent is computed (`flowanchor.jvp.attention`): a name or an object.
    """

    def __init__(self, recompute: bool | str = True, attention: str | AttentionTangent = "auto") -> None:
        if recompute not in MODES:
            raise ConfigError(f"jvp.recompute={recompute} is unknown: choose true, false or selective, or auto.")
        self.recompute = recompute
        self.form = True if recompute == "auto" else recompute
        self.attention = resolve(attention)

    def __repr__(self) -> str:
        return f"Chain(recompute={self.recompute!r}, attention={self.attention!r})"

    def check_run(self, backbone: Backbone, *, sharded: bool, low_precision: bool) -> None:
        """Raise `ConfigError` where it cannot train (`flowanchor.jvp.compatibility`)."""
        check_stages(backbone)

    def __call__(self, backbone: Backbone, x: Tensor, cond: Any, questions: Sequence[Question]) -> list[Answer]:
        """A question with a tangent and an ordinary one are answered in one walk, equal to two.

        What is shared is each stage: a sharded network gathers it once for both in the forward and in the backward, and
        reduces its gradient once.
        """
        moving = [index for index, question in enumerate(questions) if question.along is not None]
        plain = [index for index, question in enumerate(questions) if question.along is None]
        answers: dict[int, Answer] = {}
        for index in moving:
            beside = plain.pop(0) if plain else None
            inputs = Directions.of(x, cond, questions[index])
            answers[index], other = self._walk(backbone, inputs, None if beside is None else questions[beside])
            if beside is not None and other is not None:
                answers[beside] = Answer(other)
        for index in plain:
            answers[index] = Answer(ask(backbone, x, questions[index].t, cond, questions[index].r))
        return [answers[index] for index in range(len(questions))]

    def _walk(self, backbone: Backbone, inputs: Directions, plain: Question | None) -> tuple[Answer, Tensor | None]:
        inputs.check()
        embed, links = stages(backbone)
        if plain is not None and not seen(backbone, False) and not is_sharded(backbone):
            # Beside another branch, which may overwrite what a stage keeps, less is seen than alone.
            with torch.no_grad(), Surroundings.here(inputs.x.device, others=True):
                self._walk(backbone, inputs, None)

        def walk(inputs: Directions, plain: Question | None) -> tuple[Tensor | None, ...]:
            state = _Branches(*through(embed.units, lambda: self._embed(embed, inputs, plain)))
            for link in links:
                state = self._step(link, state)
            prediction = state.moving.tokens
            return prediction, still_or(state.moving.tokens_tangent, prediction), state.tokens

        with watched(backbone, plain is not None):
            prediction, tangent, other = run_network(backbone, walk, inputs, plain)
        return Answer(prediction, tangent), other

    # -------------------------------------------------------------------------------------------------------- stages

    def _embed(self, stage: Stage, inputs: Directions, plain: Question | None) -> tuple[Any, ...]:
        """`embed` keeps its small graph: it makes the context, parts of which may need gradient without moving."""
        moving = embed_dual(stage, inputs, self.attention)
        if plain is None:
            return moving, None, None
        with other_branch():
            tokens, context = stage.call(inputs.x, plain.t, inputs.cond, plain.r)
        return moving, tokens, context

    def _step(self, stage: Stage, state: _Branches) -> _Branches:
        """One block, or the head: values with gradient, tangents without."""
        tensors = _needed(state)

        def run(*tensors: Tensor) -> tuple[Tensor | None, ...]:
            now = _put_back(state, tensors)
            if not torch.is_grad_enabled():
                return self._without_graph(stage, now)[:3]
            if self.form is False:
                return self._with_graph(stage, now)
            return self._recomputed(stage, now, tensors)

        value, tangent, other = through(stage.units, run, *tensors)
        assert value is not None
        moving = state.moving._replace(tokens=value, tokens_tangent=tangent)
        return _Branches(moving, other, state.context)

    def _without_graph(
        self, stage: Stage, now: _Branches, recordings: Sequence[Recording | None] = (None, None)
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Sequence[Surroundings]]:
        """Dual pass, and the other branch's plain one, nothing kept but what is recorded."""
        with torch.no_grad():
            first = _before(now.moving.tokens, eager=True)
            value, tangent = stage_dual(stage, now.moving, self.attention, recordings[0])
            first.forget_if_unused()
            if now.tokens is None:
                return value, tangent, None, [first]
            assert now.context is not None
            second = _before(now.tokens, eager=recordings[1] is not None)
            with eager_forwards() if first.must_run_eagerly and recordings[1] else nullcontext(), other_branch():
                other = recorded(stage, now.tokens, now.context, recordings[1])
            second.forget_if_unused()
        return value, tangent, other, [first, second]

    def _with_graph(self, stage: Stage, now: _Branches) -> tuple[Tensor | None, ...]:
        """The tangent first, without a graph; then the values with one, which takes over what the first computed."""
        linears = Recording()
        with torch.no_grad():
            before = _before(now.moving.tokens, eager=True)
            _, tangent = stage_dual(stage, now.moving, self.attention, linears)
            before.forget_if_unused()
        with before:
            value = replayed(stage, now.moving.tokens, now.moving.context, linears)
        with other_branch():
            other = None if now.tokens is None else stage.call(now.tokens, now.context)
        return value, tangent, other

    def _recomputed(self, stage: Stage, now: _Branches, tensors: tuple[Tensor, ...]) -> tuple[Tensor | None, ...]:
        recordings: list[Recording | None] = [None, None]
        if self.form == "selective":
            recordings = [Recording(), Recording()]
        value, tangent, other, forwards = self._without_graph(stage, now, recordings)
        outputs = [value] if other is None else [value, other]
        plan = _Plan(stage, now, forwards, recordings, outputs, len(tensors))
        values = _Recompute.apply(plan, *tensors, *stage.parameters())
        return values[0], tangent, None if other is None else values[1]


def _before(tokens: Tensor, eager: bool = False) -> Surroundings:
    """What a pass finds that begins now; in a first walk it is found out whether Python or numpy are drawn from."""
    return Surroundings.here(tokens.device, eager, others=watch() is not None)


@dataclass(frozen=True)
class _Branches:
    """What passes between stages: the branch with tangents, and an ordinary one beside it where there are two."""

    moving: Moving
    tokens: Tensor | None
    context: StageContext | None


def _needed(state: _Branches) -> list[Tensor]:
    """The tensors of a state through which gradient may flow, in a fixed order: tokens, carried, fixed."""
    contexts = [(state.moving.tokens, state.moving.context)]
    if state.tokens is not None and state.context is not None:
        contexts.append((state.tokens, state.context))
    return [tensor for tokens, context in contexts for tensor in (tokens, *_tensors(context))]


def _tensors(context: StageContext) -> list[Tensor]:
    return [*tree_leaves(context.carried), *filter(_differentiable, tree_leaves(context.fixed))]


def _filled(context: StageContext, tensors: Iterator[Tensor]) -> StageContext:
    """The context with `_tensors` of it replaced."""
    carried = mapped(lambda _: next(tensors), context.carried)
    fixed = mapped(lambda value: next(tensors) if _differentiable(value) else value, context.fixed)
    return StageContext(carried, fixed)


def _put_back(state: _Branches, tensors: Sequence[Tensor]) -> _Branches:
    """The state with those tensors replaced."""
    rest = iter(tensors)
    tokens, context = next(rest), _filled(state.moving.context, rest)
    moving = state.moving._replace(tokens=tokens, context=context)
    if state.context is None:
        return _Branches(moving, None, None)
    return _Branches(moving, next(rest), _filled(state.context, rest))


def _differentiable(value: Any) -> bool:
    return isinstance(value, Tensor) and value.requires_grad


# ------------------------------------------------------------------------------------------------------ recomputation


@dataclass
class _Plan:
    """How to run one stage again. It holds no tensor of the batch: those are saved by autograd."""

    stage: Stage
    state: _Branches
    forwards: Sequence[Surroundings]
    recordings: Sequence[Recording | None]
    outputs: list[Tensor]
    inputs: int  # how many of the Function's tensors are inputs; the others are parameters
    branch_sizes: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.branch_sizes = [1 + len(_tensors(context)) for context in self._contexts()]
        self.state = _emptied(self.state)

    def _contexts(self) -> list[StageContext]:
        return [self.state.moving.context] + ([] if self.state.context is None else [self.state.context])


def _emptied(state: _Branches) -> _Branches:
    """The state's form without its differentiable tensors; fixed tensors that need no gradient stay (tables, masks)."""

    holes = repeat(_HOLE)
    moving = Moving(_HOLE, None, _filled(state.moving.context, holes), ())
    if state.context is None:
        return _Branches(moving, None, None)
    return _Branches(moving, _HOLE, _filled(state.context, holes))


_HOLE = torch.empty(0, requires_grad=True)  # stands for a tensor that autograd keeps


class _Recompute(torch.autograd.Function):
    """The values of a stage that were computed without a graph; the backward runs the stage again, plainly."""

    @staticmethod
    def forward(ctx: Any, plan: _Plan, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.plan = plan
        ctx.save_for_backward(*tensors[: plan.inputs])
        ctx.parameters = tensors[plan.inputs :]
        ctx.set_materialize_grads(False)
        outputs, plan.outputs = tuple(plan.outputs), []
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        plan: _Plan = ctx.plan
        parameters: tuple[nn.Parameter, ...] = ctx.parameters
        needed = ctx.needs_input_grad[1 : 1 + plan.inputs]
        inputs = [saved.detach().requires_grad_(need) for saved, need in zip(ctx.saved_tensors, needed, strict=True)]
        state = _put_back(plan.state, inputs)
        contexts = [(state.moving.tokens, state.moving.context), (state.tokens, state.context)]
        total: list[Tensor | None] = [None] * len(parameters)
        flowing: list[Tensor | None] = []
        first = 0
        for branch, size in enumerate(plan.branch_sizes):
            mine = inputs[first : first + size]
            first += size
            gradient = gradients[branch]
            if gradient is None:
                flowing += [None] * size
                continue
            wanted = [tensor for tensor in mine if tensor.requires_grad]
            found = _gradients(plan, branch, contexts[branch], gradient, wanted, parameters)
            at = iter(found)
            flowing += [next(at) if tensor.requires_grad else None for tensor in mine]
            total = [_sum(a, b) for a, b in zip(total, at, strict=True)]
        return (None, *flowing, *total)


def _gradients(
    plan: _Plan,
    branch: int,
    inputs: tuple[Any, Any],
    gradient: Tensor,
    wanted: list[Tensor],
    parameters: Sequence[nn.Parameter],
) -> tuple[Tensor | None, ...]:
    """Run one branch of a stage again and differentiate it."""
    stage, before = plan.stage, plan.forwards[branch]
    with silenced(stage.units), torch.enable_grad(), before, before.autocasting():
        output = replayed(stage, *inputs, plan.recordings[branch])
    if output.grad_fn is None:
        return (None,) * (len(wanted) + len(parameters))
    _check_leaves(stage, output, wanted, parameters)
    end = get_gradient_edge(output)
    del output  # its value is not needed again
    with _quiet_hooks(parameters):
        return torch.autograd.grad([end], [*wanted, *parameters], [gradient], allow_unused=True)


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    if a is None or b is None:
        return a if b is None else b
    return a + b


class _quiet_hooks(AbstractContextManager[None]):
    """A parameter's own gradient hooks wait for the outer backward, which calls them once with the whole gradient."""

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self.hooks = [(p._backward_hooks, dict(p._backward_hooks)) for p in parameters if p._backward_hooks]

    def __enter__(self) -> None:
        for hooks, _ in self.hooks:
            hooks.clear()

    def __exit__(self, *error: Any) -> None:
        for hooks, kept in self.hooks:
            hooks.update(kept)


_CHECKED: WeakSet[nn.Module] = WeakSet()


def _check_leaves(stage: Stage, output: Tensor, wanted: Sequence[Tensor], parameters: Sequence[Tensor]) -> None:
    """Once per stage: everything in its graph that wants gradient is an input or a parameter of its own."""
    first = stage.modules[0]
    if first in _CHECKED:
        return
    known = {id(tensor) for tensor in (*wanted, *parameters)}
    seen, todo = set(), [output.grad_fn]
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)
        if leaf is not None and id(leaf) not in known:
            raise ConfigError(
                f"The stage {stage.name} uses a trainable tensor of shape {tuple(leaf.shape)} that is neither its "
                "input nor a parameter of its own, and it would get no gradient: pass it through the context (there in "
                "tuples, lists and dicts, not in other objects), or list its module in stage_modules()."
            )
        todo += [following for following, _ in node.next_functions]
    _CHECKED.add(first)
