"""A checkpoint is data: whatever its author wrote into it, opening and using it runs nothing of their choice."""

from __future__ import annotations

import copy
import importlib.util
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from flowanchor.checkpoints import initialise_student, load_model, read_checkpoint
from flowanchor.checkpoints.format import Choices
from flowanchor.checkpoints.inspection import inspect_file
from flowanchor.codecs.load import load_codec
from flowanchor.errors import CheckpointError, FlowAnchorError
from flowanchor.generation.prompts import load_text_encoder
from flowanchor.generation.samplers import build_sampler
from flowanchor.plugins.backbones.lightningdit import LightningDiT
from flowanchor.plugins.teachers.checkpoint import CheckpointVelocity
from flowanchor.programs.evaluate import load_data

_spec = importlib.util.spec_from_file_location("strangers", Path(__file__).with_name("strangers.py"))
assert _spec is not None and _spec.loader is not None
strangers = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(strangers)

MKDIR = {"_target_": "os.mkdir", "path": "ran"}
CALLS: dict[str, Any] = {
    "in a dictionary": MKDIR,
    "in a list": [MKDIR],
    "in a tuple": (MKDIR,),
    "in a set": {"os.mkdir"},
    "as bytes": b"os.mkdir",
    "in a text": "${oc.create:{_target_: os.mkdir, path: ran}}",
    "decoded": "${oc.decode:'{_target_: os.mkdir, path: ran}'}",
    "of the environment": "${oc.env:HOME}",
    "of torch": {"_target_": "torch.load", "f": "bomb.pt", "weights_only": False},
    "partial": {"_target_": "os.mkdir", "_partial_": True, "_args_": ["ran"]},
    "with positions": {"_target_": "flowanchor.plugins.samplers.flow.FlowSampler", "_args_": [MKDIR]},
    "unconverted": {"_convert_": "none", "_recursive_": True, "x": MKDIR},
    "through a module of ours": {"_target_": "flowanchor.provenance.subprocess.Popen", "args": ["mkdir", "ran"]},
    "through a class of ours": {"_target_": "flowanchor.provenance.Path.mkdir", "self": "ran"},
    "of the checkout": {"_target_": "flowanchor.setup.x"},
    "of another place": {"_target_": "flowanchor.plugins.data.fashion_mnist.FashionMNISTDataModule", "download": True},
    "of a class method": {"_target_": "flowanchor.encoded.statistics.LatentStatistics.read", "source": "bomb.pt"},
    "of a function of ours": {"_target_": "flowanchor.base.files.write_whole", "path": "ran", "content": "x"},
}


class Bomb:
    def __reduce__(self) -> Any:
        import os

        return (os.mkdir, ("ran",))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, in which an attack would leave `ran`."""
    monkeypatch.chdir(tmp_path)
    torch.save(Bomb(), tmp_path / "bomb.pt")
    return tmp_path


def put(content: dict[str, Any], place: str, value: Any) -> dict[str, Any]:
    inner = content["flowanchor"]["config"]
    *outer, last = place.split(".")
    for key in outer:
        inner = inner[key]
    inner[last] = value
    return content


def jsonable(value: Any) -> bool:
    try:
        json.dumps(value)
    except TypeError:
        return False
    return not isinstance(value, tuple)


PLACES = ("backbone", "backbone.num_heads", "objective.interval", "sampler", "sampler.grid", "codec")


@pytest.mark.parametrize(
    ("form", "place"), [("file", place) for place in PLACES] + [(form, "sampler") for form in list(strangers.FORMS)[1:]]
)
def test_nothing_in_a_description_is_run(folder, form, place):
    """Whichever way it is written, wherever it stands: one sentence before anything is built."""
    strangers.use(strangers.FORMS[form](folder, strangers.checkpoint()))  # what is imported at first is so now
    for how, attack in CALLS.items():
        if form in ("safetensors", "published") and not jsonable(attack):
            continue
        path = strangers.FORMS[form](folder, put(strangers.checkpoint(), place, copy.deepcopy(attack)))
        with strangers.canary():
            sentence = strangers.refusal(lambda path=path: strangers.use(path))
        assert sentence is not None and str(path.name) in sentence, (how, sentence)
        assert "flowanchor.setup" not in sys.modules
        if path.is_dir():
            import shutil

            shutil.rmtree(path)


def test_the_environment_is_not_read(folder, monkeypatch):
    monkeypatch.setenv("A_SECRET", "xyzzy")
    path = strangers.as_file(folder, put(strangers.checkpoint(), "backbone.num_heads", "${oc.env:A_SECRET}"))
    assert "xyzzy" not in str(strangers.refusal(lambda: load_model(path)))


@pytest.mark.parametrize("how", [how for how in CALLS if how not in ("unconverted",)])
def test_nor_is_anything_by_the_programs_parts(folder, how):
    """Teacher, start of a student, evaluation's data, text encoder, a look at the file, the user's own codec."""
    attack = CALLS[how]
    odd = not jsonable(attack) or isinstance(attack, str)  # refused when the file is read, wherever it stands
    path = strangers.as_file(folder, put(strangers.checkpoint(), "backbone.num_heads", copy.deepcopy(attack)))
    student = LightningDiT(**strangers.SIZES, num_classes=3)
    with strangers.canary():
        assert strangers.refusal(lambda: CheckpointVelocity(str(path)))
        started = strangers.refusal(lambda: initialise_student(student, path))
        assert bool(started) is odd, "weights alone are data, whatever the description says"
        if odd:
            assert strangers.refusal(lambda: inspect_file(path, Choices()))
        else:
            assert "no match" in inspect_file(path, Choices())
    for part in ("data", "text_encoder", "codec.statistics"):
        content = strangers.checkpoint()
        if part == "codec.statistics":
            content["flowanchor"]["config"]["codec"] = {"_target_": "flowanchor.plugins.codecs.kl.KLCodec"}
        put(content, part, copy.deepcopy(attack))
        path = strangers.as_file(folder, content)
        with strangers.canary():
            assert strangers.refusal(lambda path=path, part=part: _use_part(path, part)), part


def _use_part(path: Path, part: str) -> None:
    model = load_model(path)
    if part == "data":
        load_data(OmegaConf.create({"data": None, "data_overrides": {}}), model, (1, 8, 8))
    elif part == "text_encoder":
        load_text_encoder(model)
    else:  # the user names a codec, and the checkpoint brings the statistics
        chosen = {
            "_target_": "flowanchor.plugins.codecs.kl.KLCodec",
            "name": "x",
            "latent_channels": 1,
            "downsampling": 1,
        }
        load_codec(model, OmegaConf.create({**chosen, "weights": None, "statistics": None}))


@pytest.mark.parametrize(
    "address",
    ["pipe:mkdir ran", "{pi,}pe:mkdir ran", "a.tar::pipe:mkdir ran", "https://host/a.tar", "C::pipe:mkdir ran",
     "\tpipe:mkdir ran", "s3://bucket/a.tar", "pi\npe:mkdir ran"],
)  # fmt: skip
@pytest.mark.parametrize("key", ["root", "index", "statistics"])
def test_data_is_not_fetched_from_where_a_file_says(folder, address, key):
    """webdataset runs what follows `pipe:`; only a user may type that."""
    data = {
        "_target_": "flowanchor.plugins.data.webdataset.WebDatasetDataModule", "root": str(folder), "index": None,
        "channels": 1, "size": 8, "num_classes": 0, "statistics": {"multiplier": 1.0}, "batch_size": 1, key: address,
    }  # fmt: skip
    model = load_model(strangers.as_file(folder, put(strangers.checkpoint(), "data", data)))
    settings = OmegaConf.create({"data": None, "data_overrides": {}})
    with strangers.canary(), pytest.raises(CheckpointError, match="is not for a file to say: type it yourself"):
        load_data(settings, model, (1, 8, 8)).tars()
    typed = OmegaConf.create({"data": None, "data_overrides": {key: str(folder) if key == "root" else None}})
    with pytest.raises(
        FlowAnchorError
    ) as refused:  # what the user typed takes its place: there are no tars, no numbers
        load_data(typed, model, (1, 8, 8)).tars()
    assert "is not for a file to say" not in str(refused.value)


def test_data_is_not_downloaded_because_a_file_says_so(folder):
    data = {
        "_target_": "flowanchor.plugins.data.cifar10.CIFAR10DataModule", "root": str(folder / "ran"), "download": True,
        "channels": 3, "size": 32, "num_classes": 10, "batch_size": 1,
    }  # fmt: skip
    model = load_model(strangers.as_file(folder, put(strangers.checkpoint(), "data", data)))
    settings = OmegaConf.create({"data": None, "data_overrides": {}})
    made = load_data(settings, model, (3, 32, 32))
    with strangers.canary():
        assert strangers.refusal(lambda: made.images("train"))
    assert not (folder / "ran").exists()


def test_a_class_of_nobodys_package_is_told_how_to_register(folder):
    path = strangers.as_file(folder, put(strangers.checkpoint(), "backbone", {"_target_": "mine.Net"}))
    with pytest.raises(CheckpointError, match="asks for 'mine.Net' as its backbone.*register it.*docs/plugins.md"):
        load_model(path)


def test_a_class_that_an_installed_package_registers(folder, monkeypatch):
    """Found by its entry point and its YAML file; its package is imported once it is asked for, not before."""
    site = folder / "site"
    (site / "theirs" / "conf" / "sampler").mkdir(parents=True)
    (site / "theirs" / "__init__.py").write_text("import pathlib; pathlib.Path('imported').touch()\n")
    (site / "theirs" / "halves.py").write_text(
        "from flowanchor.plugins.samplers.flow import FlowSampler\nclass Halves(FlowSampler):\n    label = 'halves'\n"
        "    @classmethod\n    def of(cls, steps, rule=None):\n        assert rule is None or rule['x'] == 1\n"
        "        return cls(2 * steps)\nclass Rule(dict):\n    pass\nclass Other:\n    pass\n"
    )
    option = "_target_: theirs.halves.Halves.of\nsteps: 3\nrule:\n  _target_: theirs.halves.Rule\n  x: 1\n"
    (site / "theirs" / "conf" / "sampler" / "halves.yaml").write_text(option)
    info = site / "theirs-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: theirs\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[flowanchor.plugins]\ntheirs = theirs.inner.most\n")
    content = put(strangers.checkpoint(), "sampler", {"_target_": "theirs.halves.Halves.of", "steps": 3})
    model = load_model(strangers.as_file(folder, content))
    with pytest.raises(CheckpointError, match="neither flowanchor nor an installed plugin"):
        build_sampler({"steps": None}, model)
    monkeypatch.syspath_prepend(str(site))
    with pytest.raises(CheckpointError, match="neither flowanchor nor an installed plugin"):
        build_sampler({"steps": None}, model)  # its entry point names a folder that is none
    (info / "entry_points.txt").write_text("[flowanchor.plugins]\ntheirs = theirs\n")
    sys.path.insert(0, str(folder))  # another search path is looked through anew
    try:
        refused = {"_target_": "theirs.halves.Other"}
        for settings in (refused, {"_target_": "theirs.halves.Halves.of", "steps": 3, "rule": refused}):
            with pytest.raises(CheckpointError, match="asks for 'theirs.halves.Other'"):
                build_sampler({}, SimpleNamespace(config={"sampler": settings}, path="a.ckpt"))
        assert not (folder / "imported").exists(), "nothing is imported in order to find out"
        assert build_sampler({"steps": 3}, _flow(model)).nfe == 6
        own = {"_target_": "theirs.halves.Halves.of", "steps": 4, "rule": {"_target_": "theirs.halves.Rule", "x": 1}}
        assert build_sampler({}, _flow(model, own)).nfe == 8
        wrong = {"_target_": "theirs.halves.Halves.of", "steps": 4, "rule": {"_target_": "theirs.halves.Rule", "x": 2}}
        with pytest.raises(CheckpointError, match="a.ckpt: its sampler cannot be built as of"):
            build_sampler({}, _flow(model, wrong))
        assert (folder / "imported").exists()
    finally:
        sys.path.remove(str(folder))


def _flow(model: Any, sampler: Any = None) -> Any:
    config = {**model.config, "sampler": sampler or model.config["sampler"]}
    return SimpleNamespace(config=config, path=model.path, kind="flow", interval=model.interval)


def test_old_names_are_known(folder):
    old = {"_target_": "flowanchor.plugins.samplers.consistency.ConsistencySampler", "steps": 3}
    model = load_model(strangers.as_file(folder, put(strangers.checkpoint(), "sampler", old)))
    assert build_sampler({}, model).nfe == 3


def test_what_is_read_is_a_copy_in_plain_types(folder):
    meta = read_checkpoint(strangers.as_file(folder, strangers.checkpoint()))["flowanchor"]
    assert meta["config"] == strangers.CONFIG and type(meta["config"]) is dict
