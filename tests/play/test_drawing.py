"""Pictures of the page: those of every other program, with what they really cost."""

from __future__ import annotations

import io
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from flowanchor.base.noise import sample_noise
from flowanchor.base.pixels import to_uint8
from flowanchor.errors import ConfigError
from flowanchor.play import pictures
from flowanchor.play.choices import can_be_guided, choices, class_names
from flowanchor.play.drawing import Wish, between, draw
from flowanchor.play.noises import spherical
from flowanchor.play.studio import FLOW_FRAMES, Studio
from flowanchor.play.watching import watching

WISH = Wish(seed=3, each=2, classes=(7, 1, 4))


def test_the_pictures_are_those_that_sample_draws(shortcut):
    drawn = draw(shortcut, replace(WISH, steps=2))
    assert np.array_equal(drawn.images, shortcut.sample([7, 7, 1, 1, 4, 4], steps=2, seed=3).numpy())
    assert drawn.subjects == (7, 1, 4)


def test_the_first_ten_classes_unless_some_are_chosen(shortcut):
    assert draw(shortcut, Wish(each=1)).subjects == tuple(range(10))


@pytest.mark.parametrize(
    ("more", "calls"),
    [
        ({"steps": 1}, 1),
        ({"steps": 3}, 3),
        ({"steps": 3, "guidance": 2.0}, 6),
        ({"sampler": "flow", "steps": 5}, 5),
        ({"sampler": "flow", "steps": 5, "guidance": 1.5}, 10),
    ],
)
def test_network_calls_are_counted(shortcut, monkeypatch, more, calls):
    asked, own = [], type(shortcut.backbone).embed

    def embed(self, x, *rest):
        asked.append(len(x))
        return own(self, x, *rest)

    monkeypatch.setattr(type(shortcut.backbone), "embed", embed)
    drawn = draw(shortcut, replace(WISH, **more))
    assert drawn.calls == calls == sum(asked) / 6  # the network itself was asked as often
    assert drawn.seconds > 0 and f"{calls} network call" in drawn.cost()


def test_many_pictures_are_counted_per_picture(shortcut):
    assert draw(shortcut, Wish(each=16, steps=2)).calls == 2  # in three batches


def test_watching_leaves_the_network_as_it_was(shortcut):
    before = dict(vars(shortcut.backbone))
    with pytest.raises(ZeroDivisionError), watching(shortcut.backbone):
        raise ZeroDivisionError
    assert vars(shortcut.backbone) == before


@pytest.mark.parametrize("more", [{"steps": 3}, {"sampler": "flow", "steps": 3}, {"steps": 3, "guidance": 2.0}])
def test_the_way_begins_with_the_noise_and_ends_with_the_picture(shortcut, more):
    drawn = draw(shortcut, replace(WISH, each=1, **more), keep=3)
    assert len(drawn.frames) == 4
    noise = to_uint8(sample_noise(3, range(3), (1, 8, 8)).float()).permute(0, 2, 3, 1)
    assert np.array_equal(drawn.frames[0], noise.numpy())
    assert np.array_equal(drawn.frames[-1], drawn.images)
    assert not np.array_equal(drawn.frames[1], drawn.frames[2])


def test_between_two_seeds_lie_the_pictures_of_both(shortcut):
    wish = replace(WISH, each=1, steps=3)  # with fresh noise after each jump, which goes along
    walk = between(shortcut, wish, other_seed=8, count=5)
    images = walk.images.reshape(3, 5, 8, 8, 1)
    assert np.array_equal(images[:, 0], draw(shortcut, wish).images)
    assert np.array_equal(images[:, -1], draw(shortcut, replace(wish, seed=8)).images)
    assert not np.array_equal(images[:, 1], images[:, 0]) and not np.array_equal(images[:, 2], images[:, -1])


def test_noise_between_two_noises_is_as_long_as_noise_is():
    first, second = torch.randn(2, 400, 1, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    middle = spherical(first, second, torch.full((400,), 0.5))
    assert middle.std().item() == pytest.approx(1, abs=0.01)
    assert ((first + second) / 2).std().item() < 0.75  # what a straight line would give
    assert torch.equal(spherical(first, second, torch.zeros(400)), first)
    assert torch.equal(spherical(first, second, torch.ones(400)), second)
    assert torch.allclose(spherical(first, first, torch.full((400,), 0.3)), first)


def test_what_can_be_chosen(shortcut, flow):
    assert sorted(choices(shortcut)) == [
        "consistency",
        "flow",
        "jump_flow",
    ]  # meanflow is told an end
    assert list(choices(flow)) == ["flow"]
    assert choices(shortcut)["consistency"].most == 8 and choices(flow)["flow"].most == 100
    assert can_be_guided(shortcut) and class_names(shortcut) == [str(number) for number in range(10)]


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"seed": -1}, "seed must be"),
        ({"each": 0}, "pictures must be"),
        ({"classes": (10,)}, "between 0 and 9"),
        ({"sampler": "meanflow"}, "choose one of consistency, flow"),
        ({"steps": 0}, "steps"),
        ({"prompts": ("a fox",), "classes": (77,)}, "between 0 and 9"),
    ],
)
def test_what_cannot_be_drawn_is_said(shortcut, more, said):
    with pytest.raises(ConfigError, match=said):
        draw(shortcut, replace(WISH, **more))


def test_teacher_and_student_begin_with_the_same_noise(shortcut, flow):
    studio = Studio()
    studio.open(shortcut.path, flow.path)
    wish = replace(WISH, steps=2)
    assert np.array_equal(studio.draw(wish).images, draw(shortcut, wish).images)
    own = studio.draw_teacher(wish, 7)
    assert own.calls == 7 and own.sampler == "flow-euler"
    assert np.array_equal(own.images, flow.sample([7, 7, 1, 1, 4, 4], steps=7, seed=3).numpy())
    assert len(studio.way(wish, along_flow=True).frames) == FLOW_FRAMES + 1
    assert len(studio.way(wish, along_flow=False).frames) == 3


def test_a_model_that_does_not_open_leaves_the_other_open(shortcut, tmp_path):
    studio = Studio()
    studio.open(shortcut.path)
    with pytest.raises(Exception, match="There is no checkpoint at"):
        studio.open(str(tmp_path / "nowhere.ckpt"))
    assert studio.draw(WISH).images.shape == (6, 8, 8, 1)


def test_tiny_pictures_are_enlarged_by_a_whole_factor(shortcut):
    drawn = draw(shortcut, WISH)
    grid = np.asarray(pictures.grid(drawn, class_names(shortcut)))
    scale = pictures.factor(drawn.images, 2)
    assert scale == 12
    first = grid[2 : 2 + 8 * scale, -(2 + 2 * 8 * scale + 2) : -(2 + 8 * scale + 2)]  # of two, 2 pixels apart
    assert np.array_equal(first[scale // 2 :: scale, scale // 2 :: scale, 0], drawn.images[0, :, :, 0])
    assert np.array_equal(first[::scale], first[scale - 1 :: scale])  # squares
    assert pictures.factor(np.zeros((4, 256, 256, 3), np.uint8), 2) == 1


def test_a_picture_to_keep_says_how_it_was_made(shortcut):
    drawn = draw(shortcut, replace(WISH, steps=2))
    with Image.open(io.BytesIO(pictures.as_png(pictures.grid(drawn), drawn, shortcut.digest))) as kept:
        facts = json.loads(kept.text["flowanchor"])
    assert facts["seed"] == 3 and facts["sampler"] == "consistency"
    assert facts["checkpoint"] == shortcut.digest and facts["network_calls"] == 2
