"""Small runs for the tests of the strategy: `training.py FOLDER SPECS`, one process of a torchrun, or imported.

Each spec is a dictionary of the arguments of `fit`; what a run did lands in FOLDER/<name>_<rank>.pt.
"""

from __future__ import annotations

import json
import os
import sys
import warnings
import weakref
from collections import Counter
from contextlib import nullcontext
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from hydra import compose, initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from hydra.utils import instantiate
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves

from flowanchor.checkpoints import initialise_student
from flowanchor.checkpoints.frozen_base import keep_base
from flowanchor.checkpoints.lightning import RunCheckpointIO
from flowanchor.data.lightning import LightningData
from flowanchor.deferred import defer_loading, materialise, parameters_on_meta
from flowanchor.ema import EMA
from flowanchor.interfaces import Batch
from flowanchor.jvp import Chain
from flowanchor.module import FlowModule
from flowanchor.optimizers import AdamW8bit, AdamWBF16
from flowanchor.plugins.backbones.imf_dit import IMFDiT
from flowanchor.plugins.backbones.lightningdit import LightningDiT
from flowanchor.plugins.backbones.wan import Wan
from flowanchor.plugins.backbones.wan_experts import WanExperts
from flowanchor.plugins.data.digits import DigitsDataModule
from flowanchor.plugins.objectives.anchors.flow_matching import FlowMatchingAnchor
from flowanchor.plugins.objectives.composed import ComposedObjective
from flowanchor.plugins.objectives.intervals.expanded import ExpandedInterval
from flowanchor.plugins.objectives.times.uniform import Uniform
from flowanchor.plugins.teachers.base import BaseVelocity
from flowanchor.plugins.teachers.checkpoint import CheckpointVelocity
from flowanchor.plugins.teachers.data import DataVelocity
from flowanchor.programs.launch import prepare
from flowanchor.strategies import ChainJVPStrategy
from flowanchor.strategies.replicas import ReplicasStrategy
from flowanchor.strategies.sharding import shard_backbone
from flowanchor.text.base import Tokens

NETWORK = {
    "input_size": 8, "patch_size": 2, "in_channels": 1, "hidden_size": 24, "depth": 2, "num_heads": 2,
    "num_classes": 10, "use_qknorm": True, "use_swiglu": True, "use_rope": True, "use_rmsnorm": True,
    "disable_label_dropout": True,
}  # fmt: skip
WAN: dict[str, Any] = {
    "in_channels": 1, "height": 8, "width": 8, "num_attention_heads": 2, "attention_head_dim": 16, "ffn_dim": 48,
    "num_layers": 2, "freq_dim": 32, "text_dim": 12, "text_len": 6,
}  # fmt: skip
CONFIG = {
    "backbone": {"_target_": "flowanchor.plugins.backbones.lightningdit.LightningDiT", **NETWORK},
    "objective": {"interval": {"_target_": "flowanchor.plugins.objectives.intervals.expanded.ExpandedInterval"}},
}
OPTIMIZERS: dict[str, Any] = {
    "float32": partial(torch.optim.AdamW, fused=True),  # one operation, through DTensor's dispatcher, for all
    "bfloat16": AdamWBF16,
    "8 bits": AdamW8bit,
}
WAN_TARGET = {"_target_": "flowanchor.plugins.backbones.wan.Wan"}


class Communication(TorchDispatchMode):
    """Counts the collectives, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            self.counts[str(func.overloadpacket)] += 1
        return func(*args, **(kwargs or {}))


class Network(LightningDiT):
    """Its output does not start at zero, where the cosine loss has no direction."""

    def initialise_stage(self, index: int) -> None:
        super().initialise_stage(index)
        if index == len(self.blocks) + 1:
            nn.init.normal_(self.final_layer.linear.weight, std=0.1)


class TwoHeads(IMFDiT):
    """With a velocity head; neither output starts at zero, and no label is ever dropped."""

    def __init__(self) -> None:
        super().__init__(8, 2, 1, 24, 2, 2, 1, num_classes=10, class_dropout_prob=1e-9)

    def initialise_stage(self, index: int) -> None:
        super().initialise_stage(index)
        if index == len(self.blocks) + 1:
            nn.init.normal_(self.final_layer.linear.weight, std=0.1)
            assert self.velocity_layer is not None
            nn.init.normal_(self.velocity_layer.linear.weight, std=0.1)


class Weighted(ComposedObjective):
    """Flow matching with a trained weight of its own: a parameter outside every backbone."""

    def __init__(self) -> None:
        super().__init__(ExpandedInterval(), Uniform(), FlowMatchingAnchor())
        self.log_weight = nn.Parameter(torch.full((2,), 0.1))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        result = super().forward(*args, **kwargs)
        return replace(result, loss=result.loss * self.log_weight.exp().mean() + self.log_weight.square().sum())


class Record(pl.Callback):
    def __init__(self) -> None:
        self.losses: list[float] = []
        self.norms: list[float] = []
        self.validation: list[float] = []

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.losses.append(float(outputs["loss"]))
        self.norms.append(float(trainer.callback_metrics.get("train/grad_norm", torch.nan)))

    def on_validation_end(self, trainer: pl.Trainer, module: Any) -> None:
        self.validation.append(float(trainer.callback_metrics["val/loss"]))


class WanNetwork(Wan):
    """Text-conditioned; its output does not start at zero either."""

    def initialise_stage(self, index: int) -> None:
        super().initialise_stage(index)
        if index == len(self.blocks) + 1:
            nn.init.normal_(self.proj_out.weight, std=0.1)


class Experts(WanExperts):
    """Two of them; the boundary in the middle, so that a few steps ask both."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(boundary=0.5, preset="nano", **settings)

    def initialise_stage(self, index: int) -> None:
        super().initialise_stage(index)
        if index == len(self.blocks) + 1:
            for expert in (self.high, self.low):
                nn.init.normal_(expert.proj_out.weight, std=0.1)


class Captions(DigitsDataModule):
    """Digits as one-frame videos, each digit with its own text."""

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        text = torch.randn(10, 5, WAN["text_dim"], generator=torch.Generator().manual_seed(1))
        return Batch(batch.x1[:, :, None], Tokens(text[batch.cond]))


def network(
    deferred: bool = False, wan: str = "", lora: dict[str, Any] | None = None, heads: bool = False, **settings: Any
) -> Any:
    torch.manual_seed(5)
    with parameters_on_meta() if deferred else nullcontext():
        if heads:
            return TwoHeads()
        if wan:
            return {"one": WanNetwork, "experts": Experts}[wan](**{**WAN, **settings}, lora=lora)
        return Network(**{**NETWORK, **settings})


def composed(name: str, overrides: list[str] | None = None) -> Any:
    """An objective as its option composes it; tangents and schedules in their middle, not at their start."""
    return instantiate(_configuration(name, *(overrides or [])), _convert_="all")


@cache
def _configuration(name: str, *overrides: str) -> Any:
    prepare()
    GlobalHydra.instance().clear()
    with initialize_config_module("flowanchor.conf", version_base="1.3"):
        cfg = compose("train", overrides=[f"objective={name}", *overrides])
    settings = {"scm": {"warmup_steps": 4}, "alpha_flow": {"start": -1, "end": 2, "run_steps": None}}.get(name, {})
    if settings:
        cfg.objective.shortcut.merge_with(settings)
    return cfg.objective


def whole(tensor: torch.Tensor) -> torch.Tensor:
    if isinstance(tensor, DTensor):
        tensor = tensor.full_tensor()
    elif is_traceable_wrapper_subclass(tensor):
        tensor = tensor.dequantize()
    return tensor.detach().cpu().clone()


def fit(
    folder: Path,
    name: str,
    steps: int,
    batch: int,
    sharded: dict[str, Any] | None = None,
    accumulate: int = 1,
    resume: str | None = None,
    teacher: str | None = None,
    start: str | None = None,
    weighted: bool = False,
    clip: float = 0.5,
    save: bool = False,
    validate: bool = True,
    objective: str | None = None,
    ddp: bool = False,
    overrides: list[str] | None = None,
    wan: str = "",
    lora: dict[str, Any] | None = None,
    base: str = "float32",
    precision: str = "32-true",
    lr: float = 0.1,
    compiled: bool = False,
    counted: bool = False,
    moments: str = "float32",
    width: int = 24,
    recompute: bool | str = True,
    rooms: list[int] | None = None,
    predicts: str = "v",
    layers: int = 2,
) -> dict[str, Any]:
    """Train; `sharded` are the arguments of the strategy, None trains in one ordinary process (or those of DDP).

    `teacher`: a checkpoint, or `base`: of the adapters.
    `objective`: by the name of its option, on a network with a second time embedder (imf_whole: with two heads).
    `counted`: its communication. `validate`: with averaged weights, and tell what those are.
    `layers`: of Wan.
    """
    deferred = sharded is not None
    loss: Any = ComposedObjective(ExpandedInterval(), Uniform(), FlowMatchingAnchor())
    if objective is not None:
        loss = composed(objective, overrides)
    told = (loss.interval.end_time or "auxiliary") if objective is not None and loss.interval.needs_end_time else None
    shape = {"num_layers": layers} if wan else {"end_time": told, "predicts": predicts, "hidden_size": width}
    student = network(deferred, wan, lora, objective == "imf_whole", **shape)
    if start is not None:
        initialise_student(student, start)
    keep_base(student, base, low_precision=False)
    velocity: Any = DataVelocity()
    if teacher == "base":
        velocity = BaseVelocity()
    elif teacher is not None:
        with defer_loading() if deferred else nullcontext():
            velocity = CheckpointVelocity(teacher)
    options = {"backend": "eager", "fullgraph": True} if compiled else None
    module = FlowModule(
        student, Weighted() if weighted else loss, velocity, Chain(recompute),
        lambda parameters: OPTIMIZERS[moments](parameters, lr=lr, eps=0.1), seed=3,
        config={**CONFIG, "backbone": {**WAN_TARGET, **WAN, "lora": lora}, "initialise_from": start} if wan else CONFIG,
        compile_options=options,
    )  # fmt: skip
    if rooms is not None:
        module.memory = Room(rooms[int(os.environ.get("RANK", 0))])
    data = (Captions if wan else DigitsDataModule)(batch_size=batch)
    record, ema = Record(), EMA(sigma_rel=0.2, decay=0.5)
    strategy: Any = ChainJVPStrategy(**sharded) if sharded is not None else ReplicasStrategy() if ddp else "auto"
    trainer = pl.Trainer(
        max_steps=steps, accelerator="cpu", devices=int(os.environ.get("LOCAL_WORLD_SIZE", 1)),
        strategy=strategy, precision=precision, accumulate_grad_batches=accumulate,
        gradient_clip_val=clip, callbacks=[ema, record], logger=False, enable_checkpointing=False, log_every_n_steps=1,
        enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0, default_root_dir=folder,
        plugins=None if deferred else [RunCheckpointIO()],
        use_distributed_sampler=False, inference_mode=False, val_check_interval=2, check_val_every_n_epoch=None,
        limit_val_batches=1 if validate else 0, max_epochs=-1,
    )  # fmt: skip
    communication = Communication()
    with communication if counted else nullcontext():  # which sees every operation, and is slow
        trainer.fit(module, LightningData(data), ckpt_path=resume, weights_only=True)
    if save:
        trainer.save_checkpoint(folder / f"{name}.ckpt")
    return {
        "form": getattr(module.engine, "form", None),
        "losses": record.losses,
        "norms": record.norms,
        "validation": record.validation,
        "weights": {key: whole(v) for key, v in module.state_dict().items() if not key.startswith("velocity.")},
        "teacher": {key: whole(v) for key, v in velocity.state_dict().items()},
        "ema": {profile: ema.averages(module, profile) for profile in ema.profiles if validate},
        "communication": communication.counts,
        "sharded": sum(isinstance(p, DTensor) for p in student.parameters()),
        "plain": [name for name, p in student.named_parameters() if not isinstance(p, DTensor)],
        "sharded_teacher": sum(isinstance(p, DTensor) for p in velocity.parameters()),
    }


def is_mapped(address: int) -> bool:
    """Whether an address lies in a file that is mapped into memory (Linux)."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        start, _, end = line.split()[0].partition("-")
        if int(start, 16) <= address < int(end, 16):
            return line.split()[-1].startswith("/")
    return False


class Room:
    """A stand-in for the memory of a process: so many bytes; nothing is measured."""

    def __init__(self, size: int) -> None:
        self.size = size

    def room(self, held: int) -> int:
        return self.size

    def start(self) -> None: ...

    def taken(self) -> int | None:
        return None


class WholeBytes(TorchDispatchMode):
    """Bytes of plain (unsharded) tensors that are alive at once, without those that are mapped from a file."""

    def __init__(self) -> None:
        super().__init__()
        self.alive = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        fresh = all(returned.alias_info is None for returned in function._schema.returns)
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and not tensor.is_meta and not isinstance(tensor, DTensor):
                self._note(tensor.untyped_storage(), fresh)
        return out

    def _note(self, storage: torch.UntypedStorage, fresh: bool) -> None:
        """`fresh`: allocated by this operation, so that it is no file's, which costs a look at all that is mapped."""
        key, size = storage.data_ptr(), storage.nbytes()
        if not size or key in self._known or not fresh and is_mapped(key):
            return
        self._known.add(key)
        self.alive += size
        self.peak = max(self.peak, self.alive)
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.alive -= size


def fill(folder: Path, name: str, source: str | None = None) -> dict[str, Any]:
    """Shard and materialise a deferred network; `source`: a checkpoint that has its weights."""
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    student = network(deferred=True, **LARGER)
    if source is not None:
        initialise_student(student, source)
    shard_backbone(student, mesh)
    with WholeBytes() as memory:
        materialise(student, torch.device("cpu"))
    own = sum(p.to_local().nbytes for p in student.parameters() if isinstance(p, DTensor))
    weights = {key: whole(value) for key, value in student.state_dict().items()}
    return {"peak": memory.peak - own, "weights": weights, "kept": memory.alive - own}


LARGER = {"depth": 4, "hidden_size": 32}


def main() -> None:
    warnings.filterwarnings("ignore")
    folder, specs = Path(sys.argv[1]), json.loads(sys.argv[2])
    torch.distributed.init_process_group("gloo")
    for spec in specs:
        result = {"fit": fit, "fill": fill}[spec.pop("do", "fit")](folder, **spec)
        torch.save(result, folder / f"{spec['name']}_{torch.distributed.get_rank()}.pt")
    torch.distributed.destroy_process_group()  # left to the interpreter's exit, its threads can abort the process


if __name__ == "__main__":
    main()
