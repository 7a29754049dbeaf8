"""The LightningModule: batch -> objective -> loss. Nothing in it knows a method, a backbone or a strategy."""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_map

from flowanchor.base.noise import share_of_noise
from flowanchor.base.rank_zero import rank_zero_info
from flowanchor.checkpoints.consolidated import FORMAT
from flowanchor.checkpoints.description import named_classes
from flowanchor.data.base import FlowDataModule
from flowanchor.data.lightning import data_of
from flowanchor.errors import ConfigError
from flowanchor.graphs.cuda import CudaGraphs, Graphs
from flowanchor.graphs.possible import check_choice, why_not
from flowanchor.graphs.steps import GraphedSteps
from flowanchor.interfaces import Backbone, Batch, DrawnTimes, Objective, TangentEngine, VelocityField
from flowanchor.jvp.chain import Chain
from flowanchor.jvp.compatibility import check, is_low, said_of_products
from flowanchor.jvp.compiled import compile_blocks
from flowanchor.jvp.full import Full
from flowanchor.jvp.stages import is_sharded
from flowanchor.jvp.surroundings import Surroundings
from flowanchor.optimizer_settings import fused_on_cuda, kept_bytes, with_own_settings
from flowanchor.parts import Described, build_network, configuration
from flowanchor.plain_network import PlainNetwork
from flowanchor.recompute import Lasting, Memory, RecomputeChoice, memory_of
from flowanchor.skipped_steps import SkippedSteps
from flowanchor.strategies.abilities import abilities
from flowanchor.weights import local

# Streams of random numbers, so that no two uses of one seed share their draws.
TRAIN_STREAM, VALIDATION_STREAM = 1, 2

UNSEEN = 50  # steps after which skipped ones are looked for though nothing is logged
_KINDS = ("terms/", "diagnostics/")

TEACHER = "velocity."  # weights under this name belong to another file and are not saved with a run


class FlowModule(pl.LightningModule):
    """Trains `student` on an objective.

    Args:
        student: the velocity network.
        objective: the loss.
        velocity: where the target velocity comes from; a frozen teacher in it is not saved with the run.
        engine: computes predictions with their tangents.
        optimizer: parameters, or groups of them -> optimizer.
        config: resolved config of the run, plain values only; stored in checkpoints so that they can be opened alone.
        seed: all randomness of a step is a function of (seed, step), so that a resumed run repeats an uninterrupted
            one, and so that N processes draw what one process with the joint batch draws.
        max_nonfinite_steps: steps in a row with a non-finite loss or gradient after which the run stops.
        compile_options: of torch.compile, for the blocks of student and teacher; None: they run eagerly.
        cuda_graph: replay forward and backward of the training step as CUDA graphs: "auto" where that is possible, true
            (`ConfigError` where it is not) or false.
    """

    make_graphs: Callable[[], Graphs] | None = None  # what captures in the place of CUDA graphs, on any device
    memory: Memory | None = None  # in the place of the device's (`jvp.recompute=auto`)

    def __init__(
        self,
        student: Backbone,
        objective: Objective,
        velocity: VelocityField,
        engine: TangentEngine,
        optimizer: Callable[[Iterable[Any]], torch.optim.Optimizer],
        config: dict[str, Any] | None = None,
        seed: int = 0,
        max_nonfinite_steps: int = 10,
        compile_options: dict[str, Any] | None = None,
        cuda_graph: bool | str = False,
    ) -> None:
        super().__init__()
        check_choice(cuda_graph)
        self.student = student
        self.objective = objective
        self.velocity = velocity
        self.engine = engine
        self.make_optimizer = optimizer
        self.config = config or {}
        self.seed = seed
        self.compile_options = compile_options
        self.cuda_graph = cuda_graph
        self.graphed = False  # decided for each fit
        self._steps: GraphedSteps | None = None
        self._choice: RecomputeChoice | None = None  # until it is made, in the first step of a fit
        self.identity: dict[str, Any] = {}  # saved with it: the run's name, whose weights it uses, what resumes changed
        self.kept_settings: Container[str] = ()  # of the optimizer: those that a resume takes from the checkpoint
        self.skips = SkippedSteps(max_nonfinite_steps)
        self.class_names: tuple[str, ...] = ()  # one for each class, as the data names them; kept in checkpoints
        self._borrowed: set[str] | None = None
        self.shown: set[str] = set()  # what is logged of a step and worth a place on the screen
        objective.check(student)
        velocity.check(student)

    @classmethod
    def from_parts(
        cls,
        network: Callable[..., Any] | nn.Module,
        objective: Objective,
        velocity: VelocityField,
        *,
        engine: TangentEngine | None = None,
        optimizer: Callable[[Iterable[Any]], torch.optim.Optimizer] | None = None,
        sampler: Described | None = None,
        codec: Described = "identity",
        sample_shape: Sequence[int] | None = None,
        classes: int = 0,
        class_names: Sequence[str] = (),
        **settings: Any,
    ) -> FlowModule:
        """A training without a configuration, whose checkpoints `flowanchor.load` opens.

        Args:
            network: `partial(CLASS, argument=...)` of a backbone; or any module `network(x, t, cond)`, whose
                checkpoints `flowanchor.load(PATH, network=...)` opens.
            objective, velocity: the loss, and where its target comes from.
            engine: of tangents; None: `Chain()`, and `Full()` for a module without stages.
            optimizer: None: AdamW with a rate of 1e-3.
            sampler, codec: how it is drawn from afterwards: the name of an option, or `partial(CLASS, argument=...)`.
                None: as the objective is made for.
            sample_shape, classes: of a module that is no backbone.
            class_names: one for each class, kept with it.
            settings: `seed`, `max_nonfinite_steps`, `compile_options`, `cuda_graph`, as of the class.

        Raises:
            ConfigError: parts that do not fit each other, or cannot be described in a checkpoint.
        """
        student, described = build_network(network, sample_shape, classes)
        module = cls(
            student,
            objective,
            velocity,
            (Full() if isinstance(student, PlainNetwork) else Chain()) if engine is None else engine,
            partial(torch.optim.AdamW, lr=1e-3) if optimizer is None else optimizer,
            configuration(described, objective, sampler, codec),
            **settings,
        )
        if class_names and len(class_names) != student.conditioning.classes:
            raise ConfigError(
                f"There are {len(class_names)} class_names, and the network has {student.conditioning.classes} classes."
            )
        module.class_names = tuple(class_names)
        return module

    def configure_model(self) -> None:
        """Let a strategy that spreads the networks over the processes do so (`ChainJVPStrategy`); compile blocks."""
        strategy = abilities(self.trainer.strategy)
        if self.objective.kind == "shortcut":  # the others ask for no tangent
            low = is_low(self.trainer.precision)
            check(self.engine, self.student, sharded=strategy.shards, low_precision=low)
            if isinstance(self.engine, Chain) and self.engine.recompute == "auto":
                self._choice = RecomputeChoice(self.engine, self.student, self.objective, self.velocity)
        strategy.parallelise(self)
        self._decide_on_graphs()
        if self.compile_options is not None:
            for network in self.modules():
                if isinstance(network, Backbone):
                    compile_blocks(network, **self.compile_options)

    def on_fit_start(self) -> None:
        """Tell the networks what stands for no condition where the data says it (the negative prompt's text)."""
        self._steps = None
        data = data_of(self.trainer)
        if isinstance(data, FlowDataModule) and data.class_names:
            self.class_names = tuple(data.class_names)
        if isinstance(data, FlowDataModule) and data.null_condition is not None:
            for network in self.modules():
                if isinstance(network, Backbone):
                    network.conditioning.use_null(data.null_condition)

    def _decide_on_graphs(self) -> None:
        reason = why_not(self.trainer, self.compile_options)
        on_cuda = self.trainer.strategy.root_device.type == "cuda"
        if not on_cuda and self.make_graphs is None:
            reason = f"this run is on {self.trainer.strategy.root_device.type}: use trainer.accelerator=gpu"
        self.graphed = self.cuda_graph is not False and reason is None
        if self.cuda_graph is True and reason is not None:
            raise ConfigError(f"cuda_graph=true cannot be, because {reason}, or leave cuda_graph=auto.")
        if self.cuda_graph == "auto" and reason is not None and on_cuda:
            rank_zero_info(f"The training step runs without a CUDA graph, because {reason}.")
        products = said_of_products(self.trainer.strategy.root_device.type, self.trainer.precision)
        if products is not None:
            rank_zero_info(products)

    # ------------------------------------------------------------------------------------------------------ steps

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        batch = as_batch(batch)
        if not isinstance(batch, Batch):
            raise ConfigError(
                f"The loader yields a {type(batch).__name__}, and a training step takes samples and labels: return "
                "flowanchor.interfaces.Batch from the collate function."
            )
        self.objective.at_step(self.trainer.global_step)
        noise, times, on_host = self._draw(batch, TRAIN_STREAM, self.trainer.fit_loop.epoch_loop.total_batch_idx)
        with self._told(on_host) as routes:
            if self._choice is not None:
                self._choose_recompute(self._choice, batch, noise, times, on_host)
            if self.graphed:
                return self._graphed_step(batch, batch_idx, noise, times, routes)
            result = self.objective(self.student, batch, self.velocity, self.engine, noise, *times)
        self._log_result("train", result.loss, result.terms, result.diagnostics, batch)
        return result.loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        batch = as_batch(batch)
        noise, times, _ = self._draw(batch, VALIDATION_STREAM, batch_idx)
        result = self.objective(self.student, batch, self.velocity, self.engine, noise, *times)
        self._log_result("val", result.loss, result.terms, result.diagnostics, batch)

    def _draw(self, batch: Batch, stream: int, step: int) -> tuple[Tensor, DrawnTimes, Tensor]:
        """This rank's share of the noise and times of the joint batch; then the rank's own stream for what follows.

        Times are drawn on the host, and their `t` there comes last, so that nobody has to ask the device for them. They
        are float32 where the samples are bfloat16, and float64 where they are.
        """
        x1 = batch.x1
        seeds = np.random.SeedSequence((self.seed, stream, step)).generate_state(2)
        size, rank = x1.shape[0], self.global_rank
        mine = slice(rank * size, (rank + 1) * size)
        torch.manual_seed(int(seeds[0]))
        if x1.device.type == "cpu":  # drawn jointly, as golden curves and resumed runs have it; the host has memory
            noise = torch.randn(self.trainer.world_size * size, *x1.shape[1:])[mine]
        else:
            noise = share_of_noise((self.seed, stream, step), rank * size, size, x1.shape[1:], x1.device)
        with _float32_at_least():
            drawn = self.objective.draw(self.trainer.world_size * size, torch.device("cpu"))
        torch.manual_seed(int(seeds[1]) + rank)
        sent = tree_map(lambda value: None if value is None else _sent(value[mine], x1.device), drawn)
        return noise.to(x1.dtype), sent, drawn.t[mine]

    @contextmanager
    def _told(self, t: Tensor) -> Iterator[Hashable]:
        """The networks know the times of this step, and say which of their computations that takes."""
        try:
            student = None if self.objective.asks_elsewhere else self.student.at_times(t)
            yield student, self.velocity.at_times(t)
        finally:
            self.student.at_times(None)
            self.velocity.at_times(None)

    def _log_result(
        self, stage: str, loss: Tensor, terms: Mapping[str, Tensor], diagnostics: Mapping[str, Tensor], batch: Batch
    ) -> None:
        validating = stage == "val"
        options: dict[str, Any] = {"batch_size": batch.x1.shape[0], "on_step": not validating, "on_epoch": validating}
        self.log(f"{stage}/loss", loss.detach(), sync_dist=validating, **options)
        for name, value in {**terms, **diagnostics}.items():
            self.log(f"{stage}/{name}", value, sync_dist=validating, **options)
        if not validating:
            self.skips.note(terms)
            # An only term is the loss itself.
            self.shown |= {f"train/{name}" for name in terms} if len(terms) > 1 else set()

    # ---------------------------------------------------------------------------------------- jvp.recompute=auto

    def _choose_recompute(
        self, choice: RecomputeChoice, batch: Batch, noise: Tensor, times: DrawnTimes, on_host: Tensor
    ) -> None:
        """By the plan, and by a trial of this step; a sharded network is measured as it makes the step."""
        if choice.settled:
            return
        rank_zero_info("Planning what a step of each form of jvp.recompute takes; a large network takes a minute.")
        device, sharded = self.trainer.strategy.root_device, is_sharded(self.student)
        trained = [p for p in (*self.student.parameters(), *self.objective.parameters()) if p.requires_grad]
        gradients, held = _own_bytes(trained), _own_bytes([*self.parameters(), *self.buffers()])
        fresh = not any(optimizer.state for optimizer in self.trainer.optimizers)
        width = 2 if is_low(self.trainer.precision) else 4
        moments = kept_bytes(self.make_optimizer, [local(p.detach()) for p in trained]) if fresh else 0
        lasting = Lasting(held, gradients, moments, width if sharded else None)
        memory = self.memory or memory_of(device, self.trainer.num_devices)
        choice.plan(memory, lasting, batch, noise, times, on_host, self.trainer.global_step)
        choice.settle(self._most, None if sharded else lambda: self._try_step(batch, noise, times))
        if not sharded:
            self._end_choice(choice)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self._choice is not None:
            self._choice.correct(self._most)
            self._end_choice(self._choice)

    def _end_choice(self, choice: RecomputeChoice) -> None:
        self._choice = None
        rank_zero_info(choice.said())

    def _most(self, number: int) -> int:
        """The largest one of all processes."""
        mine = torch.tensor(number, device=self.trainer.strategy.root_device)
        return int(self.trainer.strategy.reduce(mine, reduce_op="max"))

    def _try_step(self, batch: Batch, noise: Tensor, times: DrawnTimes) -> None:
        """Forward and backward, of which nothing remains: neither gradients nor draws nor what a buffer counts."""
        buffers = [(buffer, buffer.clone()) for part in (self.student, self.objective) for buffer in part.buffers()]
        try:
            with Surroundings.here(batch.x1.device, others=True):
                self._forward_backward(*batch, noise, *times)
        finally:
            for parameter in self.parameters():
                parameter.grad = None
            for buffer, kept in buffers:
                buffer.copy_(kept)

    # ------------------------------------------------------------------------------------------------ a graph of it

    def _graphed_step(self, batch: Batch, batch_idx: int, noise: Tensor, times: DrawnTimes, routes: Hashable) -> Tensor:
        """Forward and backward at once. What Lightning calls afterwards for the gradients does nothing."""
        if self._steps is None:
            self._steps = GraphedSteps(
                self._forward_backward,
                parameters=[*self.student.parameters(), *self.objective.parameters()],
                graphs=self.make_graphs() if self.make_graphs is not None else CudaGraphs(batch.x1.device),
                networks=[self.student, self.velocity, self.objective],
                watched=[self.objective, self.velocity, self.engine],
                refuse=self._no_graph_after_all,
                say=rank_zero_info,
            )
        first = batch_idx % self.trainer.accumulate_grad_batches == 0  # as Lightning's own zero_grad
        out = self._steps((*batch, noise, *times), (self.objective.phase, routes), first)
        if self.trainer.world_size > 1 and not self.trainer.fit_loop._should_accumulate():
            self._steps.gradients.reduce(self.trainer.world_size)
        terms, diagnostics = ({n[len(k) :]: v for n, v in out.items() if n.startswith(k)} for k in _KINDS)
        self._log_result("train", out["loss"], terms, diagnostics, batch)
        return out["loss"].clone()  # the next step overwrites it

    def _forward_backward(self, x1: Tensor, cond: Any, noise: Tensor, *times: Tensor | None) -> dict[str, Tensor]:
        """What is captured."""
        result = self.objective(self.student, Batch(x1, cond), self.velocity, self.engine, noise, *times)
        with torch.autocast(x1.device.type, enabled=False):  # as in Lightning, whose backward lies outside of it
            (result.loss / self.trainer.accumulate_grad_batches).backward()
        named = zip(_KINDS, (result.terms, result.diagnostics), strict=True)
        parts = {f"{kind}{name}": value for kind, values in named for name, value in values.items()}
        return {"loss": result.loss.detach(), **parts}

    def _no_graph_after_all(self, reason: str) -> None:
        if self.cuda_graph is True:
            raise ConfigError(f"cuda_graph=true cannot be, because {reason}, or leave cuda_graph=auto.")
        rank_zero_info(f"The training step runs without a CUDA graph, because {reason}.")

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        if not self.graphed:
            super().backward(loss, *args, **kwargs)

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: torch.optim.Optimizer) -> None:
        if not self.graphed:
            super().optimizer_zero_grad(epoch, batch_idx, optimizer)

    def on_fit_end(self) -> None:
        self._steps = None  # Lightning moves the module to the CPU now

    # ------------------------------------------------------------------------------------------------ optimisation

    def configure_optimizers(self) -> torch.optim.Optimizer:
        # A strategy may shard the student's parameters, but not all of them, and not the objective's own.
        whole = [p for p in self.student.whole_parameters() if p.requires_grad]
        kept = {id(p) for p in whole}
        rest = [p for p in self.student.parameters() if p.requires_grad and id(p) not in kept]
        own = [p for p in self.objective.parameters() if p.requires_grad]
        trained = [parameters for parameters in (rest, whole, own) if parameters]
        groups = [{"params": parameters} for parameters in trained] if len(trained) > 1 else trained[0]
        scaled = getattr(self.trainer.precision_plugin, "scaler", None) is not None
        make = fused_on_cuda(self.make_optimizer, self.trainer.strategy.root_device, scaled)
        try:
            return with_own_settings(make(groups), self.kept_settings)
        except ValueError as error:  # PyTorch's own check of rates, decays and betas
            raise ConfigError(f"The optimizer refuses its settings ({error}): correct them under optimizer.") from error

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip by norm, log the norm, and skip the step where it is not finite.

        The gradients are those reduced over all processes, so every process comes to the same verdict without asking.
        """
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        norm = clip_joint_norm(parameters, gradient_clip_val or math.inf)
        self.skips.judge(norm, optimizer, self.trainer.global_step)
        if self.trainer._logger_connector.should_update_logs or self.trainer.global_step % UNSEEN == 0:
            self.skips.read().stop_if_it_lasts()
        self.log("train/grad_norm", norm, on_step=True, on_epoch=False)
        self.log("train/nonfinite_steps", self.skips.logged(), on_step=True, on_epoch=False)

    def on_train_end(self) -> None:
        """A run whose last steps did nothing has not succeeded."""
        self.skips.check_end(self.trainer.global_step)

    @property
    def nonfinite_steps(self) -> int:
        """How many steps of the run were skipped; the host waits for the device where they are counted there."""
        return self.skips.read().total

    # ------------------------------------------------------------------------------------------------- checkpoints

    def is_elsewhere(self, key: str) -> bool:
        """Whether an entry of the state dict belongs to another file: the teacher's, or the base under adapters."""
        if self._borrowed is None:
            self._borrowed = {f"student.{name}" for name in self.student.borrowed()}
        return key.startswith(TEACHER) or key in self._borrowed

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """The teacher belongs to another file; what is needed to open this one alone goes in."""
        state = checkpoint["state_dict"]
        checkpoint["state_dict"] = {key: value for key, value in state.items() if not self.is_elsewhere(key)}
        checkpoint["flowanchor"] = {
            "format": FORMAT,
            "kind": self.objective.kind,
            "config": self.config,
            "step": int(self.trainer.global_step),
            "nonfinite_steps": self.nonfinite_steps,
            **self.identity,
        }
        names = named_classes(self.class_names, self.student.conditioning.classes)
        if names:
            checkpoint["flowanchor"]["class_names"] = names

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        own = self.state_dict()
        checkpoint["state_dict"].update({key: value for key, value in own.items() if self.is_elsewhere(key)})
        self.skips.restore(int(checkpoint.get("flowanchor", {}).get("nonfinite_steps", 0)))


def as_batch(given: Any) -> Any:
    """Samples, or samples and labels, of a loader of one's own as the `Batch` that they are; anything else as it is."""
    pair = isinstance(given, (list, tuple)) and not isinstance(given, Batch) and len(given) in (1, 2)
    return Batch(*given) if pair and all(isinstance(part, Tensor) for part in given) else given


def skipped_steps(module: pl.LightningModule | None) -> int:
    """How many steps in a row, up to the present one, a module has skipped because they were not finite."""
    return module.skips.read().in_a_row if isinstance(module, FlowModule) else 0


@contextmanager
def _float32_at_least() -> Iterator[None]:
    """Lightning's precision=bf16-true has tensors made in bfloat16, whose steps near 1 are 0.004."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.promote_types(before, torch.float32))
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@torch.no_grad()
def _own_bytes(tensors: Iterable[Tensor]) -> int:
    return sum(local(tensor).nbytes for tensor in tensors)


def _sent(values: Tensor, device: torch.device) -> Tensor:
    """To a device, without waiting for it."""
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values.to(device)


@torch.no_grad()
def clip_joint_norm(parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
    """Clip the gradients of sharded and of whole parameters by their one norm, and return it: a scalar, on every rank.

    Gradients of parameters that every rank holds whole must be equal on all ranks.
    """
    trained = [p for p in parameters if p.grad is not None]
    sharded = [p for p in trained if isinstance(p.grad, DTensor)]
    plain = [p for p in trained if not isinstance(p.grad, DTensor)]
    norms = [nn.utils.get_total_norm([p.grad for p in kind if p.grad is not None]) for kind in (sharded, plain) if kind]
    whole = [norm.full_tensor() if isinstance(norm, DTensor) else norm for norm in norms]
    total = torch.linalg.vector_norm(torch.stack(whole)) if len(whole) > 1 else (whole or [torch.zeros(())])[0]
    for kind in (sharded, plain):
        nn.utils.clip_grads_with_norm_(kind, max_norm, total)
    return total
