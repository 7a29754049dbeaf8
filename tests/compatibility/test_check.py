"""What cannot be is refused before training starts; `compile=` reaches the blocks of student and teacher."""

from __future__ import annotations

import functools
import os
import re
import subprocess
import sys
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from torch import nn

from flowanchor.data.lightning import LightningData
from flowanchor.errors import ConfigError
from flowanchor.interfaces import Backbone
from flowanchor.jumps.guidance import Guidance
from flowanchor.jvp import Chain, FiniteDifference, Full, TwoPass, full
from flowanchor.jvp.compatibility import check, compile_options, is_low, said_of_products, set_products
from flowanchor.jvp.compiled import is_compiled
from flowanchor.module import FlowModule
from flowanchor.plugins.backbones.lightningdit import LightningDiT
from flowanchor.plugins.data.digits import DigitsDataModule
from flowanchor.plugins.objectives.anchors.flow_matching import FlowMatchingAnchor
from flowanchor.plugins.objectives.composed import ComposedObjective
from flowanchor.plugins.objectives.intervals.expanded import ExpandedInterval
from flowanchor.plugins.objectives.shortcuts.consistency import ConsistencyShortcut
from flowanchor.plugins.objectives.times.uniform import Uniform
from flowanchor.plugins.teachers.checkpoint import CheckpointVelocity
from flowanchor.plugins.teachers.data import DataVelocity

ROOT = Path(__file__).resolve().parents[2]


def network() -> LightningDiT:
    torch.manual_seed(0)
    return LightningDiT(8, 2, 1, hidden_size=16, depth=2, num_heads=2, num_classes=10, disable_label_dropout=True)


class NoStages(Backbone):
    sample_shape = (1, 8, 8)

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(64, 64)

    def embed(self, x, t, cond, r=None):
        raise NotImplementedError

    def head(self, tokens, context):
        raise NotImplementedError


@pytest.mark.parametrize("engine", [Chain(), TwoPass()])
def test_a_network_without_stages_is_refused_at_once(engine):
    with pytest.raises(ConfigError, match="NoStages is no chain of stages"):
        check(engine, NoStages(), sharded=False, low_precision=False)


def test_full_needs_torch_2_13_where_the_network_is_sharded(monkeypatch):
    monkeypatch.setattr(full, "TORCH", (2, 12))
    with pytest.raises(ConfigError, match="jvp=full does not pass through a sharded network before torch 2.13"):
        check(Full(), network(), sharded=True, low_precision=False)
    check(Full(), network(), sharded=False, low_precision=True)
    monkeypatch.setattr(full, "TORCH", (2, 13))
    check(Full(), network(), sharded=True, low_precision=False)


def test_finite_differences_need_float32_and_the_weights_as_they_are():
    with pytest.raises(ConfigError, match="drowns in the roundoff of bfloat16"):
        check(FiniteDifference(), network(), sharded=False, low_precision=True)
    with pytest.raises(ConfigError, match="drowns in the roundoff of bfloat16"):
        check(FiniteDifference(), network().bfloat16(), sharded=False, low_precision=False)
    with pytest.raises(ConfigError, match="jvp.dtype=torch.float64 needs a whole copy"):
        check(FiniteDifference(dtype="float64"), network(), sharded=True, low_precision=False)
    check(FiniteDifference(dtype="float64"), network(), sharded=False, low_precision=False)
    check(FiniteDifference(), network(), sharded=True, low_precision=False)


def test_an_engine_of_ones_own_need_not_check():
    check(lambda *inputs: None, network(), sharded=True, low_precision=True)


def test_precisions():
    assert [is_low(p) for p in (32, "32-true", "64-true")] == [False] * 3
    assert [is_low(p) for p in ("bf16-mixed", "16-mixed", "bf16-true", "transformer-engine")] == [True] * 4


def test_choices_of_compile():
    assert compile_options(False) is None and compile_options(True) == {}
    fast = {"mode": "max-autotune-no-cudagraphs"}
    assert compile_options(fast) == fast
    for graphed in ({"mode": "max-autotune"}, {"mode": "reduce-overhead"}, {"options": {"triton.cudagraphs": True}}):
        with pytest.raises(ConfigError, match="overwrites.*use compile={mode:max-autotune-no-cudagraphs}"):
            compile_options(graphed)
    with pytest.raises(ConfigError, match="compile=fast is no choice: use compile=true"):
        compile_options("fast")
    with pytest.raises(ConfigError, match="torch.compile refuses .*'mode': 'fastest'.* or use compile=true.$"):
        compile_options({"mode": "fastest"})
    with pytest.raises(ConfigError, match="torch.compile refuses .*speed.* or use compile=true.$"):
        compile_options({"speed": 2})


# ---------------------------------------------------------------------------------------------------- in training


def module(engine, flow: bool = False, teacher: bool = False, options=None) -> FlowModule:
    shortcut = None if flow else ConsistencyShortcut()
    velocity = CheckpointVelocity.of_network(network(), Guidance(1.0, 0.0, 1.0)) if teacher else DataVelocity()
    return FlowModule(
        network(), ComposedObjective(ExpandedInterval(), Uniform(), FlowMatchingAnchor(), shortcut), velocity, engine,
        functools.partial(torch.optim.AdamW, lr=1e-3), compile_options=options,
    )  # fmt: skip


def fit(trained: FlowModule, folder, precision: str = "32-true") -> None:
    trainer = pl.Trainer(
        max_steps=2, accelerator="cpu", devices=1, precision=precision, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, limit_val_batches=0, default_root_dir=folder,
        inference_mode=False,
    )  # fmt: skip
    trainer.fit(trained, LightningData(DigitsDataModule(batch_size=4)))


def test_training_does_not_start_with_an_impossible_engine(tmp_path, monkeypatch):
    trained = module(FiniteDifference())
    monkeypatch.setattr(FlowModule, "training_step", lambda *inputs: pytest.fail("training started"))
    with pytest.raises(ConfigError, match="jvp=finite_difference drowns"):
        fit(trained, tmp_path, "bf16-mixed")


def test_an_objective_without_tangents_may_have_any_engine(tmp_path):
    fit(module(FiniteDifference(), flow=True), tmp_path, "bf16-mixed")


def test_student_and_teacher_are_compiled_and_train_the_same(tmp_path):
    eager, compiled = module(Chain(), teacher=True), module(Chain(), teacher=True, options={"backend": "eager"})
    for trained in (eager, compiled):
        fit(trained, tmp_path)
    assert compiled.state_dict().keys() == eager.state_dict().keys()
    for name, value in eager.student.state_dict().items():
        torch.testing.assert_close(compiled.student.state_dict()[name], value, rtol=1e-4, atol=1e-6)
    blocks = [b for found in compiled.modules() if isinstance(found, Backbone) for b in found.blocks]
    assert len(blocks) == 4 and all(is_compiled(block) for block in blocks)
    assert not any(is_compiled(block) for block in eager.student.blocks)


@pytest.mark.slow
def test_a_compiled_run_in_bfloat16_on_two_processes(tmp_path):
    """From the command line, to its end: training, validation, and the sample grid in the precision of the run."""
    command = [
        sys.executable, str(ROOT / "src" / "train.py"), "strategy=fsdp_chain_jvp", "trainer.devices=2",
        "trainer.accelerator=cpu", "trainer.precision=bf16-mixed", "compile={backend:eager,fullgraph:true}",
        "backbone.depth=1", "backbone.hidden_size=16", "backbone.num_heads=2", "data.batch_size=8",
        "optimizer.fused=true", "callbacks.sample_grid.nfe=[1]", "callbacks.sample_grid.per_class=1",
        "callbacks.sample_grid.max_classes=8", "trainer.max_steps=2", "trainer.val_check_interval=2",
        "trainer.limit_val_batches=1", "logger=none", "objective=flow_matching",  # tangents: test_matrix.py
        f"hydra.run.dir={tmp_path}",
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "step 2/2" in done.stdout + done.stderr and list(tmp_path.glob("samples/*.png"))


@pytest.mark.parametrize(
    ("device", "precision", "matmul", "said"),
    [
        ("cuda", "32-true", "high", "TF32 .matmul_precision=high.: a tangent has about three exact digits"),
        ("cuda", "32-true", "medium", "bfloat16 .matmul_precision=medium.: a tangent has about two"),
        ("cuda", "32-true", "highest", None),
        ("cuda", "bf16-mixed", "high", None),
        ("cuda", "64-true", "high", None),
        ("cpu", "32-true", "high", None),
    ],
)
def test_a_run_on_a_gpu_says_what_float32_products_are(device, precision, matmul, said, monkeypatch):
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: matmul)
    line = said_of_products(device, precision)
    assert line is None if said is None else re.search(said, line) and "matmul_precision=highest" in line


def test_a_run_that_wants_all_digits_has_them_in_convolutions_too(monkeypatch):
    """A patch embedding is one, and cuDNN takes TF32 for it whatever is said of matrices."""
    asked: list[str] = []
    monkeypatch.setattr(torch, "set_float32_matmul_precision", asked.append)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    for precision, tf32 in (("highest", False), ("high", True), ("medium", True)):
        set_products(precision)
        assert torch.backends.cudnn.allow_tf32 is tf32
    assert asked == ["highest", "high", "medium"]
