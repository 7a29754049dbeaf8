"""Two experts against each asked by hand: as one student, as one teacher, and over the times of a run."""

from __future__ import annotations

import pytest
import torch
from torch.utils._pytree import tree_map

from flowanchor.checkpoints import initialise_student
from flowanchor.errors import ConfigError
from flowanchor.graphs.capture import CaptureError, being_captured
from flowanchor.graphs.stand_in import forbidden
from flowanchor.interfaces import Batch, Question
from flowanchor.jumps.guidance import Guidance
from flowanchor.jvp import Chain, Full
from flowanchor.plugins.backbones.wan import Wan
from flowanchor.plugins.backbones.wan_experts import WanExperts
from flowanchor.plugins.objectives.anchors.flow_matching import FlowMatchingAnchor
from flowanchor.plugins.objectives.composed import ComposedObjective
from flowanchor.plugins.objectives.intervals.expanded import ExpandedInterval
from flowanchor.plugins.objectives.intervals.plain import PlainInterval
from flowanchor.plugins.objectives.shortcuts.consistency import ConsistencyShortcut
from flowanchor.plugins.objectives.times.region import Region
from flowanchor.plugins.objectives.times.routed import Routed
from flowanchor.plugins.objectives.times.shifted import Shifted
from flowanchor.plugins.objectives.times.uniform import Uniform
from flowanchor.plugins.samplers.consistency import ConsistencySampler
from flowanchor.plugins.teachers import experts as teacher_module
from flowanchor.plugins.teachers.data import DataVelocity
from flowanchor.plugins.teachers.experts import ExpertsVelocity
from flowanchor.text.base import Tokens

SMALL = {
    "in_channels": 4, "height": 8, "width": 6, "num_attention_heads": 2, "attention_head_dim": 24, "ffn_dim": 64,
    "num_layers": 2, "freq_dim": 32, "text_dim": 12, "text_len": 9,
}  # fmt: skip


@pytest.fixture
def pair():
    torch.manual_seed(0)
    network = WanExperts(preset="nano", **SMALL)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return network.eval()


@pytest.fixture
def inputs():
    torch.manual_seed(1)
    return torch.randn(3, 4, 1, 8, 6), Tokens(torch.randn(3, 5, 12))


@pytest.mark.parametrize(
    "t, name",
    [
        ([0.0, 0.1, 0.125], "high"),
        ([0.125001, 0.2, 1.0], "low"),
        ([2.0, 1.9, 1.875], "high"),
        ([1.5, 1.1, 1.8749], "low"),
    ],
)
def test_each_time_asks_its_expert(pair, inputs, t, name):
    x, text = inputs
    t = torch.tensor(t)
    with torch.no_grad():
        assert torch.equal(pair(x, t, text), getattr(pair, name)(x, t, text))


def test_a_batch_with_times_of_both_is_refused(pair, inputs):
    with pytest.raises(ConfigError, match="objective/time=routed"):
        pair(inputs[0], torch.tensor([0.0, 0.1, 0.5]), inputs[1])


@pytest.mark.parametrize("t, asked, idle", [([0.01, 0.05, 0.1], "high.", "low."), ([0.3, 0.6, 0.9], "low.", "high.")])
def test_engines_agree_and_the_other_expert_gets_no_gradient(pair, inputs, t, asked, idle):
    network = pair.double()
    x, text = tree_map(torch.Tensor.double, inputs)
    t = torch.tensor(t, dtype=torch.float64)
    found = []
    for engine in (Full(), Chain(), Chain(False)):
        network.zero_grad(set_to_none=True)
        dual = engine(network, x, text, [Question(t, along=(torch.ones_like(x), torch.ones_like(t)))])[0]
        dual.prediction.square().sum().backward()
        gradients = {name: p.grad for name, p in network.named_parameters() if p.grad is not None}
        assert gradients and not any(name.startswith(idle) and bool(g.any()) for name, g in gradients.items())
        assert len([name for name in gradients if name.startswith(asked)]) == len(list(network.high.parameters()))
        found.append((dual.prediction.detach(), dual.tangent, {k: v for k, v in gradients.items() if asked in k}))
    for prediction, tangent, gradients in found[1:]:
        assert (prediction - found[0][0]).norm() <= 1e-10 * prediction.norm()
        assert (tangent - found[0][1]).norm() <= 1e-10 * tangent.norm()
        for name, gradient in gradients.items():
            assert (gradient - found[0][2][name]).norm() <= 1e-9 * gradient.norm() + 1e-12, name


@pytest.mark.parametrize("t, side", [([0.0, 0.1, 0.125], "high"), ([1.5, 1.1, 1.8749], "low")])
def test_told_the_times_it_asks_the_device_nothing(pair, inputs, t, side):
    t = torch.tensor(t)
    wanted = pair(inputs[0], t, inputs[1])
    assert pair.at_times(t) == side
    with forbidden():
        told = pair(inputs[0], t, inputs[1])
    torch.testing.assert_close(told, wanted)
    assert pair.at_times(None) is None
    with pytest.raises(CaptureError, match="the host waits"), forbidden():
        pair(inputs[0], t, inputs[1])


def test_one_step_of_training_and_sampling_across_the_boundary(pair, inputs):
    x, text = inputs
    objective = ComposedObjective(
        ExpandedInterval(), Routed(Uniform(), 0.125), FlowMatchingAnchor(), ConsistencyShortcut(boundaries=[0.125])
    )
    for seed in range(4):  # both sides come up
        torch.manual_seed(seed)
        assert objective(pair, Batch(x, text), DataVelocity(), Chain()).loss.isfinite()
    noise = torch.randn(3, 4, 1, 8, 6, dtype=torch.float64)
    with torch.no_grad():
        drawn = ConsistencySampler(2, boundaries=[0.125]).sample(pair, noise, text, ExpandedInterval())
        middle = noise + 0.125 * pair.high(noise.float(), torch.zeros(3), text).double()
        by_hand = middle + 0.875 * pair.low(middle.float(), torch.full((3,), 0.125001), text).double()
    # The boundary itself is the high-noise expert's: the low-noise one is asked just behind it.
    assert ConsistencySampler(2, boundaries=[0.125]).asked == [0.0, 0.125001]
    torch.testing.assert_close(drawn, by_hand)


def test_a_pair_starts_from_two_folders(pair, tmp_path):
    for name, stock in zip(("transformer", "transformer_2"), pair.transformers(), strict=True):
        stock.save_pretrained(tmp_path / name)
    student = WanExperts(preset="nano", **SMALL)
    initialise_student(student, {"high": tmp_path / "transformer", "low": tmp_path / "transformer_2"})
    for name, value in pair.state_dict().items():
        assert torch.equal(student.state_dict()[name], value), name


class TestTeacher:
    T = torch.tensor([0.05, 0.6, 0.125])

    @pytest.fixture
    def teacher(self, pair, tmp_path):
        for name, stock in zip(("transformer", "transformer_2"), pair.transformers(), strict=True):
            stock.save_pretrained(tmp_path / name)
        field = ExpertsVelocity(str(tmp_path / "transformer"), str(tmp_path / "transformer_2"))
        for expert in (field.high, field.low):
            negative = torch.randn(2, 12, generator=torch.Generator().manual_seed(7))
            expert.network.conditioning.use_null(Tokens(negative))
        return field

    def wanted(self, teacher, x, text):
        rows = []
        for i, t in enumerate(self.T):
            expert, scale = (teacher.high, 4.0) if 1 - t >= 0.875 else (teacher.low, 3.0)
            told = Question(t[None])
            rows.append(
                Guidance(scale).velocity(expert.network, x[i : i + 1], told, Tokens(text.tokens[i : i + 1]), t[None])
            )
        return torch.cat(rows)

    @pytest.mark.parametrize("sharded", [False, True])
    def test_a_mixed_batch_is_split(self, teacher, inputs, sharded, monkeypatch):
        x, text = inputs
        monkeypatch.setattr(teacher_module, "is_sharded", lambda network: sharded)
        found = teacher(x, self.T, text, torch.zeros_like(x), Wan(**SMALL), PlainInterval())
        torch.testing.assert_close(found, self.wanted(teacher, x, text), rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("times", [T, torch.full((3,), 0.6), torch.full((3,), 0.05)], ids=["mixed", "low", "high"])
    def test_told_the_times_it_asks_the_device_nothing(self, teacher, inputs, times):
        x, text = inputs
        ask = (x, times, text, torch.zeros_like(x), Wan(**SMALL), PlainInterval())
        wanted = teacher(*ask)
        early = [time <= 0.125 for time in times.tolist()]
        assert teacher.at_times(times)[0] == (any(early), all(early))
        with being_captured(), forbidden():
            told = teacher(*ask)
        torch.testing.assert_close(told, wanted, rtol=1e-4, atol=1e-4)
        teacher.at_times(None)
        with pytest.raises(CaptureError), being_captured(), forbidden():
            teacher(*ask)

    def test_one_side(self, teacher, inputs):
        x, text = inputs
        teacher.one_side = True
        with pytest.raises(ConfigError, match="both experts"):
            teacher(x, self.T, text, torch.zeros_like(x), Wan(**SMALL), PlainInterval())
        t = torch.full((3,), 0.6)
        found = teacher(x, t, text, torch.zeros_like(x), Wan(**SMALL), PlainInterval())
        assert torch.equal(found, teacher.low(x, t, text, torch.zeros_like(x), Wan(**SMALL), PlainInterval()))

    def test_paths_are_needed(self):
        with pytest.raises(ConfigError, match="teacher.high=PATH"):
            ExpertsVelocity("", "x")


def test_shifted_times_are_those_of_a_shifted_noise_level():
    u = torch.linspace(0, 1, 11)
    sigma = 5 * (1 - u) / (1 + 4 * (1 - u))  # Wan's schedulers, shift 5
    torch.testing.assert_close(Shifted(Uniform(), 0.2).from_draw(u), 1 - sigma)


def test_a_region():
    found = Region(Uniform(), 0.125, 1.0).from_draw(torch.tensor([0.0, 0.5, 1.0]))
    assert found.tolist() == pytest.approx([0.125, 0.5625, 1.0], abs=2e-6)


@pytest.mark.parametrize("b", [0.125, 0.1, 0.5, 0.9])
def test_no_time_is_so_near_to_a_boundary_that_rounding_moves_it(pair, b):
    """Student, teacher and both halves of the interval agree on the expert, whatever was drawn (float32)."""
    near = torch.tensor([b, b + 1e-8, b - 1e-8, b + 6e-8, b - 6e-8, 0.0, 1.0])
    pair.boundary = 1 - b
    for first in near:
        t = Routed(Uniform(), b).from_draw(torch.cat([first[None], near]))
        expert, early = pair.expert(t), 1 - t >= pair.boundary
        assert pair.expert(2 - t) is expert and early.all() == early.any() == (expert is pair.high)
    for low, high, expert in ((0.0, b, pair.high), (b, 1.0, pair.low)):
        t = Region(Uniform(), low, high).from_draw(torch.tensor([0.0, 1e-8, 0.5, 1.0]))
        assert pair.expert(t) is pair.expert(2 - t) is expert and low <= t.min() and t.max() <= high


def test_routed_batches_lie_on_one_side_as_often_as_the_times_do():
    time = Routed(Shifted(Uniform(), 0.2), 0.125)
    torch.manual_seed(0)
    batches = [time.sample(16) for _ in range(2000)]
    sides = [bool((t < 0.125).all()) for t in batches]
    assert all(bool((t < 0.125).all()) or bool((t >= 0.125).all()) for t in batches)
    share = 0.125 / (0.2 + 0.8 * 0.125)  # of uniform draws, those that the shift sends below the boundary
    assert sum(sides) / len(sides) == pytest.approx(share, abs=0.04)
    assert all(float(t.min()) >= 0 and float(t.max()) <= 1 for t in batches)


@pytest.mark.parametrize(
    "make",
    [lambda: Region(Uniform(), 0.5, 0.5), lambda: Routed(Uniform(), 0.0), lambda: Shifted(Uniform(), 0.0),
     lambda: WanExperts(boundary=1.0, preset="nano", **SMALL)],
)  # fmt: skip
def test_settings_that_make_no_sense(make):
    with pytest.raises(ConfigError):
        make()
