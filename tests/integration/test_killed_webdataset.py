"""Two processes train from tars, are killed by SIGKILL in the middle of an epoch and go on as if nothing had been."""

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
import torch

ROOT = Path(__file__).parents[2]
SAMPLES, BATCH, STEPS = 60, 4, 18  # seven batches an epoch on two processes, 18 steps end in the third
KILL_AFTER, SAVE_EVERY = 10, 4

SPY = '''
"""Writes down which samples each rank trains on, by the number that their first value is, and waits a little."""
import os, time
import lightning.pytorch as pl

class Spy(pl.Callback):
    def on_train_start(self, trainer, module):
        with open(f"{os.environ['SPY']}_pid_{trainer.global_rank}", "w") as file:
            file.write(str(os.getpid()))

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        numbers = (batch.x1[:, 0, 0, 0] * 100).round().int().tolist()
        with open(f"{os.environ['SPY']}_{trainer.global_rank}", "a") as file:
            print(trainer.global_step, *numbers, file=file, flush=True)
        time.sleep(float(os.environ.get("DAWDLE", 0)))
'''


def write_tars(folder: Path) -> None:
    folder.mkdir()
    shards = []
    for number in range(3):
        with tarfile.open(folder / f"shard-{number:06d}.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
            for index in range(20 * number, 20 * number + 20):
                values = np.random.default_rng(index).standard_normal((2, 2, 4, 4)).astype(np.float32)
                values[:, 0, 0, 0] = index / 100
                buffer = io.BytesIO()
                np.save(buffer, values)
                for name, content in ((f"{index:08d}.npy", buffer.getvalue()), (f"{index:08d}.cls", b"1")):
                    header = tarfile.TarInfo(name)
                    header.size = len(content)
                    tar.addfile(header, io.BytesIO(content))
        shards.append({"url": f"shard-{number:06d}.tar", "nsamples": 20})
    (folder / "index.json").write_text(json.dumps({"shardlist": shards}))
    torch.save({"mean": torch.zeros(1, 2, 1, 1), "std": torch.ones(1, 2, 1, 1)}, folder / "latents_stats.pt")


def start(folder: Path, spy: str, name: str, dawdle: float = 0.0) -> subprocess.Popen:
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(ROOT / "src/train.py"),
        "data=webdataset", "data.root=tars", "data.channels=2", "data.size=4", "data.num_classes=3", "data.window=7",
        f"data.batch_size={BATCH}", "data.num_workers=2", "objective=flow_matching", "strategy=ddp", "logger=none",
        "backbone.depth=1", "backbone.hidden_size=16", "backbone.num_heads=2", "trainer.devices=2", "ema=none",
        "trainer.accelerator=cpu", f"trainer.max_steps={STEPS}", "trainer.limit_val_batches=0", "callbacks=default",
        "~callbacks.sample_grid", "~callbacks.best", f"callbacks.last.every_n_train_steps={SAVE_EVERY}",
        "+callbacks.spy._target_=spy.Spy", f"name={name}",
    ]  # fmt: skip
    paths = os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH", "")]))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths, "SPY": spy, "DAWDLE": str(dawdle)}
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=folder, env=environment, stdout=pipe, stderr=pipe, text=True)


def finish(process: subprocess.Popen) -> None:
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, out + err


def seen(folder: Path, spy: str) -> dict[int, list[list[int]]]:
    """Step -> the samples of rank 0 and of rank 1; of a step that was taken twice, the second time."""
    found: dict[int, list[list[int]]] = {}
    for rank in (0, 1):
        for line in (folder / f"{spy}_{rank}").read_text().splitlines():
            step, *numbers = map(int, line.split())
            found.setdefault(step, [[], []])[rank] = numbers
    return found


def test_killed_in_the_middle_of_an_epoch(tmp_path):
    (tmp_path / "spy.py").write_text(SPY)
    write_tars(tmp_path / "tars")
    finish(start(tmp_path, "whole", "whole"))
    whole = seen(tmp_path, "whole")
    assert sorted(whole) == list(range(STEPS))
    first_epoch = [number for step in range(7) for rank in whole[step] for number in rank]
    assert len(first_epoch) == len(set(first_epoch)) == 56, "every sample once, but for the rest"

    killed = start(tmp_path, "before", "killed", dawdle=0.1)
    latest = time.monotonic() + 120
    while time.monotonic() < latest and killed.poll() is None:
        log = tmp_path / "before_0"
        if log.exists() and len(log.read_text().splitlines()) > KILL_AFTER:
            break
        time.sleep(0.02)
    ranks = [int((tmp_path / f"before_pid_{rank}").read_text()) for rank in (0, 1)]
    for pid in (killed.pid, *ranks):  # the launcher first: it would end the ranks by itself, and more gently
        os.kill(pid, signal.SIGKILL)
    killed.communicate(timeout=60)
    before = seen(tmp_path, "before")
    assert KILL_AFTER <= max(before) < STEPS - 1, "it was killed at the wrong moment"

    finish(start(tmp_path, "after", "killed"))
    after = seen(tmp_path, "after")
    saved = min(after)
    assert saved % SAVE_EVERY == 0 and 7 < saved <= max(before), "it goes on from a checkpoint within the second epoch"
    assert {**before, **after} == whole
