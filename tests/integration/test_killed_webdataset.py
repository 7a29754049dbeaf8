"""Two processes on WebDataset shards, killed with SIGKILL in the middle of an epoch and resumed: the same batches."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parents[2]
SHAPE, CLASSES, SHARDS, BATCH, PROCESSES = (2, 4, 4), 3, [11, 6, 14, 9], 3, 2
EPOCH = sum(SHARDS) // (BATCH * PROCESSES)  # 6 joint batches of 6, of 40 samples
STEPS, SAVED_EVERY, KILLED_AT = 13, 2, 9  # two epochs and a batch; killed in the second one, a step past a checkpoint

SPY = '''
"""A callback that writes down which samples each step of each process is made of, and stands still where it is told."""
import json
import os
import time
from pathlib import Path
import lightning.pytorch as pl

class Spy(pl.Callback):
    def on_train_batch_start(self, trainer, module, batch, batch_index):
        with open(f"{os.environ['SPY']}.{trainer.global_rank}", "a") as file:
            mirrored = (batch.x1[:, 0, 0, 1] < 0).tolist()
            samples = [round(float(v) * 100) for v in batch.x1[:, 0, 0, 0]]
            print(json.dumps([trainer.global_step, samples, mirrored, batch.cond.tolist()]), file=file)
        if trainer.global_step == int(os.environ.get("STAND_STILL_AT", -1)):
            Path(f"{os.environ['SPY']}.{trainer.global_rank}.still").touch()
            time.sleep(600)
'''


def write_tars(folder: Path) -> Path:
    """Every latent tells its sample, and whether it is the mirrored one, by its first two values."""
    folder.mkdir()
    index = 0
    for number, count in enumerate(SHARDS):
        with tarfile.open(folder / f"shard-{number:06d}.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
            for sample in range(index, index + count):
                values = np.random.default_rng(sample).standard_normal((2, *SHAPE), dtype=np.float32)
                values[:, 0, 0, 0], values[:, 0, 0, 1] = sample / 100, (1.0, -1.0)
                buffer = io.BytesIO()
                np.save(buffer, values)
                for name, content in (("npy", buffer.getvalue()), ("cls", str(sample % CLASSES).encode())):
                    member = tarfile.TarInfo(f"{sample:08d}.{name}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
        index += count
    shards = [{"url": f"shard-{n:06d}.tar", "nsamples": count} for n, count in enumerate(SHARDS)]
    (folder / "index.json").write_text(json.dumps({"shardlist": shards}))
    return folder


def start(folder: Path, name: str, spy: Path, stand_still_at: int = -1) -> subprocess.Popen:
    command = [
        sys.executable, str(ROOT / "src" / "train.py"), "data=webdataset", f"data.root={folder / 'tars'}",
        "data.statistics={multiplier: 1.0}", f"data.channels={SHAPE[0]}", f"data.size={SHAPE[1]}",
        f"data.num_classes={CLASSES}", f"data.batch_size={BATCH}", "data.window=5", "data.num_workers=2",
        "codec=identity", "backbone.depth=1", "backbone.hidden_size=16", "backbone.num_heads=2",
        "~callbacks.sample_grid", "~callbacks.best", "objective=flow_matching", "trainer.limit_val_batches=0",
        "ema=none", "logger=none", f"callbacks.last.every_n_train_steps={SAVED_EVERY}",
        "+callbacks.spy._target_=spy.Spy",
        f"name={name}", "strategy=ddp", f"trainer.devices={PROCESSES}", "trainer.accelerator=cpu",
        f"trainer.max_steps={STEPS}",
    ]  # fmt: skip
    paths = [str(folder), os.environ.get("PYTHONPATH", "")]
    environment = {
        **os.environ,
        "SPY": str(spy),
        "STAND_STILL_AT": str(stand_still_at),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
    }
    with (folder / f"{spy.name}.log").open("w") as log:
        return subprocess.Popen(
            command, cwd=folder, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )


def finish(process: subprocess.Popen, log: Path) -> None:
    try:
        assert process.wait(timeout=240) == 0, log.read_text()
    finally:
        kill(process)


def kill(process: subprocess.Popen) -> None:
    """SIGKILL to every process of the run: its ranks and their loaders' workers."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return  # all of them have gone
    process.wait(timeout=60)


def steps(spy: Path, rank: int) -> list:
    """What a process wrote down: step, samples, which of them mirrored, labels."""
    return [json.loads(line) for line in Path(f"{spy}.{rank}").read_text().splitlines()]


@pytest.mark.slow
def test_killed_and_resumed_the_batches_are_those_of_an_uninterrupted_run(tmp_path):
    (tmp_path / "spy.py").write_text(SPY)
    write_tars(tmp_path / "tars")
    whole, killed, resumed = tmp_path / "whole", tmp_path / "killed", tmp_path / "resumed"

    finish(start(tmp_path, "whole", whole), tmp_path / "whole.log")
    process = start(tmp_path, "parts", killed, stand_still_at=KILLED_AT)
    try:
        deadline = time.monotonic() + 240
        while not all(Path(f"{killed}.{rank}.still").exists() for rank in range(PROCESSES)):
            assert process.poll() is None and time.monotonic() < deadline, (tmp_path / "killed.log").read_text()
            time.sleep(0.1)
    finally:
        kill(process)
    assert process.returncode == -signal.SIGKILL
    finish(start(tmp_path, "parts", resumed), tmp_path / "resumed.log")

    saved = KILLED_AT - KILLED_AT % SAVED_EVERY
    assert EPOCH < saved < KILLED_AT < 2 * EPOCH, "killed within an epoch, and within the steps of a checkpoint"
    for rank in range(PROCESSES):
        uninterrupted = steps(whole, rank)
        assert [step for step, *_ in uninterrupted] == list(range(STEPS))
        assert steps(killed, rank) == uninterrupted[: KILLED_AT + 1]
        assert steps(resumed, rank) == uninterrupted[saved:]

    for epoch in range(STEPS // EPOCH):  # and what they see is the data
        seen = [step for rank in range(PROCESSES) for step in steps(whole, rank)[epoch * EPOCH : (epoch + 1) * EPOCH]]
        samples = [sample for _, samples, *_ in seen for sample in samples]
        assert len(samples) == len(set(samples)) == EPOCH * BATCH * PROCESSES
        assert [label for *_, labels in seen for label in labels] == [sample % CLASSES for sample in samples]
        assert samples != sorted(samples) and len({flip for _, _, flips, _ in seen for flip in flips}) == 2

    last = [torch.load(tmp_path / f"outputs/train/{n}/checkpoints/last.ckpt", weights_only=True)
            for n in ("whole", "parts")]  # fmt: skip
    assert last[0]["global_step"] == last[1]["global_step"] == STEPS
    for name, value in last[0]["state_dict"].items():
        assert torch.equal(value, last[1]["state_dict"][name]), name
