"""data=captions: every sample once per pass, one size per batch, the same after a resume and on two processes."""

from __future__ import annotations

import warnings
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from flowanchor.encoded.captions import NEGATIVE
from flowanchor.encoded.manifest import CaptionManifest
from flowanchor.errors import ConfigError, DataError
from flowanchor.plugins.data.captioned import CaptionedDataModule

COUNTS = {(4, 6): 11, (6, 4): 9, (2, 2): 1}


@pytest.fixture
def folder(tmp_path, write_captions):
    """Sample i has the value i everywhere, and i % 3 + 1 captions of i + 1, i + 2, ... tokens."""
    shards, sizes, number = [], [], 0
    for size, count in COUNTS.items():
        for part in (count // 2, count - count // 2):
            if not part:
                continue
            rows = range(number, number + part)
            latents = torch.stack([torch.full((3, 1, *size), float(row)) for row in rows])
            texts = [
                [torch.full((row % 5 + 1 + k, 8), float(100 * row + k)) for k in range(row % 3 + 1)] for row in rows
            ]
            captions = [[f"{row} {k}" for k in range(row % 3 + 1)] for row in rows]
            names = [str(row) for row in rows]
            shards.append(
                write_captions(tmp_path / f"captions-{len(shards):05d}.safetensors", latents, texts, names, captions)
            )
            sizes.append(size)
            number += part
    save_file({"text": torch.ones(3, 8)}, tmp_path / NEGATIVE)
    CaptionManifest(
        number, (3, 1), 8, tuple(shards), tuple(sizes), {"name": "identity", "digest": "identity"}, {"name": "x"}, ""
    ).write(tmp_path)
    return tmp_path


def module(folder, **settings):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        data = CaptionedDataModule(
            str(folder),
            **{"channels": 3, "frames": 1, "height": 4, "width": 6, "text_dim": 8, "batch_size": 3, **settings},
        )
        data.setup("fit")
    return data


def batches(data, passes: int = 1):
    order = data._train_order()
    order.seek(0)
    examples = data.examples("train")
    found = []
    for number in range(passes):
        order.set_epoch(number)
        found += [examples.__getitems__(indices) for indices in order]
    return found


def test_one_size_per_batch_and_every_sample_once(folder):
    seen = []
    for batch in batches(module(folder)):
        assert batch.x1.shape[1:3] == (3, 1) and tuple(batch.x1.shape[3:]) in COUNTS and len(batch.x1) == 3
        seen += batch.x1[:, 0, 0, 0, 0].tolist()
    assert len(seen) == len(set(seen)) == 9 + 9, "eleven make three batches of three, nine make three, one makes none"


def test_what_is_left_out_changes_and_the_captions_change(folder):
    found = batches(module(folder), passes=20)
    seen = {row for batch in found for row in batch.x1[:, 0, 0, 0, 0].tolist()}
    assert seen == set(map(float, range(20))), "all but the one that is alone of its size"
    told = {}
    for batch in found:
        for row, text in zip(batch.x1[:, 0, 0, 0, 0].tolist(), batch.cond.tokens, strict=True):
            told.setdefault(row, set()).add(float(text[0, 0]) - 100 * row)
    assert told[0.0] == {0.0} and told[2.0] == {0.0, 1.0, 2.0}


def test_texts_are_padded_with_zeros_to_the_longest_or_the_negative_one(folder):
    for batch in batches(module(folder)):
        text = batch.cond.tokens
        lengths = (text != 0).any(-1).sum(1)  # sample 0's own text is zero
        assert text.shape[1] == max(3, int(lengths.max())) or 0.0 in batch.x1
    assert torch.equal(module(folder).null_condition.tokens, torch.ones(3, 8))


def test_two_processes_share_the_batches_of_one(folder):
    whole = module(folder, batch_size=4)._train_order()
    data = module(folder, batch_size=2)
    halves = []
    for rank in range(2):
        data._process = lambda rank=rank: (rank, 2)
        halves.append([list(indices) for indices in data._train_order()])
    assert [a + b for a, b in zip(*halves, strict=True)] == [list(indices) for indices in whole]


def test_an_iteration_holds_whole_steps(folder):
    data = module(folder)
    straight = [list(i) for i in data._train_order()]
    data.trainer = SimpleNamespace(global_rank=0, world_size=1, accumulate_grad_batches=4)
    order = data._train_order()
    assert order.batches == 6 and len(order) == 4 and [list(i) for i in order] == straight[:4]
    order.seek(4)
    assert [list(i) for i in order][:2] == straight[4:6], "what an epoch left comes next"


def test_a_resumed_run_sees_the_next_batches(folder):
    data = module(folder)
    order = data._train_order()
    straight = [list(i) for i in order]
    order.set_epoch(1)
    straight += [list(i) for i in order]
    order = data._train_order()
    order.seek(4)
    assert [list(i) for i in order] == straight[4 : 4 + len(order)]


def test_the_prompts_of_the_sample_grids(folder):
    found = module(folder).fixed_prompts(3)
    assert list(found) == ["0 0", "1 0", "2 0"] and all(text.tokens.shape[1] == 8 for text in found.values())


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"channels": 16}, "use data.channels=3"),
        ({"text_dim": 4096}, "use data.text_dim=8"),
        ({"frames": 5}, "use data.frames=1"),
        ({"num_classes": 10}, "captions have no classes"),
        ({"batch_size": 12}, "No size has the 12 samples"),
    ],
)
def test_settings_that_do_not_fit(folder, settings, message):
    with pytest.raises((ConfigError, DataError), match=message):
        module(folder, **settings)


def test_bad_folders(folder, tmp_path):
    with pytest.raises(ConfigError, match="data.root=FOLDER"):
        CaptionedDataModule(None, 3, 1, 4, 6, 8, batch_size=1)
    with pytest.raises(DataError, match="no complete set"):
        module(tmp_path / "nowhere")
    (folder / "captions-00001.safetensors").write_bytes(b"short")
    with pytest.raises(DataError, match="cannot be read"):
        module(folder)


def test_sizes_that_are_never_seen_are_named(folder):
    with pytest.warns(UserWarning, match="too few for a batch of 3 and are never seen: 2 x 2: 1"):
        data = CaptionedDataModule(str(folder), 3, 1, 4, 6, 8, batch_size=3)
        data.setup("fit")
