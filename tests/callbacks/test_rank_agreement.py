"""Ranks that train the same network pass; a rank that does something else stops the run on all ranks, by name."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from flowanchor.callbacks.rank_agreement import RankAgreement, check_norms, checksum
from flowanchor.errors import ConfigError, RankDisagreement

ROOT = Path(__file__).parents[2]

START = """
import json, os, sys, types, warnings
import lightning.pytorch as pl
import torch, torch.distributed as dist
from flowanchor.callbacks.rank_agreement import RankAgreement
from flowanchor.errors import RankDisagreement
from flowanchor.interfaces import Batch

rank = int(os.environ["LOCAL_RANK"])
dist.init_process_group("gloo", init_method="file://" + os.path.abspath("rendezvous"), rank=rank, world_size=2)
said = {}
"""

# Leaves at once: threads of gloo that meet the end of the interpreter can abort a process that is done.
END = """
print("SAID", json.dumps(said), flush=True)
os._exit(0)
"""

LIGHTNING = """
class Toy(pl.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.config = {"optimizer": {"lr": 0.1}, "data": {"folder": f"/scratch/{rank}"}, "callbacks": {"own": rank}}
        self.student = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.SiLU(), torch.nn.Linear(4, 2))
        self.frozen = torch.nn.Linear(2, 2).requires_grad_(False)

    def training_step(self, batch, batch_idx):
        return self.student(batch.x1).square().mean()

    def configure_optimizers(self):
        return torch.optim.Adam(self.student.parameters(), lr=self.config["optimizer"]["lr"])

    def configure_gradient_clipping(self, optimizer, **options):
        norm = torch.nn.utils.clip_grad_norm_(self.student.parameters(), 1.0)
        if not torch.isfinite(norm):
            optimizer.zero_grad(set_to_none=True)
        self.log("train/grad_norm", norm * (2.0 if rank and deed == "another norm" else 1.0))

class Data(pl.LightningDataModule):
    def train_dataloader(self):
        batches = torch.randn(12, 2, 5, 3, generator=torch.Generator().manual_seed(0))
        share = 0 if deed == "the same data" else rank
        return torch.utils.data.DataLoader([Batch(pair[share]) for pair in batches], batch_size=None)

class Meddle(pl.Callback):
    def setup(self, trainer, module, stage):
        if rank == 1 and deed == "another setting":
            module.config["optimizer"]["lr"] = 0.2

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if rank == 1 and deed == "another weight" and trainer.global_step == 1:
            with torch.no_grad():
                module.student[2].bias[1] += 1e-6

    def on_after_backward(self, trainer, module):
        weight = module.student[0].weight
        if deed == "not finite" and trainer.global_step == 1:
            weight.grad.fill_(float("inf"))
        if rank == 1 and trainer.global_step == LATE:
            if deed == "another gradient":
                weight.grad[2, 1] += 1e-6
            if deed == "no gradient":
                weight.grad = None

LATE = 2
for name in sys.argv[1:]:
    deed, _, option = name.partition(", ")
    settings = {"steps": 3, "every": None, "accumulate_grad_batches": 1} | (json.loads(option) if option else {})
    check = RankAgreement(settings["steps"], settings["every"])
    trainer = pl.Trainer(
        max_steps=5, accelerator="cpu", devices=2, strategy="ddp", logger=False, enable_checkpointing=False,
        enable_model_summary=False, enable_progress_bar=False, use_distributed_sampler=False,
        callbacks=[check, Meddle()], accumulate_grad_batches=settings["accumulate_grad_batches"],
    )
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        try:
            trainer.fit(Toy(), datamodule=Data())
            said[name] = [trainer.global_step, ""]
        except RankDisagreement as error:
            said[name] = [trainer.global_step, str(error)]
    said[name].append([str(w.message) for w in heard if "same batch" in str(w.message)])
"""


def two_ranks(folder: Path, program: str, *arguments: str) -> list[dict[str, Any]]:
    """What each of two gloo processes found, by scenario."""
    folder.mkdir(exist_ok=True)
    (folder / "program.py").write_text(START + program + END)
    paths = os.pathsep.join(filter(None, [str(ROOT / "src"), os.environ.get("PYTHONPATH", "")]))
    started = []
    for rank in range(2):
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths, "LOCAL_RANK": str(rank)}
        command = [sys.executable, "program.py", *arguments]
        pipe = subprocess.PIPE
        started.append(subprocess.Popen(command, cwd=folder, env=environment, stdout=pipe, stderr=pipe, text=True))
    try:
        outputs = [process.communicate(timeout=120) for process in started]
    finally:
        for process in started:
            process.kill()
    for process, (out, err) in zip(started, outputs, strict=True):
        assert process.returncode == 0, out + err
    return [json.loads(out.split("SAID", 1)[1]) for out, _ in outputs]


# Scenario -> optimizer steps that it is trained for, and what the sentence must say (none: the run passes).
SCENARIOS = {
    "nothing": (5, None),
    'nothing, {"accumulate_grad_batches": 2, "every": 1}': (5, None),
    "not finite": (5, None),
    "the same data": (5, None),
    "another gradient": (
        2,
        r"disagree at step 2: the gradient of student\.0\.weight is another on rank 1 than on rank 0 after reduction; ",
    ),
    "no gradient": (2, r"disagree at step 2: student\.0\.weight has no gradient on rank 1 and has one on rank 0; "),
    "another weight": (2, r"disagree at step 1: the weight of student\.2\.bias is another on rank 1 than on rank 0 "),
    "another norm": (1, r"disagree at step 0: the gradient's norm is \d.* on rank 1 and \d.* on rank 0; "),
    "another setting": (0, r"have different settings: optimizer\.lr is 0\.2 on rank 1 and 0\.1 on rank 0; "),
    'another gradient, {"steps": 2}': (5, None),  # the steps that are checked have passed
    'another gradient, {"steps": 1, "every": 2}': (2, r"disagree at step 2: "),
}


@pytest.fixture(scope="module")
def lightning_runs(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return two_ranks(tmp_path_factory.mktemp("lightning"), LIGHTNING, *SCENARIOS)


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_two_ranks_of_a_lightning_run(lightning_runs, scenario):
    steps, sentence = SCENARIOS[scenario]
    for said in lightning_runs:
        taken, error, _ = said[scenario]
        assert taken == steps
        assert re.search(sentence, error) if sentence else error == ""
    assert lightning_runs[0][scenario][1] == lightning_runs[1][scenario][1], "both ranks stop with the same sentence"


def test_ranks_that_see_the_same_data_are_warned(lightning_runs):
    warned = lightning_runs[0]["the same data"][2]
    assert len(warned) == 1 and "Ranks 0 and 1 train on the same batch at step 0" in warned[0]
    assert lightning_runs[0]["nothing"][2] == []


SHARDED = """
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

def run(name, mesh, meddle=lambda student: None, norm=lambda student: None, after_backward=lambda student: None,
        after_step=lambda student: None):
    torch.manual_seed(0)
    student = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.SiLU(), torch.nn.Linear(4, 5), torch.nn.Linear(5, 1))
    for layer in (student[0], student[2], student):
        fully_shard(layer, mesh=mesh)
    meddle(student)
    trainer = types.SimpleNamespace(global_step=0, callback_metrics={})
    check = RankAgreement()
    check.on_train_start(trainer, student)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    try:
        for step in range(2):
            x = torch.randn(6, 3, generator=torch.Generator().manual_seed(10 * step + rank))
            check.on_train_batch_start(trainer, student, Batch(x), step)
            student(x).square().mean().backward()
            after_backward(student)
            check.on_before_optimizer_step(trainer, student, optimizer)
            trainer.callback_metrics["train/grad_norm"] = norm(student)
            optimizer.step()
            optimizer.zero_grad()
            after_step(student)
            trainer.global_step += 1
            check.on_train_batch_end(trainer, student, None, Batch(x), step)
        said[name] = ""
    except RankDisagreement as error:
        said[name] = str(error)

def whole_norm(student):
    return torch.nn.utils.get_total_norm([p.grad for p in student.parameters()]).full_tensor()

def norm_of_own_shards(student):
    return torch.nn.utils.get_total_norm([p.grad.to_local() for p in student.parameters()])

def change(tensor):
    with torch.no_grad():
        tensor.to_local().mul_(1 + 1e-6 * rank)

shards = init_device_mesh("cpu", (2,))
replicas = init_device_mesh("cpu", (2, 1), mesh_dim_names=("replicate", "shard"))
run("shards", shards, norm=whole_norm)
run("shards, norm not reduced", shards, norm=norm_of_own_shards)
run("shards, gradients not reduced", shards, lambda student: student.set_requires_gradient_sync(False))
run("replicas", replicas, norm=whole_norm)
run("replicas, gradients not reduced", replicas, lambda student: student.set_requires_all_reduce(False))
run("replicas, another gradient", replicas, after_backward=lambda student: change(student[2].bias.grad))
run("replicas, another weight", replicas, after_step=lambda student: change(student[2].bias))
"""


def test_two_ranks_with_sharded_parameters(tmp_path):
    said, also_said = two_ranks(tmp_path, SHARDED)
    assert said == also_said
    assert said["shards"] == said["replicas"] == ""
    assert "step 0: the gradient's norm is " in said["shards, norm not reduced"]
    assert "step 0: no parameter has a gradient on any rank" in said["shards, gradients not reduced"]
    assert "step 0: no parameter has a gradient on any rank" in said["replicas, gradients not reduced"]
    assert "step 0: the gradient of 2.bias is another on rank 1" in said["replicas, another gradient"]
    assert "step 0: the weight of 2.bias is another on rank 1" in said["replicas, another weight"]


MEDDLE = """
import lightning.pytorch as pl

class Meddle(pl.Callback):
    def on_after_backward(self, trainer, module):
        if trainer.global_rank == 1 and trainer.global_step == 1:
            next(p for p in module.student.parameters() if p.grad is not None).grad += 1e-3
"""


@pytest.mark.parametrize("meddled", [False, True])
def test_it_is_on_in_a_training_run(tmp_path, meddled):
    (tmp_path / "meddle.py").write_text(MEDDLE)
    command = [
        sys.executable, str(ROOT / "src" / "train.py"), "backbone.depth=1", "backbone.hidden_size=16",
        "backbone.num_heads=2", "logger=none", "data.batch_size=16", "strategy=ddp", "trainer.devices=2",
        "trainer.accelerator=cpu", "trainer.max_steps=3", "trainer.limit_val_batches=0", "~callbacks.sample_grid",
        "objective=flow_matching", "ema=none",
        *(["+callbacks.meddle._target_=meddle.Meddle"] if meddled else []),
    ]  # fmt: skip
    paths = os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    if meddled:
        sentence = (
            r"^Error: The ranks disagree at step 1: the gradient of student\.\S+ is another on rank 1 than on rank 0"
        )
        assert done.returncode == 1 and re.search(sentence, done.stderr, re.M), done.stderr
    else:
        assert done.returncode == 0 and "disagree" not in done.stderr, done.stderr


def test_one_process_is_not_checked():
    check = RankAgreement()
    module: Any = torch.nn.Linear(2, 2)
    trainer: Any = None  # it must not even be looked at
    check.on_train_start(trainer, module)
    check.on_train_batch_start(trainer, module, None, 0)
    check.on_before_optimizer_step(trainer, module, torch.optim.SGD(module.parameters()))
    check.on_train_batch_end(trainer, module, None, None, 0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.int64, torch.uint8])
def test_a_checksum_sees_every_bit_and_its_place(dtype):
    tensor = (torch.arange(60) % 7).to(dtype).reshape(3, 4, 5)
    seen = {checksum(tensor)}
    assert checksum(tensor.clone()) in seen
    for index in range(tensor.numel()):
        changed = tensor.clone()
        changed.view(-1)[index] += 1
        seen.add(checksum(changed))
    assert len(seen) == tensor.numel() + 1
    swapped = tensor.clone()
    swapped[0, 0, 0], swapped[0, 0, 1] = tensor[0, 0, 1], tensor[0, 0, 0]
    assert checksum(swapped) not in seen
    assert checksum(tensor.transpose(0, 2)) == checksum(tensor.transpose(0, 2).contiguous())
    assert checksum(torch.zeros(0, 3)) == 0 and checksum(torch.tensor(1.0)) != checksum(torch.tensor(2.0))


def test_norms_agree_but_for_their_last_digits():
    check_norms(0, [1.0, 1.0 + 1e-7, 1.0])
    check_norms(0, [float("nan"), float("nan")])
    check_norms(0, [float("inf"), float("inf")])
    check_norms(0, [None, None])
    for norms in ([1.0, 1.01], [float("nan"), 1.0], [1.0, None]):
        with pytest.raises(RankDisagreement, match="on rank 1"):
            check_norms(0, norms)


@pytest.mark.parametrize("settings", [{"steps": -1}, {"every": 0}])
def test_wrong_settings_are_refused(settings):
    with pytest.raises(ConfigError, match="callbacks.rank_agreement"):
        RankAgreement(**settings)
