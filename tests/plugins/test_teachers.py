"""Where the target velocity comes from: guidance, its interval, frozen teachers, and guidance without one."""

from __future__ import annotations

import pytest
import torch

from flowanchor.errors import CheckpointError, ConfigError
from flowanchor.jumps.guidance import Guidance
from flowanchor.plugins.backbones.lightningdit import LightningDiT
from flowanchor.plugins.objectives.intervals.auxiliary import AuxiliaryInterval
from flowanchor.plugins.objectives.intervals.expanded import ExpandedInterval
from flowanchor.plugins.teachers.checkpoint import CheckpointVelocity
from flowanchor.plugins.teachers.data import DataVelocity
from flowanchor.plugins.teachers.student import SelfVelocity

NULL = 3


def network(seed=0, **settings):
    torch.manual_seed(seed)
    made = LightningDiT(**{"input_size": 4, "patch_size": 2, "in_channels": 2, "hidden_size": 16, "depth": 1,
                           "num_heads": 2, "num_classes": NULL, **settings})  # fmt: skip
    for parameter in made.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.3)
    return made.eval()


def inputs():
    generator = torch.Generator().manual_seed(1)
    x, flow = torch.randn(4, 2, 4, 4, generator=generator), torch.randn(4, 2, 4, 4, generator=generator)
    return x, torch.tensor([0.05, 0.3, 0.6, 0.95]), torch.tensor([0, 1, 2, 0]), flow


def test_data_velocity_is_the_difference():
    x, t, y, flow = inputs()
    assert DataVelocity()(x, t, y, flow, network(), ExpandedInterval()) is flow


def test_teacher_guidance_inside_its_interval_only():
    """Fails if guidance were on below (or above) the interval."""
    teacher, student = network(0), network(1)
    x, t, y, flow = inputs()
    field = CheckpointVelocity.of_network(teacher, Guidance(scale=1.75, low=0.125, high=0.9))
    v = field(x, t, y, flow, student, ExpandedInterval())
    conditional, unconditional = teacher(x, t, y), teacher(x, t, torch.full_like(y, NULL))
    guided = unconditional + 1.75 * (conditional - unconditional)
    for i, expected in enumerate([conditional, guided, guided, conditional]):
        assert torch.allclose(v[i], expected[i], atol=1e-6), i
    assert not torch.allclose(guided[0], conditional[0], atol=1e-3)
    assert not v.requires_grad


def test_teacher_stays_frozen_and_in_evaluation_mode():
    field = CheckpointVelocity.of_network(network(0, class_dropout_prob=1.0), Guidance())
    field.train()
    assert not field.network.training
    assert not any(p.requires_grad for p in field.parameters())


def test_distilled_teacher_is_asked_at_its_anchor():
    teacher = network(0)
    x, t, y, flow = inputs()
    field = CheckpointVelocity.of_network(teacher, Guidance(), interval=ExpandedInterval())
    assert torch.equal(field(x, t, y, flow, network(1), ExpandedInterval()), teacher(x, 2 - t, y))


def test_teacher_with_second_embedder_is_asked_at_r_equal_t():
    teacher = network(0, auxiliary_time_cond=True)
    x, t, y, flow = inputs()
    v = CheckpointVelocity.of_network(teacher, Guidance())(x, t, y, flow, network(1), ExpandedInterval())
    assert torch.equal(v, teacher(x, t, y, t))


def test_teacher_that_does_not_fit_is_refused():
    field = CheckpointVelocity.of_network(network(0), Guidance())
    field.check(network(1))
    with pytest.raises(CheckpointError, match=r"shape \(2, 4, 4\), this student has samples of shape \(2, 8, 8\)"):
        field.check(network(1, input_size=8))
    with pytest.raises(CheckpointError, match="3 classes, this student has 5 classes"):
        field.check(network(1, num_classes=5))
    with pytest.raises(ConfigError, match="teacher.checkpoint=PATH"):
        CheckpointVelocity(checkpoint="")


@pytest.mark.parametrize(
    ("interval", "settings"), [(ExpandedInterval(), {}), (AuxiliaryInterval(), {"auxiliary_time_cond": True})]
)
def test_self_guidance_asks_the_anchor_branch(interval, settings):
    """METHOD: the unconditional velocity comes from the anchor, never the shortcut; dropped labels stay unguided."""
    student = network(1, **settings)
    x, t, y, flow = inputs()
    y = torch.tensor([0, 1, NULL, 2])  # the third label was dropped
    v = SelfVelocity(1.75, 0.125, 1.0)(x, t, y, flow, student, interval)
    told = interval.anchor(t)
    unconditional = student.predict(x, told.t, torch.full_like(y, NULL), told.r)
    guided = unconditional + 1.75 * (flow - unconditional)
    for i, expected in enumerate([flow, guided, flow, guided]):
        assert torch.allclose(v[i], expected[i], atol=1e-6), i
    wrong = interval.shortcut(t)
    at_shortcut = student.predict(x, wrong.t, torch.full_like(y, NULL), wrong.r)
    assert not torch.allclose(at_shortcut[1], unconditional[1], atol=1e-3)
    assert not v.requires_grad


def test_self_guidance_can_mix_in_its_own_conditional_velocity():
    """MeanFlow's: omega v + kappa u(c) + (1 - omega - kappa) u(null), on the branch r = t."""
    student, interval = network(1, auxiliary_time_cond=True), AuxiliaryInterval()
    x, t, y, flow = inputs()
    v = SelfVelocity(1.2, 0.0, 1.0, mix=0.5)(x, t, y, flow, student, interval)
    own, null = student.predict(x, t, y, t), student.predict(x, t, torch.full_like(y, NULL), t)
    torch.testing.assert_close(v, 1.2 * flow + 0.5 * own + (1 - 1.2 - 0.5) * null)
    with pytest.raises(ConfigError, match="disable_label_dropout=false"):
        SelfVelocity(1.0, mix=0.5).check(network(disable_label_dropout=True))


def test_self_guidance_needs_label_dropout():
    with pytest.raises(ConfigError, match="disable_label_dropout=false"):
        SelfVelocity().check(network(disable_label_dropout=True))
    SelfVelocity().check(network())
    SelfVelocity(guidance_scale=1.0).check(network(disable_label_dropout=True))


def test_guidance_interval_must_not_be_empty():
    with pytest.raises(ConfigError, match="must not exceed"):
        Guidance(2.0, 0.8, 0.2)
