"""The LightningModule: batch -> objective -> loss. Nothing in it knows a method, a backbone or a strategy."""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Iterable
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from flowanchor.base.rank_zero import rank_zero_warn
from flowanchor.checkpoints.consolidated import FORMAT
from flowanchor.data.lightning import data_of
from flowanchor.errors import ConfigError, NonFiniteLossError
from flowanchor.interfaces import Backbone, Batch, Objective, ObjectiveResult, TangentEngine, Times, VelocityField
from flowanchor.jvp.compatibility import check, is_low
from flowanchor.jvp.compiled import compile_blocks
from flowanchor.optimizer_settings import with_own_settings

# Streams of random numbers, so that no two uses of one seed share their draws.
TRAIN_STREAM, VALIDATION_STREAM = 1, 2

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
    """

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
    ) -> None:
        super().__init__()
        self.student = student
        self.objective = objective
        self.velocity = velocity
        self.engine = engine
        self.make_optimizer = optimizer
        self.config = config or {}
        self.seed = seed
        self.max_nonfinite_steps = max_nonfinite_steps
        self.compile_options = compile_options
        self.identity: dict[str, Any] = {}  # saved with it: the run's name, whose weights it uses, what resumes changed
        self.kept_settings: Container[str] = ()  # of the optimizer: those that a resume takes from the checkpoint
        self.nonfinite_steps = 0
        self.skipped_in_a_row = 0
        self.last_good_step: int | None = None  # the number of steps after the last one that was not skipped
        self._seen_terms: list[dict[str, Tensor]] = []
        self._borrowed: set[str] | None = None
        self._shown: dict[str, bool] = {}
        objective.check(student)
        velocity.check(student)

    def configure_model(self) -> None:
        """Let a strategy that spreads the networks over the processes do so (`ChainJVPStrategy`); compile blocks."""
        parallelise = getattr(self.trainer.strategy, "parallelise", None)
        if self.objective.kind == "shortcut":  # the others ask for no tangent
            low = is_low(self.trainer.precision)
            check(self.engine, self.student, sharded=parallelise is not None, low_precision=low)
        if parallelise is not None:
            parallelise(self)
        if self.compile_options is not None:
            for network in self.modules():
                if isinstance(network, Backbone):
                    compile_blocks(network, **self.compile_options)

    def on_fit_start(self) -> None:
        """Tell the networks what stands for no condition where the data says it (the negative prompt's text)."""
        null = getattr(data_of(self.trainer), "null_condition", None)
        if null is not None:
            for network in self.modules():
                if isinstance(network, Backbone):
                    network.set_null_context(null)

    # ------------------------------------------------------------------------------------------------------ steps

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        self.objective.at_step(self.trainer.global_step)
        noise, times = self._draw(batch, TRAIN_STREAM, self.trainer.fit_loop.epoch_loop.total_batch_idx)
        result = self.objective(self.student, batch, self.velocity, self.engine, noise, *times)
        self._seen_terms.append(result.terms)
        self._log_result("train", result, batch)
        return result.loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        noise, times = self._draw(batch, VALIDATION_STREAM, batch_idx)
        self._log_result("val", self.objective(self.student, batch, self.velocity, self.engine, noise, *times), batch)

    def _draw(self, batch: Batch, stream: int, step: int) -> tuple[Tensor, Times]:
        """This rank's share of the noise and times of the joint batch; then the rank's own stream for what follows."""
        x1 = batch.x1
        seeds = np.random.SeedSequence((self.seed, stream, step)).generate_state(2)
        size, rank = x1.shape[0], self.global_rank
        mine = slice(rank * size, (rank + 1) * size)
        torch.manual_seed(int(seeds[0]))
        noise = torch.randn(self.trainer.world_size * size, *x1.shape[1:], device=x1.device)[mine].to(x1.dtype)
        t, end = self.objective.draw(self.trainer.world_size * size, x1.device)
        torch.manual_seed(int(seeds[1]) + rank)
        return noise, Times(t[mine], None if end is None else end[mine])

    def _log_result(self, stage: str, result: ObjectiveResult, batch: Batch) -> None:
        validating = stage == "val"
        values = {f"{stage}/{name}": value for name, value in {**result.terms, **result.diagnostics}.items()}
        options: dict[str, Any] = {"batch_size": batch.x1.shape[0], "on_step": not validating, "on_epoch": validating}
        self.log(f"{stage}/loss", result.loss.detach(), prog_bar=True, sync_dist=validating, **options)
        terms = {f"{stage}/{name}" for name in result.terms}
        for name, value in values.items():
            # Lightning wants a name to be logged in one way: as it was at first. An only term is the loss itself; one
            # that others join after a warm-up is not.
            several = len(terms) > 1 or bool(getattr(self.objective, "anchor_warmup_steps", 0))
            shown = self._shown.setdefault(name, name in terms and not validating and several)
            self.log(name, value, prog_bar=shown, sync_dist=validating, **options)

    # ------------------------------------------------------------------------------------------------ optimisation

    def configure_optimizers(self) -> torch.optim.Optimizer:
        # A strategy may shard the student's parameters, but not all of them, and not the objective's own.
        whole = [p for p in self.student.whole_parameters() if p.requires_grad]
        kept = {id(p) for p in whole}
        rest = [p for p in self.student.parameters() if p.requires_grad and id(p) not in kept]
        own = [p for p in self.objective.parameters() if p.requires_grad]
        trained = [parameters for parameters in (rest, whole, own) if parameters]
        groups = [{"params": parameters} for parameters in trained] if len(trained) > 1 else trained[0]
        try:
            return with_own_settings(self.make_optimizer(groups), self.kept_settings)
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
        if bool(torch.isfinite(norm)):
            self.skipped_in_a_row, self.last_good_step = 0, self.trainer.global_step + 1
        else:
            self._skip_step(optimizer)
        self._seen_terms.clear()
        self.log("train/grad_norm", norm, on_step=True, on_epoch=False)
        self.log("train/nonfinite_steps", float(self.nonfinite_steps), on_step=True, on_epoch=False)

    def _skip_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Drop the gradients, so that the optimizer leaves weights and moments alone; count, name, stop if it lasts."""
        optimizer.zero_grad(set_to_none=True)
        self.nonfinite_steps += 1
        self.skipped_in_a_row += 1
        broken = sorted(
            {name for terms in self._seen_terms for name, value in terms.items() if not torch.isfinite(value)}
        )
        where = (
            f"the {' and '.join(broken)} loss"
            if broken
            else "the gradient (every loss term was finite on this process)"
        )
        row = self.skipped_in_a_row
        rank_zero_warn(
            f"Step {self.trainer.global_step} was skipped: {where} was not finite "
            f"({row} in a row, {self.nonfinite_steps} in all)."
        )
        if row >= self.max_nonfinite_steps:
            raise NonFiniteLossError(
                f"Training stopped at step {self.trainer.global_step}: {where} was not finite {row} times in a row "
                "(max_nonfinite_steps), and no checkpoint was written meanwhile: lower optimizer.lr, "
                "use trainer.precision=32-true, or check the data."
            )

    def on_train_end(self) -> None:
        """A run whose last steps did nothing has not succeeded."""
        if self.skipped_in_a_row:
            raise NonFiniteLossError(
                f"Training ended at step {self.trainer.global_step}, and its last {self.skipped_in_a_row} steps were "
                "skipped because the loss or its gradient was not finite: no checkpoint was written meanwhile; lower "
                "optimizer.lr, use trainer.precision=32-true, or check the data."
            )

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

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        own = self.state_dict()
        checkpoint["state_dict"].update({key: value for key, value in own.items() if self.is_elsewhere(key)})
        self.nonfinite_steps = int(checkpoint.get("flowanchor", {}).get("nonfinite_steps", 0))


def skipped_steps(module: pl.LightningModule | None) -> int:
    """How many steps in a row, up to the present one, a module has skipped because they were not finite."""
    return module.skipped_in_a_row if isinstance(module, FlowModule) else 0


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
