"""Normalisation of latents and its file."""

from __future__ import annotations

import pickle

import pytest
import torch

from flowanchor.encoded.statistics import LatentStatistics, RunningStatistics
from flowanchor.errors import DataError


def test_the_released_formula_and_back():
    latents = torch.randn(5, 3, 4, 4, dtype=torch.float64)
    statistics = LatentStatistics((1.0, -2.0, 0.5), (2.0, 0.5, 3.0), 0.7)
    samples = statistics.normalise(latents)
    torch.testing.assert_close(samples[:, 1], (latents[:, 1] + 2.0) / 0.5 * 0.7)
    torch.testing.assert_close(statistics.denormalise(samples), latents)


def test_a_multiplier_alone():
    latents = torch.randn(2, 4, 4, 4)
    torch.testing.assert_close(LatentStatistics(multiplier=0.18215).normalise(latents), latents * 0.18215)


def test_running_statistics_are_those_of_all_values_whatever_the_split():
    latents = torch.randn(50, 3, 4, 4, dtype=torch.float64) * 3 + 1
    whole, left, right = RunningStatistics(3), RunningStatistics(3), RunningStatistics(3)
    for batch in latents.split(7):
        whole.add(batch)
    left.add(latents[:11])
    right.add(latents[11:])
    left.merge(right.state())
    for found in (whole.statistics(), left.statistics()):
        torch.testing.assert_close(torch.tensor(found.mean).double(), latents.mean((0, 2, 3)), rtol=1e-6, atol=1e-6)
        expected = latents.transpose(0, 1).flatten(1).std(1, unbiased=False)
        torch.testing.assert_close(torch.tensor(found.std).double(), expected, rtol=1e-6, atol=1e-6)


def test_the_file_has_the_released_layout_and_is_read_back(tmp_path):
    statistics = LatentStatistics((1.0, 2.0), (3.0, 4.0))
    statistics.write(tmp_path / "latents_stats.pt")
    content = torch.load(tmp_path / "latents_stats.pt", weights_only=True)
    assert content["mean"].shape == content["std"].shape == (1, 2, 1, 1)
    assert LatentStatistics.read(tmp_path / "latents_stats.pt") == statistics
    assert LatentStatistics.read(statistics.as_config()) == statistics


class _Malicious:
    def __reduce__(self):
        return (pytest.fail, ("unpickled",))


def test_bad_files_are_refused(tmp_path):
    path = tmp_path / "latents_stats.pt"
    with pytest.raises(DataError, match="no latent statistics at"):
        LatentStatistics.read(path)
    path.write_bytes(pickle.dumps(_Malicious()))
    with pytest.raises(DataError, match="cannot be read safely"):
        LatentStatistics.read(path)
    torch.save({"mean": torch.zeros(2)}, path)
    with pytest.raises(DataError, match="no 'mean' and 'std'"):
        LatentStatistics.read(path)
    with pytest.raises(DataError, match="2 channels and the latents have 3"):
        LatentStatistics((0.0, 0.0), (1.0, 1.0)).check(3, path)
    for std in (0.0, float("nan")):
        with pytest.raises(DataError, match="finite, with positive"):
            LatentStatistics((0.0,), (std,))
