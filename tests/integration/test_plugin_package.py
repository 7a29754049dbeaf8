"""A package of somebody else's brings options along: built, installed and used the way its author would."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "examples" / "plugin_package"


def run(*command: object, folder: Path, target: Path | None = None) -> subprocess.CompletedProcess[str]:
    """A command in `folder`, with what pip installed into `target` importable."""
    paths = [str(path) for path in (target, os.environ.get("PYTHONPATH")) if path]
    return subprocess.run(
        [str(part) for part in command],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=280,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"},
    )


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the example package, built from a copy of its sources without network."""
    scratch = tmp_path_factory.mktemp("plugin")
    sources = shutil.copytree(EXAMPLE, scratch / "sources", ignore=shutil.ignore_patterns("build", "*.egg-info"))
    pip = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-build-isolation", "--no-index"]
    done = run(*pip, "--target", scratch / "target", sources, folder=scratch)
    assert done.returncode == 0, done.stderr
    return scratch / "target"


def test_trains_a_step_through_the_command_line(target, tmp_path):
    command = ["backbone=tiny_conv", "objective/shortcut=toy", "trainer.fast_dev_run=true"]
    done = run(sys.executable, ROOT / "src" / "train.py", *command, folder=tmp_path, target=target)
    assert done.returncode == 0, done.stdout + done.stderr
    records = list(tmp_path.glob("outputs/train/*/config.yaml"))
    assert len(records) == 1
    text = records[0].read_text()
    assert "flowanchor_example.tiny_conv.TinyConv" in text and "flowanchor_example.toy_shortcut.HuberShortcut" in text


def test_without_the_package_its_options_are_unknown(tmp_path):
    done = run(sys.executable, ROOT / "src" / "train.py", "backbone=tiny_conv", folder=tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith("Error: Unknown option 'tiny_conv' for backbone"), done.stderr
    assert "lightningdit" in done.stderr


def test_a_setting_that_its_author_refuses_is_one_sentence(target, tmp_path):
    command = ["backbone=tiny_conv", "backbone.width=12", "trainer.fast_dev_run=true"]
    done = run(sys.executable, ROOT / "src" / "train.py", *command, folder=tmp_path, target=target)
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1].startswith("Error: backbone.width=12 does not divide")
    assert "Traceback" not in done.stderr


def test_backbone_satisfies_the_contract(target, monkeypatch):
    """Stages make up the forward, every condition reaches the prediction, and tangents are true."""
    import torch
    from torch.func import jvp

    monkeypatch.syspath_prepend(str(target))
    from flowanchor_example.tiny_conv import TinyConv

    torch.manual_seed(0)
    net = TinyConv(channels=3, size=6, num_classes=4, width=16, depth=2).double().eval()
    for parameter in net.parameters():  # layers that start at zero would hide what they do
        torch.nn.init.normal_(parameter, std=0.3)
    x, t, labels = torch.randn(2, 3, 6, 6).double(), torch.tensor([0.2, 1.7]).double(), torch.tensor([1, 3])
    tokens, context = net.embed(x, t, labels)
    for block in net.blocks:
        tokens = block(tokens, context)
    torch.testing.assert_close(net(x, t, labels), net.head(tokens, context))
    assert net(x, t, labels).shape == (2, *net.sample_shape)
    for changed in (net(x, 2 - t, labels), net(x, t, labels.flip(0)), net(x, t, net.conditioning.null(labels))):
        assert (changed - net(x, t, labels)).abs().max() > 1e-4

    v, step = torch.randn_like(x), 1e-6
    _, tangent = jvp(lambda x, t: net(x, t, labels), (x, t), (v, torch.ones_like(t)))
    ahead, behind = net(x + step * v, t + step, labels), net(x - step * v, t - step, labels)
    torch.testing.assert_close(tangent, (ahead - behind) / (2 * step), rtol=1e-5, atol=1e-7)

    net.train()
    dropped = (net.conditioning.dropped(torch.ones(1000, dtype=torch.long)) == 4).float().mean()
    assert 0.05 < dropped < 0.15


def test_its_format_writes_and_is_opened_in_place(target, tmp_path, monkeypatch, capsys):
    import torch
    from hydra.core.global_hydra import GlobalHydra

    from flowanchor.checkpoints import initialise_student, load_model
    from flowanchor.errors import CheckpointError
    from flowanchor.programs.convert import main as convert

    monkeypatch.syspath_prepend(str(target))
    monkeypatch.chdir(tmp_path)
    from flowanchor_example.tiny_conv import TinyConv

    def run(*words: str) -> str:
        GlobalHydra.instance().clear()
        monkeypatch.setattr(sys, "argv", ["src/convert.py", *words])
        convert()
        return capsys.readouterr().out

    sizes = {"channels": 3, "size": 6, "num_classes": 4, "width": 16, "depth": 2}
    network = TinyConv(**sizes)
    torch.nn.init.normal_(network.out.weight)
    interval = {"_target_": "flowanchor.plugins.objectives.intervals.plain.PlainInterval"}
    backbone = {"_target_": "flowanchor_example.tiny_conv.TinyConv", **sizes}
    meta = {
        "format": 1,
        "kind": "flow",
        "step": 3,
        "config": {"backbone": backbone, "objective": {"interval": interval}},
    }
    weights = {f"student.{name}": value for name, value in network.state_dict().items()}
    torch.save({"state_dict": weights, "flowanchor": meta}, "a.ckpt")
    run("checkpoint=a.ckpt", "output=a.npz", "format=tiny_conv_npz")
    model = load_model("a.npz")
    assert type(model.backbone) is TinyConv and len(model.digest) == 12
    student = TinyConv(**sizes)
    initialise_student(student, "a.npz")
    for found in (model.backbone, student):
        assert all(torch.equal(value, network.state_dict()[name]) for name, value in found.state_dict().items())
    assert "matched      19 of 19 names and shapes" in run("inspect=a.npz")
    run("checkpoint=a.npz", "output=back.safetensors", "dtype=bfloat16")
    assert load_model("back.safetensors").config["backbone"] == backbone

    Path("empty.npz").write_bytes(b"no arrays")
    with pytest.raises(CheckpointError, match="empty.npz is not a checkpoint that can be read safely"):
        load_model("empty.npz")


def test_shortcut_is_zero_where_the_identity_holds(target, monkeypatch):
    import torch

    monkeypatch.syspath_prepend(str(target))
    from flowanchor.interfaces import Point
    from flowanchor.testing import Answers
    from flowanchor_example.toy_shortcut import HuberShortcut

    velocity, tangent, t = torch.randn(3, 1, 4, 4), torch.randn(3, 1, 4, 4), torch.tensor([0.0, 0.5, 1.0])
    exact = velocity + (1 - t.view(-1, 1, 1, 1)) * tangent
    point = Point(velocity, t, torch.ones(3), velocity)
    assert HuberShortcut().loss(Answers(exact, tangent), point).loss.abs().max() < 1e-6
    far = HuberShortcut(delta=1.0).loss(Answers(exact + 3, tangent), point).loss
    torch.testing.assert_close(far, torch.full((3,), 2.5))  # delta (|e| - delta / 2)
