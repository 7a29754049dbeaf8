"""Sharded runs against one process with the joint batch: weights, averages, gradients' norm, checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from flowanchor.errors import ConfigError
from flowanchor.strategies import ChainJVPStrategy

STAGES = 4  # of the network in training.py: embed, two blocks, head
PLAIN: dict[str, Any] = {}


@pytest.fixture(scope="module")
def one(training, folder):
    """One process: eight steps without interruption, saved after four; the first steps of variants."""
    return {
        "whole": training.fit(folder, "one", 8, 32),
        "half": training.fit(folder, "half", 4, 32, save=True),
        "accumulated": training.fit(folder, "acc", 2, 16, accumulate=2),
        "weighted": training.fit(folder, "weighted", 3, 32, weighted=True),
        "taught": training.fit(folder, "taught", 3, 32, teacher=str(folder / "half.ckpt")),
    }


@pytest.fixture(scope="module")
def two(torchrun, one, folder):
    """Two processes."""
    accumulated = {"steps": 2, "batch": 8, "accumulate": 2, "counted": True}
    return torchrun(
        2,
        {"name": "two", "steps": 4, "batch": 16, "sharded": PLAIN, "save": True},
        {"name": "two_file", "steps": 4, "batch": 16, "sharded": {"save_distributed_checkpoint": False}, "save": True},
        {"name": "acc", **accumulated, "sharded": PLAIN},
        {"name": "acc_each", **accumulated, "sharded": {"reduce_every_micro_batch": True}},
        {"name": "weighted", "steps": 3, "batch": 16, "weighted": True, "sharded": PLAIN},
        {"name": "taught", "steps": 3, "batch": 16, "sharded": PLAIN, "teacher": str(folder / "half.ckpt")},
        {"name": "from_file", "steps": 8, "batch": 16, "sharded": PLAIN, "resume": str(folder / "half.ckpt")},
    )


@pytest.fixture(scope="module")
def four(torchrun, two, folder):
    """Four processes, which go on from the checkpoint of two."""
    return torchrun(
        4,
        {"name": "resumed_4", "steps": 8, "batch": 8, "sharded": PLAIN, "resume": str(folder / "two.ckpt")},
        {"name": "hsdp", "steps": 4, "batch": 8, "sharded": {"replicate": 2}, "save": True},
    )


def assert_equal(ours: list[dict[str, Any]], theirs: dict[str, Any], skipped: int = 0, tolerance: float = 1e-5) -> None:
    """Same losses (averaged over the ranks), norms, weights and averages; ranks agree exactly on what they share."""
    assert ours[0]["sharded"] >= 40, "the student's parameters are sharded"
    joint = torch.tensor([rank["losses"] for rank in ours]).mean(0)
    torch.testing.assert_close(joint, torch.tensor(theirs["losses"])[skipped:], rtol=tolerance, atol=1e-6)
    norms = torch.tensor(theirs["norms"])[skipped:]
    assert norms[-1] > 0.5, "clipping is at work"
    for rank in ours:
        torch.testing.assert_close(torch.tensor(rank["norms"]), norms, rtol=tolerance, atol=0, equal_nan=True)
        assert rank["weights"].keys() == theirs["weights"].keys()
        for name, value in theirs["weights"].items():
            torch.testing.assert_close(rank["weights"][name], value, rtol=tolerance, atol=tolerance, msg=name)
            assert torch.equal(rank["weights"][name], ours[0]["weights"][name]), name
            if name.endswith("adaLN_modulation.1.weight"):  # zero at first: all of it is what training did
                assert value.norm() > 0 and (rank["weights"][name] - value).norm() <= 1e-4 * value.norm(), name
        for profile, average in theirs["ema"].items():
            for name, value in average.items():
                torch.testing.assert_close(rank["ema"][profile][name], value, rtol=tolerance, atol=tolerance, msg=name)
        torch.testing.assert_close(
            torch.tensor(rank["validation"]), torch.tensor(theirs["validation"])[skipped // 2 :], rtol=tolerance, atol=0
        )


def test_two_processes_equal_one(one, two):
    assert_equal(two["two"], one["half"])


def test_resumed_on_four_processes(one, four):
    assert_equal(four["resumed_4"], one["whole"], skipped=4)


@pytest.mark.parametrize("checkpoint", ["two.ckpt", "two_file.ckpt", "hsdp.ckpt"])
def test_resumed_on_one_process_without_the_strategy(training, folder, one, four, checkpoint):
    result = training.fit(folder, "back", 8, 32, resume=str(folder / checkpoint))
    assert_equal([{**result, "sharded": 99}], one["whole"], skipped=4)


def test_a_file_of_one_process_is_resumed_by_two(one, two):
    assert_equal(two["from_file"], one["whole"], skipped=4)


def test_hsdp_equals_one_process(one, four):
    assert_equal(four["hsdp"], one["half"])


def test_accumulation_equals_the_joint_batch_and_reduces_once(one, two):
    for name in ("acc", "acc_each"):
        assert_equal(two[name], one["accumulated"])
    scatters = "c10d._reduce_scatter_base_"
    assert two["acc"][0]["communication"][scatters] == 2 * STAGES, "one reduction per stage and step"
    assert two["acc_each"][0]["communication"][scatters] == 2 * 2 * STAGES, "one per stage and micro-batch"


def test_parameters_outside_the_backbones_are_averaged_and_clipped_with_the_rest(one, two):
    assert_equal(two["weighted"], one["weighted"])
    learned = one["weighted"]["weights"]["objective.log_weight"]
    assert (learned - 0.1).abs().max() > 1e-4, "the objective's own parameter is trained"


def test_the_teacher_is_sharded_and_not_saved(one, two, folder):
    assert_equal(two["taught"], one["taught"])
    for name, value in one["taught"]["teacher"].items():
        assert torch.equal(two["taught"][0]["teacher"][name], value), name
    assert two["taught"][0]["sharded_teacher"] >= 40
    assert not any(key.startswith("velocity.") for key in two["taught"][0]["weights"])


# ---------------------------------------------------------------------------------------------------------- refusals


class Environment:
    """Processes that somebody else has started."""

    creates_processes_externally = True

    def __init__(self, processes: int) -> None:
        self.processes = processes

    def world_size(self) -> int:
        return self.processes


def strategy(devices: int, started: int | None = None, **settings: Any) -> ChainJVPStrategy:
    made = ChainJVPStrategy(**settings)
    made.parallel_devices = [torch.device("cpu")] * devices
    made.cluster_environment = Environment(devices if started is None else started)  # type: ignore[assignment]
    return made


def test_mesh_that_does_not_divide_the_processes():
    with pytest.raises(ConfigError, match="replicate=3 does not divide the 4 processes .*: choose one of 1, 2, 4"):
        strategy(4, replicate=3)._configure_launcher()
    with pytest.raises(ConfigError, match="replicate=0 is too small"):
        ChainJVPStrategy(replicate=0)
    with pytest.raises(ConfigError, match="2 processes were started and the trainer expects 1 .*: set trainer.devices"):
        strategy(1, started=2)._configure_launcher()
    strategy(4, replicate=2)._configure_launcher()


@pytest.mark.parametrize("precision", ["16-mixed", "bf16-true", "64-true", "16"])
def test_precisions_without_a_policy(precision):
    with pytest.raises(ConfigError, match=f"precision={precision} does not work .*: use trainer.precision=32-true or"):
        ChainJVPStrategy().check_precision(precision)


def test_precisions_with_a_policy():
    for precision in ("32-true", "32", 32, "bf16-mixed", "bf16"):
        ChainJVPStrategy().check_precision(precision)


def test_checkpoint_folders_of_runs_hold_no_teacher(two, folder: Path):
    from flowanchor.checkpoints import read_checkpoint

    names = set(read_checkpoint(folder / "two.ckpt")["state_dict"])
    assert names == set(two["two"][0]["weights"])
