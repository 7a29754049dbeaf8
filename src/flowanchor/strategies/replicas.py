"""`strategy=ddp`: the whole network on every device, the mean of the gradients once per step."""

from __future__ import annotations

from lightning.pytorch.overrides.distributed import _sync_module_states
from lightning.pytorch.strategies import DDPStrategy
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from flowanchor.module import FlowModule
from flowanchor.strategies.abilities import Abilities


class ReplicasStrategy(Abilities, DDPStrategy):
    """DistributedDataParallel, or where the step is a CUDA graph the same without it.

    Its hooks reduce parts of the gradients during the backward pass, which a graph of forward and backward does not
    call. So nothing is wrapped then: every process starts from the weights of the first one, and `FlowModule` reduces
    all gradients at once when a replay has made them.

    Quantised weights (`base_dtype=int8`) are left alone by both: they are frozen, each process has read them from the
    same file, and what they are made of cannot be sent.
    """

    allows_graphs = True

    def configure_ddp(self) -> None:
        module = self.lightning_module
        assert module is not None
        quantised = [name for name, p in module.named_parameters() if is_traceable_wrapper_subclass(p)]
        if quantised:
            DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, quantised)
        if not (isinstance(module, FlowModule) and module.graphed):
            super().configure_ddp()
            return
        _sync_module_states(module)
