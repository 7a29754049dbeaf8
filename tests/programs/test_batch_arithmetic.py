"""Samples per step: counted over processes and accumulation, compared with what the recipe means."""

from __future__ import annotations

import pytest
from omegaconf import OmegaConf

from flowanchor.errors import ConfigError
from flowanchor.programs.batch_arithmetic import check_batch, count_processes


@pytest.fixture(autouse=True)
def not_launched(monkeypatch):
    for name in ("TORCHELASTIC_RUN_ID", "SLURM_NTASKS", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


def settings(batch=128, devices=8, nodes=1, accumulate=1, wanted=1024, reference=None, lr=1e-4):
    return OmegaConf.create(
        {
            "data": {"batch_size": batch},
            "trainer": {
                "devices": devices, "num_nodes": nodes, "accumulate_grad_batches": accumulate, "accelerator": "auto"
            },
            "optimizer": {"lr": lr},
            "global_batch_size": wanted,
            "reference_batch_size": reference,
        }
    )  # fmt: skip


@pytest.mark.parametrize(
    "values",
    [{}, {"batch": 16, "nodes": 8}, {"batch": 32, "accumulate": 4}, {"wanted": None}, {"devices": "0,1", "batch": 512}],
)
def test_what_multiplies_to_the_batch_passes(values):
    check_batch(settings(**values))


@pytest.mark.parametrize(
    "values, sentence",
    [
        ({"devices": 1}, r"128 samples: data\.batch_size=128 x 1 process x .*=1, and global_batch_size=1024: use "
                         r"data\.batch_size=1024, or trainer\.accumulate_grad_batches=8, or 8 processes"),
        ({"devices": 4}, r"512 samples: .* x 4 processes x .*use data\.batch_size=256, or .*batches=2, or 8 processes"),
        ({"devices": 3}, r"384 samples: .*use 8 processes \(trainer\.devices, trainer\.num_nodes\), or global_"),
        ({"devices": 8, "nodes": 8}, r"8192 samples: .*use data\.batch_size=16, or 8 processes"),
        ({"devices": "all"}, "trainer.devices=all is no number"),
        ({"devices": 0}, "trainer.devices=0 is no number of devices: use for example 8"),
        ({"devices": -2, "wanted": None}, "trainer.devices=-2 is no number of devices"),
        ({"devices": []}, r"trainer.devices=\[\] is no number of devices"),
        ({"nodes": 0}, "trainer.num_nodes=0 is too small"),
        ({"accumulate": "often"}, "trainer.accumulate_grad_batches=often is not a whole number"),
        ({"wanted": "1k"}, "global_batch_size=1k is not a whole number: use for example global_batch_size=1024"),
        ({"wanted": 1024.5}, "global_batch_size=1024.5 is not a whole number"),
        ({"wanted": 0}, "global_batch_size=0 is too small"),
        ({"reference": "usual"}, "reference_batch_size=usual is not a whole number"),
    ],
)  # fmt: skip
def test_what_does_not_is_refused_with_a_way_out(values, sentence):
    with pytest.raises(ConfigError, match=sentence):
        check_batch(settings(**values))


def test_processes_of_a_launcher_count(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "64")
    assert count_processes(8, 1, "gpu") == 8, "WORLD_SIZE alone may be left from anything"
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    assert count_processes(8, 1, "gpu") == 64


@pytest.mark.parametrize("devices, count", [(2, 2), ([0, 3], 2), ("0,3", 2), ("4", 4), ("auto", 1), (-1, 1)])
def test_ways_to_name_devices(devices, count):
    assert count_processes(devices, 3, "cpu") == 3 * count


def test_a_rate_for_another_batch_is_warned_about(recwarn):
    check_batch(settings(reference=1024))
    assert not recwarn.list
    with pytest.warns(
        UserWarning, match=r"0\.0001 is stated for a batch of 1024 and a step .* has 256: .*5e-05.*2\.5e-05"
    ):
        check_batch(settings(devices=2, wanted=256, reference=1024))
