"""LightningDiT: presets, options, stages, labels."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from flowanchor.errors import CheckpointError, ConfigError
from flowanchor.plugins.backbones.lightningdit import PRESETS, LightningDiT
from flowanchor.plugins.formats.authors import Authors

RELEASED = {"use_qknorm": True, "use_swiglu": True, "use_rope": True, "use_rmsnorm": True}
TINY = {
    "input_size": 4,
    "patch_size": 2,
    "in_channels": 3,
    "hidden_size": 16,
    "depth": 2,
    "num_heads": 2,
    "num_classes": 5,
}


def awake(network):
    """A network whose zero-initialised gates and head let something through."""
    torch.manual_seed(0)
    for parameter in network.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.3)
    return network


def test_xl_1_counts_the_released_parameters():
    with torch.device("meta"):
        network = LightningDiT.from_preset("XL/1", input_size=16, in_channels=32, num_classes=1000, **RELEASED)
    assert sum(p.numel() for p in network.parameters()) == 675_260_768
    assert network.pos_embed.shape == (1, 256, 1152) and not network.pos_embed.requires_grad


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_builds(preset):
    with torch.device("meta"):
        network = LightningDiT.from_preset(preset, input_size=16, in_channels=32, num_classes=1000, **RELEASED)
    assert len(network.blocks) == PRESETS[preset]["depth"]
    assert network.side == 16 // PRESETS[preset]["patch_size"]


def test_a_setting_replaces_the_presets_value_and_null_does_not():
    with torch.device("meta"):
        network = LightningDiT.from_preset(
            "nano", input_size=8, in_channels=1, num_classes=10, depth=2, hidden_size=None
        )
    assert len(network.blocks) == 2 and network.pos_embed.shape[-1] == PRESETS["nano"]["hidden_size"]
    with pytest.raises(ConfigError, match="choose one of nano"):
        LightningDiT.from_preset("XXL/1")


@pytest.mark.parametrize("switches", list(itertools.product([False, True], repeat=6)), ids=str)
def test_every_switch_runs_forward_and_backward(switches):
    names = ("use_qknorm", "use_swiglu", "use_rope", "use_rmsnorm", "wo_shift", "auxiliary_time_cond")
    options = dict(zip(names, switches, strict=True))
    network = awake(LightningDiT(**{**TINY, "hidden_size": 16, **options})).eval()
    x, t, y = torch.randn(2, 3, 4, 4), torch.tensor([0.2, 1.7]), torch.tensor([1, 5])
    r = torch.ones(2) if options["auxiliary_time_cond"] else None
    out = network(x, t, y, r)
    assert out.shape == x.shape
    out.square().sum().backward()
    without = [n for n, p in network.named_parameters() if p.requires_grad and p.grad is None]
    assert not without


def test_pixel_norm_gives_shifts_and_scales_unit_size():
    """The size of what is added and multiplied does not depend on the size of the modulation's weights; gates do."""
    plain, normed = (awake(LightningDiT(**{**TINY, "pixel_norm": on})).eval() for on in (False, True))
    normed.load_state_dict(plain.state_dict())
    inputs = torch.randn(2, 3, 4, 4), torch.tensor([0.2, 0.7]), torch.tensor([1, 5])
    assert not torch.allclose(plain(*inputs), normed(*inputs))
    before = {network: network(*inputs) for network in (plain, normed)}
    with torch.no_grad():
        for network in (plain, normed):
            for block in network.blocks:
                for layer in (block.adaLN_modulation[1].weight, block.adaLN_modulation[1].bias):
                    parts = layer.view(6, -1, *layer.shape[1:])
                    parts[[0, 1, 3, 4]] *= 1000  # shifts and scales
    assert torch.allclose(normed(*inputs), before[normed], rtol=1e-2, atol=1e-2)
    assert not torch.allclose(plain(*inputs), before[plain], rtol=1e-1, atol=1e-1)


def test_forward_is_the_loop_over_the_stages():
    network = awake(LightningDiT(**TINY, **RELEASED)).eval()
    x, t, y = torch.randn(2, 3, 4, 4), torch.rand(2), torch.tensor([0, 4])
    tokens, context = network.embed(x, t, y)
    assert tokens.shape == (2, 4, 16) and context.carried[0].shape == (2, 16)
    for block in network.blocks:
        before = tokens.clone()
        after = block(tokens, context)
        assert torch.equal(tokens, before), "a stage must not change its input"
        tokens = after
    assert torch.equal(network.head(tokens, context), network(x, t, y))


def test_starts_from_zero_velocity():
    network = LightningDiT(**TINY, **RELEASED)
    assert network(torch.randn(2, 3, 4, 4), torch.rand(2), torch.tensor([0, 1])).abs().max() == 0


def test_auxiliary_embedder_starts_silent_and_is_required():
    torch.manual_seed(0)
    network = LightningDiT(**TINY, auxiliary_time_cond=True).eval()
    assert network.r_embedder(torch.rand(3)).abs().max() == 0
    with pytest.raises(ConfigError, match="pass r"):
        network(torch.randn(1, 3, 4, 4), torch.rand(1), torch.tensor([0]))


def test_learn_sigma_drops_the_second_half():
    network = awake(LightningDiT(**TINY, learn_sigma=True)).eval()
    assert network.final_layer.linear.out_features == 2 * 2 * 6
    assert network(torch.randn(1, 3, 4, 4), torch.rand(1), torch.tensor([0])).shape == (1, 3, 4, 4)


def test_label_dropout_in_training_only():
    network = awake(LightningDiT(**TINY, class_dropout_prob=1.0))
    x, t, y = torch.randn(2, 3, 4, 4), torch.rand(2), torch.tensor([0, 1])
    null = network.conditioning.null(y)
    assert torch.equal(null, torch.tensor([5, 5]))
    assert torch.equal(network.train()(x, t, y), network.predict(x, t, null))
    assert not torch.equal(network.eval()(x, t, y), network.predict(x, t, null))
    kept = awake(LightningDiT(**TINY, class_dropout_prob=1.0, disable_label_dropout=True)).train()
    assert torch.equal(kept(x, t, y), kept.predict(x, t, y))
    assert kept.conditioning.dropout == 0 and kept.y_embedder.embedding_table.weight.shape[0] == 6


def test_label_dropout_share():
    network = LightningDiT(**TINY, class_dropout_prob=0.1)
    torch.manual_seed(0)
    dropped = network.conditioning.dropped(torch.zeros(20_000, dtype=torch.long)) == 5
    assert abs(dropped.float().mean().item() - 0.1) < 0.01


def test_unconditional_network():
    network = awake(LightningDiT(**{**TINY, "num_classes": 0, "class_dropout_prob": 0.0})).eval()
    assert network.y_embedder is None
    assert network(torch.randn(2, 3, 4, 4), torch.rand(2), None).shape == (2, 3, 4, 4)
    with pytest.raises(ConfigError, match="no null class"):
        network.conditioning.null(None)


def test_time_is_embedded_in_float32_under_autocast():
    network = awake(LightningDiT(**TINY)).eval()
    near = torch.tensor([0.5, 0.5001])  # the same number in bfloat16
    with torch.autocast("cpu", dtype=torch.bfloat16):
        embedded = network.t_embedder(near)
    assert embedded.dtype == torch.float32
    assert not torch.equal(embedded[0], embedded[1])


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"input_size": 5}, "patch size among 1, 5"),
        ({"num_heads": 3}, "not divisible by backbone.num_heads=3"),
        ({"hidden_size": 12, "num_heads": 2, "use_rope": True}, "multiple of 4"),
        ({"depth": 0}, "at least one block"),
        ({"class_dropout_prob": 2.0}, "between 0 and 1"),
    ],
)
def test_sizes_that_do_not_fit(settings, sentence):
    with pytest.raises(ConfigError, match=sentence):
        LightningDiT(**{**TINY, **settings})


@pytest.mark.parametrize("kind", ["lightningdit", "sit", "dit"])
def test_tokens_lie_one_after_the_other(kind):
    """Channels before tokens would be the layout of all that is added to them, and every product would copy."""
    from flowanchor.plugins.backbones.dit import DiT
    from flowanchor.plugins.backbones.sit import SiT

    network = {"lightningdit": LightningDiT, "sit": SiT, "dit": DiT}[kind](4, 2, 3, 16, 1, 2, num_classes=5)
    tokens, context = network.embed(torch.randn(2, 3, 4, 4), torch.rand(2), torch.tensor([0, 1]))
    assert tokens.is_contiguous() and network.blocks[0](tokens, context).is_contiguous()


@pytest.mark.parametrize("end_time", [None, "auxiliary"])
def test_a_time_scale_is_the_same_network_at_other_times_with_a_derivative_as_much_larger(end_time):
    """Answers and derivatives against the network without it, float64 automatic differentiation."""
    plain, scaled = (
        awake(LightningDiT(**{**TINY, "end_time": end_time, "time_scale": scale})).eval().double()
        for scale in (1.0, 100.0)
    )
    scaled.load_state_dict(plain.state_dict())
    torch.manual_seed(3)
    x, t = torch.randn(2, *plain.sample_shape, dtype=torch.float64), torch.tensor([0.2, 0.7], dtype=torch.float64)
    y, r = torch.tensor([0, 1]), None if end_time is None else t + 0.1

    def answer(network, times, factor):
        return network.predict(x, times, y, None if r is None else factor * r)

    with sdpa_kernel(SDPBackend.MATH):  # the one that has a forward derivative
        there, slope = torch.func.jvp(lambda time: answer(scaled, time, 1), (t,), (torch.ones_like(t),))
        same, gentle = torch.func.jvp(lambda time: answer(plain, time, 100), (100 * t,), (torch.ones_like(t),))
    torch.testing.assert_close(there, same)
    torch.testing.assert_close(slope, 100 * gentle)
    with pytest.raises(ConfigError, match="backbone.time_scale=0"):
        LightningDiT(**{**TINY, "time_scale": 0})


def test_the_authors_layout_cannot_say_a_time_scale(tmp_path):
    config = {"backbone": {"_target_": "flowanchor.plugins.backbones.lightningdit.LightningDiT", "time_scale": 1000.0}}
    given = SimpleNamespace(meta={"config": config})
    with pytest.raises(CheckpointError, match="this one 1000 times it"):
        Authors().write(given, tmp_path / "a.pt")
