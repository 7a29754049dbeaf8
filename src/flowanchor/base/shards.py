"""Whether tensors and networks are shared by several processes, asked without the libraries that share them.

Nothing can be of a class that nobody has imported, and importing these two takes seconds: whoever opens a model to draw
with it never does.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, TypeGuard

from torch import Tensor, nn

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def _imported(module: str, name: str) -> Any:
    """A class of a library; None where that was not imported (as yet)."""
    library = sys.modules.get(module)
    return None if library is None else vars(library).get(name)


def is_shared(tensor: Tensor) -> TypeGuard[DTensor]:
    """Whether several processes hold a tensor together."""
    kind = _imported("torch.distributed.tensor", "DTensor")
    return kind is not None and isinstance(tensor, kind)


def is_unit(module: nn.Module) -> bool:
    """Whether a module is a unit of FSDP2."""
    kind = _imported("torch.distributed.fsdp", "FSDPModule")
    return kind is not None and isinstance(module, kind)


def is_sharded(network: nn.Module) -> bool:
    """Whether any part of a network is a unit of FSDP2."""
    kind = _imported("torch.distributed.fsdp", "FSDPModule")
    return kind is not None and any(isinstance(module, kind) for module in network.modules())
