"""The end of an average told to transformers of diffusers: exactly the base at first, and every derivative right."""

from __future__ import annotations

import pytest
import torch

from flowanchor.errors import ConfigError
from flowanchor.interfaces import Question
from flowanchor.jvp import Chain, Full
from flowanchor.plugins.backbones.diffusers.network import DiffusersTransformer
from flowanchor.plugins.backbones.lora import is_adapter
from flowanchor.plugins.objectives.intervals.auxiliary import AuxiliaryInterval

from .diffusers_cases import CASES

WAYS = ("auxiliary", "decoupled", "gated")
NAMES = [name for name in CASES if "padded" not in name and name not in ("SD3", "FLUX.1 dev")]


def relative(a, b):
    return float((a - b).detach().norm() / b.detach().norm())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("way", WAYS)
def test_it_starts_as_its_base_wherever_the_end_is_the_time(name, way):
    """Its second embedder is drawn as a new network's is, the others are the base's."""
    case = CASES[name]
    base = case.network().double()
    told = DiffusersTransformer(case.description.stock, case.settings, **case.sizes(), **case.more, end_time=way)
    state = dict(base.state_dict())
    if way == "gated":
        state |= {name: state[of] for name, of in told.copies().items()}
    elif way == "auxiliary":
        state |= {name: value for name, value in told.state_dict().items() if name.startswith("r_embedder.")}
    told.load_state_dict(state)
    told = told.double().eval()
    x, t, cond = case.inputs()
    with torch.no_grad():
        wanted = base.predict(x, t, cond)
        assert relative(told.predict(x, t, cond, t), wanted) < 1e-6  # the sinusoids of both are made in float32 there
        elsewhere = told.predict(x, t, cond, torch.ones_like(t))
        assert (relative(elsewhere, wanted) < 1e-6) == (way == "auxiliary"), "silent, or told"
        with told.without_adapters():
            assert relative(told.predict(x, t, cond, torch.ones_like(t)), wanted) < 1e-6


@pytest.mark.parametrize(
    "name, way",
    [
        ("SD3.5", "gated"),
        ("FLUX.1", "auxiliary"),
        ("Z-Image", "decoupled"),
        *(pytest.param(name, WAYS[number % 3], marks=pytest.mark.slow) for number, name in enumerate(NAMES)),
    ],
)
def test_derivatives_with_the_end(name, way):
    """Along x, t and r at once, against central differences; gradients of two engines; beside adapters."""
    case = CASES[name]
    network = case.network(end_time=way, lora={"rank": 2, "alpha": 3}).double()
    x, t, cond = case.inputs()
    r, weight = torch.tensor([0.6006, 0.9009]).double(), torch.randn_like(x)
    along = (torch.randn_like(x), torch.ones_like(t), torch.tensor([0.5, -0.25]).double())
    found = {}
    for engine in (Full(), Chain()):
        network.zero_grad()
        out = engine(network, x, cond, [Question(t, r, along)])[0]
        (out.prediction * weight).sum().backward()
        gradient = torch.cat([p.grad.flatten() for p in network.parameters() if p.requires_grad])
        found[type(engine).__name__] = out.prediction.detach(), out.tangent, gradient
    step = 1e-9 if name == "Sana" else 1e-7
    with torch.no_grad():
        at = {
            s: network.predict(x + s * step * along[0], t + s * step * along[1], cond, r + s * step * along[2])
            for s in (-2, -1, 1, 2)
        }
    slope = (8 * (at[1] - at[-1]) - (at[2] - at[-2])) / (12 * step)
    assert relative(found["Full"][1], slope) < 1e-6
    for one, other in zip(found["Chain"], found["Full"], strict=True):
        assert relative(one, other) < 1e-11
    trained = {name for name, p in network.named_parameters() if p.requires_grad}
    kept = {name for name in network.state_dict() if name not in network.borrowed()}
    assert trained == kept and any(map(is_adapter, trained))
    assert any(name.startswith("r_embedder.") for name in trained) == (way != "decoupled")


def test_what_makes_no_sense_is_told_in_a_sentence():
    case = CASES["SD3"]
    with pytest.raises(ConfigError, match="backbone.end_time=soon is unknown"):
        case.network(end_time="soon")
    with pytest.raises(ConfigError, match="pass r"):
        case.network(end_time="gated").predict(*case.inputs(torch.float32))
    with pytest.raises(ConfigError, match="backbone.end_time=auxiliary"):
        AuxiliaryInterval().check(case.network())
