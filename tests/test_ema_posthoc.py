"""Post-hoc synthesis against the average that was really kept, on a trajectory with known history."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.integrate import quad

from flowanchor.ema import Profile
from flowanchor.ema_posthoc import Owner, gamma_from_sigma_rel, p_dot_p, save_snapshot, solve_weights, synthesise
from flowanchor.errors import CheckpointError, ConfigError

STEPS, EVERY = 4000, 250


def trajectory(t: int) -> torch.Tensor:
    """A parameter vector that drifts, turns, settles and shakes."""
    s = t / STEPS
    noise = torch.randn(2, generator=torch.Generator().manual_seed(t), dtype=torch.float64)
    head = torch.tensor([s, np.sin(9 * s), np.exp(-5 * s), np.sqrt(s)], dtype=torch.float64)
    return torch.cat([head, 0.3 * noise])


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[float, torch.Tensor]]:
    folder = tmp_path_factory.mktemp("run")
    averages = {s: torch.zeros(6, dtype=torch.float64) for s in (0.05, 0.08, 0.1, 0.15, 0.2)}
    profiles = {s: Profile(sigma_rel=s) for s in averages}
    for t in range(1, STEPS + 1):
        value = trajectory(t)
        for s, average in averages.items():
            average.lerp_(value, 1 - profiles[s].beta(t))
        if t % EVERY == 0:
            for s in (0.05, 0.1):
                state = {"w": averages[s], "table": torch.tensor([t], dtype=torch.int64)}
                save_snapshot(folder / f"{t:08d}_power_{s:g}.safetensors", state, s, t, ["table"], torch.float64)
    return folder, averages


@pytest.mark.parametrize("sigma_rel", [0.08, 0.15, 0.2])
def test_other_widths(run: tuple[Path, dict[float, torch.Tensor]], sigma_rel: float) -> None:
    folder, averages = run
    found = synthesise(folder, sigma_rel)
    error = (found["w"].double() - averages[sigma_rel]).norm() / averages[sigma_rel].norm()
    nearest = min((averages[s] - averages[sigma_rel]).norm() for s in (0.05, 0.1)) / averages[sigma_rel].norm()
    assert error < (5e-3 if sigma_rel > 0.1 else 1e-3)  # beyond the stored widths it is an extrapolation
    assert error < nearest / 10  # better than taking the nearest stored average
    assert found["table"].item() == STEPS  # a buffer is copied from the latest snapshot, never combined


def test_stored_width_at_a_snapshot_is_exact(run: tuple[Path, dict[float, torch.Tensor]]) -> None:
    folder, averages = run
    torch.testing.assert_close(synthesise(folder, 0.1)["w"].double(), averages[0.1], rtol=1e-6, atol=1e-7)
    t = np.array([250.0, 500.0, 500.0])
    gamma = np.array([gamma_from_sigma_rel(s) for s in (0.05, 0.05, 0.1)])
    weights, misfit = solve_weights(t, gamma, 500.0, gamma[1])
    np.testing.assert_allclose(weights, [0, 1, 0], atol=1e-9)
    assert misfit < 1e-6


def test_earlier_step(run: tuple[Path, dict[float, torch.Tensor]]) -> None:
    folder, _ = run
    average, profile = torch.zeros(6, dtype=torch.float64), Profile(sigma_rel=0.08)
    for t in range(1, 2001):
        average.lerp_(trajectory(t), 1 - profile.beta(t))
    assert (synthesise(folder, 0.08, step=2000)["w"].double() - average).norm() < 3e-3 * average.norm()


def test_inner_product_against_quadrature() -> None:
    for t_a, gamma_a, t_b, gamma_b in [(3.0, 2.0, 5.0, 7.0), (5.0, 7.0, 3.0, 2.0), (4.0, 1.5, 4.0, 6.94)]:

        def product(tau: float, a: float = t_a, ga: float = gamma_a, b: float = t_b, gb: float = gamma_b) -> float:
            return (ga + 1) * tau**ga / a ** (ga + 1) * (gb + 1) * tau**gb / b ** (gb + 1)

        assert p_dot_p(t_a, gamma_a, t_b, gamma_b) == pytest.approx(quad(product, 0, min(t_a, t_b))[0], rel=1e-9)


def test_rough_fit_is_announced(run: tuple[Path, dict[float, torch.Tensor]]) -> None:
    with pytest.warns(UserWarning, match="roughly"):
        synthesise(run[0], 0.25, step=EVERY)


def test_bad_requests(run: tuple[Path, dict[float, torch.Tensor]], tmp_path: Path) -> None:
    for sigma_rel in (0.0, -0.1, 0.2887, 0.5):
        with pytest.raises(ConfigError, match="between 0 and 0.2887"):
            synthesise(run[0], sigma_rel)
    with pytest.raises(CheckpointError, match="no snapshots"):
        synthesise(tmp_path, 0.1)
    with pytest.raises(CheckpointError, match="step 250"):
        synthesise(run[0], 0.1, step=100)


def held(folder: Path, step: int, averages: dict[float, torch.Tensor]) -> Owner:
    """A checkpoint of the run at a step between two snapshots, with its own averages."""
    meta = {"step": step, "config": {"ema": {"sigma_rel": list(averages)}}}
    ema = {f"power_{s:g}": {"w": average, "table": torch.tensor([step])} for s, average in averages.items()}
    content = {"flowanchor": meta, "callbacks": {"EMA": {"updates": step}}, "ema": ema}
    return Owner.of(folder / "checkpoints" / "best.ckpt", content)


def test_a_checkpoint_between_two_snapshots(run: tuple[Path, dict[float, torch.Tensor]]) -> None:
    """Its own averages reach its step, where no snapshot does."""
    folder, step = run[0], 2100
    averages = {s: torch.zeros(6, dtype=torch.float64) for s in (0.05, 0.08, 0.1)}
    for t in range(1, step + 1):
        for s, average in averages.items():
            average.lerp_(trajectory(t), 1 - Profile(sigma_rel=s).beta(t))
    wanted = averages.pop(0.08)
    found = synthesise(folder, 0.08, step, held(folder, step, averages))
    assert (found["w"].double() - wanted).norm() < 3e-3 * wanted.norm() and found["table"].item() == step
    with pytest.raises(
        CheckpointError, match="No snapshot in .* reaches step 2100, the last before it is of step 2000"
    ):
        synthesise(folder, 0.08, step, held(folder, step, {}))


@pytest.mark.parametrize(
    ("ours", "theirs", "place", "owned"),
    [
        ("a", "a", "anywhere", True),
        ("a", "b", "checkpoints", False),
        (None, None, "checkpoints", True),  # both of before runs had names
        (None, None, "anywhere", False),
        ("a", None, "checkpoints", True),  # a run of before that goes on
        (None, "a", "checkpoints", True),
    ],
)
def test_whose_snapshots_they_are(
    tmp_path: Path, ours: str | None, theirs: str | None, place: str, owned: bool
) -> None:
    path = tmp_path / "00000007_power_0.2.safetensors"
    save_snapshot(path, {"w": torch.ones(2)}, 0.2, 7, [], torch.float32, theirs)
    content = {"flowanchor": {"step": 7, "config": {}, **({} if ours is None else {"run": ours})}}
    owner = Owner.of(tmp_path / place / "last.ckpt", content)
    if owned:
        assert torch.equal(synthesise(tmp_path, 0.2, 7, owner)["w"], torch.ones(2))
    else:
        with pytest.raises(CheckpointError, match="are those of another run"):
            synthesise(tmp_path, 0.2, 7, owner)
