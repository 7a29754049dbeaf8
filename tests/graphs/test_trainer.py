"""Whole trainings whose step is replayed are those whose step is not, bit for bit."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy

from flowanchor.errors import ConfigError, NonFiniteLossError
from flowanchor.graphs.capture import CaptureError
from flowanchor.graphs.stand_in import StandIn
from flowanchor.interfaces import Batch
from flowanchor.jumps.guidance import Guidance
from flowanchor.jvp import Chain, FiniteDifference, Full, TwoPass
from flowanchor.module import FlowModule
from flowanchor.plugins.teachers.checkpoint import CheckpointVelocity
from flowanchor.plugins.teachers.student import SelfVelocity
from flowanchor.strategies.chain_jvp import ChainJVPStrategy
from flowanchor.strategies.replicas import ReplicasStrategy

from .runs import assert_equal_runs, backbone, batch_for, fit

pytestmark = pytest.mark.filterwarnings("ignore")

OBJECTIVES: dict[str, tuple[str, ...]] = {
    "facm": ("objective=facm",),
    "meanflow": ("objective=meanflow",),
    "alpha_flow": ("objective=alpha_flow", "objective.shortcut.run_steps=8"),
    "imf": ("objective=imf",),
    "scm": ("objective=scm", "objective.shortcut.warmup_steps=6"),
    "flow_matching": ("objective=flow_matching",),
    "warm-up": ("objective=facm", "objective.anchor_warmup_steps=4", "objective/weight=log_variance"),
}


def slowly(*elsewhere: Any) -> Any:
    """For `make test-slow`: check_objective holds these steps against their replays already (test_contract.py)."""
    return pytest.param(*elsewhere, marks=pytest.mark.slow)


def both(folder: Path, forms: int = 1, **settings: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    eager = fit(folder, False, **settings)
    graphed = fit(folder, True, **settings)
    assert graphed["captured"] == forms and graphed["replayed"] > 0 and eager["captured"] == 0
    assert_equal_runs(eager, graphed)
    return eager, graphed


@pytest.mark.parametrize(
    "name", ["facm", "alpha_flow", "warm-up", *map(slowly, ("meanflow", "imf", "scm")), "flow_matching"]
)
def test_every_objective(tmp_path: Path, name: str) -> None:
    forms = {"alpha_flow": 3, "warm-up": 2}.get(name, 1)
    both(tmp_path, forms=forms, goal=OBJECTIVES[name], steps={1: 4, 2: 8}.get(forms, 11))


@pytest.mark.parametrize(
    "engine",
    [Chain(False), Chain("selective"), slowly(Full()), slowly(TwoPass()), TwoPass(checkpoint=True), FiniteDifference()],
    ids=repr,
)
def test_every_engine(tmp_path: Path, engine: Any) -> None:
    both(tmp_path, engine=engine, steps=4)


@pytest.mark.parametrize("name", [slowly("sit"), slowly("dit"), "wan"])
def test_every_backbone(tmp_path: Path, name: str) -> None:
    both(tmp_path, network=name, steps=4)


def test_two_experts_are_two_graphs(tmp_path: Path) -> None:
    goal = ("objective=facm", "objective/time=routed", "objective.time.boundary=0.5", "objective.time.time.shift=1")
    both(tmp_path, forms=2, network="wan_experts", goal=goal, steps=12)


@pytest.mark.parametrize(
    "precision, name",
    [
        ("bf16-true", "facm"),
        ("bf16-mixed", "alpha_flow"),
        pytest.param("bf16-mixed", "facm", marks=pytest.mark.slow),
        pytest.param("bf16-true", "alpha_flow", marks=pytest.mark.slow),
    ],
)
def test_low_precision(tmp_path: Path, precision: Any, name: str) -> None:
    both(tmp_path, goal=OBJECTIVES[name], precision=precision, steps=4)


@pytest.mark.parametrize("name", ["facm", "warm-up"])
def test_accumulation(tmp_path: Path, name: str) -> None:
    goal, forms = OBJECTIVES[name], 1
    if name == "warm-up":
        goal, forms = (*goal, "objective.anchor_warmup_steps=2"), 2
    both(tmp_path, forms=forms, goal=goal, accumulate_grad_batches=2, steps=2 + 2 * forms)


def test_guided_teachers(tmp_path: Path) -> None:
    frozen = CheckpointVelocity.of_network(backbone(), Guidance(1.75, 0.125, 0.9))
    both(tmp_path, velocity=frozen, steps=4)
    both(tmp_path, velocity=SelfVelocity(1.75), steps=4)


def test_the_step_keeps_the_rules_of_a_capture(tmp_path: Path) -> None:
    """Under the guard, which rounds some operators otherwise: nothing is read, no state is set."""
    frozen = CheckpointVelocity.of_network(backbone(), Guidance(1.75, 0.125, 0.9))
    for settings in ({"velocity": frozen}, {"network": "dit"}, {"network": "wan"}, {"engine": TwoPass(True)}):
        assert fit(tmp_path, True, guarded=True, steps=4, **settings)["replayed"] == 2  # type: ignore[arg-type]


def test_odd_batches_and_lengths_of_text(tmp_path: Path) -> None:
    network = backbone("wan")
    shapes = [(4, 5), (4, 6), (3, 5), (4, 7), (2, 5), (4, 5)]  # five forms: the last one stays eager
    batches = [batch_for(network, size, seed, length) for seed, (size, length) in enumerate(shapes)]
    _, graphed = both(tmp_path, forms=4, network="wan", batches=batches, steps=19)
    assert graphed["replayed"] == 5 + 1 + 1 + 1


def test_validation_with_averaged_weights(tmp_path: Path) -> None:
    both(tmp_path, steps=6, val_check_interval=3, check_val_every_n_epoch=None)


class Grid(pl.Callback):
    """Draws in evaluation mode, as the sample grid does."""

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, *_: Any) -> None:
        module.student.eval()
        with torch.random.fork_rng([]), torch.no_grad():
            module.student(torch.randn(2, 1, 4, 4), torch.rand(2), torch.zeros(2, dtype=torch.long))
        module.student.train()


class Meddle(pl.Callback):
    """Does something to the networks after one step."""

    def __init__(self, what: str) -> None:
        self.what = what

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, *_: Any) -> None:
        if self.what == "gradients":
            trainer.optimizers[0].zero_grad(set_to_none=True)
        elif trainer.global_step == 4:
            if self.what == "weights":
                weight = next(p for p in module.student.parameters() if p.requires_grad)
                weight.data = weight.data.clone()
            else:
                module.student.eval()


@pytest.mark.parametrize(
    "callback, forms", [(Grid(), 1), (Meddle("weights"), 2), (Meddle("mode"), 2), (Meddle("gradients"), 1)],
    ids=["grid", "weights", "mode", "gradients"],
)  # fmt: skip
def test_what_others_do_between_steps(tmp_path: Path, callback: pl.Callback, forms: int) -> None:
    both(tmp_path, forms=forms, callbacks=[callback], steps=7)


def test_resume(tmp_path: Path) -> None:
    one = [batch_for(backbone())]
    whole = fit(tmp_path, False, batches=one, steps=8)
    half = fit(tmp_path, True, batches=one, steps=4)
    half["trainer"].save_checkpoint(tmp_path / "half.ckpt")
    rest = fit(tmp_path, True, batches=one, steps=8, checkpoint=tmp_path / "half.ckpt")
    assert rest["replayed"] > 0
    assert_equal_runs(rest, {**whole, "rows": whole["rows"][4:]})


def test_a_second_fit_captures_anew(tmp_path: Path) -> None:
    from torch.utils.data import DataLoader

    runs = [fit(tmp_path, graphs, steps=4) for graphs in (False, True)]
    for run in runs:
        trainer, module = run["trainer"], run["module"]
        trainer.fit_loop.epoch_loop.max_steps = 8
        trainer.fit(module, DataLoader([batch_for(module.student)], batch_size=None))  # type: ignore[arg-type]
    first, second = (dict(run["module"].state_dict()) for run in runs)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert runs[1]["module"]._steps is None


# ------------------------------------------------------------------------------------------------- steps not finite


def poisoned(*steps: int, count: int = 12) -> list[Batch]:
    """One batch for each step; NaN at some."""
    batches = [batch_for(backbone(), seed=seed) for seed in range(count)]
    for step in steps:
        batches[step] = Batch(batches[step].x1 * float("nan"), batches[step].cond)
    return batches


@pytest.mark.parametrize("fused", [True, False])
def test_nonfinite_steps_are_skipped_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fused: bool) -> None:
    batches = poisoned(0, 4, 5)
    eager, _ = both(tmp_path, fused=fused, batches=batches, steps=9)
    assert isinstance(eager["module"].skips.verdict, torch.Tensor if fused else bool)
    assert eager["skipped"] == 3 and eager["updates"] == 6
    assert [row["train/nonfinite_steps"] for row in eager["rows"]] == [1, 1, 1, 1, 2, 3, 3, 3, 3]
    monkeypatch.setattr("flowanchor.skipped_steps.is_told_on_device", lambda *_: False)
    assert_equal_runs(eager, fit(tmp_path, False, fused=fused, batches=batches, steps=9))  # the host's own verdict


def test_a_device_that_counts_stops_the_run_when_it_is_read(tmp_path: Path) -> None:
    """Steps 4 to 6 are three in a row; something is logged at steps 5 and 7 (every second one)."""
    with pytest.raises(NonFiniteLossError, match=r"step 7: the anchor and shortcut loss was not finite 4 times"):
        fit(tmp_path, True, batches=poisoned(4, 5, 6, 7, 8, 9), steps=12, module_settings={"max_nonfinite_steps": 3})
    with pytest.raises(NonFiniteLossError, match=r"ended at step 8, and its last 2 steps"):
        fit(tmp_path, True, batches=poisoned(6, 7), steps=8)


# ------------------------------------------------------------------------------------------------------ where it is not


@pytest.mark.parametrize(
    "settings, reason",
    [
        ({"detect_anomaly": True}, "detect_anomaly"),
        ({"module_settings": {"compile_options": {"mode": "reduce-overhead"}}}, "max-autotune-no-cudagraphs"),
    ],
)
def test_refusals_name_the_reason(tmp_path: Path, settings: Any, reason: str) -> None:
    with pytest.raises(ConfigError, match=f"cuda_graph=true cannot be, because .*{reason}"):
        fit(tmp_path, True, steps=1, **settings)


def told(strategy: Any, precision: Any = None, compile_options: Any = None, **settings: Any) -> Any:
    """A trainer, as far as it is asked whether its step can be a graph; the options of compilation beside it."""
    plugin = SimpleNamespace(scaler=None) if precision is None else precision
    made = {"_detect_anomaly": False, "precision": "bf16-mixed", "precision_plugin": plugin, **settings}
    return SimpleNamespace(strategy=strategy, **made), compile_options


@pytest.mark.parametrize(
    "given, reason",
    [
        (told(SingleDeviceStrategy("cpu")), None),
        (told(ReplicasStrategy()), None),
        (told(SingleDeviceStrategy("cpu"), compile_options={"mode": "max-autotune-no-cudagraphs"}), None),
        (told(ChainJVPStrategy()), "FSDP2.* gathers its weights .*: use strategy=ddp"),
        (told(DDPStrategy()), "DDPStrategy wraps the module .*: use strategy=ddp"),
        (told(SingleDeviceStrategy("cpu"), SimpleNamespace(scaler=object())), "16-mixed .*: use .*bf16-mixed"),
        (told(SingleDeviceStrategy("cpu"), _detect_anomaly=True), "detect_anomaly=true .*: leave it out"),
        (told(SingleDeviceStrategy("cpu"), compile_options={"mode": "max-autotune"}), "mode=max-autotune makes"),
    ],
    ids=["one", "ddp", "no-cudagraphs", "fsdp", "wrapped", "scaled", "anomaly", "autotune"],
)
def test_on_a_gpu_one_line_says_why_not(given: Any, reason: str | None, caplog: pytest.LogCaptureFixture) -> None:
    """The module's own decision, with a trainer that says that its device is a GPU."""
    trainer, options = given
    with mock.patch.object(type(trainer.strategy), "root_device", torch.device("cuda")):
        for choice in ("auto", True):
            module = SimpleNamespace(trainer=trainer, cuda_graph=choice, compile_options=options, make_graphs=None)
            if choice is True and reason is not None:
                with pytest.raises(ConfigError, match=f"cuda_graph=true cannot be, because .*{reason}"):
                    FlowModule._decide_on_graphs(module)  # type: ignore[arg-type]
            else:
                FlowModule._decide_on_graphs(module)  # type: ignore[arg-type]
            assert module.graphed is (reason is None)
    lines = [record.getMessage() for record in caplog.records if "CUDA graph" in record.getMessage()]
    assert len(lines) == (reason is not None)
    assert reason is None or re.search(f"runs without a CUDA graph, because .*{reason}", lines[0])


def test_one_line_says_that_it_is_one(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    goal = OBJECTIVES["warm-up"]  # two forms, one line
    assert fit(tmp_path, True, goal=goal, steps=8, module_settings={"cuda_graph": "auto"})["captured"] == 2
    assert caplog.text.count("training step are replayed as a CUDA graph from here on.") == 1


def test_on_a_cpu(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(ConfigError, match="cuda_graph=true cannot be, because this run is on cpu"):
        fit(tmp_path, False, steps=1, module_settings={"cuda_graph": True})
    with pytest.raises(ConfigError, match="cuda_graph=maybe is no choice: use cuda_graph=auto, true or false"):
        fit(tmp_path, False, steps=1, module_settings={"cuda_graph": "maybe"})
    run = fit(tmp_path, False, steps=1, module_settings={"cuda_graph": "auto"})
    assert not run["module"].graphed and "CUDA graph" not in caplog.text


@pytest.mark.parametrize(
    "recompute", [True, *(pytest.param(way, marks=pytest.mark.slow) for way in ("selective", False))]
)
def test_compiled_blocks_in_a_graph(tmp_path: Path, recompute: bool | str) -> None:
    """The compiled dual pass among them; equal to the same without a graph."""
    settings: dict[str, Any] = {"compile_options": {"backend": "eager"}}
    runs = [
        fit(tmp_path, graphs, engine=Chain(recompute=recompute), module_settings=settings, steps=4)
        for graphs in (False, True)
    ]
    assert runs[1]["captured"] == 1 and runs[1]["replayed"] == 2
    assert_equal_runs(*runs)


def test_a_capture_that_fails(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What PyTorch cannot capture runs eagerly under `auto`, from that very step on, and is told under `true`."""

    def refuse(self: Any, function: Any) -> Any:
        raise CaptureError("PyTorch could not capture it (out of memory).")

    eager = fit(tmp_path, False, steps=4)
    monkeypatch.setattr(StandIn, "capture", refuse)
    auto = fit(tmp_path, True, steps=4, module_settings={"cuda_graph": "auto"})
    assert caplog.text.count("without a CUDA graph, because PyTorch could not capture it (out of memory).") == 1
    assert_equal_runs(eager, auto)
    with pytest.raises(ConfigError, match="cuda_graph=true cannot be, because PyTorch could not capture it"):
        fit(tmp_path, True, steps=4)
