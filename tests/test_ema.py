"""EMA callback: the averages themselves, swapping, checkpoints and resuming, on a small Lightning module."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.utils.data import DataLoader, TensorDataset

from flowanchor.ema import EMA, Profile
from flowanchor.ema_posthoc import read_snapshots, synthesise
from flowanchor.errors import CheckpointError, ConfigError


class Toy(pl.LightningModule):
    """A student with a frozen parameter and a buffer, and a teacher that must never be averaged."""

    def __init__(self) -> None:
        super().__init__()
        self.student = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
        self.student[2].bias.requires_grad_(False)
        self.teacher = nn.Linear(3, 1)
        self.seen_in_validation: list[dict[str, Tensor]] = []

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return ((self.student(batch[0]) - self.teacher(batch[0]).detach()) ** 2).mean()

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.seen_in_validation.append(copy.deepcopy(self.student.state_dict()))
        self.log("val/loss", ((self.student(batch[0]) - self.teacher(batch[0])) ** 2).mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in self.student.parameters() if p.requires_grad], lr=0.05)

    def train_dataloader(self) -> DataLoader:
        data = torch.randn(32, 3, generator=torch.Generator().manual_seed(0))
        return DataLoader(TensorDataset(data), batch_size=32)  # one batch an epoch: resuming it is not under test

    def val_dataloader(self) -> DataLoader:
        return DataLoader(TensorDataset(torch.ones(8, 3)), batch_size=8)


class Recorder(pl.Callback):
    """Keeps the raw weights after every optimizer step."""

    def __init__(self) -> None:
        self.weights: list[dict[str, Tensor]] = []

    def on_train_batch_end(self, trainer, pl_module, *args) -> None:  # type: ignore[no-untyped-def]
        if trainer.global_step > len(self.weights):
            self.weights.append(copy.deepcopy(pl_module.student.state_dict()))


def toy() -> Toy:
    torch.manual_seed(1)
    return Toy()


def fit(
    model: Toy, folder: Path, steps: int, *callbacks: pl.Callback, ckpt_path: str | None = None, **options: Any
) -> pl.Trainer:
    options = {"limit_val_batches": 0} | options
    trainer = pl.Trainer(
        max_steps=steps, default_root_dir=folder, callbacks=list(callbacks), logger=False, accelerator="cpu",
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
        **options,
    )  # fmt: skip
    trainer.fit(model, ckpt_path=ckpt_path)
    return trainer


def test_averages_equal_the_weighted_sum_of_the_history(tmp_path: Path) -> None:
    ema, recorder, model = EMA(sigma_rel=[0.2, 0.1], decay=0.9), Recorder(), toy()
    start = copy.deepcopy(model.student.state_dict())
    fit(model, tmp_path, 11, ema, recorder)
    assert list(ema.profiles) == ["power_0.2", "power_0.1", "constant_0.9"] and ema.default == "power_0.2"
    for name, profile in ema.profiles.items():
        average = ema.averages(model, name)
        weights = [profile.beta(t) for t in range(1, 12)]
        for key in ("0.weight", "1.bias", "2.weight"):
            expected = start[key].double()
            for beta, state in zip(weights, recorder.weights, strict=True):
                expected = beta * expected + (1 - beta) * state[key].double()
            torch.testing.assert_close(average[key].double(), expected, rtol=1e-5, atol=1e-7)
            assert not torch.equal(average[key], model.student.state_dict()[key])
        for key in ("2.bias", "1.running_mean", "1.num_batches_tracked"):  # frozen or buffer: as it is
            assert torch.equal(average[key], model.student.state_dict()[key])
        toy().student.load_state_dict(average, strict=True)
        assert set(ema._shadows[name]) == {"0.weight", "0.bias", "1.weight", "1.bias", "2.weight"}  # no teacher


def test_power_function_profile() -> None:
    # At the end of a long run the weights over the past have relative standard deviation sigma_rel (its definition).
    profile, n = Profile(sigma_rel=0.15), 4000
    weights = torch.zeros(n, dtype=torch.float64)
    for t in range(1, n + 1):
        weights *= profile.beta(t)
        weights[t - 1] = 1 - profile.beta(t)
    times = torch.arange(1, n + 1, dtype=torch.float64) / n
    mean = (weights * times).sum()
    assert weights.sum() == pytest.approx(1)
    assert ((weights * (times - mean) ** 2).sum()).sqrt().item() == pytest.approx(0.15, rel=2e-3)
    assert Profile(sigma_rel=0.05).gamma == pytest.approx(16.97, abs=0.01)  # EDM2, table of profiles
    assert Profile(sigma_rel=0.10).gamma == pytest.approx(6.94, abs=0.01)


@pytest.mark.parametrize(
    "options",
    [
        {}, {"sigma_rel": 0.3}, {"sigma_rel": 0.0}, {"decay": 1.0}, {"decay": -0.1}, {"sigma_rel": [0.1, 0.1]},
        {"decay": 0.9, "snapshot_every": 0}, {"decay": 0.9, "snapshot_dtype": "int8"},
    ],
)  # fmt: skip
def test_settings_that_cannot_be(options: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="choose|set|must|name"):
        EMA(**options)  # type: ignore[arg-type]


def test_accumulated_batches_count_once(tmp_path: Path) -> None:
    ema = EMA(decay=0.5)
    fit(toy(), tmp_path, 3, ema, accumulate_grad_batches=2)
    assert ema.updates == 3


def test_validation_sees_the_average_and_raw_weights_come_back(tmp_path: Path) -> None:
    ema, recorder, model = EMA(sigma_rel=0.2), Recorder(), toy()
    fit(model, tmp_path, 4, ema, recorder, limit_val_batches=1.0)
    assert len(model.seen_in_validation) == 4
    assert torch.equal(model.seen_in_validation[-1]["0.weight"], ema.averages(model, ema.default)["0.weight"])
    assert torch.equal(model.student[0].weight, recorder.weights[-1]["0.weight"])


def test_swapped_nests_and_survives_errors(tmp_path: Path) -> None:
    ema, model = EMA(sigma_rel=[0.2, 0.05]), toy()
    fit(model, tmp_path, 5, ema)
    raw = model.student[0].weight.detach().clone()
    with pytest.raises(RuntimeError, match="inside"), ema.swapped(model):
        assert torch.equal(model.student[0].weight, ema._shadows["power_0.2"]["0.weight"])
        with ema.swapped(model, "power_0.05"):
            assert torch.equal(model.student[0].weight, ema._shadows["power_0.05"]["0.weight"])
        assert torch.equal(model.student[0].weight, ema._shadows["power_0.2"]["0.weight"])
        raise RuntimeError("inside")
    assert torch.equal(model.student[0].weight, raw)
    with pytest.raises(ConfigError, match="power_0.2, power_0.05"), ema.swapped(model, "power_0.1"):
        pass


def test_exception_in_validation_restores_raw_weights(tmp_path: Path) -> None:
    class Failing(Toy):
        def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
            raise RuntimeError("validation broke")

    torch.manual_seed(1)
    ema, recorder, model = EMA(sigma_rel=0.2), Recorder(), Failing()
    with pytest.raises(RuntimeError, match="validation broke"):
        fit(model, tmp_path, 4, ema, recorder, limit_val_batches=1.0)
    assert torch.equal(model.student[0].weight, recorder.weights[-1]["0.weight"])


def test_checkpoint_saved_while_swapped_holds_raw_weights(tmp_path: Path) -> None:
    ema, model = EMA(sigma_rel=0.2), toy()
    trainer = fit(model, tmp_path, 5, ema)
    raw = {k: v.clone() for k, v in model.state_dict().items()}
    with ema.swapped(model):
        trainer.save_checkpoint(tmp_path / "inside.ckpt")
    file = torch.load(tmp_path / "inside.ckpt", weights_only=True)
    assert file["state_dict"].keys() == raw.keys()
    assert all(torch.equal(file["state_dict"][k], raw[k]) for k in raw)
    assert torch.equal(file["ema"]["power_0.2"]["0.weight"], ema._shadows["power_0.2"]["0.weight"])
    assert file["ema"]["power_0.2"].keys() == model.student.state_dict().keys()


def test_resume_is_bit_exact(tmp_path: Path) -> None:
    whole, first, second = (EMA(sigma_rel=[0.2, 0.05], decay=0.9, snapshot_every=4) for _ in range(3))
    uninterrupted, model, resumed = toy(), toy(), toy()
    fit(uninterrupted, tmp_path / "a", 12, whole)
    fit(model, tmp_path / "b", 8, first).save_checkpoint(tmp_path / "stop.ckpt")
    late = tmp_path / "b/ema_snapshots/00000020_power_0.2.safetensors"  # left behind by a run that went further
    late.write_bytes((tmp_path / "b/ema_snapshots/00000008_power_0.2.safetensors").read_bytes())
    fit(resumed, tmp_path / "b", 12, second, ckpt_path=str(tmp_path / "stop.ckpt"))
    assert second.updates == whole.updates == 12
    assert not late.exists()
    for profile in whole.profiles:
        expected, found = whole.averages(uninterrupted, profile), second.averages(resumed, profile)
        assert expected.keys() == found.keys()
        assert all(torch.equal(expected[k], found[k]) for k in expected)
    for path in sorted((tmp_path / "a/ema_snapshots").iterdir()):
        here, there = load_file(path), load_file(tmp_path / "b/ema_snapshots" / path.name)
        assert all(torch.equal(here[k], there[k]) for k in here)


def test_resume_with_other_averages_says_so(tmp_path: Path) -> None:
    fit(toy(), tmp_path, 4, EMA(sigma_rel=0.2)).save_checkpoint(tmp_path / "stop.ckpt")
    with pytest.raises(CheckpointError, match="power_0.2 but not power_0.1"):
        fit(toy(), tmp_path, 8, EMA(sigma_rel=0.1), ckpt_path=str(tmp_path / "stop.ckpt"))


def test_snapshots_of_a_run(tmp_path: Path) -> None:
    ema, model = EMA(sigma_rel=[0.2, 0.05], decay=0.9, snapshot_every=4, snapshot_dtype="float16"), toy()
    fit(model, tmp_path, 10, ema)
    snapshots = read_snapshots(tmp_path / "ema_snapshots")
    assert [(s.step, s.sigma_rel) for s in snapshots] == [(k, s) for k in (4, 8, 10) for s in (0.05, 0.2)]
    state = synthesise(tmp_path / "ema_snapshots", 0.2)
    model.student.load_state_dict(state, strict=True)
    torch.testing.assert_close(state["0.weight"], ema._shadows["power_0.2"]["0.weight"], rtol=2e-3, atol=2e-3)
    assert state["1.num_batches_tracked"].dtype == torch.int64


def test_sharded_parameters(tmp_path: Path) -> None:
    """Averages of DTensor parameters equal those of ordinary ones, and are saved and restored whole."""
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    torch.distributed.init_process_group("gloo", rank=0, world_size=1, store=torch.distributed.HashStore())
    try:
        mesh = init_device_mesh("cpu", (1,))
        plain, sharded = toy(), toy()
        for layer in (sharded.student[0], sharded.student[2]):
            for name, p in list(layer.named_parameters()):
                shard = distribute_tensor(p.detach(), mesh, [Shard(0)])
                setattr(layer, name, nn.Parameter(shard, requires_grad=p.requires_grad))
        emas = [EMA(sigma_rel=0.2), EMA(sigma_rel=0.2)]
        for _ in range(3):
            for model, ema in zip((plain, sharded), emas, strict=True):
                with torch.no_grad():
                    for p in model.student.parameters():
                        p.add_(0.1)
                ema.update(model)
        expected, found = (e.averages(m, e.default) for e, m in zip(emas, (plain, sharded), strict=True))
        assert all(torch.equal(expected[k], found[k]) and not isinstance(found[k], DTensor) for k in expected)
        with emas[1].swapped(sharded):
            assert torch.equal(sharded.student[0].weight.full_tensor(), expected["0.weight"])  # type: ignore[operator]
        restored = EMA(sigma_rel=0.2)
        restored.on_load_checkpoint(None, sharded, {"ema": {"power_0.2": expected}})  # type: ignore[arg-type]
        again = restored.averages(sharded, "power_0.2")
        assert all(torch.equal(expected[k], again[k]) for k in expected)
    finally:
        torch.distributed.destroy_process_group()
