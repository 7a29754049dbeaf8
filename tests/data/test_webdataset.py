"""data=webdataset: every sample once per epoch over ranks and workers, resumed to the same next batch; bad input."""

from __future__ import annotations

import functools
import http.server
import io
import json
import re
import tarfile
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from flowanchor.data.tar_plan import TarPlan
from flowanchor.data.tar_reader import count_samples, decode_array, expand, read_shard
from flowanchor.errors import ConfigError, DataError
from flowanchor.plugins.data.webdataset import WebDatasetDataModule

SETTINGS = {"channels": 2, "size": 4, "num_classes": 3, "batch_size": 3, "seed": 7, "window": 5}
COUNTS = [7, 4, 9, 5]  # 25 samples


def module(root, rank: int = 0, world_size: int = 1, done: int = 0, **settings) -> WebDatasetDataModule:
    data = WebDatasetDataModule(str(root), **{**SETTINGS, **settings})
    progress = SimpleNamespace(batch_progress=SimpleNamespace(total=SimpleNamespace(processed=done)))
    data.trainer = SimpleNamespace(
        global_rank=rank,
        world_size=world_size,
        accumulate_grad_batches=1,
        overfit_batches=0,
        fit_loop=SimpleNamespace(epoch_loop=progress),
    )
    return data


def epoch(data: WebDatasetDataModule) -> list:
    data.setup("fit")
    return list(data.train_dataloader())


# ----------------------------------------------------------------------------------------------------------- the order


@pytest.mark.parametrize("workers", [0, 1, 3])
@pytest.mark.parametrize("world_size", [1, 2])
def test_every_sample_once_per_epoch_over_ranks_and_workers(write_tars, samples, world_size, workers):
    folder = write_tars(COUNTS)
    ranks = [epoch(module(folder, rank, world_size, num_workers=workers)) for rank in range(world_size)]
    assert [len(batches) for batches in ranks] == [25 // (3 * world_size)] * world_size
    seen = [index for batches in ranks for batch in batches for index, _ in samples(batch)]
    assert len(seen) == len(set(seen)) == 25 // (3 * world_size) * 3 * world_size
    assert seen != sorted(seen)
    labels = [int(label) for batches in ranks for batch in batches for label in batch.cond]
    assert labels == [index % 3 for index in seen]


def test_epochs_differ_and_leave_out_others(write_tars, samples):
    folder = write_tars(COUNTS)
    epochs = [[s for b in epoch(module(folder, done=8 * e)) for s in samples(b)] for e in range(6)]
    assert len({tuple(e) for e in epochs}) == 6
    left_out = [set(range(25)) - {index for index, _ in e} for e in epochs]
    assert all(len(rest) == 1 for rest in left_out) and len(set.union(*left_out)) > 1
    coins = [flip for e in epochs for _, flip in e]
    assert 0.3 < np.mean(coins) < 0.7


WHOLE: dict[int, list] = {}  # three epochs, by the number of workers
MORE = [pytest.param(done, workers, marks=pytest.mark.slow) for workers in (1, 2) for done in (1, 8)]


@pytest.mark.parametrize(
    "done, workers", [*((done, workers) for workers in (0, 3) for done in (1, 5, 8, 11)), (5, 1), (11, 2), *MORE]
)
def test_resumed_it_goes_on_with_the_same_batches(write_tars, samples, workers, done):
    folder = write_tars(COUNTS)
    if workers not in WHOLE:
        epochs = [epoch(module(folder, done=8 * e, num_workers=workers)) for e in range(3)]
        WHOLE[workers] = [samples(batch) for batches in epochs for batch in batches]
    whole = WHOLE[workers]
    resumed = [samples(b) for b in epoch(module(folder, done=done, num_workers=workers))]
    assert resumed == whole[done : done + 8]


def test_on_resume_nothing_is_read_that_was_trained_on_before(write_tars, monkeypatch):
    from flowanchor.plugins.data import webdataset as code

    decoded = []
    decode = code.decode_array
    folder = write_tars(COUNTS)
    data = module(folder, done=6)
    data.setup("fit")
    loader = data.train_dataloader()
    monkeypatch.setattr(code, "decode_array", lambda content: decoded.append(1) or decode(content))
    batches = iter(loader)
    next(batches), next(batches)
    assert len(decoded) == 6


def test_a_sample_is_moved_within_its_window_only():
    plan = TarPlan([1000], 10, 0, 1, 1, window=50, seed=0)
    order = plan.stretch(0, 0).order
    moved = np.abs(order - np.arange(1000))
    assert sorted(order.tolist()) == list(range(1000)) and 25 < moved.max() <= 50


@pytest.mark.parametrize("accumulate, epoch, length", [(3, 6, 6), (4, 8, 8), (8, 8, 8), (20, 8, 20)])
def test_an_iteration_holds_whole_steps(accumulate, epoch, length):
    plan = TarPlan([25], 3, 0, 1, 2, window=5, seed=0, accumulate=accumulate)  # eight batches
    assert (plan.batches, plan.length) == (epoch, length)
    for position in (0, length):
        made = [list(plan.work(position, worker)) for worker in range(2)]
        assert sum(count for pieces in made for *_, count in pieces) == length
        assert {number for pieces in made for number, *_ in pieces} == set(
            range(position // epoch, (position + length - 1) // epoch + 1)
        )


def test_the_trainer_gets_whole_steps_from_tars(write_tars):
    data = module(write_tars(COUNTS))
    data.trainer.accumulate_grad_batches = 3
    assert len(data.train_dataloader()) == 6 == len(list(data.train_dataloader()))


def test_the_shards_come_in_a_new_order_each_epoch():
    plan = TarPlan([10] * 8, 10, 0, 1, 1, window=5, seed=0)
    assert len({tuple(plan.stretch(epoch, 0).shards.tolist()) for epoch in range(5)}) == 5


def test_a_resumed_run_with_other_readers_is_warned(write_tars):
    folder = write_tars(COUNTS)
    data, other = module(folder), module(folder, num_workers=2)
    state = data.train_dataloader().state_dict()
    with pytest.warns(UserWarning, match="readers was 1, is 2"):
        other.train_dataloader().load_state_dict(state)


# ----------------------------------------------------------------------------------------------------------- the tars


def test_through_webdataset_it_is_the_same(write_tars, samples):
    """Over HTTP, which is for webdataset to open, as from the disk."""
    folder = write_tars(COUNTS)
    quiet = type("Quiet", (http.server.SimpleHTTPRequestHandler,), {"log_message": lambda *_: None})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(quiet, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        base = f"http://127.0.0.1:{server.server_port}"
        remote = f"{base}/shard-{{000000..000003}}.tar"
        options = {"statistics": str(folder / "latents_stats.pt")}
        with pytest.raises(ConfigError, match="add data.index=FILE or URL"):
            epoch(module(remote, **options))
        there = epoch(module(remote, index=f"{base}/index.json", **options))
    finally:
        server.shutdown()
        server.server_close()
    assert [samples(b) for b in there] == [samples(b) for b in epoch(module(folder))]


def test_pipes_too(write_tars, samples):
    folder = write_tars(COUNTS)
    piped = f"pipe:cat {folder}/shard-{{000000..000003}}.tar"
    options = {"statistics": str(folder / "latents_stats.pt"), "index": str(folder / "index.json")}
    assert [samples(b) for b in epoch(module(piped, **options))] == [samples(b) for b in epoch(module(folder))]


@pytest.mark.parametrize(
    "url",
    [
        "pipe:aws s3 cp s3://bucket/shard-{000000..000003}.tar -",
        "pipe:curl -s 'https://host/shard-{000000..000003}.tar?key=a/b.c' | cat",
        "https://host/shard-{000000..000003}.tar?signature=a%2Fb/c&x=1",
        "gs://bucket/folder/shard-{000000..000003}.tar",
    ],
)
def test_the_index_knows_a_tar_by_its_name_in_any_url(write_tars, url):
    assert count_samples(expand(url), str(write_tars(COUNTS) / "index.json")) == COUNTS
    with pytest.raises(DataError, match="does not list .*shard-000004.tar"):
        count_samples(expand(url.replace("000003", "000004")), str(write_tars(COUNTS, name="more") / "index.json"))


def test_local_tars_are_counted_without_an_index(write_tars):
    folder = write_tars(COUNTS, index_file=False)
    assert count_samples(expand(str(folder)), None) == COUNTS
    assert count_samples(expand(f"{folder}/shard-{{000001..000002}}.tar"), None) == COUNTS[1:3]


def test_a_file_url_is_a_path(write_tars, samples):
    folder = write_tars(COUNTS)
    for url in (f"file:{folder}", f"file://{folder}/shard-{{000000..000003}}.tar"):
        assert [samples(b) for b in epoch(module(url))] == [samples(b) for b in epoch(module(folder))]


def test_tars_of_other_programs(tmp_path):
    """Long names, folders and PAX headers, as tar programs write them."""
    long = "folder/" + "x" * 120
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        for extension in ("npy", "cls"):
            (tmp_path / "content").write_text(extension)
            tar.add(tmp_path / "content", f"{long}.{extension}")
    (found,) = read_shard(str(tmp_path / "a.tar"))
    assert found.key == long and {k: bytes(v) for k, v in found.files.items()} == {"npy": b"npy", "cls": b"cls"}
    with tarfile.open(tmp_path / "b.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
        tar.add(tmp_path, "folder", recursive=False)
        tar.add(tmp_path / "content", "folder/x.npy")
    assert [s.key for s in read_shard(str(tmp_path / "b.tar"))] == ["folder/x"]


# ------------------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize("cut", [100, 11_000])
def test_a_truncated_shard_is_named(write_tars, cut):
    folder = write_tars([7])
    path = folder / "shard-000000.tar"
    with tarfile.open(path) as tar:
        last = tar.getmembers()[-1]
    path.write_bytes(path.read_bytes()[: last.offset_data + 1 - (cut - 100)])
    for workers in (0, 1):
        with pytest.raises(DataError, match=r"shard-000000\.tar is truncated"):
            epoch(module(folder, num_workers=workers))


def test_an_index_that_promises_more(write_tars):
    folder = write_tars([7, 5])
    (folder / "index.json").write_text(
        json.dumps({"shardlist": [{"url": f"shard-{n:06d}.tar", "nsamples": 8} for n in range(2)]})
    )
    with pytest.raises(DataError, match=r"shard-00000\d\.tar has \d samples and its index says 8"):
        for done in (0, 5):
            epoch(module(folder, done=done))


def test_bad_samples_are_named_and_counted(write_tars, samples):
    def spoil(index, files):
        if index == 2:
            del files["cls"]
        if index == 4:
            del files["npy"]
        if index == 8:
            files["cls"] = b"3"
        if index == 10:
            files["npy"] = files["npy"][:128] + np.full(64, np.nan, np.float32).tobytes()

    folder = write_tars([12], spoil=spoil)
    named = {
        2: r"Sample 00000002 of .*shard-000000\.tar has label nothing",
        4: r"Sample 00000004 .* has no \.npy",
        8: r"Sample 00000008 .* has label 3, which is none of data\.num_classes=3",
        10: r"Sample 00000010 .* is not finite",
    }
    settings = {"statistics": {"multiplier": 1.0}}
    with pytest.raises(DataError, match="|".join(named.values())):
        epoch(module(folder, **settings))
    with pytest.warns(UserWarning) as heard:
        batches = epoch(module(folder, max_bad=4, **settings))
    texts = [str(w.message) for w in heard]
    for sentence in named.values():
        assert any(re.search(sentence, text) and "left out" in text for text in texts), sentence
    kept = [round(float(row[0, 0, 0]) * 100) for batch in batches for row in batch.x1]
    assert len(kept) == 12 and set(kept) == set(range(12)) - set(named)


@pytest.mark.parametrize(
    "settings, error, sentence",
    [
        ({"root": None}, ConfigError, "add data.root=FOLDER"),
        ({"size": 8}, DataError, r"Sample \d+ of .*tar holds latents of 2 x 4 x 4, but 2 x 8 x 8"),
        ({"batch_size": 40}, DataError, "larger than the data, 12 samples"),
        ({"window": 0}, ConfigError, "data.window=0"),
        ({"index": "nowhere.json"}, DataError, "nowhere.json cannot be read as an index"),
    ],
)
def test_settings_that_do_not_fit(write_tars, settings, error, sentence):
    folder = write_tars([12])
    with pytest.raises(error, match=sentence):
        epoch(WebDatasetDataModule(**{**SETTINGS, "root": str(folder), **settings}))


def test_roots_that_hold_none(tmp_path):
    options = {**SETTINGS, "statistics": {"multiplier": 1.0}}
    with pytest.raises(DataError, match="no tars in"):
        WebDatasetDataModule(str(tmp_path), **options).setup("fit")
    with pytest.raises(DataError, match=r"no file .*a1\.tar \(2 of 2\)"):
        WebDatasetDataModule(f"{tmp_path}/a{{1..2}}.tar", **options).setup("fit")


def test_it_has_no_images(write_tars):
    with pytest.raises(ConfigError, match="add reference=FOLDER"):
        module(write_tars([5])).images("train")


def test_the_folder_of_the_manifest(write_tars, tmp_path):
    folder = write_tars([5])
    (folder / "manifest.json").write_text(
        json.dumps(
            {
                "layout": "safetensors",
                "values": "sample",
                "shape": [2, 4, 4],
                "count": 5,
                "flips": True,
                "dtype": "float32",
                "image_size": 8,
                "num_classes": 3,
                "format": 1,
            }
        )  # fmt: skip
    )
    with pytest.raises(ConfigError, match="use data=latents"):
        module(Path(folder))


@pytest.mark.parametrize("dtype", ["int64", "uint8", "bool", "complex64"])
def test_arrays_of_other_numbers_than_floating_point_ones(dtype):
    buffer = io.BytesIO()
    np.save(buffer, np.zeros((1, 2, 4, 4), dtype))
    with pytest.raises(ValueError, match="not floating-point numbers"):
        decode_array(buffer.getvalue())


def test_keys_with_dots_are_refused_before_they_are_one_sample(tmp_path):
    """1.5, 1.6 and 1.7 share the key 1: they would be a single sample without its array."""
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for key in ("1.5", "1.6", "1.7"):
            for name, content in ((f"{key}.npy", b"x"), (f"{key}.cls", b"0")):
                header = tarfile.TarInfo(name)
                header.size = len(content)
                tar.addfile(header, io.BytesIO(content))
    (tmp_path / "._0.tar").write_bytes(b"macOS's")
    with pytest.raises(DataError, match=r"0\.tar holds 1\.5\.npy, .* write the key without dots"):
        count_samples(expand(str(tmp_path)), None)


def test_an_index_is_that_of_its_tars(write_tars):
    """Tars of one name in two folders have no index in common; one that says less would hide samples."""
    one, two = write_tars([3], name="one"), write_tars([5], name="two")
    urls = [str(next(folder.glob("*.tar"))) for folder in (one, two)]
    assert Path(urls[0]).name == Path(urls[1]).name
    assert count_samples(urls, None) == [3, 5]
    with pytest.raises(DataError, match="names two of one name"):
        count_samples(urls, str(one / "index.json"))
    content = json.loads((two / "index.json").read_text())
    content["shardlist"][0]["nsamples"] = 4
    (two / "index.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"has more than the 4 samples that its index says"):
        epoch(module(two, batch_size=2))
    content["shardlist"] *= 2
    (two / "index.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"two tars of one name"):
        count_samples(urls[1:], None)
