"""Two processes without DistributedDataParallel, whose gradients are reduced after each replay, are two with it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch

from .runs import differences

SCRIPT = '''
"""One process of two."""
import sys, warnings
from pathlib import Path
warnings.filterwarnings("ignore")
import torch
from lightning.pytorch.strategies import DDPStrategy
from flowanchor.strategies.replicas import ReplicasStrategy
from graphs.runs import KEPT, backbone, batch_for, fit

folder, rank = Path(sys.argv[1]), int(sys.argv[2])
batches = [batch_for(backbone(), seed=10 * rank + i) for i in range(4)]
for accumulate in (1, 2):
    for name, graphs in (("wrapped", False), ("graphed", True)):
        run = fit(
            folder, graphs, batches=batches, steps=4, accumulate_grad_batches=accumulate, devices=2,
            strategy=ReplicasStrategy() if graphs else DDPStrategy(),
        )
        kept = {part: run[part] for part in KEPT}
        torch.save({**kept, "replayed": run["replayed"]}, folder / f"{name}_{accumulate}_{rank}.pt")
'''


def test_two_processes(tmp_path: Path) -> None:
    (tmp_path / "run.py").write_text(SCRIPT)
    (tmp_path / "graphs").symlink_to(Path(__file__).parent)
    environment = {
        **os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(tmp_path), "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(20_000 + os.getpid() % 20_000),
    }  # fmt: skip
    processes = [
        subprocess.Popen(
            [sys.executable, str(tmp_path / "run.py"), str(tmp_path), str(rank)],
            env={**environment, "LOCAL_RANK": str(rank), "RANK": str(rank), "NODE_RANK": "0"},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    for process in processes:
        said, _ = process.communicate(timeout=200)
        assert process.returncode == 0, said

    def outcome(name: str, accumulate: int, rank: int) -> dict[str, object]:
        return torch.load(tmp_path / f"{name}_{accumulate}_{rank}.pt", weights_only=True)

    for accumulate in (1, 2):
        wrapped, graphed = ([outcome(name, accumulate, rank) for rank in range(2)] for name in ("wrapped", "graphed"))
        for ours, theirs in zip(wrapped, graphed, strict=True):
            assert theirs.pop("replayed") and not ours.pop("replayed")
            assert not differences(ours, theirs)[:5]
        assert not differences(graphed[0]["weights"], graphed[1]["weights"])
        assert differences(graphed[0]["rows"], graphed[1]["rows"]), "each process has its own batches"
