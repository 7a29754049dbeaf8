"""Stop and resume: the parameters after step n equal those of an uninterrupted run, bit for bit."""

from __future__ import annotations

import pytest
import torch

from flowanchor.errors import FlowAnchorError

RUN = [
    "callbacks=default", "~callbacks.sample_grid", "~callbacks.best", "optimizer.lr=1e-3",
    "trainer.val_check_interval=4", "trainer.limit_val_batches=1", "log_every_n_steps=1",
    "data.repeat=1", "backbone.disable_label_dropout=false", "backbone.patch_size=4",
]  # fmt: skip


def content(folder, name):
    return torch.load(folder / "outputs" / "train" / name / "checkpoints" / "last.ckpt", weights_only=True)


@pytest.mark.parametrize(
    ("batch", "stops", "extra"),
    [
        # Two batches an epoch: inside the second epoch, and where an epoch ends and a validation falls due.
        (500, (3, 4), []),
        (100, (5,), ["data.num_workers=1"]),  # inside the first epoch, with a worker that reads ahead
        (100, (3,), ["trainer.accumulate_grad_batches=2"]),
    ],
)
def test_resumed_equals_uninterrupted(command, tiny, batch, stops, extra, assert_same):
    settings = [*tiny, *RUN, f"data.batch_size={batch}", *extra]
    folder = command("train", *settings, "name=whole", "trainer.max_steps=6")
    for stop in stops:
        command("train", *settings, f"name=parts{stop}", f"trainer.max_steps={stop}")
        assert content(folder, f"parts{stop}")["global_step"] == stop
        command("train", *settings, f"name=parts{stop}", "trainer.max_steps=6")
        whole, parts = content(folder, "whole"), content(folder, f"parts{stop}")
        assert whole["global_step"] == parts["global_step"] == 6
        for key in ("state_dict", "ema", "optimizer_states"):
            assert whole[key], key
            assert_same(whole[key], parts[key], key)
    start = content(folder, "whole")["state_dict"]["student.final_layer.linear.weight"]
    assert start.abs().max() > 0, "the run must have trained something"


def test_the_same_command_finds_a_finished_run(command, tiny, capsys):
    settings = [*tiny, *RUN, "trainer.max_steps=2"]
    folder = command("train", *settings)
    (run,) = (folder / "outputs" / "train").iterdir()
    before = (run / "checkpoints" / "last.ckpt").stat().st_mtime_ns
    command("train", *settings)
    assert list((folder / "outputs" / "train").iterdir()) == [run]
    assert (run / "checkpoints" / "last.ckpt").stat().st_mtime_ns == before


def test_another_run_under_the_same_name_is_refused(command, tiny, capsys):
    settings = [*tiny, *RUN, "trainer.max_steps=2", "name=one"]
    command("train", *settings)
    with pytest.raises(SystemExit) as exit:
        command("train", *settings, "objective.shortcut.clamp=2.0")
    assert exit.value.code == 1
    assert "objective.shortcut.clamp" in capsys.readouterr().err


def test_a_checkpoint_of_ours_needs_no_unpickling(command, tiny):
    folder = command("train", *tiny, *RUN, "trainer.max_steps=2", "name=one")
    from flowanchor.checkpoints import load_model

    model = load_model(folder / "outputs" / "train" / "one")
    raw = load_model(folder / "outputs" / "train" / "one", ema="none")
    assert model.kind == "shortcut" and model.step == 2 and model.ema != "none" and len(model.digest) == 12
    assert raw.ema == "none"
    differs = [
        not torch.equal(a, b) for a, b in zip(model.backbone.parameters(), raw.backbone.parameters(), strict=True)
    ]
    assert any(differs), "the average differs from the raw weights"
    with pytest.raises(FlowAnchorError, match="choose one of power_"):
        load_model(folder / "outputs" / "train" / "one", ema="power_9")
