"""Forward and backward of a training step, captured once for each of its forms and replayed from then on."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from flowanchor.graphs.capture import CaptureError, draws
from flowanchor.graphs.cuda import Graph, Graphs, Outputs
from flowanchor.graphs.reads import Reads

EAGER_RUNS = 2  # of each form: they are steps of the training like all others
MOST_FORMS = 4  # captured ones; each keeps its activations' memory
MOST_RESETS = 3


class GraphedSteps:
    """Calls `function(*inputs)`, which computes losses and accumulates gradients: eagerly at first, then as a graph.

    A form is a phase of the objective with inputs of certain shapes. Its first two calls run eagerly, then it is
    captured; forms beyond the fourth run eagerly. Gradients lie in tensors of this object, which all graphs write to;
    a parameter that no form of the present sum has given a gradient to has `grad=None`, as without graphs.

    Args:
        function: inputs (a tree of tensors, and of values that belong to the form) -> named tensors.
        parameters: what gets gradients.
        graphs: what captures.
        networks: everything whose weights the function reads; captured anew where one lies elsewhere, or is switched
            between training and evaluation.
        watched: what is looked through for attributes that change from step to step and are read in the step.
        refuse: told, in words, why all steps run eagerly from now on; may raise.
        say: told, each once, that steps are graphs now, and why some are not.
    """

    def __init__(
        self,
        function: Callable[..., Outputs],
        parameters: Iterable[nn.Parameter],
        graphs: Graphs,
        networks: Sequence[nn.Module] = (),
        watched: Sequence[Any] = (),
        refuse: Callable[[str], None] = lambda reason: None,
        say: Callable[[str], None] = lambda reason: None,
    ) -> None:
        self.function, self.graphs, self.refuse, self.say = function, graphs, refuse, say
        self.modules = [module for network in networks for module in network.modules()]
        self.watched = watched
        self.parameters = [p for p in parameters if p.requires_grad]
        self.gradients = Gradients(self.parameters)
        self.forms: dict[Hashable, _Form] = {}
        self.refused = False
        self._said: set[str] = set()
        self._resets = 0
        self._here = self._state()

    def __call__(self, inputs: Any, phase: Hashable = None, first: bool = True) -> Outputs:
        """One micro-batch; `first`: a new sum of gradients begins. The outputs are overwritten by the next call."""
        if first:
            self.gradients.clear()
        leaves, tree = tree_flatten(inputs)
        form = self.forms.setdefault((phase, str(tree), *map(_signature, leaves)), _Form())
        if not self.refused:
            self._check(form)
        if self.refused or form.graph is None and form.calls < EAGER_RUNS:
            return self._eagerly(form, inputs)
        if form.graph is None and sum(other.graph is not None for other in self.forms.values()) >= MOST_FORMS:
            self._say_once(
                f"{MOST_FORMS} forms of the training step are CUDA graphs (shapes of the batch, phases of the "
                "objective); all others run without."
            )
            return self._eagerly(form, inputs)
        self.gradients.attach(form.gives)
        if form.graph is None:
            form.inputs = [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
            static = tree_unflatten(form.inputs, tree)
            try:
                form.graph = self.graphs.capture(lambda: self.function(*static))
            except CaptureError as error:  # a capture computes nothing, so the step can still be made
                self._refuse(str(error).rstrip("."))
                return self._eagerly(form, inputs)
            self._say_once("Forward and backward of the training step are replayed as a CUDA graph from here on.")
        tensors = [(kept, new) for kept, new in zip(form.inputs, leaves, strict=True) if isinstance(new, Tensor)]
        for kept, new in tensors:
            kept.copy_(new, non_blocking=True)
        form.graph.replay()
        return form.graph.outputs

    def _eagerly(self, form: _Form, inputs: Any) -> Outputs:
        form.calls += 1
        rehearsal = form.calls == EAGER_RUNS and not self.refused
        for parameter in self.parameters:
            parameter.grad = None
        drawn = draws()
        form.reads = Reads(*self.watched) if rehearsal else form.reads
        watching = form.reads.watching() if rehearsal and form.reads is not None else nullcontext()
        with self.graphs.eager(rehearsal) as complaints, watching:
            outputs = self.function(*inputs)
        form.gives = self.gradients.take()
        if rehearsal and draws() != drawn:
            complaints.append("a stage of the network draws random numbers and is computed twice")
        if rehearsal and complaints:
            self._refuse(complaints[0])
        return outputs

    def _check(self, form: _Form) -> None:
        """What a graph would not notice."""
        here = self._state()
        if here != self._here:
            self._here, self._resets = here, self._resets + 1
            for other in self.forms.values():
                other.graph, other.calls = None, 0
            if self._resets > MOST_RESETS:
                self._refuse("its weights move, or change between training and evaluation, again and again")
        if form.graph is not None and form.reads is not None:
            changed = form.reads.changed()
            if changed is not None:
                self._refuse(
                    f"{changed}, and a number that changes must be a StepNumber or belong to the objective's phase "
                    "(docs/add_an_objective.md)"
                )

    def _refuse(self, reason: str) -> None:
        self.refused = True
        for form in self.forms.values():
            form.graph = None
        self.refuse(reason)

    def _say_once(self, what: str) -> None:
        if what not in self._said:
            self._said.add(what)
            self.say(what)

    def _state(self) -> tuple[list[bool], list[int]]:
        """In which mode each module is, and where the weights lie."""
        held = ((module._parameters, module._buffers) for module in self.modules)
        addresses = [t.data_ptr() for both in held for tensors in both for t in tensors.values() if t is not None]
        return [module.training for module in self.modules], addresses


@dataclass
class _Form:
    calls: int = 0
    gives: list[bool] = field(default_factory=list)  # which parameters it gives a gradient to
    graph: Graph | None = None
    inputs: list[Any] = field(default_factory=list)
    reads: Reads | None = None


def _signature(leaf: Any) -> Hashable:
    return (tuple(leaf.shape), leaf.dtype, leaf.device) if isinstance(leaf, Tensor) else leaf


# ------------------------------------------------------------------------------------------------------------ gradients


class Gradients:
    """The sums of the gradients: parts of one tensor for each type, so that they never move and are reduced at once."""

    ALIGNED = 64  # elements: kernels read 16 bytes at a time

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self.parameters = list(parameters)
        self.flat: list[Tensor] = []
        parts: dict[int, Tensor] = {}
        for dtype in dict.fromkeys(p.dtype for p in self.parameters):
            mine = [p for p in self.parameters if p.dtype == dtype]
            starts, size = [], 0
            for p in mine:
                starts.append(size)
                size += -(-p.numel() // self.ALIGNED) * self.ALIGNED
            flat = torch.zeros(size, dtype=dtype, device=mine[0].device)
            self.flat.append(flat)
            parts |= {id(p): flat.as_strided(p.shape, p.stride(), start) for p, start in zip(mine, starts, strict=True)}
        self.parts = [parts[id(p)] for p in self.parameters]
        self.used = [False] * len(self.parameters)

    def clear(self) -> None:
        """A new sum begins."""
        for flat in self.flat:
            flat.zero_()
        self.used = [False] * len(self.parameters)

    def take(self) -> list[bool]:
        """Add what an eager backward pass has left in `grad`; which parameters had one."""
        found = [p.grad for p in self.parameters]
        given = [gradient is not None for gradient in found]
        pairs = [(part, gradient) for part, gradient in zip(self.parts, found, strict=True) if gradient is not None]
        if pairs:
            torch._foreach_add_([part for part, _ in pairs], [gradient for _, gradient in pairs])
        self.attach(given)
        return given

    def attach(self, given: Sequence[bool]) -> None:
        """Let `grad` be the sums, of the parameters in `given` and of those that had one before."""
        self.used = [a or b for a, b in zip(self.used, given, strict=True)]
        for p, part, used in zip(self.parameters, self.parts, self.used, strict=True):
            p.grad = part if used else None

    def reduce(self, processes: int) -> None:
        """The mean over the processes, in place."""
        for flat in self.flat:
            flat.div_(processes)
            dist.all_reduce(flat)
