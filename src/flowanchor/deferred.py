"""Where the weights of a network come from, one stage at a time, so that no process ever needs to hold it whole.

    with parameters_on_meta():
        network = MyBackbone(...)           # shapes only
    shard_backbone(network, mesh)           # each process now owns a part of every parameter
    materialise(network, device)            # the part gets its values: drawn, or read from `network.pending`

The values are, bit for bit, those that one process draws which builds the network whole.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar

import torch
from torch import Tensor, nn

from flowanchor.errors import ConfigError
from flowanchor.weights import copy_weights, local, own_part


class StagedWeights(nn.Module):
    """A network whose weights come stage by stage: drawn, read from a file, or borrowed from another checkpoint.

    A network of one's own calls `initialise` last in its constructor; it may override `initialise_stage`, which sets
    the first values, and `borrowed`.

    Attributes:
        initial_seed: of the first values, drawn before any of them is, so that it is the same whether or not the
            weights get their values right away.
        initialised_by_stage: whether `initialise` alone says what the first values are.
        pending: weights that a network without values is to be filled with.
    """

    initialised_by_stage: bool = False
    pending: Mapping[str, Tensor] | None = None

    def __init__(self) -> None:
        super().__init__()
        self.initial_seed = int(torch.randint(2**62, (), device="cpu"))

    def stage_modules(self) -> list[list[nn.Module]]:
        """The children of each stage, in the order in which the stages are walked."""
        raise NotImplementedError

    def initialise(self) -> None:
        """Give every parameter its first value, stage by stage; a constructor calls it last.

        Each stage draws from a stream of its own, so that a process which holds one stage at a time draws what a
        process that holds them all does.
        """
        self.initialised_by_stage = True
        if all(parameter.is_meta for parameter in self.parameters()):
            return  # there is nothing to fill yet: `materialise` draws
        for index in range(len(self.stage_modules())):
            with self.stage_randomness(index):
                self.initialise_stage(index)

    def initialise_stage(self, index: int) -> None:
        """Set every parameter of `stage_modules()[index]`; index 0 also those that belong to no stage.

        Here: PyTorch's own initialisation of each layer, by its `reset_parameters`.
        """
        for module in self.stage_modules()[index]:
            for layer in module.modules():
                reset = getattr(layer, "reset_parameters", None)
                if callable(reset):
                    reset()

    @contextmanager
    def stage_randomness(self, index: int) -> Iterator[None]:
        """Within it the CPU's random numbers are those of this network's stage `index`; afterwards as they were."""
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(self.initial_seed + index)
            yield

    def copies(self) -> dict[str, str]:
        """Names in the state dict that weights to start from may lack -> the names whose values they then take."""
        return {}

    def borrowed(self) -> set[str]:
        """Names in the state dict of frozen weights that another checkpoint holds (what adapters stand beside): they
        are not saved with a run, and read from there again."""
        return set()

    def lora_factors(
        self, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], source: object
    ) -> dict[str, tuple[Tensor, Tensor]]:
        """What a LoRA file adds to this network: name of a weight -> A [r, *], B [out, r] with the scale in it.

        Raises `ConfigError` for a file that cannot be read as such, all of it.
        """
        raise ConfigError(
            f"base_lora={source}: a {type(self).__name__} takes none; it is for backbone=diffusers and backbone=wan."
        )


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Within it every parameter that a module registers loses its values; buffers (tables) keep theirs."""
    register = nn.Module.register_parameter

    def register_shape(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and not parameter.is_meta:  # a tied parameter, registered twice, stays one
            parameter = nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)
        register(module, name, parameter)

    nn.Module.register_parameter = register_shape  # type: ignore[assignment,method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


_loading_deferred = ContextVar("loading_deferred", default=False)


@contextmanager
def defer_loading() -> Iterator[None]:
    """Within it `load_model` builds networks without values: their weights stay in the file, as `pending`."""
    token = _loading_deferred.set(True)
    try:
        yield
    finally:
        _loading_deferred.reset(token)


def loading_context() -> AbstractContextManager[None]:
    """In what `load_model` builds its network."""
    return parameters_on_meta() if _loading_deferred.get() else nullcontext()


def is_deferred(network: nn.Module) -> bool:
    """Whether a network still lacks values."""
    return any(parameter.is_meta for parameter in network.parameters())


@torch.no_grad()
def materialise(backbone: StagedWeights, device: torch.device) -> None:
    """Give a deferred network, sharded or not, its values: those of `pending`, and drawn ones for what it lacks."""
    pending, backbone.pending = backbone.pending, None
    backbone._apply(lambda t: torch.empty_like(t, device=device) if t.is_meta else t.to(device))
    held = {} if pending is None else pending
    absent = {id(parameter) for name, parameter in backbone.state_dict(keep_vars=True).items() if name not in held}
    for index, modules in enumerate(_stages(backbone)):
        if any(id(p) in absent for module in modules for p in module.parameters(recurse=False)):
            _draw_stage(backbone, index, modules)
    if pending is not None:
        copy_weights(pending, {name: t for name, t in backbone.state_dict().items() if name in pending})


def _stages(backbone: StagedWeights) -> list[list[nn.Module]]:
    """All modules by stage; those that belong to none go with the first."""
    stages = [[inner for module in stage for inner in module.modules()] for stage in backbone.stage_modules()]
    known = {module for stage in stages for module in stage}
    stages[0] += [module for module in backbone.modules() if module not in known]
    return stages


def _draw_stage(backbone: StagedWeights, index: int, modules: list[nn.Module]) -> None:
    """Draw one stage whole, on the CPU, and keep this process' part of it."""
    slots = [(m, name, p) for m in modules for name, p in m._parameters.items() if p is not None]
    whole: dict[int, nn.Parameter] = {}
    for _, _, p in slots:
        if id(p) not in whole:
            whole[id(p)] = nn.Parameter(torch.empty(p.shape, dtype=p.dtype), requires_grad=p.requires_grad)
    try:
        for module, name, p in slots:
            module._parameters[name] = whole[id(p)]
        with torch.enable_grad(), backbone.stage_randomness(index):
            backbone.initialise_stage(index)
    finally:
        for module, name, p in slots:
            module._parameters[name] = p
    for kept in {id(p): p for _, _, p in slots}.values():
        local(kept).copy_(whole[id(kept)].detach()[own_part(kept)])
