"""Emoji drawn from a font: a small one that the tests make, and the real one where it is installed."""

from __future__ import annotations

import importlib.util
import os
import sys
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from hydra.core.global_hydra import GlobalHydra

from flowanchor.base.tables import read_captions
from flowanchor.checkpoints import load_model
from flowanchor.errors import ConfigError, DataError
from flowanchor.plugins.data.emoji import CLASSES, EmojiDataModule, code_points, open_font, picture
from flowanchor.plugins.data.emoji_folder import main as emoji_folder
from flowanchor.plugins.data.image_folder import ImageFolderDataModule

INSTALLED = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
FACES, HEADS, HEARTS = range(0x1F600, 0x1F632), (0x1F981, 0x1F984, 0x1F98A), range(0x1F493, 0x1F4A0)
COLOURS = {code: (i * 3, 255 - i * 2, i * 4 % 200) for i, code in enumerate((*FACES, *HEADS, *HEARTS))}
HELD_OUT = {0x1F60D, 0x1F610, 0x1F611, 0x1F626, 0x1F498}  # by `crc32 (1F60D | ...)`, worked out once


@pytest.fixture(scope="module")
def write_font():
    spec = importlib.util.spec_from_file_location("emoji_font", Path(__file__).with_name("emoji_font.py"))
    module = sys.modules["emoji_font"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.write_font


@pytest.fixture(scope="module")
def font(write_font, tmp_path_factory) -> Path:
    return write_font(tmp_path_factory.mktemp("font") / "squares.ttf", COLOURS)


def data(font: Path, *classes: str, **settings) -> EmojiDataModule:
    return EmojiDataModule(str(font), classes, **{"num_classes": len(classes), "batch_size": 4, **settings})


def middles(images, place: int = 16) -> list[tuple[int, ...]]:
    """The colour in the middle of each picture, where a square of the font is."""
    return [tuple(image[:, place, place].tolist()) for image in (images[i] for i in range(len(images)))]


def test_pictures_are_the_fonts_and_split_by_character(font):
    made = data(font, "heart", "face")
    train, heldout = made.images("train"), made.images("heldout")
    assert made.class_names == ("heart", "face") and train[0].shape == (3, 32, 32)
    kept = [code for code in (*HEARTS, *FACES) if code not in HELD_OUT]
    assert middles(train) == [COLOURS[code] for code in kept]
    assert train.labels.tolist() == [int(code in FACES) for code in kept]
    assert {*middles(heldout)} == {COLOURS[code] for code in HELD_OUT} and len(heldout) == len(HELD_OUT)
    assert heldout.labels.tolist() == [0, 1, 1, 1, 1]
    assert train[0][:, 31].eq(255).all() and train[0][:, :, 31].eq(255).all()  # white beside the square


def test_another_choice_of_classes_keeps_the_split(font):
    whole, part = data(font, "heart", "animal-face", "face"), data(font, "face")
    for split in ("train", "heldout"):
        faces = whole.images(split).subset(np.flatnonzero(whole.images(split).labels == 2))
        assert {*middles(part.images(split))} == {*middles(faces)}


def test_mirrored_copies_are_trained_on(font):
    batch = next(iter(data(font, "face", mirror=True, batch_size=92).train_dataloader()))
    assert len(batch.x1) == 92 and len(data(font, "face", mirror=False).images("train")) == 46
    corners = batch.x1[:, :, 16, 0].ne(1).any(1)  # the square begins at the left, in mirrored ones it ends at the right
    assert corners.sum() == 46 and batch.x1[~corners][:, :, 16, 31].ne(1).any(1).all()


def test_characters_that_the_font_lacks_are_told(font, caplog):
    with caplog.at_level("INFO", logger="flowanchor"):
        data(font, "face").images("train")
    assert caplog.messages == [f"Not in squares.ttf: {103 - 50} of 103 of face."]


def test_a_font_without_pictures_is_refused(write_font, font, tmp_path):
    outlines = write_font(tmp_path / "outlines.ttf", COLOURS, layered=False)
    with pytest.raises(DataError, match="no colour pictures of the class face: install Noto Color Emoji"):
        data(outlines, "face").images("train")
    with pytest.raises(DataError, match="no colour pictures of the class food"):
        data(font, "face", "food").images("train")
    with pytest.raises(DataError, match=r"does not exist: install .*fonts-noto-color-emoji.*data\.font=FILE"):
        data(tmp_path / "none.ttf", "face").images("train")
    (tmp_path / "text.ttf").write_text("no font")
    os.mkfifo(tmp_path / "pipe.ttf")  # which would be waited on
    for path in (tmp_path / "text.ttf", tmp_path / "pipe.ttf", tmp_path):
        with pytest.raises(DataError, match="is no font with pictures"):
            data(path, "face").images("train")


@pytest.mark.parametrize(
    "classes, settings, said",
    [
        (["face", "fruit"], {}, "each once: face, animal-face"),
        (["face", "face"], {}, "each once"),
        ([], {}, "each once"),
        (["face", "food"], {"num_classes": 3}, r"data\.num_classes=2 "),
        (["face"], {"size": 30}, r"data\.size=32"),
        (["face"], {"channels": 1}, r"data\.channels=3"),
    ],
)
def test_settings_that_contradict_are_refused(classes, settings, said):
    with pytest.raises(ConfigError, match=said):
        data(INSTALLED, *classes, **settings)


def test_classes_share_no_character_and_hold_what_they_say():
    codes = [code for name in CLASSES for code in code_points(name)]
    assert len(CLASSES) == 10 and len(codes) == len({*codes})
    assert {unicodedata.category(chr(code)) for code in codes if code < 0x1FA75} == {"So"}  # assigned: pictographs
    names = [unicodedata.name(chr(code)) for code in code_points("heart") if code < 0x1FA75]
    assert all("HEART" in name or name == "LOVE LETTER" for name in names)


@pytest.mark.skipif(not INSTALLED.exists(), reason="needs Noto Color Emoji: apt install fonts-noto-color-emoji")
def test_the_real_font_has_every_character_and_none_is_cut():
    font = open_font(INSTALLED)
    for code in (code for name in CLASSES for code in code_points(name)):
        pixels = picture(font, code)
        assert (pixels != 255).any() and (pixels[:, [0, -1]] == 255).mean() > 0.5, hex(code)


def test_files_with_names_and_credits_are_an_image_folder(font, tmp_path, capsys):
    emoji_folder(
        ["--font", str(font), "--classes", "heart", "animal-face", "--size", "16", "--", str(tmp_path / "set")]
    )
    assert "16 pictures in" in capsys.readouterr().out
    assert "fox face" in read_captions(tmp_path / "set" / "captions.csv")
    assert "animal-face/1F98A.png,fox face" in (tmp_path / "set" / "captions.csv").read_text().splitlines()
    assert "copyright Google" in (tmp_path / "set" / "CREDITS.md").read_text()
    read = ImageFolderDataModule(str(tmp_path / "set"), size=16, num_classes=2, batch_size=4)
    found = [colour for split in ("train", "heldout") for colour in middles(read.images(split), 8)]
    assert {*found} == {COLOURS[code] for code in (*HEARTS, *HEADS)} and read.class_names == ("animal-face", "heart")
    with pytest.raises(SystemExit, match="apt install fonts-noto-color-emoji"):
        emoji_folder(["--font", str(tmp_path / "none.ttf"), str(tmp_path / "other")])


def test_the_recipes_train(font, monkeypatch, tmp_path):
    from flowanchor.programs.train import main

    small = [f"data.font={font}", "backbone.hidden_size=16", "backbone.depth=1", "backbone.num_heads=2",
             "compile=false", "~callbacks.sample_grid", "logger=none", "data.batch_size=8", "trainer.max_steps=1",
             "trainer.limit_val_batches=0"]  # fmt: skip
    monkeypatch.chdir(tmp_path)
    for recipe in (["emoji_teacher"], ["emoji_facm", "teacher.checkpoint=outputs/train/emoji_teacher"]):
        GlobalHydra.instance().clear()
        monkeypatch.setattr(sys, "argv", ["src/train.py", f"experiment={recipe[0]}", *recipe[1:], *small])
        main()
    assert load_model(tmp_path / "outputs" / "train" / "emoji_facm").step == 1
