"""A network that is told the end of an average, decoupled or gated, is its teacher at r = t, and exact elsewhere."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from flowanchor.checkpoints import initialise_student
from flowanchor.errors import ConfigError
from flowanchor.interfaces import Backbone, Batch, Question, VelocityField
from flowanchor.jvp import Chain, Full, TwoPass, compile_blocks, compiled_forms
from flowanchor.plugins.backbones.dit import DiT
from flowanchor.plugins.backbones.end_time import EndTime
from flowanchor.plugins.backbones.lightningdit import LightningDiT
from flowanchor.plugins.backbones.sit import SiT
from flowanchor.plugins.backbones.wan import Wan
from flowanchor.plugins.backbones.wan_experts import WanExperts
from flowanchor.plugins.objectives.anchors.flow_matching import FlowMatchingAnchor
from flowanchor.plugins.objectives.composed import ComposedObjective
from flowanchor.plugins.objectives.intervals.auxiliary import AuxiliaryInterval
from flowanchor.plugins.objectives.intervals.end_time import EndTimeInterval
from flowanchor.plugins.objectives.shortcuts.alpha_flow import AlphaFlowShortcut
from flowanchor.plugins.objectives.shortcuts.consistency import ConsistencyShortcut
from flowanchor.plugins.objectives.shortcuts.imf import ImprovedMeanFlowShortcut
from flowanchor.plugins.objectives.shortcuts.meanflow import MeanFlowShortcut
from flowanchor.plugins.objectives.shortcuts.scm import SCMShortcut
from flowanchor.plugins.objectives.times.uniform import Uniform
from flowanchor.plugins.samplers.meanflow import MeanFlowSampler
from flowanchor.testing import check_backbone, check_objective
from flowanchor.text.base import Tokens

SQUARE = {"input_size": 4, "in_channels": 2, "hidden_size": 16, "depth": 3, "num_heads": 2, "num_classes": 3}
RELEASED = {"use_qknorm": True, "use_swiglu": True, "use_rope": True, "use_rmsnorm": True}
VIDEO = {
    "in_channels": 2, "height": 4, "width": 4, "num_attention_heads": 2, "attention_head_dim": 12, "ffn_dim": 16,
    "num_layers": 3, "freq_dim": 8, "text_dim": 6, "text_len": 4,
}  # fmt: skip
NETWORKS: dict[str, Any] = {
    "lightningdit": lambda **more: LightningDiT(**SQUARE, **RELEASED, **more),
    "sit": lambda **more: SiT(**SQUARE, **more),
    "dit": lambda **more: DiT(**SQUARE, **more),
    "wan": lambda **more: Wan.from_preset("nano", **VIDEO, **more),
    "wan_experts": lambda **more: WanExperts(boundary=0.5, preset="nano", **VIDEO, **more),
}
WAYS = ("decoupled", "gated")


def filled(name: str, seed: int = 0, **more: Any) -> Backbone:
    """Every weight matters: a fresh network answers zero."""
    torch.manual_seed(seed)
    network: Backbone = NETWORKS[name](**more).eval()
    for parameter in network.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.3)
    return network


def asked(network: Backbone, dtype: torch.dtype = torch.float32) -> tuple[Any, Any, Any, Any]:
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(3, *network.sample_shape, dtype=dtype, generator=draw)
    t = torch.tensor([0.05, 0.21, 0.4], dtype=dtype)  # of one expert
    text = Tokens(torch.randn(3, 4, 6, dtype=dtype, generator=draw))
    return x, t, torch.tensor([0, 1, 2]) if network.conditioning.classes else text, t + 0.3


def saved(network: Backbone, folder: Any) -> Any:
    weights = {f"student.{name}": value for name, value in network.state_dict().items()}
    meta = {"format": 1, "kind": "flow", "step": 1, "config": {}}
    torch.save({"state_dict": weights, "ema": {}, "flowanchor": meta}, folder / "teacher.ckpt")
    return folder / "teacher.ckpt"


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", NETWORKS)
@torch.no_grad()
def test_a_student_is_its_teacher_bit_for_bit_where_the_end_is_the_time(name, way, tmp_path):
    teacher, student = filled(name), filled(name, 1, end_time=way)
    initialise_student(student, saved(teacher, tmp_path))
    x, t, cond, r = asked(student)
    assert torch.equal(student.predict(x, t, cond, t), teacher.predict(x, t, cond))
    assert (student.predict(x, t, cond, r) - teacher.predict(x, t, cond)).abs().max() > 1e-2
    new = {key for key in student.state_dict() if key not in teacher.state_dict()}
    assert bool(new) == (way == "gated"), "decoupled has no weights of its own"


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", NETWORKS)
@torch.no_grad()
def test_a_network_from_scratch_starts_without_a_preference(name, way):
    """At r = t it is what its own time embedder says; before training the two say the same."""
    network = NETWORKS[name](end_time=way)
    copies = network.copies()
    assert all(torch.equal(network.state_dict()[new], network.state_dict()[old]) for new, old in copies.items())
    assert len(copies) == {"decoupled": 0, "gated": 8 if name == "wan_experts" else 4}[way]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["lightningdit", "sit", "wan"])
@torch.no_grad()
def test_what_the_blocks_are_told(name, way):
    """By hand: the teacher's own stages, with the condition of one time or of the other."""
    network = filled(name, end_time=way)
    x, t, cond, r = asked(network)
    plain = filled(name)
    plain.load_state_dict({key: value for key, value in network.state_dict().items() if "r_embedder." not in key})
    tokens, at_t = plain.embed(x, t, cond)
    _, at_r = plain.embed(x, r, cond)
    if way == "decoupled":
        told = [at_t, at_t, at_r, at_r]  # 2 of 3 blocks, and the head
    else:
        embed = network.t_embedder if name != "wan" else network.condition_embedder.time_embedder
        enter = (lambda t: t) if name != "wan" else network._waves
        c = 0.75 * embed(enter(t)) + 0.25 * network.r_embedder(enter(r))
        if name == "wan":
            carried = (c, network._modulation(c))
        else:
            carried = (c + network.y_embedder(cond),)
        told = [at_t._replace(carried=carried)] * 4
    for block, context in zip(plain.blocks, told, strict=False):
        tokens = block(tokens, context)
    torch.testing.assert_close(network.predict(x, t, cond, r), plain.head(tokens, told[-1]), rtol=1e-4, atol=1e-4)


EXACT = {"chain": Chain(), "selective": Chain("selective"), "graph": Chain(False), "two_pass": TwoPass()}


@pytest.mark.parametrize(
    ("name", "way"),
    [
        ("lightningdit", "decoupled"), ("sit", "gated"), ("dit", "gated"), ("dit", "decoupled"), ("wan", "gated"),
        ("wan_experts", "decoupled"),
    ],
)  # fmt: skip
def test_every_engine_gives_the_same_answers_and_gradients(name, way):
    """Along (dx, dt, dr), and with r held; the tangent against central differences."""
    network = filled(name, end_time=way).double()
    x, t, cond, r = asked(network, torch.float64)
    dx, dt, dr = torch.randn(x.shape).double(), torch.tensor([1.0, -2.0, 0.5]).double(), torch.ones(3).double()
    found: dict[str, Any] = {}
    for engine_name, engine in {"full": Full(), **EXACT}.items():
        network.zero_grad()
        questions = [Question(t, t), Question(t, r, (dx, dt, dr)), Question(t, r, (dx, dt))]
        answers = engine(network, x, cond, questions)
        sum(answer.prediction.sin().sum() for answer in answers).backward()
        gradient = torch.cat([p.grad.flatten() for p in network.parameters() if p.grad is not None])
        found[engine_name] = [*(value for answer in answers for value in answer if value is not None), gradient]
    for engine_name, values in found.items():
        for value, wanted in zip(values, found["full"], strict=True):
            assert (value - wanted).norm() <= 1e-10 * wanted.norm(), engine_name
    step = 1e-8  # networks of a thousand levels turn as much faster with the time
    with torch.no_grad():
        for tangent, rate in ((found["chain"][2], dr), (found["chain"][4], 0 * dr)):
            ahead, behind = (
                network.predict(x + sign * dx, t + sign * dt, cond, r + sign * rate) for sign in (step, -step)
            )
            assert (tangent - (ahead - behind) / (2 * step)).norm() <= 1e-6 * tangent.norm()


@pytest.mark.parametrize(
    ("name", "engine"),
    [
        ("lightningdit", "chain"),
        pytest.param("lightningdit", "selective", marks=pytest.mark.slow),
        pytest.param("wan", "selective", marks=pytest.mark.slow),
    ],
)
def test_compiled_blocks_read_their_own_time(name, engine):
    """The two parts of a decoupled network do not share a graph of the dual pass."""
    compiled_forms._KINDS.clear()
    network = filled(name, end_time="decoupled").double()
    x, t, cond, r = asked(network, torch.float64)
    questions = [Question(t, t), Question(t, r, (torch.randn(x.shape).double(), torch.ones(3).double()))]

    def step() -> list[Any]:
        network.zero_grad()
        answers = EXACT[engine](network, x, cond, questions)
        sum(answer.prediction.sin().sum() for answer in answers).backward()
        return [answers[1].tangent, torch.cat([p.grad.flatten() for p in network.parameters() if p.grad is not None])]

    wanted = step()
    compile_blocks(network, backend="eager")
    step()  # the first walk of a joint step is watched, and runs eagerly
    for found, value in zip(step(), wanted, strict=True):
        assert (found - value).norm() <= 1e-12 * value.norm()
    graphs = [graph for kind in compiled_forms._KINDS.values() for graph in kind.forms.values()]
    assert len(graphs) == (2 if engine == "chain" else 6) and None not in graphs
    compiled_forms._KINDS.clear()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", [LightningDiT, DiT])
def test_they_keep_the_contract(kind, way):
    check_backbone(kind(**SQUARE, end_time=way))


@pytest.mark.parametrize(
    ("split", "depth", "first"), [(None, 28, 20), (None, 4, 3), (None, 1, 1), (0.5, 12, 6), (0.01, 4, 1), (2, 4, 2)]
)
def test_where_the_blocks_are_divided(split, depth, first):
    assert EndTime.of("decoupled", split, 0.25, depth, False).first == first
    assert EndTime.of("gated", None, 0.25, depth, False).first == depth


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"end_time": "other"}, "choose auxiliary, decoupled or gated"),
        ({"end_time": "gated", "auxiliary_time_cond": True}, "leave one of them out"),
        ({"end_time": "gated", "end_time_split": 2}, "divides the blocks of backbone.end_time=decoupled"),
        ({"end_time": "decoupled", "end_time_split": 4}, "how many of the 3 blocks"),
        ({"end_time": "decoupled", "end_time_split": 1.5}, "how many of the 3 blocks"),
        ({"end_time": "gated", "end_time_gate": 1.0}, "between 0 and 1"),
    ],
)
def test_settings_that_make_no_sense(settings, words):
    with pytest.raises(ConfigError, match=words):
        NETWORKS["lightningdit"](**settings)


def test_an_interval_and_a_network_that_do_not_fit():
    gated, none = NETWORKS["sit"](end_time="gated"), NETWORKS["sit"]()
    EndTimeInterval("gated").check(gated)
    AuxiliaryInterval().check(gated)
    with pytest.raises(ConfigError, match="told it as gated: set backbone.end_time=decoupled"):
        EndTimeInterval("decoupled").check(gated)
    with pytest.raises(ConfigError, match="not told the end of an average: set backbone.end_time=gated"):
        EndTimeInterval("gated").check(none)
    with pytest.raises(ConfigError, match="choose objective/interval=gated"):
        AuxiliaryInterval("span").check(gated)
    with pytest.raises(ConfigError, match="choose decoupled or gated"):
        EndTimeInterval("auxiliary")
    with pytest.raises(ConfigError, match="pass r"):
        x, t, cond, _ = asked(gated)
        gated.predict(x, t, cond)


def test_adapters_keep_the_copy_trained(tmp_path):
    """Of Wan: the embedder of the end is trained whole beside adapters, as an auxiliary one is."""
    teacher = filled("wan")
    student = filled("wan", 1, end_time="gated", lora={"rank": 2})
    initialise_student(student, saved(teacher, tmp_path))
    trained = {name for name, parameter in student.named_parameters() if parameter.requires_grad}
    assert {name for name in student.state_dict() if "r_embedder." in name} < trained
    assert not {name for name in student.borrowed() if "r_embedder." in name}


class Frozen(VelocityField):
    """The velocity of a teacher that knows no end."""

    def __init__(self, teacher: Backbone) -> None:
        super().__init__()
        self.teacher = [teacher]

    @torch.no_grad()
    def forward(self, x, t, cond, flow, student, interval):
        return self.teacher[0].predict(x, t, cond)


SHORTCUTS = {
    "consistency": ConsistencyShortcut, "meanflow": MeanFlowShortcut, "imf": ImprovedMeanFlowShortcut,
    "alpha_flow": lambda: AlphaFlowShortcut(start=0, end=3, run_steps=None), "scm": lambda: SCMShortcut(4),
}  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", SHORTCUTS)
def test_every_shortcut_learns_beside_an_anchor(name, way, tmp_path):
    """The anchor is without a fault at the start, and the shortcut's loss is that of any exact engine."""
    teacher, student = filled("sit").double(), filled("sit", 1, end_time=way).double()
    initialise_student(student, saved(teacher, tmp_path))
    goal = ComposedObjective(EndTimeInterval(way), Uniform(), FlowMatchingAnchor(), SHORTCUTS[name]())
    goal.check(student)
    goal.at_step(2)
    x1 = torch.randn(4, *student.sample_shape).double()
    noise, times = torch.randn(x1.shape).double(), [None if d is None else d.double() for d in goal.draw(4)]
    losses = []
    for engine in (Full(), Chain()):
        student.zero_grad()
        result = goal(student, Batch(x1, torch.tensor([0, 1, 2, 0])), Frozen(teacher), engine, noise, *times)
        result.loss.backward()
        losses.append(torch.cat([p.grad.flatten() for p in student.parameters() if p.grad is not None]))
        assert abs(result.terms["anchor"]) < 1e-12 and result.terms["shortcut"].isfinite()
    assert losses[0].norm() > 0 and (losses[1] - losses[0]).norm() <= 1e-9 * losses[0].norm()


@pytest.mark.parametrize("way", WAYS)
def test_samples_without_a_jump_find_nothing_to_learn_at_first(way, tmp_path):
    teacher, student = filled("lightningdit"), filled("lightningdit", 1, end_time=way)
    initialise_student(student, saved(teacher, tmp_path))
    x1, cond = torch.randn(4, *student.sample_shape), torch.tensor([0, 1, 2, 0])
    for share, still in ((1.0, True), (0.0, False)):
        goal = ComposedObjective(EndTimeInterval(way), Uniform(), shortcut=MeanFlowShortcut(share))
        loss = goal(student, Batch(x1, cond), Frozen(teacher), Chain()).loss
        assert loss < 1e-7 if still else loss > 1e-3


@pytest.mark.parametrize(
    ("network", "way"), [("lightningdit", "decoupled"), pytest.param("wan", "gated", marks=pytest.mark.slow)]
)
def test_a_step_can_be_captured(network, way):
    goal = ComposedObjective(EndTimeInterval(way), Uniform(), FlowMatchingAnchor(), MeanFlowShortcut(0.5))
    if network == "lightningdit":
        check_objective(goal)
    else:
        student = filled(network, end_time=way)
        batch = Batch(torch.randn(2, *student.sample_shape), Tokens(torch.randn(2, 4, 6)))
        check_objective(goal, student, batch=batch)


@torch.no_grad()
def test_a_sampler_asks_for_the_end_of_each_step():
    network = filled("sit", end_time="decoupled")
    x, _, cond, _ = asked(network)
    drawn = MeanFlowSampler(steps=2).sample(network, x, cond, EndTimeInterval("decoupled"))
    zero, half, one = (torch.full((3,), time) for time in (0.0, 0.5, 1.0))
    middle = x + 0.5 * network.predict(x, zero, cond, half)
    torch.testing.assert_close(drawn.float(), middle + 0.5 * network.predict(middle, half, cond, one))
