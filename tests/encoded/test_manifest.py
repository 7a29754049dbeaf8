"""Manifests are read back, and a folder of another kind, version or shape is named."""

from __future__ import annotations

import json

import pytest

from flowanchor.encoded.manifest import CaptionManifest, LatentManifest, Shard
from flowanchor.errors import DataError

LATENTS = LatentManifest(
    "safetensors", "sample", (4, 2, 2), 6, True, "float32", 16, 3, ("a", "b", "c"),
    shards=(Shard("x.safetensors", 6, 10, "0"),), unreadable=("a/1.jpg",),
)  # fmt: skip
CAPTIONS = CaptionManifest(
    6, (4, 1), 8, (Shard("c.safetensors", 6, 10, "0"),), ((2, 3),), {"name": "x"}, {"name": "y"}, "no"
)


@pytest.mark.parametrize("manifest", [LATENTS, CAPTIONS])
def test_it_is_read_back_and_a_damaged_one_is_named(tmp_path, manifest):
    kind, path = type(manifest), tmp_path / "manifest.json"
    assert kind.read(tmp_path) is None
    manifest.write(tmp_path)
    assert kind.read(tmp_path) == manifest
    path.write_text(json.dumps({**json.loads(path.read_text()), "something": "of a later version"}))
    assert kind.read(tmp_path) == manifest
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": 2}))
    with pytest.raises(DataError, match="has format 2 and this version reads 1"):
        kind.read(tmp_path)
    path.write_text("{")
    with pytest.raises(DataError, match=r"manifest\.json is damaged"):
        kind.read(tmp_path)


def test_a_set_of_another_kind_is_no_damaged_one(tmp_path):
    CAPTIONS.write(tmp_path)
    with pytest.raises(DataError, match=r"another kind of data, captions: use data=captions"):
        LatentManifest.read(tmp_path)
    LATENTS.write(tmp_path)
    with pytest.raises(DataError, match=r"another kind of data, latents: .* encode\.py data=captions"):
        CaptionManifest.read(tmp_path)


@pytest.mark.parametrize(
    "change",
    [{"shape": [4, 1, 1]}, {"shape": 4}, {"sizes": [[2, 3], [2, 3]]}, {"shards": [{"file": "x"}]}, {"count": -1}],
)
def test_values_that_cannot_be(tmp_path, change):
    CAPTIONS.write(tmp_path)
    path = tmp_path / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(DataError, match=r"manifest\.json is damaged"):
        CaptionManifest.read(tmp_path)


def test_files_that_are_gone_or_cut_are_missing(tmp_path):
    assert CAPTIONS.missing(tmp_path) == ["c.safetensors"]
    (tmp_path / "c.safetensors").write_bytes(bytes(9))
    assert CAPTIONS.missing(tmp_path) == ["c.safetensors"]
    (tmp_path / "c.safetensors").write_bytes(bytes(10))
    assert CAPTIONS.missing(tmp_path) == []
