"""From a teacher that knows one time to a student that is told two: train, resume, draw, measure, give away."""

from __future__ import annotations

import pytest
import torch

from flowanchor.checkpoints import load_model

SHORT = ["callbacks=default", "~callbacks.sample_grid", "~callbacks.best", "trainer.val_check_interval=2"]
SHORT += ["trainer.limit_val_batches=1", "data.num_workers=0"]


@pytest.mark.slow
def test_a_student_that_is_told_the_end(command, tiny, capsys):
    size = [*tiny, "backbone.depth=2"]
    folder = command("train", *size, *SHORT, "experiment=digits_teacher", "trainer.max_steps=2", "name=teacher")
    teacher = "outputs/train/teacher"
    starts = [f"initialise_from={teacher}", "teacher=checkpoint", f"teacher.checkpoint={teacher}"]
    for way in ("gated", "decoupled"):
        asked = [*size, *SHORT, *starts, "objective=meanflow", f"objective/interval={way}", f"name={way}"]
        command("train", *asked, "trainer.max_steps=2")
        command("train", *asked, "trainer.max_steps=4")
        model = load_model(folder / "outputs/train" / way)
        assert (model.step, model.backbone.end_time, model.interval.end_time) == (4, way, way)
        command("sample", f"checkpoint=outputs/train/{way}", "sampler.steps=2", "num_samples=4", f"name={way}")
        capsys.readouterr()
        command("convert", f"inspect=outputs/train/{way}")
        assert "shortcut, step 4" in capsys.readouterr().out
    command("convert", "checkpoint=outputs/train/gated", "output=given.safetensors")
    given, kept = load_model(folder / "given.safetensors"), load_model(folder / "outputs/train/gated")
    assert given.backbone.told_end == kept.backbone.told_end
    weights = kept.backbone.state_dict()
    assert all(torch.equal(weights[name], value) for name, value in given.backbone.state_dict().items())
    evaluated = ["nfe=[1]", "num_samples=20", "batch_size=20", "seed=0", "metric=random", "metric.cache_dir=cache"]
    command("evaluate", "checkpoint=outputs/train/gated", *evaluated)
    with pytest.raises(SystemExit):
        command("train", *size, *SHORT, "objective/interval=gated", "backbone.end_time=decoupled")
    assert "set backbone.end_time=gated" in capsys.readouterr().err
