"""`strategy=fsdp_chain_jvp`: networks sharded by their stages (FSDP2), as a Lightning strategy."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from flowanchor.base.files import remove, replace, unfinished
from flowanchor.checkpoints import read_checkpoint
from flowanchor.checkpoints.lightning import RunCheckpointIO
from flowanchor.checkpoints.sharded import write_sharded
from flowanchor.checkpoints.soundness import sound_checkpoint
from flowanchor.deferred import is_deferred, materialise
from flowanchor.errors import CheckpointError, ConfigError
from flowanchor.module import TEACHER, FlowModule
from flowanchor.strategies.abilities import Abilities
from flowanchor.strategies.sharding import shard_backbone, unsharded_backbones
from flowanchor.weights import copy_weights, dtype_of, shape_of

PRECISIONS = {"32-true": None, "bf16-mixed": torch.bfloat16}  # precision -> in which parameters are gathered
_ALIASES = {"32": "32-true", "bf16": "bf16-mixed"}


class ChainJVPStrategy(Abilities, ModelParallelStrategy):
    """Shards the student, and the frozen teacher with it, so that one stage at a time is whole on each process.

    Args:
        replicate: replicas of the sharded model (HSDP): the processes form a mesh of `replicate` x shards, gradients
            are reduced over the shards and averaged over the replicas. 1: every process holds another shard.
        prefetch: gather the next stage while one runs.
        reduce_every_micro_batch: with `trainer.accumulate_grad_batches`, reduce the gradients after each micro-batch;
            False reduces them once a step, and keeps whole gradients on every process until then.
        save_distributed_checkpoint: checkpoints are folders into which every process writes its part; False gathers
            them on the first process, into one file.
        process_group_backend: nccl on GPUs and gloo on CPUs where it is null.
        timeout: seconds after which a collective without answer ends the run.
    """

    deferred_initialisation = True
    shards = True

    def __init__(
        self,
        replicate: int = 1,
        prefetch: bool = True,
        reduce_every_micro_batch: bool = False,
        save_distributed_checkpoint: bool = True,
        process_group_backend: str | None = None,
        timeout: float = 1800.0,
    ) -> None:
        super().__init__(
            save_distributed_checkpoint=save_distributed_checkpoint,
            process_group_backend=process_group_backend,
            timeout=timedelta(seconds=timeout),
        )
        self.checkpoint_io = RunCheckpointIO()
        if replicate < 1:
            raise ConfigError(f"strategy.replicate={replicate} is too small: use 1, or a divisor of the processes.")
        self.replicate, self.prefetch, self.reduce_every_micro_batch = replicate, prefetch, reduce_every_micro_batch

    # ------------------------------------------------------------------------------------- processes and their mesh

    def check_precision(self, precision: Any) -> None:
        """Raise `ConfigError` for a `trainer.precision` that this strategy has no mixed precision policy for."""
        name = _ALIASES.get(str(precision), str(precision))
        if name not in PRECISIONS:
            raise ConfigError(
                f"trainer.precision={precision} does not work with strategy=fsdp_chain_jvp: use "
                f"trainer.precision={' or trainer.precision='.join(PRECISIONS)}."
            )

    def _configure_launcher(self) -> None:
        # The first moment at which the trainer has told everything, and before it starts any process.
        self.check_precision(self.precision_plugin.precision)
        processes = self.num_nodes * self.num_processes
        started = self.world_size  # by torchrun or SLURM; else what the trainer is about to start
        if started != processes:
            raise ConfigError(
                f"{started} processes were started and the trainer expects {processes} (trainer.devices="
                f"{self.num_processes} x trainer.num_nodes={self.num_nodes}): set trainer.devices to the processes per "
                "node, and trainer.num_nodes to the nodes."
            )
        if processes % self.replicate:
            divisors = ", ".join(str(n) for n in range(1, processes + 1) if processes % n == 0)
            raise ConfigError(
                f"strategy.replicate={self.replicate} does not divide the {processes} processes (trainer.devices x "
                f"trainer.num_nodes): choose one of {divisors}."
            )
        super()._configure_launcher()

    def setup_environment(self) -> None:
        self._setup_distributed()
        kind, shards = self.root_device.type, self.world_size // self.replicate
        if self.replicate > 1:
            mesh = init_device_mesh(kind, (self.replicate, shards), mesh_dim_names=("replicate", "shard"))
        else:
            mesh = init_device_mesh(kind, (shards,), mesh_dim_names=("shard",))
        self._device_mesh = mesh
        assert self.lightning_module is not None
        self.lightning_module._device_mesh = mesh

    @property
    def mesh(self) -> DeviceMesh:
        """`shard`, or `replicate` x `shard`."""
        return self.device_mesh

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        return {"num_replicas": self.world_size, "rank": self.global_rank}  # every process has samples of its own

    # ----------------------------------------------------------------------------------------------------- sharding

    def parallelise(self, module: pl.LightningModule) -> None:
        """Shard every backbone of a module and give it its values; what is sharded already stays as it is."""
        low = PRECISIONS[_ALIASES.get(str(self.precision_plugin.precision), str(self.precision_plugin.precision))]
        for backbone in unsharded_backbones(module):
            shard_backbone(
                backbone,
                self.mesh,
                param_dtype=low,
                reduce_dtype=None if low is None else torch.float32,
                prefetch=self.prefetch,
            )
            if is_deferred(backbone):
                materialise(backbone, self.root_device)

    # ---------------------------------------------------------------------------------------------------- gradients

    @contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        """Around every micro-batch but the last of a step: its gradients are kept, not reduced."""
        if self.reduce_every_micro_batch:
            yield
            return
        self._reduce_gradients(False)
        try:
            yield
        finally:
            self._reduce_gradients(True)

    def _reduce_gradients(self, reduce: bool) -> None:
        assert self.model is not None
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.set_requires_gradient_sync(reduce, recurse=False)
                module.set_is_last_backward(reduce)
        self._reducing = reduce

    _reducing = True

    def post_backward(self, closure_loss: Tensor) -> None:
        if self._reducing:
            assert self.lightning_module is not None
            average_plain_gradients(self.lightning_module)

    # -------------------------------------------------------------------------------------------------- checkpoints

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """The weights as they are, sharded: what a save needs of them is known once the hooks have been asked."""
        assert self.model is not None
        return {name: value.detach() for name, value in self.model.state_dict().items()}

    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """The optimizer's state as it is, sharded, by the index of the parameter."""
        return getattr(optimizer, "_optimizer", optimizer).state_dict()

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None) -> None:
        """Write a checkpoint, a folder or a file; an earlier one of that name stays until this one is complete."""
        path = Path(self.broadcast(str(filepath)))
        if not self._save_distributed_checkpoint:
            whole = _gathered(checkpoint, self.is_global_zero)
            if self.is_global_zero:
                self.checkpoint_io.save_checkpoint(whole, path, storage_options)
            self.barrier()
            return
        draft = unfinished(path)
        if self.is_global_zero:
            remove(draft)
        self.barrier()
        try:
            write_sharded(draft, checkpoint, self.global_rank, _gather_objects, self.barrier)
        except BaseException:
            if self.is_global_zero:
                shutil.rmtree(draft, ignore_errors=True)  # on a full disk its room is needed
            raise
        if self.is_global_zero:
            replace(draft, path, keep_previous=path in self.kept_checkpoints)
        self.barrier()

    @property
    def kept_checkpoints(self) -> set[Path]:
        """Checkpoints whose predecessor stays beside them (`LastCheckpoint`)."""
        kept: set[Path] = getattr(self.checkpoint_io, "kept", set())
        return kept

    @torch.no_grad()
    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Restore weights and optimizer from a folder or a file, of any number of processes; each reads its part."""
        path = sound_checkpoint(Path(self.broadcast(str(checkpoint_path))))
        content = read_checkpoint(path)
        assert self.lightning_module is not None
        module = self.lightning_module
        elsewhere = module.is_elsewhere if isinstance(module, FlowModule) else lambda key: key.startswith(TEACHER)
        own = {k: v for k, v in module.state_dict().items() if not elsewhere(k)}
        stored = content["state_dict"]
        unfit = [name for name in own if name not in stored or shape_of(stored, name) != own[name].shape]
        if unfit:
            raise CheckpointError(
                f"{path} has no fitting entry for {', '.join(unfit[:3])}: resume with the backbone and objective of "
                "the run, or train into a new folder with name=NAME."
            )
        copy_weights(stored, own)
        for optimizer, state in zip(self.optimizers, content.pop("optimizer_states", []), strict=False):
            _restore_optimizer(optimizer, state)
        return {**content, "state_dict": {}}


def average_plain_gradients(module: nn.Module) -> None:
    """Average, over all processes, the gradients of trained parameters that FSDP does not reduce (one collective)."""
    plain = [p for p in module.parameters() if p.requires_grad and not isinstance(p, DTensor)]
    if not plain or dist.get_world_size() == 1:
        return
    # A process on which a parameter was not used has no gradient for it, and must take part all the same.
    parts = [torch.zeros_like(p) if p.grad is None else p.grad.detach() for p in plain]
    used = [part.new_full((1,), float(p.grad is not None)) for p, part in zip(plain, parts, strict=True)]
    joint = torch.cat([*used, *(part.flatten() for part in parts)])
    dist.all_reduce(joint)
    counts, *sums = joint.split([len(plain), *(part.numel() for part in parts)])
    # Only whoever lacks a gradient must know whether the others had one: the host waits for the device then.
    wanted = [True] * len(plain) if all(p.grad is not None for p in plain) else counts.bool().tolist()
    for p, some, total in zip(plain, wanted, sums, strict=True):
        if some:
            p.grad = (total / dist.get_world_size()).view_as(p).to(p.dtype)


def _gather_objects(value: Any) -> list[Any]:
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def _gathered(value: Any, keep: bool) -> Any:
    """A checkpoint with every sharded tensor whole, on the CPU of the process that shall `keep` them."""
    if isinstance(value, DTensor):
        whole = value.full_tensor()
        return whole.cpu() if keep else None
    if isinstance(value, Mapping):
        return {key: _gathered(entry, keep) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_gathered(entry, keep) for entry in value)
    return value


def _restore_optimizer(optimizer: torch.optim.Optimizer, stored: dict[str, Any]) -> None:
    """Give an optimizer the state of a checkpoint, each process its part; entries go by the index of the parameter."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    tensors: Mapping[str, Tensor] | None = stored.get("tensors")
    state: dict[int, dict[str, Any]] = {index: dict(entries) for index, entries in stored["state"].items()}
    if tensors is None:  # of a file, whose tensors lie next to the plain values
        tensors = {f"{i}/{name}": v for i, e in state.items() for name, v in e.items() if isinstance(v, Tensor)}
    targets: dict[str, Tensor] = {}
    for key in tensors:
        index, _, name = key.partition("/")
        p, shape = parameters[int(index)], shape_of(tensors, key)
        targets[key] = _empty_beside(p, shape, dtype_of(tensors, key))
        state.setdefault(int(index), {})[name] = targets[key]
    copy_weights(tensors, targets)
    optimizer.load_state_dict({"state": state, "param_groups": stored["param_groups"]})


def _empty_beside(p: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """What has the shape of its parameter, or as many rows, is sharded like it; what is left are counters."""
    if shape == p.shape:
        return torch.empty_like(p.detach(), dtype=dtype)
    if isinstance(p, DTensor) and shape[:1] == p.shape[:1]:
        return torch.distributed.tensor.empty(shape, dtype=dtype, device_mesh=p.device_mesh, placements=p.placements)
    return torch.empty(shape, dtype=dtype)
