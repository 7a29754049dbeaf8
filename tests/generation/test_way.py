"""What can be seen and chosen of a drawing from Python: noise, moments on the way, samplers as objects."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

import flowanchor
from flowanchor.errors import ConfigError
from flowanchor.generation.opened import Drawn
from flowanchor.plugins.samplers.consistency import ConsistencySampler
from flowanchor.plugins.samplers.flow import FlowSampler
from flowanchor.plugins.samplers.meanflow import MeanFlowSampler

TINY = Path(__file__).parents[1] / "programs" / "tiny_checkpoint.py"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    spec = importlib.util.spec_from_file_location("tiny_checkpoint", TINY)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    folder = tmp_path_factory.mktemp("models")
    return {
        kind: flowanchor.load(module.save_checkpoint(folder / f"{kind}.ckpt", kind)) for kind in ("shortcut", "flow")
    }


@pytest.mark.parametrize(
    "kind, sampler, moments",
    [
        ("shortcut", ConsistencySampler(steps=3), [0, 1 / 3, 2 / 3, 1]),
        ("shortcut", ConsistencySampler(grid=[0.0, 0.4]), [0, 0.4, 1]),
        ("flow", FlowSampler(steps=4), [0, 0.25, 0.5, 0.75, 1]),
        ("flow", FlowSampler(steps=2, solver="heun"), [0, 0.5, 1]),
        ("flow", FlowSampler(steps=2, solver="rk4"), [0, 0.5, 1]),
        ("flow", FlowSampler(solver="dopri5", rtol=1e-2, atol=1e-2), [0, 1]),
    ],
    ids=["consistency", "grid", "euler", "heun", "rk4", "dopri5"],
)
def test_the_way_begins_with_the_noise_and_ends_with_the_images(models, kind, sampler, moments):
    model, seen = models[kind], []
    noise = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(5))
    drawn = model.sample(
        [0, 1, 2], seed=3, batch_size=2, noise=noise, sampler=sampler, callback=seen.append, return_trajectory=True
    )
    assert isinstance(drawn, Drawn)
    assert torch.equal(drawn.images, model.sample([0, 1, 2], seed=3, noise=noise, sampler=sampler))
    assert drawn.trajectory.shape == (len(moments), 3, 8, 8, 1) and drawn.trajectory.dtype == torch.uint8
    assert torch.equal(drawn.trajectory[-1], drawn.images)
    expected = ((noise + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)
    assert torch.equal(drawn.trajectory[0], expected)
    assert [(one.first, one.step) for one in seen] == [(first, k) for first in (0, 2) for k in range(len(moments))]
    assert [one.time for one in seen if one.first == 0] == pytest.approx(moments)
    assert {tuple(one.samples.shape) for one in seen} == {(2, 1, 8, 8), (1, 1, 8, 8)}


def test_a_step_of_the_way_is_the_solvers_own(models):
    """Euler's: the difference of two states is the step times the velocity at the first."""
    model, seen = models["flow"], []
    model.sample([4], steps=2, callback=seen.append)
    start, middle, _ = (moment.samples for moment in seen)
    time = model.interval.anchor(torch.zeros(1)).t
    with torch.no_grad():
        velocity = model.backbone.predict(start.float(), time, torch.tensor([4]))
    assert torch.allclose(middle, start + 0.5 * velocity.double())


def test_noise_in_the_place_of_the_seeds(models):
    model = models["shortcut"]
    noise = torch.randn(2, 1, 8, 8)
    one_step = {"steps": 1}
    assert torch.equal(
        model.sample([0, 1], seed=1, noise=noise, **one_step), model.sample([0, 1], seed=2, noise=noise, **one_step)
    )
    assert model.sample(noise=noise).shape == (2, 8, 8, 1)  # as many as there is noise for
    for wrong in (noise[:1], noise[..., :4], torch.zeros(3)):
        with pytest.raises(ConfigError, match="noise has the shape"):
            model.sample([0, 1], noise=wrong)


def test_a_sampler_as_an_object(models):
    model = models["shortcut"]
    assert torch.equal(model.sample([1, 2], sampler=ConsistencySampler(steps=1)), model.sample([1, 2], steps=1))
    with pytest.raises(ConfigError, match="steps= is a setting of the sampler"):
        model.sample([1], steps=2, sampler=ConsistencySampler(steps=1))
    with pytest.raises(ConfigError, match="sampler=meanflow asks for averages"):
        model.sample([1], sampler=MeanFlowSampler(steps=1))
    with pytest.raises(ConfigError, match="trained as a flow model"):
        models["flow"].sample([1], sampler=ConsistencySampler(steps=1))
    with pytest.raises(TypeError, match="stepz"):
        ConsistencySampler(stepz=1)


def test_labels_is_classes_by_its_earlier_name(models):
    model = models["shortcut"]
    assert torch.equal(model.sample(labels=[3, 4]), model.sample(classes=[3, 4]))
    with pytest.raises(ConfigError, match="classes and labels are the same"):
        model.sample([3], labels=[3])
