"""SiT and DiT: released names load strictly, the noise prediction becomes the right velocity, every engine agrees."""

from __future__ import annotations

import itertools
import math
import operator

import pytest
import torch

from flowanchor.interfaces import Question
from flowanchor.jvp import Chain, Full, TwoPass
from flowanchor.plugins.backbones import dit_noise
from flowanchor.plugins.backbones.dit import DiT
from flowanchor.plugins.backbones.lightningdit import LightningDiT
from flowanchor.plugins.backbones.sit import PRESETS, SiT
from flowanchor.plugins.objectives.intervals.expanded import ExpandedInterval
from flowanchor.plugins.samplers.flow import FlowSampler

SMALL = {"input_size": 8, "patch_size": 2, "hidden_size": 32, "depth": 2, "num_heads": 4, "num_classes": 5}


def filled(network, scale: float = 0.2):
    """Random weights, so that no gate is zero."""
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=draw) * scale)
    return network.double().eval()


def released_shapes(depth: int, width: int, patch: int, tokens: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of SiT-*/p and DiT-*/p at 256 pixels, as the releases have them."""
    shapes = {
        "pos_embed": (1, tokens, width),
        "x_embedder.proj.weight": (width, 4, patch, patch),
        "x_embedder.proj.bias": (width,),
        "t_embedder.mlp.0.weight": (width, 256),
        "t_embedder.mlp.0.bias": (width,),
        "t_embedder.mlp.2.weight": (width, width),
        "t_embedder.mlp.2.bias": (width,),
        "y_embedder.embedding_table.weight": (1001, width),
        "final_layer.linear.weight": (patch * patch * 8, width),
        "final_layer.linear.bias": (patch * patch * 8,),
        "final_layer.adaLN_modulation.1.weight": (2 * width, width),
        "final_layer.adaLN_modulation.1.bias": (2 * width,),
    }
    layers = {
        "attn.qkv": (3 * width, width), "attn.proj": (width, width), "mlp.fc1": (4 * width, width),
        "mlp.fc2": (width, 4 * width), "adaLN_modulation.1": (6 * width, width),
    }  # fmt: skip
    for index in range(depth):
        for name, shape in layers.items():
            shapes[f"blocks.{index}.{name}.weight"] = shape
            shapes[f"blocks.{index}.{name}.bias"] = shape[:1]
    return shapes


@pytest.mark.parametrize("kind", [SiT, DiT])
@pytest.mark.parametrize("preset, depth, width, patch", [("S/8", 12, 384, 8), ("XL/2", 28, 1152, 2)])
def test_the_released_names_and_shapes(kind, preset, depth, width, patch):
    with torch.device("meta"):
        network = kind.from_preset(preset)
    ours = {name: tuple(value.shape) for name, value in network.state_dict().items()}
    assert ours == released_shapes(depth, width, patch, (32 // patch) ** 2)
    assert network.sample_shape == (4, 32, 32)


def test_xl_has_the_published_size():
    with torch.device("meta"):
        count = sum(p.numel() for p in SiT.from_preset("XL/2").parameters() if p.requires_grad)
    assert round(count / 1e6) == 675  # table 4 of the paper
    assert set(PRESETS) == {"nano", *(f"{s}/{p}" for s in ("S", "B", "L", "XL") for p in (2, 4, 8))}


def test_sit_is_lightningdit_with_its_switches_off():
    ours, theirs = SiT(**SMALL), LightningDiT(**SMALL, in_channels=4, learn_sigma=True)
    filled(ours)
    theirs.double().load_state_dict(ours.state_dict(), strict=True)
    x, t, y = torch.randn(3, 4, 8, 8, dtype=torch.float64), torch.rand(3, dtype=torch.float64), torch.tensor([0, 5, 2])
    assert torch.equal(ours.predict(x, t, y), theirs.eval().predict(x, t, y))


def test_the_second_half_of_the_channels_is_dropped():
    """The output layer writes, for each pixel of a patch, 4 channels of velocity and then 4 that are left out."""
    whole = filled(SiT(**SMALL))
    half = SiT(**SMALL, learn_sigma=False).double().eval()
    rows = [8 * pixel + channel for pixel in range(4) for channel in range(4)]
    weights = whole.state_dict()
    for name in ("final_layer.linear.weight", "final_layer.linear.bias"):
        weights[name] = weights[name][rows]
    half.load_state_dict(weights, strict=True)
    x, t, y = torch.randn(3, 4, 8, 8, dtype=torch.float64), torch.rand(3, dtype=torch.float64), torch.tensor([0, 5, 2])
    torch.testing.assert_close(whole.predict(x, t, y), half.predict(x, t, y))


# ------------------------------------------------------------------------------------------------- noise to velocity


# prod(1 - beta) up to each level, by hand.
KEPT = list(itertools.accumulate((1 - (1e-4 + (0.02 - 1e-4) * s / 999) for s in range(1000)), operator.mul))


@pytest.mark.parametrize("level", [0, 1, 37, 500, 998, 999])
def test_a_level_is_where_its_signal_to_noise_ratio_is(level):
    a = KEPT[level]
    t = torch.tensor([math.sqrt(a) / (math.sqrt(a) + math.sqrt(1 - a))], dtype=torch.float64)
    torch.testing.assert_close(dit_noise.noise_level(t), torch.tensor([float(level)], dtype=torch.float64))
    torch.testing.assert_close((t * dit_noise.unit_scale(t)).item(), math.sqrt(a))
    torch.testing.assert_close(((1 - t) * dit_noise.unit_scale(t)).item(), math.sqrt(1 - a))


def test_the_level_falls_and_ends():
    levels = dit_noise.noise_level(torch.linspace(0, 1, 5001, dtype=torch.float64))
    assert levels[0] == 999 and levels[-1] == 0
    assert bool((levels.diff() <= 0).all())


@pytest.fixture(scope="module")
def network_and_trunk():
    """A DiT of random weights, and the network of the release around the same weights: (z, level, label) -> noise."""
    network = filled(DiT(**SMALL))
    trunk = LightningDiT(**SMALL, in_channels=4, learn_sigma=True).double().eval()
    trunk.load_state_dict(network.state_dict(), strict=True)
    return network, trunk


@pytest.mark.parametrize("level", [0, 37, 500, 999])
@pytest.mark.parametrize("reflected", [False, True])
def test_the_trunk_is_asked_as_dit_was_trained(network_and_trunk, level, reflected):
    """At a trained level, by hand: x = t x1 + (1 - t) eps is a multiple of z = sqrt(a) x1 + sqrt(1 - a) eps."""
    network, trunk = network_and_trunk
    a = KEPT[level]
    t = math.sqrt(a) / (math.sqrt(a) + math.sqrt(1 - a))
    x, y = torch.randn(2, 4, 8, 8, dtype=torch.float64), torch.tensor([1, 5])
    told = torch.full((2,), float(-level if reflected else level), dtype=torch.float64)
    eps = trunk.predict(x * math.sqrt(a) / t, told, y)
    asked = torch.full((2,), 2 - t if reflected else t, dtype=torch.float64)
    torch.testing.assert_close(network.predict(x, asked, y), (x - eps) / t, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("t", [0.0, 0.003])
def test_nearer_to_the_noise_the_last_level_predicts_the_data(network_and_trunk, t):
    network, trunk = network_and_trunk
    a = KEPT[999]
    x, y = torch.randn(2, 4, 8, 8, dtype=torch.float64), torch.tensor([1, 5])
    z = x / math.sqrt(t**2 + (1 - t) ** 2)
    eps = trunk.predict(z, torch.full((2,), 999.0, dtype=torch.float64), y)
    data = (z - math.sqrt(1 - a) * eps) / math.sqrt(a)
    found = network.predict(x, torch.full((2,), t, dtype=torch.float64), y)
    torch.testing.assert_close(found, (data - x) / (1 - t), rtol=1e-7, atol=1e-7)


class AnalyticDiT(DiT):
    """DiT's conversion around the exact noise prediction for data N(mean, std^2), made from z and s alone."""

    mean, std = 0.7, 0.3

    def embed(self, x, t, cond, r=None):
        tokens, context = super().embed(x, t, cond, r)
        physical = context.carried[2]
        level = dit_noise.noise_level(physical)
        z = x * dit_noise.unit_scale(physical).view(-1, 1, 1, 1)
        whole, share = level.long().clamp(max=998), level - level.long().clamp(max=998)
        table = torch.tensor([0.5 * math.log((1 - KEPT[s]) / KEPT[s]) for s in range(1000)], dtype=torch.float64)
        ratio = (table[whole] + share * (table[whole + 1] - table[whole])).exp()  # noise / signal
        signal = torch.rsqrt(1 + ratio.square()).view(-1, 1, 1, 1)
        noise = ratio.view(-1, 1, 1, 1) * signal
        variance = (signal * self.std).square() + noise.square()
        self.eps = noise * (z - signal * self.mean) / variance
        return tokens, context

    def head(self, tokens, context):
        return dit_noise.velocity(context.carried[1], context.carried[2], self.eps)

    def exact(self, x, t):
        """E[x1 - x0 | x_t] of the Gaussian."""
        t = t.view(-1, 1, 1, 1)
        variance = (t * self.std).square() + (1 - t).square()
        slope = (t * self.std**2 - (1 - t)) / variance
        return self.mean + slope * (x - t * self.mean)


def test_the_velocity_of_an_exact_noise_prediction_is_exact():
    network = AnalyticDiT(**SMALL).double().eval()
    t = torch.linspace(0.007, 0.989, 300, dtype=torch.float64)
    x = torch.randn(300, 4, 8, 8, dtype=torch.float64)
    labels = torch.zeros(300, dtype=torch.long)
    torch.testing.assert_close(network.predict(x, t, labels), network.exact(x, t), rtol=1e-9, atol=1e-9)
    reflected = network.predict(x, 2 - t, labels)
    torch.testing.assert_close(reflected, network.exact(x, t), rtol=1e-9, atol=1e-9)


def test_it_draws_the_data():
    network = AnalyticDiT(**SMALL).double().eval()
    noise = torch.randn(64, 4, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    labels = torch.zeros(64, dtype=torch.long)
    drawn = FlowSampler(steps=50, solver="heun").sample(network, noise, labels, ExpandedInterval())
    assert abs(drawn.mean() - 0.7) < 0.02 and abs(drawn.std() - 0.3) < 0.02


def test_it_is_finite_and_continuous_at_the_ends():
    network = filled(DiT(**SMALL))
    low, high = (float(v) for v in dit_noise.trained_range())
    x = torch.randn(1, 4, 8, 8, dtype=torch.float64)
    label = torch.tensor([1])
    for edge in (low, high, 1.0):
        a, b = (network.predict(x, torch.tensor([edge + d], dtype=torch.float64), label) for d in (-1e-9, 1e-9))
        jump = (a - b).abs().max() / a.abs().max()
        assert jump < (2 if edge == 1.0 else 1e-4), edge  # at 1 another branch of the interval begins
    for edge in (0.0, 1.0, 2.0):
        t = torch.tensor([edge], dtype=torch.float64, requires_grad=True)
        out = network.predict(x, t, label)
        out.sum().backward()
        assert bool(out.isfinite().all()) and bool(t.grad.isfinite().all()), edge


@pytest.mark.parametrize("kind", [SiT, DiT])
def test_every_engine_is_exact(kind):
    """Tangents against central differences and each other, float64; both halves of the expanded interval."""
    network = filled(kind(**SMALL))
    x, v = torch.randn(4, 4, 8, 8, dtype=torch.float64), torch.randn(4, 4, 8, 8, dtype=torch.float64)
    t = torch.tensor([0.1234, 0.5678, 1.321, 1.777], dtype=torch.float64)
    y, ones = torch.tensor([0, 1, 2, 5]), torch.ones(4, dtype=torch.float64)
    eps = 1e-7
    ahead, behind = (network.predict(x + s * v, t + s, y) for s in (eps, -eps))
    difference = ((ahead - behind) / (2 * eps)).detach()
    (full,) = Full()(network, x, y, [Question(t, along=(v, ones))])
    assert float((full.tangent - difference).norm() / difference.norm()) <= 1e-6
    for engine in (Chain(recompute=True), Chain(recompute=False), TwoPass()):
        (found,) = engine(network, x, y, [Question(t, along=(v, ones))])
        assert float((found.tangent - full.tangent).norm() / full.tangent.norm()) <= 1e-10
        gradients = []
        for prediction in (found.prediction, full.prediction):
            network.zero_grad()
            (prediction * difference).sum().backward(retain_graph=True)
            gradients.append(torch.cat([p.grad.flatten() for p in network.parameters() if p.grad is not None]))
        assert float((gradients[0] - gradients[1]).norm() / gradients[1].norm()) <= 1e-9


def test_time_stays_exact_in_half_precision():
    """Under autocast the level is told in float32: neighbouring levels near 999 differ by less than bf16 resolves."""
    network = DiT(**SMALL).eval()
    seen = []
    network.t_embedder.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.autocast("cpu", torch.bfloat16):
        network.predict(torch.randn(2, 4, 8, 8), torch.tensor([0.0080, 0.0081]), torch.tensor([0, 1]))
    assert seen[0].dtype == torch.float32 and 0 < float(seen[0][0] - seen[0][1]) < 4
