"""What a network may be asked for, and what is done with conditions of each kind."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from flowanchor.conditioning import Classes, NoCondition, Text, batch_of
from flowanchor.errors import ConfigError
from flowanchor.request import make_labels
from flowanchor.text.base import TextEncoder, Tokens


class Two(NamedTuple):
    """What a pair of encoders would give: embeddings of two lengths, a mask, and a pooled vector."""

    words: Tensor  # [B, L, 3]
    bytes: Tensor  # [B, M, 2]
    mask: Tensor  # [B, L] (bool)
    pooled: Tensor  # [B, 4]


class Pair(TextEncoder):
    """A prompt's words, its letters, and its length."""

    name, width = "pair", 3

    def encode(self, prompts):
        found = []
        for prompt in prompts:
            words, letters = len(prompt.split()), len(prompt)
            pooled = torch.full((4,), float(letters))
            found.append(Two(torch.ones(words, 3), torch.full((letters, 2), 2.0), torch.ones(words).bool(), pooled))
        return found

    def fingerprint(self):
        return "pair"


def text(dropout: float = 0.0) -> Text:
    null = Two(torch.zeros(1, 3), torch.zeros(1, 2), torch.zeros(1).bool(), torch.zeros(4))
    return Text(null, {"words": 3, "bytes": 8, "mask": 3}, dropout)


def test_a_text_of_several_tensors():
    """Two encoders and texts of unequal length: nothing but the encoder and the network's own null text is new."""
    conditioning = text()
    request = conditioning.request(5, prompts=["a fox", "sea"], negative="a b c")
    cond = request.cond(0, 2, Pair())
    assert cond.words.shape == (2, 3, 3) and cond.bytes.shape == (2, 5, 2) and cond.pooled.tolist()[1] == [3.0] * 4
    assert cond.mask.tolist() == [[True, True, False], [True, False, False]]
    assert cond.words[1, 1:].abs().sum() == 0, "zeros behind a text"
    null = conditioning.null(cond)
    assert all(a.shape == b.shape for a, b in zip(cond, null, strict=True))
    assert null.pooled.tolist() == [[5.0] * 4] * 2 and null.mask.all()
    both = conditioning.stack(cond, request.cond(1, 2, Pair()))
    assert both.bytes.shape == (3, 5, 2) and torch.equal(both.pooled[2], cond.pooled[1])
    assert conditioning.is_null(conditioning.stack(cond, null)).tolist() == [False, False, True, True]
    with pytest.warns(UserWarning, match="reads 8 tokens of a prompt; the rest of 'a long text' is cut off"):
        assert conditioning.request(1, prompts=["a long text"]).cond(0, 1, Pair()).bytes.shape == (1, 8, 2)


def test_dropped_texts_become_the_null_one():
    conditioning = text(0.5)
    conditioning.use_null(Pair().encode(["no no"])[0])
    cond = batch_of(Pair().encode(["a b c"] * 200))
    torch.manual_seed(0)
    dropped = conditioning.dropped(cond)
    null = conditioning.is_null(dropped)
    assert 70 < null.sum() < 130 and torch.equal(dropped.pooled[~null], cond.pooled[~null])
    torch.manual_seed(0)
    assert torch.equal(null, torch.rand(200) < 0.5), "one draw per text"
    assert text().dropped(cond) is cond


def test_what_stands_for_no_text_moves_with_the_network_and_is_not_saved():
    conditioning = text()
    assert not conditioning.state_dict() and not list(conditioning.parameters())
    assert conditioning.to(torch.float64).null_text.words.dtype == torch.float64


def test_another_encoder_is_refused():
    conditioning = Text(Tokens(torch.zeros(1, 3)), {"tokens": 3})
    with pytest.raises(ConfigError, match="gives words, bytes, mask, pooled and the network reads tokens"):
        conditioning.request(1, prompts=["x"]).cond(0, 1, Pair())


@pytest.mark.parametrize(
    "conditioning, settings, sentence",
    [
        (NoCondition(), {"classes": [0]}, "without classes: leave out classes="),
        (NoCondition(), {"prompts": ["x"]}, "not conditioned on text: leave out prompt= and prompts="),
        (Classes(3), {"prompts": ["x"]}, "not conditioned on text: leave out prompt= and prompts="),
        (Classes(3), {"negative": "x"}, "leave out negative="),
        (Classes(3), {"classes": [3]}, r"whole numbers between 0 and 2, for example classes=\[0,1\]"),
        (Classes(3), {"classes": ["cat"]}, "whole numbers between 0 and 2"),
        (Classes(3), {"classes": []}, "whole numbers between 0 and 2"),
        (text(), {}, "add prompts=FILE with one per line, or prompt="),
        (text(), {"classes": [1], "prompts": ["x"]}, "give prompts instead of classes="),
        (text(), {"prompts": ["x"], "protocol": "even"}, "protocol=balanced or protocol=random"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_setting_to_type(conditioning, settings, sentence):
    with pytest.raises(ConfigError, match=sentence):
        conditioning.request(4, **settings)


def test_classes_take_turns():
    request = Classes(5).request(5, classes=[3, 1])
    assert request.cond(1, 4).tolist() == [1, 3, 1] and request.numbers().tolist() == [3, 1, 3, 1, 3]
    assert request.part(1, 3).cond(0, 2).tolist() == [1, 3] and request.named(1) == ", label 1"
    assert Classes(5).request(7).cond(3, 7).tolist() == [3, 4, 0, 1]
    assert NoCondition().request(3).cond(0, 2) is None and NoCondition().request(3).numbers() is None


def test_prompts_take_turns():
    request = text().request(5, prompts=["a", "b"]).part(1, 5)
    assert request.texts(0, 3) == ["b", "a", "b"] and request.numbers().tolist() == [1, 0, 1, 0]
    assert request.named(1) == ", prompt 'a'" and request.identity() == [["a", "b"], ""]


def test_networks_without_a_null_class_cannot_be_guided():
    with pytest.raises(ConfigError, match="backbone.class_dropout_prob=0.1"):
        Classes(3, null=False).null(torch.tensor([1]))
    with pytest.raises(ConfigError, match="sampler.guidance_scale=1"):
        NoCondition().null(None)


# ------------------------------------------------------------------------------------------------------------- labels


def test_balanced_labels_are_balanced_in_every_prefix():
    labels = make_labels("balanced", 25, 10, seed=0)
    assert labels.tolist() == [i % 10 for i in range(25)] and labels.dtype == torch.int64


def test_random_labels_follow_the_seed():
    first, again, other = (make_labels("random", 1000, 10, seed=s) for s in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)
    counts = torch.bincount(first, minlength=10)
    assert counts.min() > 60 and counts.max() < 140 and counts.float().std() > 1


def test_unconditional_networks_get_no_labels():
    assert make_labels("balanced", 10, 0, seed=0) is None


@pytest.mark.parametrize(
    ("protocol", "count", "message"),
    [("even", 10, "protocol=balanced or protocol=random"), ("random", 0, "num_samples=1000")],
)
def test_bad_requests(protocol, count, message):
    with pytest.raises(ConfigError, match=message):
        make_labels(protocol, count, 10, seed=0)
