"""`strategy=ddp`: the whole network on every device, the mean of the gradients once per step."""

from __future__ import annotations

from lightning.pytorch.overrides.distributed import _sync_module_states
from lightning.pytorch.strategies import DDPStrategy

from flowanchor.module import FlowModule
from flowanchor.strategies.abilities import Abilities


class ReplicasStrategy(Abilities, DDPStrategy):
    """DistributedDataParallel, or where the step is a CUDA graph the same without it.

    Its hooks reduce parts of the gradients during the backward pass, which a graph of forward and backward does not
    call. So nothing is wrapped then: every process starts from the weights of the first one, and `FlowModule` reduces
    all gradients at once when a replay has made them.
    """

    allows_graphs = True

    def configure_ddp(self) -> None:
        module = self.lightning_module
        if not (isinstance(module, FlowModule) and module.graphed):
            super().configure_ddp()
            return
        _sync_module_states(module)
