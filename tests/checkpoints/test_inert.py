"""Foreign files are data: what releases hold is read, and whatever would run is refused and does not run."""

from __future__ import annotations

import argparse
import collections
import os
import pathlib
import pickle
import subprocess

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from flowanchor.checkpoints.inert import Inert, plain, read_inert
from flowanchor.errors import CheckpointError
from flowanchor.plugins.formats.authors_file import read_foreign


def test_what_releases_hold_comes_back_as_plain_values(tmp_path):
    path = tmp_path / "a.pt"
    settings = {"a": 1, "b": [1, 2.5, "x", None, True], "c": {"d": "${a}"}}
    torch.save(
        {
            "args": argparse.Namespace(sigma_rel=0.2, name="x", deep=argparse.Namespace(n=3)),
            "config": OmegaConf.create(settings),
            "loss": np.float64(3.5),
            "array": np.arange(3),
            "path": pathlib.Path("x/y"),
            "counts": collections.defaultdict(list, {"k": [1]}),
            "weights": {"w": torch.arange(3.0)},
        },
        path,
    )
    found = read_inert(path)
    assert plain(found["args"]) == {"sigma_rel": 0.2, "name": "x", "deep": {"n": 3}}
    assert plain(found["config"]) == settings, "an interpolation stays text"
    assert plain(found["counts"]) == {"k": [1]}
    assert torch.equal(found["weights"]["w"], torch.arange(3.0))
    for name in ("args", "config", "loss", "array", "path"):
        assert type(found[name]) is Inert, f"{name} has no behaviour of its own"


class Runs:
    """Unpickles into a call."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("place", ["args", "emas", "model"])
@pytest.mark.parametrize("save", [torch.save, lambda content, path: path.write_bytes(pickle.dumps(content))])
def test_a_malicious_pickle_is_refused_and_its_code_never_runs(tmp_path, place, save):
    trap = tmp_path / "sprung"
    for attack in (
        Runs(os.system, f"touch {trap}"),
        Runs(open, str(trap), "w"),
        Runs(eval, f"open({str(trap)!r}, 'w')"),
        Runs(subprocess.Popen, ["touch", str(trap)]),
        Runs(getattr, argparse.Namespace, "__init__"),
        Runs(pathlib.Path.touch, pathlib.Path(trap)),
    ):
        path = tmp_path / "file.pt"
        save({"model": {"w": torch.zeros(1)}, place: attack}, path)
        with pytest.raises(CheckpointError, match="refused|damaged"):
            read_foreign(path)
        assert not trap.exists()
    pickle.loads(pickle.dumps(Runs(open, str(trap), "w"))).close()
    assert trap.exists(), "the attack itself works"


def test_the_refusal_says_what_was_asked_for(tmp_path):
    path = tmp_path / "file.pt"
    torch.save({"model": {"w": torch.zeros(1)}, "args": Runs(print, "x")}, path)
    with pytest.raises(CheckpointError, match="is refused: reading it would run code.*print"):
        read_foreign(path)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_file_that_is_cut_off(tmp_path, suffix):
    from safetensors.torch import save_file

    path = tmp_path / f"whole{suffix}"
    weights = {"w": torch.randn(1000)}
    (save_file if suffix == ".safetensors" else torch.save)(weights, path)
    assert torch.equal(read_inert(path)["w"], weights["w"])
    content = path.read_bytes()
    for length in (0, 5, len(content) // 2, len(content) - 100):
        cut = tmp_path / f"cut{suffix}"
        cut.write_bytes(content[:length])
        with pytest.raises(CheckpointError, match="damaged or cut off|no file of torch.save"):
            read_inert(cut)


def test_a_file_of_the_old_format(tmp_path):
    path = tmp_path / "old.pt"
    torch.save({"w": torch.arange(4.0)}, path, _use_new_zipfile_serialization=False)
    assert torch.equal(read_inert(path)["w"], torch.arange(4.0))
