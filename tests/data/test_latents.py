"""data=latents: the released files, batch by batch, every sample once per pass, and what is said about bad ones."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from flowanchor.base.noise import sample_noise
from flowanchor.data.encoded import StoredLatents
from flowanchor.encoded.manifest import LatentManifest
from flowanchor.encoded.statistics import LatentStatistics
from flowanchor.errors import ConfigError, DataError
from flowanchor.plugins.data.latents import LatentsDataModule

SETTINGS = {"channels": 2, "size": 4, "num_classes": 3, "batch_size": 4, "seed": 7}


def module(folder: Path, **settings) -> LatentsDataModule:
    return LatentsDataModule(str(folder), **{**SETTINGS, **settings})


def epoch(data: LatentsDataModule) -> list:
    data.setup("fit")
    return list(data.train_dataloader())


def first_file(folder: Path) -> Path:
    return sorted(folder.glob("*.safetensors"))[0]


def change(path: Path, **tensors: torch.Tensor) -> None:
    save_file({k: v for k, v in {**load_file(path), **tensors}.items() if v is not None}, path)


def test_every_sample_once_per_pass(write_latents, samples):
    batches = epoch(module(write_latents([5, 8, 3]), repeat=2))
    seen = [samples(batch) for batch in batches]
    assert [len(batch) for batch in seen] == [4] * 8
    for part in (seen[:4], seen[4:]):
        assert sorted(index for batch in part for index, _ in batch) == list(range(16))
    mirrored = [flip for batch in seen for _, flip in batch]
    assert 6 < sum(mirrored) < 26, "a fair coin"
    assert [index for batch in seen[:4] for index, _ in batch] != [index for batch in seen[4:] for index, _ in batch]
    labels = torch.cat([batch.cond for batch in batches]).tolist()
    assert labels == [index % 3 for batch in seen for index, _ in batch]


def test_the_order_is_a_function_of_the_seed(write_latents, samples):
    folder = write_latents([9, 7])
    runs = [
        [samples(b) for b in epoch(module(folder, seed=seed, num_workers=w))] for seed, w in ((7, 0), (7, 2), (8, 0))
    ]
    assert runs[0] == runs[1] != runs[2]


def test_without_flips_and_without_labels(write_latents, samples):
    folder = write_latents([8])
    for path in folder.glob("*.safetensors"):
        change(path, latents_flip=None)
    with pytest.raises(DataError, match="no mirrored latents.*add data.flips=false"):
        epoch(module(folder))
    batches = epoch(module(folder, flips=False, num_classes=0))
    assert not any(flip for batch in batches for _, flip in samples(batch)) and batches[0].cond is None


def test_heldout_samples_are_not_trained_on(write_latents, samples):
    data = module(write_latents([9, 7]), heldout=4)
    trained = {index for batch in epoch(data) for index, _ in samples(batch)}
    heldout = [sample for batch in data.val_dataloader() for sample in samples(batch)]
    assert len(trained) == 12 and {index for index, _ in heldout} == set(range(16)) - trained
    assert not any(flip for _, flip in heldout)
    assert module(data.root).val_dataloader() == []


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_other_types_are_read_as_float32(write_latents, dtype):
    batch = epoch(module(write_latents([8], dtype=dtype)))[0]
    reference = epoch(module(write_latents([8], name="exact")))[0]
    assert batch.x1.dtype == torch.float32
    torch.testing.assert_close(batch.x1, reference.x1, atol=2e-2, rtol=2e-2)


def test_moments_are_drawn_anew_in_every_pass(write_latents):
    folder = write_latents([4])
    mean, logvar = torch.randn(4, 2, 4, 4), torch.randn(4, 2, 4, 4)
    both = torch.cat([mean, logvar], 1)
    change(first_file(folder), latents=both, latents_flip=both.clone())
    data = module(folder, values="moments", repeat=2, statistics={"multiplier": 3.0})
    first, second = epoch(data)
    assert not torch.equal(first.x1.sort(0).values, second.x1.sort(0).values)
    again = epoch(module(folder, values="moments", repeat=2, statistics={"multiplier": 3.0}))
    assert torch.equal(first.x1, again[0].x1) and torch.equal(second.x1, again[1].x1)
    stored = StoredLatents((2, 4, 4), "moments", LatentStatistics(multiplier=3.0), 7)
    drawn = stored.samples(both[1:2].clone(), np.array([1]), np.array([5]))
    noise = sample_noise(7, [1], (2, 4, 4), draw=5).float()
    torch.testing.assert_close(drawn, 3.0 * (mean[1:2] + (logvar[1:2] / 2).exp() * noise))


def test_released_statistics_or_numbers(write_latents):
    folder = write_latents([4])
    numbers = {"mean": [0.5, 0.5], "std": [2.0, 2.0]}
    assert torch.equal(epoch(module(folder))[0].x1, epoch(module(folder, statistics=numbers))[0].x1)
    (folder / "latents_stats.pt").unlink()
    with pytest.raises(DataError, match=r"no latents_stats\.pt beside the latents: add data\.statistics=FILE"):
        module(folder)


def test_it_survives_being_sent_to_a_worker(write_latents):
    data = module(write_latents([8]))
    examples = data.examples("train")
    before = examples.__getitems__([0, 9]).x1
    assert torch.equal(pickle.loads(pickle.dumps(examples)).__getitems__([0, 9]).x1, before)


# ------------------------------------------------------------------------------------------------------------ bad input


def test_a_truncated_file_is_named(write_latents):
    folder = write_latents([5, 8])
    path = sorted(folder.glob("*.safetensors"))[1]
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(DataError, match=r"shard001\.safetensors is truncated"):
        module(folder).setup("fit")


def test_a_missing_key_is_named(write_latents):
    folder = write_latents([5])
    change(first_file(folder), labels=None)
    with pytest.raises(DataError, match=r"shard000\.safetensors holds no 'labels'"):
        module(folder).setup("fit")


def test_labels_out_of_range_name_file_and_sample(write_latents):
    with pytest.raises(DataError, match=r"Sample 3 of .*shard000\.safetensors has label 3, but data\.num_classes=3"):
        module(write_latents([5, 8], classes=4)).setup("fit")


def test_values_that_are_not_finite(write_latents, samples):
    folder = write_latents([5, 11])
    latents = load_file(sorted(folder.glob("*.safetensors"))[1])["latents"]
    latents[2, 1, 0, 3] = float("nan")
    change(sorted(folder.glob("*.safetensors"))[1], latents=latents)
    with pytest.raises(DataError, match=r"Sample 2 of .*shard001\.safetensors is not finite.*data\.max_bad=1"):
        epoch(module(folder, flips=False))
    with pytest.raises(DataError, match=r"Sample 2 of .*shard001"):  # the sentence arrives from a worker too
        epoch(module(folder, flips=False, num_workers=1))
    with pytest.warns(UserWarning, match=r"Sample 2 of .*left out \(1 so far, at most 1\)"):
        batches = epoch(module(folder, flips=False, max_bad=1))
    seen = [index for batch in batches for index, _ in samples(batch)]
    assert len(seen) == 16 and set(seen) == set(range(16)) - {7}
    labels = torch.cat([batch.cond for batch in batches]).tolist()
    assert labels == [index % 3 for index in seen]


def test_a_bad_sample_counts_once_however_often_it_comes(write_latents):
    folder = write_latents([8])
    content = {name: values.clone() for name, values in load_file(first_file(folder)).items()}  # no view of the file
    content["latents"][2, 1, 0, 3] = content["latents_flip"][2, 0, 1, 1] = float("inf")
    change(first_file(folder), **content)
    with pytest.warns(UserWarning, match=r"Sample 2 of .*left out \(1 so far, at most 1\)") as heard:
        batches = epoch(module(folder, max_bad=1, repeat=3))
    assert len(batches) == 6 and all(batch.x1.isfinite().all() for batch in batches)
    assert sum("left out" in str(warning.message) for warning in heard) == 1
    content["latents"][5, 1, 0, 3] = content["latents_flip"][5, 0, 1, 1] = float("inf")
    change(first_file(folder), **content)
    with pytest.warns(UserWarning), pytest.raises(DataError, match=r"data\.max_bad=2 \(now 1[;)]"):
        epoch(module(folder, max_bad=1))


def test_statistics_of_other_latents(write_latents):
    folder = write_latents([5])
    torch.save({"mean": torch.zeros(1, 3, 1, 1), "std": torch.ones(1, 3, 1, 1)}, folder / "latents_stats.pt")
    with pytest.raises(DataError, match="statistics of 3 channels and the latents have 2"):
        module(folder)
    torch.save({"mean": torch.zeros(1, 2, 1, 1), "std": torch.full((1, 2, 1, 1), 9.0)}, folder / "latents_stats.pt")
    with pytest.raises(DataError, match="statistics do not fit the latents"):
        module(folder).setup("fit")


@pytest.mark.parametrize(
    "settings, error, sentence",
    [
        ({"channels": 3}, DataError, "statistics of 2 channels"),
        ({"size": 8}, DataError, r"shard000.* holds latents of 2 x 4 x 4, but 2 x 8 x 8 are expected"),
        ({"batch_size": 40}, DataError, "larger than the data"),
        ({"heldout": 5}, ConfigError, "leaves none of 5 samples"),
        ({"values": "means"}, ConfigError, "data.values=means is not known"),
    ],
)
def test_settings_that_do_not_fit(write_latents, settings, error, sentence):
    folder = write_latents([5])
    with pytest.raises(error, match=sentence):
        module(folder, **settings).setup("fit")


def test_folders_that_hold_none(tmp_path):
    with pytest.raises(ConfigError, match="add data.root=FOLDER"):
        LatentsDataModule(None, **SETTINGS)
    statistics = {"multiplier": 1.0}
    with pytest.raises(DataError, match="no .safetensors files in"):
        module(tmp_path, statistics=statistics).setup("fit")
    (tmp_path / ".encoding").mkdir()
    with pytest.raises(DataError, match="not encoded to its end"):
        module(tmp_path, statistics=statistics)


def test_it_must_agree_with_its_manifest(write_latents):
    folder = write_latents([5, 8])
    shards = [{"file": p.name, "count": 1, "bytes": 1, "sha256": ""} for p in sorted(folder.glob("*.safetensors"))]
    content = dict(layout="safetensors", values="sample", shape=(2, 4, 4), count=13, flips=True, dtype="float32",
                   image_size=32, num_classes=3, shards=shards)  # fmt: skip
    (folder / "manifest.json").write_text(json.dumps({**content, "format": 1}))
    module(folder).setup("fit")
    for settings, sentence in (
        ({"num_classes": 4}, "use data.num_classes=3"),
        ({"values": "moments"}, "use data.values"),
    ):
        with pytest.raises(ConfigError, match=sentence):
            module(folder, **settings)
    (folder / shards[1]["file"]).unlink()
    with pytest.raises(DataError, match=r"shard001\.safetensors is gone"):
        module(folder).setup("fit")
    shutil.copy(folder / shards[0]["file"], folder / shards[1]["file"])
    assert LatentManifest.read(folder) is not None
    (folder / "manifest.json").write_text(json.dumps({**content, "layout": "webdataset", "format": 1}))
    with pytest.raises(ConfigError, match="use data=webdataset"):
        module(folder)


def test_it_has_no_images(write_latents):
    with pytest.raises(ConfigError, match="add reference=FOLDER"):
        module(write_latents([5])).images("train")


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool, torch.complex64])
@pytest.mark.parametrize("key", ["latents", "latents_flip"])
def test_latents_that_are_no_floating_point_numbers(write_latents, dtype, key):
    folder = write_latents([8])
    path = first_file(folder)
    change(path, **{key: load_file(path)[key].to(dtype)})
    with pytest.raises(DataError, match=f"holds '{key}' of type"):
        epoch(module(folder))
