"""Two thousand spoilt files: each opens and can be used, or is refused in one sentence; none runs, writes or waits.

What is spoilt is chosen by the structure of a file: any value of the description anywhere, any entry of the weights,
any number in a header or an index, any byte. A case is a function of its number, which a failure names.
"""

from __future__ import annotations

import copy
import importlib
import importlib.util
import json
import pickle
import random
import re
import shutil
import warnings
import zipfile
from collections import Counter, OrderedDict
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata

_spec = importlib.util.spec_from_file_location("strangers", Path(__file__).with_name("strangers.py"))
assert _spec is not None and _spec.loader is not None
strangers = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(strangers)

TARGETS = (
    "os.mkdir", "os.system", "builtins.eval", "torch.load", "flowanchor.setup.x", "flowanchor", "", ".", "..", "a.b",
    "flowanchor.provenance.subprocess.Popen", "flowanchor.interfaces.Backbone", "flowanchor.base.files.write_whole",
    "flowanchor.plugins.backbones.lightningdit.LightningDiT", "flowanchor.plugins.backbones.sit.SiT.from_preset",
    "flowanchor.plugins.samplers.flow.FlowSampler", "flowanchor.plugins.samplers.meanflow.MeanFlowSampler",
    "flowanchor.plugins.codecs.kl.KLCodec",
    "flowanchor.plugins.objectives.intervals.plain.PlainInterval", "flowanchor.plugins.codecs.wan_vae.WanVAE",
    "flowanchor.plugins.objectives.intervals.auxiliary.AuxiliaryInterval",
    "flowanchor.plugins.data.digits.DigitsDataModule",
)  # fmt: skip
SCALARS: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 3, 2**31, 2**63, 10**18, 10**30, 10**60, 0.0, -0.5, 0.5, 1e308, 1e-308,
    float("inf"), float("nan"), "", "x", "1", "flow", "none", "euler", "dopri5", "ran", "/dev/zero", "../..", "/",
    "pipe:mkdir ran", "https://host/x", "${oc.env:HOME}", "${oc.create:{_target_: os.mkdir, path: ran}}", "???",
    "\x00", "\x1b[2J", "\ud800", "\u202e", "é" * 40, "nano", "XL/2", b"", b"bytes", 1j,
)  # fmt: skip


class Bomb:
    def __reduce__(self) -> Any:
        import os

        return (os.mkdir, ("ran",))


def attack(draw: random.Random, written: bool) -> dict[str, Any]:
    made: dict[str, Any] = {"_target_": draw.choice(TARGETS)}
    for key in draw.sample(("path", "_partial_", "_args_", "_convert_", "steps", "weights", "x"), draw.randint(0, 2)):
        made[key] = value(draw, 1, written)
    return made


def value(draw: random.Random, depth: int = 0, written: bool = False) -> Any:
    """Something that does not belong there; `written`: of what can be written out as text, too."""
    kind = draw.randint(0, 6 if depth >= 3 else 11 if written else 13)
    if kind <= 5:
        return draw.choice(SCALARS)
    if kind == 6:
        return draw.choice(
            (torch.zeros(2), torch.zeros(1).expand(10**6, 10**6), torch.Size([3]), torch.float32, Bomb())
        )
    inner = value(draw, depth + 1, written)
    if kind == 7:
        return attack(draw, written)
    if kind == 8:
        return draw.choice(([inner], (inner,), {"x": inner}, {"_target_": inner}, OrderedDict(x=inner), [[[inner]]]))
    if kind == 9:
        return draw.choice(({1: inner}, {None: inner}, {(): inner}, {"_target_": "os.mkdir", 3: inner}))
    if kind == 10:
        return draw.choice((set(), {"x"}, Counter("abc"), frozenset("a"), PurePosixPath("ran"), range(3)))
    if kind == 11:
        for _ in range(draw.choice((30, 60, 300))):
            inner = draw.choice(([inner], {"x": inner}))
        return inner
    if kind == 12:
        for _ in range(40):  # two to the power of forty values, in forty
            inner = [inner, inner]
        return inner
    loop: list[Any] = []
    loop.append(loop)
    return loop


def places(node: Any) -> list[tuple[Any, Any]]:
    found: list[tuple[Any, Any]] = []
    pairs = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, inner in pairs:
        found += [(node, key), *places(inner)]
    return found


def spoil(draw: random.Random, node: Any, made: Callable[[random.Random], Any] = value) -> None:
    """Change one or two places of a structure."""
    known = places(node)  # before anything is put in that holds itself
    for owner, key in draw.sample(known, draw.choice((1, 1, 1, 2))):
        if isinstance(owner, dict) and key not in owner:
            continue
        how = draw.randint(0, 9)
        if how == 0 and isinstance(owner, dict):
            owner.pop(key)
        elif how == 1 and isinstance(owner, dict):
            owner[draw.choice(("_target_", "_args_", "x", "preset", "weights", "grid", "", "a.b"))] = made(draw)
        elif how == 2:
            owner[key] = draw.choice(([owner[key]], (owner[key],), {"x": owner[key]}))
        elif how == 3 and isinstance(owner[key], (int, float)):
            owner[key] = draw.choice((owner[key] + 1, -owner[key], float(owner[key]), 10**9 * (owner[key] + 1)))
        else:
            owner[key] = made(draw)


# ---------------------------------------------------------------------------------------------------------------- cases


def spoil_content(draw: random.Random, folder: Path) -> Path:
    content = strangers.checkpoint()
    if draw.random() < 0.75:
        spoil(draw, content["flowanchor"])
    else:
        where = draw.choice((content, content["state_dict"], content["ema"], content["ema"]["short"]))
        key = draw.choice(list(where))
        found = where[key]
        if isinstance(found, torch.Tensor) and draw.random() < 0.7:
            casts = (torch.int64, torch.bool, torch.complex64, torch.float16, torch.bfloat16, torch.float8_e4m3fn)
            where[key] = draw.choice(
                (found.to(draw.choice(casts)), found.to_sparse(), found.to("meta"), found[:0], found.flatten(),
                 found * float("nan"), found.flatten()[:1].expand(found.shape), found.double(), found[None])
            )  # fmt: skip
        elif draw.random() < 0.3:
            where[draw.choice(("x", 1, "student.x", "\x1b"))] = where.pop(key)
        else:
            where[key] = value(draw)
    try:
        return strangers.as_file(folder, content)
    except Exception:  # what not even pickle writes
        return strangers.as_file(folder, strangers.checkpoint())


def spoil_bytes(draw: random.Random, file: Path) -> None:
    raw = bytearray(file.read_bytes())
    how = draw.randint(0, 3)
    start = draw.choice((0, draw.randrange(len(raw)), draw.randrange(max(1, len(raw) - 2000), len(raw))))
    if how == 0:
        del raw[draw.randrange(len(raw)) :]
    elif how == 1:
        for _ in range(draw.choice((1, 8, 60))):
            raw[draw.randrange(len(raw))] ^= 1 << draw.randrange(8)
    elif how == 2:
        raw[start : start + 512] = bytes(512)
    else:
        raw[start:start] = draw.randbytes(draw.choice((1, 8, 300)))
    file.write_bytes(raw)


def damaged(draw: random.Random, folder: Path) -> Path:
    path = Path(shutil.copy(BASES["file"], folder / "a.ckpt"))
    if draw.random() < 0.3:  # a flip in the middle of a few numbers says little: one in the names and shapes
        with zipfile.ZipFile(path) as archive:
            entries = {entry.filename: archive.read(entry) for entry in archive.infolist()}
        name = next(name for name in entries if name.endswith("data.pkl"))
        text = bytearray(entries[name])
        for _ in range(draw.choice((1, 3))):
            text[draw.randrange(len(text))] = draw.randrange(256)
        entries[name] = bytes(text)
        with zipfile.ZipFile(path, "w", draw.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))) as archive:
            for name, content in entries.items():
                archive.writestr(name, content)
    else:
        spoil_bytes(draw, path)
    return path


def published(draw: random.Random, folder: Path) -> Path:
    path = Path(shutil.copytree(BASES["published"], folder / "d"))
    config = path / "config.json"
    if draw.random() < 0.2:
        spoil_bytes(draw, draw.choice((config, path / "model.safetensors")))
        return path
    content = json.loads(config.read_text())
    spoil(draw, content, jsonable)
    text = json.dumps(content, skipkeys=True)
    config.write_text(draw.choice((text, text, text, text.replace('"x"', '"_target_"'), "[" * 9999 + text)))
    return path


def jsonable(draw: random.Random) -> Any:
    made = value(draw, written=True)
    try:
        json.dumps(made, skipkeys=True)
    except (TypeError, ValueError, RecursionError):
        return "${x}"
    return made


def safetensors(draw: random.Random, folder: Path) -> Path:
    """A header that lies: about its length, about types, shapes and places of tensors, about the description."""
    raw = BASES["safetensors"].read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header, body = json.loads(raw[8 : 8 + length]), raw[8 + length :]
    if draw.random() < 0.4:
        described = json.loads(header["__metadata__"]["flowanchor"])
        spoil(draw, described, jsonable)
        header["__metadata__"]["flowanchor"] = json.dumps(described, skipkeys=True)
    else:
        name = draw.choice(list(header)[1:])
        numbers = (-1, 0, 1, 7, 2**31, 2**40, 2**63, 2**64, 10**30)
        header[name] = draw.choice(
            (
                {**header[name], "dtype": draw.choice(("F64", "I64", "BOOL", "F8_E4M3", "C64", "X", "", 3))},
                {**header[name], "shape": [draw.choice(numbers) for _ in range(draw.randint(0, 4))]},
                {**header[name], "data_offsets": [draw.choice(numbers), draw.choice(numbers)]},
                {**header[name], "data_offsets": header[draw.choice(list(header)[1:])]["data_offsets"]},
                jsonable(draw),
            )
        )
    text = json.dumps(header, skipkeys=True).encode("utf-8", "surrogatepass")
    claimed = draw.choice((len(text),) * 6 + (0, len(text) - 1, len(text) + 1, 2**40, 2**63))
    path = folder / "c.safetensors"
    path.write_bytes(claimed.to_bytes(8, "little") + text + body)
    return path


def sharded(draw: random.Random, folder: Path) -> Path:
    path = Path(shutil.copytree(BASES["sharded"], folder / "b.ckpt"))
    index, meta = path / ".metadata", path / "meta.pt"
    how = draw.random()
    if how < 0.35:
        content = torch.load(meta, weights_only=True)
        spoil(draw, content)
        try:
            torch.save(content, meta)
        except Exception:
            meta.unlink()
    elif how < 0.5:
        spoil_bytes(draw, draw.choice(sorted(path.iterdir())))
    else:
        found = pickle.loads(index.read_bytes())
        entries, storage = found.state_dict_metadata, found.storage_data
        name, place = draw.choice(sorted(entries)), draw.choice(list(storage))
        ways: tuple[Callable[[], Any], ...] = (
            lambda: setattr(storage[place], "relative_path", draw.choice(("../a", "/dev/zero", "", "x", 3, None))),
            lambda: setattr(storage[place], "offset", draw.choice((-1, 10**12, None, "x"))),
            lambda: setattr(storage[place], "length", draw.choice((-1, 0, 10**12, None, "x"))),
            lambda: setattr(storage[place], "transform_descriptors", ["zstd"]),
            lambda: setattr(entries[name], "size", draw.choice((torch.Size([10**6, 10**6]), torch.Size([]), 3, None))),
            lambda: setattr(entries[name], "properties", draw.choice((None, "x"))),
            lambda: setattr(entries[name].properties, "dtype", draw.choice((torch.int8, torch.complex64, None, 3))),
            lambda: entries.update({name: draw.choice((BytesStorageMetadata(), None, 3, "x"))}),
            lambda: entries.pop(name),
            lambda: storage.pop(place),
            lambda: setattr(entries[name], "chunks", draw.choice(([], None, [3]))),
            lambda: setattr(found, draw.choice(("state_dict_metadata", "storage_data")), draw.choice((None, [], {}))),
            lambda: entries.update({name: Bomb()}),
        )  # fmt: skip
        draw.choice(ways)()
        index.write_bytes(pickle.dumps(found))
    return path


BASES: dict[str, Path] = {}
KINDS = {spoil_content: 1000, damaged: 250, published: 350, safetensors: 250, sharded: 150}
QUICK = {spoil_content: 150, damaged: 50, published: 100, safetensors: 50, sharded: 50}  # of `make test`
CASES = [
    pytest.param(kind, first, id=f"{kind.__name__}-{first}", marks=[pytest.mark.slow] if first >= QUICK[kind] else [])
    for kind, count in KINDS.items()
    for first in range(0, count, 50)
]


@pytest.fixture(scope="module", autouse=True)
def bases(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("bases")
    for target in TARGETS:  # what is imported at first is so now
        if found := re.match(r"flowanchor\.plugins\.[a-z0-9_.]+(?=\.[A-Z])", target):
            importlib.import_module(found.group())
    for name, write in strangers.FORMS.items():
        BASES[name] = write(folder, strangers.checkpoint())
        strangers.use(BASES[name])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("kind", "first"), CASES)
def test_spoilt_files(tmp_path, monkeypatch, kind, first):
    assert sum(KINDS.values()) == 2000
    opened = 0
    for number in range(first, first + 50):
        folder = tmp_path / str(number)
        folder.mkdir()
        monkeypatch.chdir(folder)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            path = kind(random.Random(f"{kind.__name__} {number}"), folder)
            try:
                with strangers.canary():
                    opened += strangers.refusal(lambda path=path: strangers.use(path)) is None
            except BaseException as error:
                raise AssertionError(f"{kind.__name__}, case {number}") from error
        assert not (folder / "ran").exists(), number
        shutil.rmtree(folder)
    assert opened < 50, "what is spoilt is told"
    monkeypatch.chdir(tmp_path)


def test_the_cases_are_the_same_every_time(tmp_path):
    """A number stands for a case: what a failure names can be looked at again."""
    contents = []
    for place in ("one", "two"):
        (tmp_path / place).mkdir()
        path = safetensors(random.Random("safetensors 7"), tmp_path / place)
        contents.append(path.read_bytes())
    assert contents[0] == contents[1]
    assert copy.deepcopy(strangers.CONFIG) == strangers.CONFIG
