"""A run with adapters: bound to the weights that it adapts, wherever they lie, and published with them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

import flowanchor

DATA = [
    "data=captions", "data.root=encoded", "codec=identity", "text_encoder=minilm", "data.channels=3", "data.height=8",
    "data.width=8", "data.text_dim=384", "data.batch_size=2",
]  # fmt: skip
RUN = [
    *DATA, "backbone=wan", "backbone.preset=nano", "backbone.num_layers=1", "backbone.text_len=16",
    "objective=flow_matching", "~callbacks.best", "~callbacks.sample_grid", "trainer.limit_val_batches=0", "ema=none",
    "optimizer.lr=1e-2",
]  # fmt: skip


def encode(folder: Path, command) -> None:
    (folder / "images").mkdir()
    from PIL import Image

    rows = []
    for number in range(8):
        Image.fromarray(np.full((8, 8), 30 * number, np.uint8)).save(folder / f"images/{number}.png")
        rows.append(json.dumps({"file": f"{number}.png", "caption": ["dark", "grey", "light"][number % 3]}))
    (folder / "images/captions.jsonl").write_text("\n".join(rows))
    command(
        "encode", "data=captions", "data.root=images", "codec=identity", "text_encoder=minilm", "image_size=8",
        "captions.multiple=8", "captions.max_ratio=1", "num_workers=0", "out=encoded",
    )  # fmt: skip


@pytest.mark.slow
def test_the_base_of_adapters(command, capsys, tmp_path, monkeypatch):
    def draw(checkpoint, name, *more):
        words = ["prompt=grey", "num_samples=4", "sampler.steps=3", f"name={name}", *more]
        command("sample", f"checkpoint={checkpoint}", *words)
        folder = Path("outputs/sample") / name
        return np.load(folder / "samples.npz")["images"], json.loads((folder / "sample.provenance.json").read_text())

    def refused(program, *words):
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            command(program, *words)
        said = capsys.readouterr().err
        assert ended.value.code == 1 and said.startswith("Error: ") and said.count("\n") == 1, said
        return said

    encode(tmp_path, command)
    command("train", *RUN, "name=base", "trainer.max_steps=3")
    adapted = [*RUN, "backbone.lora.rank=2", "initialise_from=outputs/train/base", "name=lora"]
    command("train", *adapted, "trainer.max_steps=3")
    run, base = tmp_path / "outputs/train/lora", tmp_path / "outputs/train/base"
    images, record = draw(run, "before")
    digest = record["used"]["sources"]["initialise_from"]
    assert len(digest) == 64

    # From another folder, where the path that was typed leads nowhere.
    monkeypatch.chdir(tmp_path / "images")
    assert np.array_equal(draw(run, "from_elsewhere")[0], images)
    monkeypatch.chdir(tmp_path)

    # Published, it holds everything.
    command("convert", f"checkpoint={run}", "output=hub", "format=huggingface")
    command("convert", "consolidate", f"checkpoint={run}", "output=one.safetensors")
    assert "leave out initialise_from=outputs/train/base" in refused(
        "sample", "checkpoint=one.safetensors", "initialise_from=outputs/train/base", "prompt=grey"
    )
    base.rename(tmp_path / "moved")
    for name in ("hub", "one.safetensors"):
        found, record = draw(name, f"published_{Path(name).stem}")
        assert np.array_equal(found, images) and not record["used"]["sources"]
        model = flowanchor.load(name)
        assert np.array_equal(model.sample(prompts=["grey"] * 4, steps=3).numpy(), images)
    assert "initialise_from=PATH" in refused("sample", f"checkpoint={run}", "prompt=grey")
    assert "initialise_from=PATH" in refused("convert", f"checkpoint={run}", "output=hub2", "format=huggingface")
    assert not (tmp_path / "hub2").exists()
    found, record = draw(run, "moved", f"initialise_from={tmp_path}/moved")
    assert np.array_equal(found, images) and record["used"]["sources"]["initialise_from"] == digest
    command("train", *adapted, "initialise_from=moved", "trainer.max_steps=4")  # where it lies counts for nothing

    # Trained on, it is another base: for every program that opens the adapters, and for the run itself.
    shutil.copytree(tmp_path / "moved", base)
    command("train", *RUN, "name=base", "trainer.max_steps=5")
    (tmp_path / "moved").rename(tmp_path / "away")
    measured = ["nfe=1", "num_samples=20", "metric=random", "reference=images", "prompts=images/captions.jsonl"]
    for program, words in (
        ("sample", [f"checkpoint={run}", "prompt=grey", "initialise_from=outputs/train/base"]),
        ("evaluate", [f"checkpoint={run}", *measured, "initialise_from=outputs/train/base"]),
        ("convert", [f"checkpoint={run}", "output=new.safetensors", "initialise_from=outputs/train/base"]),
        ("train", [*adapted, "trainer.max_steps=6"]),
    ):
        said = refused(program, *words)
        assert digest[:12] in said and "sha256" in said, said
