"""Wan against diffusers' own network: sign, timesteps, text, sizes, both halves of the interval; tangents."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional
from torch.utils._pytree import tree_map

from flowanchor.errors import ConfigError
from flowanchor.interfaces import Question
from flowanchor.jumps.guidance import Guidance
from flowanchor.jvp import Chain, FiniteDifference, Full, TwoPass
from flowanchor.plugins.backbones.wan import PRESETS, Wan, _exact
from flowanchor.plugins.objectives.intervals.expanded import ExpandedInterval
from flowanchor.text.base import Tokens

SMALL = {
    "in_channels": 4, "height": 8, "width": 6, "num_attention_heads": 2, "attention_head_dim": 24, "ffn_dim": 64,
    "num_layers": 2, "freq_dim": 32, "text_dim": 12, "text_len": 9,
}  # fmt: skip
RELEASED = {"1.3B": 1.42e9, "5B": 5.0e9, "A14B": 14.3e9}  # parameters, as the release states them


def filled(**settings):
    """Random weights, so that neither the head nor the embedder of r is zero."""
    torch.manual_seed(0)
    network = Wan(**{**SMALL, **settings})
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return network.eval()


@pytest.fixture
def inputs():
    torch.manual_seed(1)
    return torch.randn(3, 4, 1, 8, 6), torch.tensor([0.0, 0.31, 1.7]), Tokens(torch.randn(3, 5, 12))


@pytest.mark.parametrize("frames, height, width", [(1, 8, 6), (3, 4, 10)])
def test_prediction_is_the_negative_of_diffusers(frames, height, width):
    network = filled()
    x, t, text = torch.randn(3, 4, frames, height, width), torch.tensor([0.0, 0.31, 1.7]), Tokens(torch.randn(3, 5, 12))
    stock = network.transformer()
    with torch.no_grad():
        theirs = stock(x, 1000 * (1 - t), functional.pad(text.tokens, (0, 0, 0, 4))).sample
        torch.testing.assert_close(network(x, t, text), -theirs, rtol=1e-5, atol=1e-5)


def test_the_stock_network_shares_the_weights_and_saves_them_under_diffusers_names(tmp_path):
    from diffusers import WanTransformer3DModel

    network = filled()
    network.transformer().save_pretrained(tmp_path)
    again = WanTransformer3DModel.from_pretrained(tmp_path)
    for name, value in network.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name


def test_the_anchor_half_is_negative_timesteps(inputs):
    x, _, text = inputs
    network, t = filled(), torch.tensor([0.2, 0.5, 0.9])
    stock = network.transformer()
    with torch.no_grad():
        theirs = stock(x, -1000 * (1 - t), functional.pad(text.tokens, (0, 0, 0, 4))).sample
        ours = network(x, ExpandedInterval().anchor(t).t, text)
    assert (ours + theirs).norm() <= 1e-3 * theirs.norm()  # float32: 2 - t loses digits of a time near 0


def test_tangent_in_float64_against_differences_and_every_engine(inputs):
    network = filled(auxiliary_time_cond=True).double()
    x, t, text = tree_map(torch.Tensor.double, inputs)
    dx, dt, r, dr = torch.randn_like(x), torch.ones_like(t), t / 2, torch.full_like(t, 0.5)

    def answer(engine):
        network.zero_grad()
        dual = engine(network, x, text, [Question(t, r, (dx, dt, dr))])[0]
        dual.prediction.square().sum().backward()
        return dual.prediction.detach(), dual.tangent, torch.cat([p.grad.flatten() for p in network.parameters()])

    full = answer(Full())
    with torch.no_grad():

        def slope(h):
            ahead, behind = (network(x + s * dx, t + s * dt, text, r + s * dr) for s in (h, -h))
            return (ahead - behind) / (2 * h)

        differences = (4 * slope(4e-6) - slope(8e-6)) / 3
    assert (full[1] - differences).norm() <= 1e-7 * differences.norm()
    ways = [Chain(), Chain("selective"), Chain(False), TwoPass(), TwoPass(checkpoint=True)]
    for engine in [*ways, *(Chain(attention=name) for name in ("math", "streaming"))]:
        for found, right, limit in zip(answer(engine), full, (1e-10, 1e-10, 1e-9), strict=True):
            assert (found - right).norm() <= limit * right.norm(), engine
    # A time step is 1,000 timesteps, so differences need a step a thousand times smaller than elsewhere.
    assert (answer(FiniteDifference(eps=1e-6, dtype=torch.float64))[1] - full[1]).norm() <= 1e-4 * full[1].norm()


def test_smoothed_tangent_is_that_of_a_network_with_averaged_waves(inputs, monkeypatch):
    """Values and gradients stay; each engine's tangent is the derivative along sinusoids averaged over nearby times."""
    h = 0.004
    exact, smooth = filled().double(), filled(tangent_smoothing=h).double()
    x, t, text = tree_map(torch.Tensor.double, inputs)
    dx, dt = torch.randn_like(x), torch.ones_like(t)

    def answer(network, engine):
        network.zero_grad()
        dual = engine(network, x, text, [Question(t, along=(dx, dt))])[0]
        dual.prediction.square().sum().backward()
        return dual.prediction.detach(), dual.tangent, torch.cat([p.grad.flatten() for p in network.parameters()])

    plain, wanted = answer(exact, Full()), answer(smooth, Full())
    assert torch.equal(plain[0], wanted[0]) and torch.equal(plain[2], wanted[2])
    assert (plain[1] - wanted[1]).norm() > 0.1 * plain[1].norm()
    for engine in (Chain(), Chain(False), TwoPass()):
        for found, right, limit in zip(answer(smooth, engine), wanted, (1e-10, 1e-10, 1e-9), strict=True):
            assert (found - right).norm() <= limit * right.norm(), engine

    # By hand: the derivative of the waves is a Gaussian average of exact derivatives (quadrature), the rest is exact.
    nodes, weights = np.polynomial.hermite_e.hermegauss(60)
    waves = exact._waves
    step = 1e-7

    def averaged(change):
        parts = [
            w * (waves(t + h * z + change) - waves(t + h * z - change)) for z, w in zip(nodes, weights, strict=True)
        ]
        return sum(parts) / (2 * change * sum(weights))

    with torch.no_grad(), _exact(x):
        now, slope = waves(t), averaged(step)
        found = []
        for way in (1, -1):
            monkeypatch.setattr(exact, "_waves", lambda t, way=way: now + way * step * slope)
            found.append(exact(x + way * step * dx, t, text))
        by_hand = (found[0] - found[1]) / (2 * step)
    assert (wanted[1] - by_hand).norm() <= 1e-5 * by_hand.norm()


def test_smoothing_is_refused_where_nothing_would_see_it(inputs):
    with pytest.raises(ConfigError, match=r"tangent_smoothing=0.01 is seen by forward-mode AD alone: choose jvp=chain"):
        x, t, text = inputs
        FiniteDifference()(filled(tangent_smoothing=0.01), x, text, [Question(t, along=(x, t))])
    with pytest.raises(ConfigError, match=r"tangent_smoothing=-1 is a width in time"):
        Wan(**SMALL, tangent_smoothing=-1)


def test_bfloat16_autocast_keeps_the_time_in_float32(inputs):
    """The embedding of a timestep moves with the tenth of one; bfloat16 would round 690 to a multiple of four."""
    x, t, text = inputs
    network = filled()
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        first, second = (network.embed(x, t + shift, text)[1].carried for shift in (0.0, 1e-4))
    assert all(tensor.dtype == torch.float32 for tensor in first)
    assert all(not torch.equal(a[1], b[1]) for a, b in zip(first, second, strict=True))


def test_bfloat16_tangent(inputs):
    x, t, text = inputs
    network = filled()
    along = [Question(t, along=(torch.ones_like(x), torch.ones_like(t)))]
    exact = Chain()(network, x, text, along)[0].tangent
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = Chain()(network, x, text, along)[0].tangent
    assert (low.float() - exact).norm() <= 0.03 * exact.norm()


def test_zeros_behind_a_prompt_change_nothing_and_a_longer_one_is_refused(inputs):
    x, t, text = inputs
    network = filled()
    assert torch.equal(network(x, t, text), network(x, t, Tokens(functional.pad(text.tokens, (0, 0, 0, 3)))))
    with pytest.raises(ConfigError, match=r"up to 9, 12\]"):
        network(x, t, Tokens(functional.pad(text.tokens, (0, 0, 0, 5))))


@pytest.mark.parametrize("length", [2, 7])
def test_guidance_with_a_negative_prompt_of_another_length(inputs, length, monkeypatch):
    x, t, text = inputs
    network = filled()
    negative = torch.randn(length, 12)
    network.conditioning.use_null(Tokens(negative))
    from flowanchor.jumps import guidance

    with torch.no_grad():
        conditional, unconditional = network(x, t, text), network(x, t, Tokens(negative.expand(3, -1, -1)))
        wanted = unconditional + 2.5 * (conditional - unconditional)
        field = Guidance(2.5, 0.0, 2.0)
        torch.testing.assert_close(field.velocity(network, x, Question(t), text, t), wanted)
        monkeypatch.setattr(guidance, "is_sharded", lambda network: True)  # both conditions side by side
        torch.testing.assert_close(field.velocity(network, x, Question(t), text, t), wanted, rtol=1e-4, atol=1e-5)


def test_dropped_prompts_become_the_negative_one(inputs):
    x, t, text = inputs
    network = filled(condition_dropout=1.0).train()
    negative = torch.randn(7, 12)
    network.conditioning.use_null(Tokens(negative))
    with torch.no_grad():
        torch.testing.assert_close(network(x, t, text), network.predict(x, t, Tokens(negative.expand(3, -1, -1))))
        network.conditioning.dropout = 0.0
        assert torch.equal(network(x, t, text), network.predict(x, t, text))


@pytest.mark.parametrize("preset", sorted(RELEASED))
def test_presets_have_the_size_of_the_release(preset):
    channels = 48 if preset == "5B" else 16
    with torch.device("meta"):
        from flowanchor.deferred import parameters_on_meta

        with parameters_on_meta():
            settings = {**PRESETS[preset], "num_layers": 1}
            one, two = (Wan(in_channels=channels, **{**settings, "num_layers": n}) for n in (1, 2))
    count = [sum(p.numel() for p in network.parameters()) for network in (one, two)]
    total = count[0] + (PRESETS[preset]["num_layers"] - 1) * (count[1] - count[0])
    assert abs(total - RELEASED[preset]) <= 0.01 * RELEASED[preset]


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"height": 7}, "cannot be cut into patches"),
        ({"attention_head_dim": 23}, "must be even"),
        ({"num_layers": 0}, "at least one block"),
        ({"condition_dropout": 1.5}, "between 0 and 1"),
    ],
)
def test_sizes_that_do_not_fit(settings, message):
    with pytest.raises(ConfigError, match=message):
        Wan(**{**SMALL, **settings})


def test_inputs_that_do_not_fit(inputs):
    x, t, text = inputs
    network = filled()
    for bad, message in (
        ((x[:, :, 0], t, text), r"\[B, C, frames, h, w\]"),
        ((x[..., :5], t, text), "multiples of 16"),
        ((x, t, None), "conditioned on text"),
    ):
        with pytest.raises(ConfigError, match=message):
            network(*bad)
    with pytest.raises(ConfigError, match="pass r"):
        filled(auxiliary_time_cond=True)(x, t, text)
    with pytest.raises(ConfigError, match="Unknown Wan preset '2B'"):
        Wan.from_preset("2B")
