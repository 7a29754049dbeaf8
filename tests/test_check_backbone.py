"""What breaks a rule of the contract is found and named; what keeps them all passes."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import nn

from flowanchor.conditioning import Classes
from flowanchor.errors import ConfigError
from flowanchor.interfaces import Backbone, StageContext
from flowanchor.plugins.backbones.dit import DiT
from flowanchor.plugins.backbones.lightningdit import LightningDiT
from flowanchor.plugins.backbones.sit import SiT
from flowanchor.plugins.backbones.wan import Wan
from flowanchor.testing import check_backbone, examine_backbone
from flowanchor.text.base import Tokens


class Layer(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.layer = nn.Linear(width, width)

    def forward(self, tokens, context):
        return tokens + torch.tanh(self.layer(tokens + context.carried[0]))


class Net(Backbone):
    """Keeps every rule; each subclass below breaks one."""

    def __init__(self) -> None:
        super().__init__()
        self.conditioning = Classes(4)
        self.sample_shape = (2, 3, 3)
        self.inlet, self.time = nn.Linear(18, 8), nn.Linear(1, 8)
        self.label = nn.Embedding(4, 8)
        self.blocks = nn.ModuleList(Layer(8) for _ in range(2))
        self.outlet = nn.Linear(8, 18)

    def embed(self, x, t, cond, r=None):
        return self.inlet(x.flatten(1)), StageContext((torch.sin(self.time(t[:, None])) + self.label(cond),))

    def head(self, tokens, context):
        return self.outlet(tokens).unflatten(1, self.sample_shape)


class OtherShape(Net):
    def head(self, tokens, context):
        return super().head(tokens, context)[:, :1]


class Random(Net):
    def head(self, tokens, context):
        return super().head(tokens, context) * torch.rand(())


class Mixed(Net):
    def head(self, tokens, context):
        return super().head(tokens - tokens.mean(0), context)


class InPlaceLayer(Layer):
    def forward(self, tokens, context):
        tokens += torch.tanh(self.layer(tokens + context.carried[0]))
        return tokens.clone()


class InPlace(Net):
    def __init__(self) -> None:
        super().__init__()
        self.blocks[1] = InPlaceLayer(8)


class ViewLayer(Layer):
    def forward(self, tokens, context):
        return tokens.view_as(tokens)


class View(Net):
    def __init__(self) -> None:
        super().__init__()
        self.blocks[0] = ViewLayer(8)


class Unowned(Net):
    def stage_modules(self):
        return [[self.inlet, self.time], *([block] for block in self.blocks), [self.outlet]]


class Unused(Net):
    def __init__(self) -> None:
        super().__init__()
        self.spare = nn.Linear(2, 2)


class Fixed(Net):
    """The embedded time where no tangent is carried."""

    def embed(self, x, t, cond, r=None):
        tokens, context = super().embed(x, t, cond, r)
        return tokens, StageContext((torch.zeros_like(context.carried[0]),), (context.carried[0],))


class Detached(Net):
    def embed(self, x, t, cond, r=None):
        tokens, context = super().embed(x, t, cond, r)
        return tokens, StageContext((context.carried[0] + self.time(t.detach()[:, None]),))


class Double(Net):
    def head(self, tokens, context):
        return super().head(tokens, context).double()


BROKEN = {
    OtherShape: r"the velocity has the shape \(3, 1, 3, 3\) and the sample \(3, 2, 3, 3\)",
    Random: "asked twice",
    Mixed: "see each other",
    InPlace: r"blocks\[1\] changes what it was given in place",
    View: r"blocks\[0\] returns its input or a view",
    Unowned: "no stage of stage_modules.. has label.weight",
    Unused: "no gradient reaches spare.weight, spare.bias",
    Fixed: "derivative would be lost|fixed",
    Detached: "off by .* against central differences|no tangent",
    Double: "float32 samples give a velocity in torch.float64",
}


@pytest.mark.parametrize("kind", BROKEN, ids=lambda kind: kind.__name__)
def test_a_broken_rule_is_named(kind):
    with pytest.raises(ConfigError, match=BROKEN[kind]):
        check_backbone(kind())


def test_all_rules_kept_and_the_network_left_as_it_was():
    network = Net()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    assert all(finding.fault is None and finding.skipped is None for finding in examine_backbone(network))
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert network.training


SMALL = {
    "input_size": 4,
    "patch_size": 2,
    "in_channels": 3,
    "hidden_size": 16,
    "depth": 2,
    "num_heads": 2,
    "num_classes": 5,
}


@pytest.mark.parametrize("kind", [LightningDiT, SiT, DiT], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("second_time", [False, True])
def test_the_projects_own(kind, second_time):
    check_backbone(kind(**SMALL, auxiliary_time_cond=second_time))


def test_a_network_that_is_none():
    (finding,) = examine_backbone(nn.Linear(2, 2))
    assert finding.fault is not None


def test_as_a_command():
    words = [
        sys.executable,
        "-m",
        "flowanchor.testing",
        "backbone.depth=1",
        "backbone.hidden_size=16",
        "backbone.num_heads=2",
    ]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 9 and "BROKEN" not in done.stdout


def test_wan_with_the_embeddings_of_a_text():
    network = Wan(
        in_channels=4, height=4, width=4, num_layers=2, num_attention_heads=2, attention_head_dim=12, ffn_dim=32,
        text_dim=8, freq_dim=16, text_len=5, tangent_smoothing=0,
    )  # fmt: skip
    check_backbone(network, cond=Tokens(torch.randn(3, 5, 8)))
