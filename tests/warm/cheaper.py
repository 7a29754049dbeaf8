"""Within tests, what costs much and decides nothing is left out. The warm start (start.py) does so before it forks.

- `torch.compile(graph, backend="eager")` of a graph that was traced already is that graph: Dynamo would go through it
  operation by operation, to hand the same one to a compiler that leaves it as it is. What is traced anew (a module, a
  function) is compiled as ever, and so is every graph for another compiler.
- Seeds for devices that are not there: PyTorch remembers each, with the stack that asked for it.
- A rendezvous of torchrun says in every record which of its functions wrote it.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.cuda.random
import torch.mtia
import torch.xpu.random
from torch.distributed.elastic.rendezvous import dynamic_rendezvous
from torch.fx import GraphModule

_compile = torch.compile


def _compile_what_is_no_graph(model: Any = None, **options: Any) -> Any:
    if isinstance(model, GraphModule) and options.get("backend") == "eager":
        return model
    return _compile(model, **options)


def _later(call: Any, **options: Any) -> None: ...


def make_cheaper() -> None:
    """From now on, in this process."""
    torch.compile = _compile_what_is_no_graph
    if not torch.cuda.is_available():
        for module in (torch.cuda, torch.cuda.random, torch.xpu, torch.xpu.random, torch.mtia):
            module._lazy_call = _later
    dynamic_rendezvous.get_method_name = lambda depth=2: "a function"
