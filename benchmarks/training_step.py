"""What a training step costs the host on a CPU: operators, values that are read, seconds; now and at another commit.

    python benchmarks/training_step.py --before COMMIT   # about ten minutes; refreshes docs/performance.md
    python benchmarks/training_step.py                   # the present code alone; prints, and writes nothing
    python benchmarks/training_step.py --steps 2         # the same, of two steps
    python benchmarks/training_step.py --network wan --before COMMIT

The run is `train.py` as it stands (digits, FACM, a small LightningDiT; or a small Wan on random texts), with a fused
optimizer as on a GPU, an average and a checkpoint callback that is never due. Operators are calls of PyTorch's
dispatcher; a value that is read is one for which the host would wait on a GPU. The step as a graph is replayed by the
stand-in (`flowanchor.graphs.stand_in`), whose operators inside the replay a graph would not call.
"""

from __future__ import annotations

import argparse
import inspect
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

from harness import commit, machine, markdown, refresh, write_json

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "training_step_cpu.json"
FIRST = 6  # the first step that is looked at
LOGGED = 10_000  # nothing is logged in them
NETWORKS: dict[str, list[str]] = {
    "lightningdit": [],
    "wan": ["backbone=wan", "backbone.num_layers=4", "backbone.text_dim=32", "backbone.text_len=16"],
}


# ------------------------------------------------------------------------------------------------------- one process


def work(what: str, graphed: bool, steps: int, network: str) -> dict[str, Any]:
    """Train, and count (`counts`) or time (`seconds`) steps; runs with whichever flowanchor is found first."""
    import lightning.pytorch as pl
    import torch
    from hydra import compose, initialize_config_module
    from hydra.utils import instantiate
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils.data import DataLoader

    from flowanchor.callbacks.checkpointing import LastCheckpoint
    from flowanchor.ema import EMA
    from flowanchor.module import FlowModule

    torch.set_num_threads(1)
    with initialize_config_module("flowanchor.conf", version_base=None):
        cfg = compose("train", overrides=["data.batch_size=16", *NETWORKS[network]])
    torch.manual_seed(0)
    student = instantiate(cfg.backbone)
    if network == "wan":
        from flowanchor.interfaces import Batch
        from flowanchor.text import base

        texts = torch.randn(16, cfg.backbone.text_len, cfg.backbone.text_dim)
        texts = vars(base).get("Tokens", lambda tensor: tensor)(texts)  # once, a text was a tensor
        batches = 32 * [Batch(torch.randn(16, *student.sample_shape), texts)]
    else:
        data = instantiate(cfg.data)
        data.setup("fit")
        batches = 4 * list(islice(data.train_dataloader(), 8))  # what loading costs is not a step's; one epoch
    settings: dict[str, Any] = {}
    if "cuda_graph" in inspect.signature(FlowModule).parameters:
        settings["cuda_graph"] = graphed
    module = FlowModule(
        student, instantiate(cfg.objective, _convert_="all"), instantiate(cfg.teacher), instantiate(cfg.jvp),
        lambda parameters: torch.optim.AdamW(parameters, lr=1e-3, fused=True), **settings,
    )  # fmt: skip
    if graphed:
        from flowanchor.graphs.capture import capturing
        from flowanchor.graphs.stand_in import StandIn

        module.make_graphs = lambda: StandIn([*module.student.parameters()], guarded=False)
    else:

        def capturing() -> bool:
            return False

    counts: Counter[str] = Counter()

    class Operators(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            name = func.overloadpacket.__name__
            counts["inside" if capturing() else "outside"] += 1
            if name == "_local_scalar_dense":
                counts["read"] += 1
            elif name == "lift_fresh":
                counts["made of numbers"] += 1
            return func(*args, **(kwargs or {}))

    class Watch(pl.Callback):
        seconds: list[float] = []
        mode: Any = None

        def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
            step = trainer.global_step
            if what == "counts" and step == FIRST:
                self.mode = Operators()
                self.mode.__enter__()
            elif what == "counts" and step == FIRST + steps:
                self.mode.__exit__(None, None, None)
            self.seconds.append(time.process_time())

    watch = Watch()
    with tempfile.TemporaryDirectory() as folder:
        trainer = pl.Trainer(
            max_steps=FIRST + steps + 1, max_epochs=-1, accelerator="cpu", logger=False, enable_progress_bar=False,
            enable_model_summary=False, default_root_dir=folder, num_sanity_val_steps=0, limit_val_batches=0,
            inference_mode=False, gradient_clip_val=1.0, log_every_n_steps=LOGGED, use_distributed_sampler=False,
            callbacks=[EMA(sigma_rel=0.2), LastCheckpoint(folder, every_n_train_steps=LOGGED), watch],
        )  # fmt: skip
        trainer.fit(module, DataLoader(batches, batch_size=None))  # type: ignore[arg-type]
    if what == "counts":
        return {name: count / steps for name, count in counts.items()}
    starts = watch.seconds[FIRST : FIRST + steps + 1]
    return {"seconds": min(b - a for a, b in pairwise(starts))}  # the one that other programs disturbed least


# ------------------------------------------------------------------------------------------------------ all of them


def ask(checkout: Path, what: str, steps: int, network: str, graphed: bool = False) -> dict[str, Any]:
    """The answer of a fresh process with the code of a checkout."""
    command = [sys.executable, "-W", "ignore", str(Path(__file__).resolve()), "--work", what]
    command += ["--steps", str(steps), "--network", network]
    environment = {
        **os.environ,
        "PYTHONPATH": str(checkout / "src"),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    done = subprocess.run(command + ["--graphed"] * graphed, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"A measurement failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def export(commit: str, folder: Path) -> Path:
    """The files of a commit."""
    archive = subprocess.run(["git", "-C", str(ROOT), "archive", commit], capture_output=True, check=True).stdout
    subprocess.run(["tar", "-x", "-C", str(folder)], input=archive, check=True)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description="What a training step costs the host.")
    parser.add_argument("--before", help="a commit to compare with")
    parser.add_argument("--rounds", type=int, default=5, help="processes of each, in turn, for the seconds")
    parser.add_argument("--steps", type=int, default=20, help="the steps that are looked at")
    parser.add_argument("--network", choices=[*NETWORKS], default="lightningdit")
    parser.add_argument("--work", choices=["counts", "seconds"], help=argparse.SUPPRESS)
    parser.add_argument("--graphed", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work:
        print(json.dumps(work(arguments.work, arguments.graphed, arguments.steps, arguments.network)))
        return
    with tempfile.TemporaryDirectory() as folder:
        codes = {"now": ROOT}
        if arguments.before:
            codes = {"before": export(arguments.before, Path(folder)), **codes}
        counts = {name: ask(code, "counts", arguments.steps, arguments.network) for name, code in codes.items()}
        counts["as a graph"] = ask(ROOT, "counts", arguments.steps, arguments.network, graphed=True)
        seconds: dict[str, list[float]] = {name: [] for name in codes}
        for _ in range(arguments.rounds if arguments.before else 0):
            for name, code in codes.items():
                seconds[name].append(ask(code, "seconds", arguments.steps, arguments.network)["seconds"])
    if not arguments.before:
        print(table(counts))
        return
    ratio = statistics.median(ratios(seconds))
    about = {**machine(), "commit": commit()}
    found = {"machine": about, "before": arguments.before, "counts": counts, "seconds": seconds, "ratio": ratio}
    found["steps"] = arguments.steps
    record = json.loads(RESULTS.read_text())
    if arguments.network == "lightningdit":
        record = {**found, **{name: record[name] for name in NETWORKS if name in record}}
    else:
        record[arguments.network] = found
    write_json(RESULTS, record)
    refresh(ROOT / "docs" / "performance.md", "training step", page(record))


def ratios(seconds: dict[str, list[float]]) -> list[float]:
    """Now / before, of each pair of processes."""
    return [b / a for a, b in zip(seconds["before"], seconds["now"], strict=True)]


def table(counts: dict[str, dict[str, float]], network: str | None = None) -> str:
    step = "training step" if network is None else f"training step, backbone={network}"
    header = (step, "operators that the host calls", "values read", "tensors made of numbers")
    columns = ("outside", "read", "made of numbers")
    return markdown(
        header, [[name, *(f"{found.get(column, 0):,.1f}" for column in columns)] for name, found in counts.items()]
    )


def page(record: dict[str, Any]) -> str:
    """The table with what stands below it, of each network."""
    return "\n\n".join([_part(record), *(_part(record[name], name) for name in NETWORKS if name in record)])


def _part(record: dict[str, Any], network: str | None = None) -> str:
    about, each = record["machine"], ratios(record["seconds"])
    pairs = f"{len(each)} pairs of processes, from {min(each):.2f} to {max(each):.2f}"
    note = (
        f"Per step. CPU seconds of the eager step, now / before: {statistics.median(each):.2f} (the least of "
        f"{record.get('steps', 20)} steps; median of {pairs}). `python benchmarks/training_step.py "
        f"{'' if network is None else f'--network {network} '}--before {record['before']}` on {about['cpu']}, one "
        f"thread, torch {about['torch']}, {about['date']}, commit {about['commit']}."
    )
    return f"{table(record['counts'], network)}\n\n{note}"


if __name__ == "__main__":
    main()
