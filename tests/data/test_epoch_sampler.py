"""The order of the batches: pure, sharded, and exact after a resume through a real Lightning trainer."""

from __future__ import annotations

import warnings

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from flowanchor.data.base import FlowDataModule
from flowanchor.data.epoch_sampler import EpochBatchSampler
from flowanchor.data.images import ArrayImages, ImageSet
from flowanchor.data.lightning import LightningData
from flowanchor.errors import ConfigError, DataError

LENGTH = 23


class Numbered(FlowDataModule):
    """Image i is filled with i, so that a batch tells which samples it holds."""

    name, channels, size, num_classes = "numbered", 1, 2, 2

    def load(self) -> dict[str, ImageSet]:
        images = torch.arange(LENGTH, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, 2, 2).clone()
        labels = np.arange(LENGTH) % 2
        return {"train": ArrayImages(images, labels), "heldout": ArrayImages(images[:7], labels[:7])}


class Recorder(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.seen: list[list[int]] = []
        self.steps: list[int] = []  # batches seen when an optimizer step was made

    def training_step(self, batch, _):
        self.seen.append(ids(batch))
        return (self.weight * batch.x1.mean()).sum()

    def validation_step(self, batch, _):
        self.log("val/loss", batch.x1.mean())

    def on_before_optimizer_step(self, optimizer):
        self.steps.append(len(self.seen))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def ids(batch) -> list[int]:
    return ((batch.x1[:, 0, 0, 0] + 1) * 127.5).round().int().tolist()


def fit(tmp_path, steps, ckpt=None, callbacks=(), workers=0, **trainer):
    module = Recorder()
    options = dict(
        max_steps=steps,
        max_epochs=-1,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        enable_checkpointing=bool(callbacks),
        callbacks=list(callbacks),
        default_root_dir=tmp_path,
        num_sanity_val_steps=0,
    )
    runner = pl.Trainer(**{**options, **trainer})
    data = Numbered(batch_size=4, num_workers=workers, repeat=2, seed=3)  # 46 samples: 11 batches per epoch
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*not resumable.*")
        runner.fit(module, datamodule=LightningData(data), ckpt_path=ckpt, weights_only=True)
    runner.steps = module.steps
    return module.seen, runner


def test_every_pass_visits_everything_once_in_a_new_order():
    sampler = EpochBatchSampler(LENGTH, 1, seed=0, repeat=2)
    epoch = [index for batch in sampler for index in batch]
    assert sorted(epoch[:LENGTH]) == sorted(epoch[LENGTH:]) == list(range(LENGTH))
    assert epoch[:LENGTH] != epoch[LENGTH:]


def test_order_depends_on_seed_and_epoch_alone():
    def order(seed, epoch):
        sampler = EpochBatchSampler(LENGTH, 4, seed=seed)
        sampler.set_epoch(epoch)
        return list(sampler)

    assert order(1, 5) == order(1, 5)
    assert order(1, 5) != order(1, 6)
    assert order(1, 5) != order(2, 5)


def test_seek_continues_across_an_epoch():
    sampler = EpochBatchSampler(LENGTH, 4, seed=1)
    epochs = []
    for epoch in range(3):
        sampler.set_epoch(epoch)
        epochs += list(sampler)
    sampler.seek(3)
    assert list(sampler) == epochs[3 : 3 + len(sampler)]


@pytest.mark.parametrize("drop_last", [True, False])
def test_two_ranks_together_see_the_joint_batch(drop_last):
    joint = EpochBatchSampler(LENGTH, 8, seed=2, drop_last=drop_last)
    ranks = [EpochBatchSampler(LENGTH, 4, 2, rank, 2, drop_last=drop_last) for rank in range(2)]
    assert len(joint) == len(ranks[0]) == len(ranks[1])
    for whole, first, second in zip(joint, *ranks, strict=True):
        assert len(first) == len(second)
        assert (first + second)[: len(whole)] == whole  # an incomplete batch may be filled up


def test_in_order_and_complete_without_shuffling():
    assert [i for b in EpochBatchSampler(LENGTH, 4, shuffle=False, drop_last=False) for i in b] == list(range(LENGTH))


def test_batch_larger_than_the_data_says_what_to_type():
    with pytest.raises(DataError, match=r"data\.batch_size=23 or less, or data\.drop_last=false"):
        EpochBatchSampler(LENGTH, 24)
    with pytest.raises(DataError, match=r"24 \(12 on each of 2 processes\).*data\.batch_size=11"):
        EpochBatchSampler(LENGTH, 12, world_size=2)
    assert len(EpochBatchSampler(LENGTH, 24, drop_last=False)) == 1
    with pytest.raises(ConfigError, match=r"data\.repeat=0"):
        EpochBatchSampler(LENGTH, 4, repeat=0)
    with pytest.raises(DataError, match="no samples"):
        EpochBatchSampler(0, 4)


STEPS = 30  # 11 batches per epoch: into the third epoch


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    return fit(tmp_path_factory.mktemp("whole"), STEPS)[0]


def test_uninterrupted_run_follows_the_sampler(uninterrupted):
    sampler = EpochBatchSampler(LENGTH, 4, seed=3, repeat=2)
    expected = []
    for epoch in range(3):
        sampler.set_epoch(epoch)
        expected += list(sampler)
    assert uninterrupted == expected[:STEPS]


@pytest.mark.parametrize(("stop", "workers"), [(3, 0), (11, 0), (14, 0), (22, 0), (14, 2)])
def test_resume_after_max_steps_sees_the_remaining_batches(tmp_path, uninterrupted, stop, workers):
    before, trainer = fit(tmp_path, stop, workers=workers)
    trainer.save_checkpoint(tmp_path / "stop.ckpt")
    after, resumed = fit(tmp_path, STEPS, ckpt=tmp_path / "stop.ckpt", workers=workers)
    assert resumed.global_step == STEPS
    assert before + after == uninterrupted


@pytest.mark.parametrize("every", [5, 11])
def test_resume_from_a_checkpoint_of_a_running_training(tmp_path, uninterrupted, every):
    """As after a crash: checkpoints written inside the loop, in the middle (5) or at the end (11) of an epoch."""
    saver = ModelCheckpoint(dirpath=tmp_path, every_n_train_steps=every, save_top_k=-1, filename="{step}")
    fit(tmp_path, STEPS, callbacks=[saver])
    saved = sorted(tmp_path.glob("*.ckpt"))
    assert len(saved) == STEPS // every
    for path in saved:
        stop = torch.load(path, weights_only=True)["global_step"]
        after, _ = fit(tmp_path, STEPS, ckpt=path)
        assert after == uninterrupted[stop:], path.name


def test_limited_epochs_and_overfitting(tmp_path, uninterrupted):
    limited, _ = fit(tmp_path, 12, limit_train_batches=5)
    assert limited == uninterrupted[:12]
    overfitted, _ = fit(tmp_path, 9, overfit_batches=3, limit_val_batches=0)
    assert overfitted == uninterrupted[:3] * 3


@pytest.mark.parametrize("accumulate", [3, 4, 16])  # of 11 batches per epoch: none divides it, and one is larger
def test_every_step_has_all_its_batches(tmp_path, uninterrupted, accumulate):
    steps = STEPS // accumulate
    seen, trainer = fit(tmp_path, steps, accumulate_grad_batches=accumulate)
    assert trainer.steps == [accumulate * (step + 1) for step in range(steps)]
    assert seen == uninterrupted[: accumulate * steps], "the order is that without accumulation"


@pytest.mark.parametrize("stop", [1, 2, 4, 5])  # steps of 4 batches: an iteration has two, the epoch ends in the third
def test_resumed_while_steps_span_epochs(tmp_path, uninterrupted, stop):
    before, trainer = fit(tmp_path, stop, accumulate_grad_batches=4)
    trainer.save_checkpoint(tmp_path / "stop.ckpt")
    after, resumed = fit(tmp_path, 7, ckpt=tmp_path / "stop.ckpt", accumulate_grad_batches=4)
    assert before + after == uninterrupted[:28]
    assert resumed.steps == [4 * (step + 1) for step in range(7 - stop)]


def test_changed_batch_size_is_reported_on_resume(tmp_path):
    _, trainer = fit(tmp_path, 3)
    trainer.save_checkpoint(tmp_path / "stop.ckpt")
    data = Numbered(batch_size=5, repeat=2, seed=3)
    again = pl.Trainer(
        max_steps=4, accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False,
        default_root_dir=tmp_path, enable_model_summary=False, use_distributed_sampler=False,
    )  # fmt: skip
    with pytest.warns(UserWarning, match="global_batch_size was 4, is 5"):
        again.fit(Recorder(), datamodule=LightningData(data), ckpt_path=tmp_path / "stop.ckpt", weights_only=True)
