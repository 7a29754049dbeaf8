"""`convert.py` on released files: looked at, imported, exported in the authors' layout, published, opened again."""

from __future__ import annotations

import importlib
import importlib.util
import json
import re
import sys
from pathlib import Path

import pytest
import torch
import yaml
from hydra.core.global_hydra import GlobalHydra

import flowanchor
from flowanchor.base.seal import seal
from flowanchor.checkpoints import initialise_student, load_model
from flowanchor.errors import CheckpointError
from flowanchor.plugins.backbones.lightningdit import LightningDiT
from flowanchor.plugins.teachers.checkpoint import CheckpointVelocity
from flowanchor.programs.convert import main

_spec = importlib.util.spec_from_file_location(
    "released", Path(__file__).parents[1] / "plugins" / "formats" / "released.py"
)
assert _spec is not None and _spec.loader is not None
released = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(released)

RAW, CASE, CONFIG = released.golden("plain")
NARROW, WIDE = released.shifted(RAW, 0.1), released.shifted(RAW, -0.1)


@pytest.fixture
def convert(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> str:
        GlobalHydra.instance().clear()
        monkeypatch.setattr(sys, "argv", ["src/convert.py", *arguments])
        capsys.readouterr()
        main()
        return capsys.readouterr().out

    return run


@pytest.fixture
def refused(convert, capsys):
    def run(*arguments: str) -> str:
        with pytest.raises(SystemExit) as exit:
            convert(*arguments)
        assert exit.value.code == 1
        return capsys.readouterr().err

    return run


def predicted(model):
    with torch.no_grad():
        return model.backbone(CASE["in.x"], CASE["in.t"], CASE["in.y"])


def close(found, expected):
    return float((found - expected).norm() / expected.norm()) <= 1e-5


def same(found, expected):
    return found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in expected)


# ------------------------------------------------------------------------------------------------------------ importing


def test_released_weights_predict_what_the_authors_network_does(convert):
    torch.save(released.stage_one(RAW, NARROW), "stage1.pt")
    convert("checkpoint=stage1.pt", "output=stage1.safetensors", "kind=flow")
    model = load_model("stage1.safetensors")
    assert (model.kind, model.ema, type(model.interval).__name__) == ("flow", "ema", "PlainInterval")
    assert close(predicted(model), CASE["out.prediction"])
    teacher = CheckpointVelocity("stage1.safetensors")
    assert teacher.asked_interval is None and same(teacher.network.state_dict(), RAW)
    student = LightningDiT(**{**CONFIG, "auxiliary_time_cond": True})
    initialise_student(student, "stage1.safetensors")
    assert torch.equal(student.blocks[1].attn.qkv.weight, RAW["blocks.1.attn.qkv.weight"])


@pytest.mark.parametrize(
    ("profile", "expected"), [(None, WIDE), ("power_0.2", WIDE), ("power_0.05", NARROW), ("none", RAW)]
)
def test_every_profile_of_stage_two(convert, profile, expected):
    torch.save(released.stage_two(NARROW, WIDE, RAW), "stage2.pt")
    convert("checkpoint=stage2.pt", "output=a.safetensors", *([] if profile is None else [f"ema_profile={profile}"]))
    model = load_model("a.safetensors")
    assert (model.kind, model.step, type(model.interval).__name__) == ("shortcut", 40, "ExpandedInterval")
    assert model.ema == (profile or "power_0.2") and same(model.backbone.state_dict(), expected)


def test_the_second_time_embedder_chooses_the_auxiliary_interval(convert):
    state, _, _ = released.golden("auxiliary")
    torch.save(released.extracted(state), "stage2.pt")
    convert("checkpoint=stage2.pt", "output=a.safetensors")
    model = load_model("a.safetensors")
    assert model.backbone.takes_end_time and type(model.interval).__name__ == "AuxiliaryInterval"


def test_numbers_are_kept_or_cast(convert):
    from safetensors.torch import load_file

    half = {key: value.half() for key, value in RAW.items()}
    torch.save(released.extracted(half), "half.pt")
    convert("checkpoint=half.pt", "output=kept.safetensors")
    assert same(load_file("kept.safetensors"), half)
    for dtype in ("float16", "bfloat16", "float32"):
        convert("checkpoint=half.pt", f"output={dtype}.safetensors", f"dtype={dtype}")
        wanted = {key: v.to(getattr(torch, dtype)) for key, v in half.items()}
        assert same(load_file(f"{dtype}.safetensors"), wanted), dtype
        model = load_model(f"{dtype}.safetensors")
        assert next(model.backbone.parameters()).dtype == torch.float32
        assert float((predicted(model) - CASE["out.prediction"]).norm() / CASE["out.prediction"].norm()) < 2e-2


def test_statistics_and_codec_go_along(convert, refused):
    state, _, _ = released.golden("plain")
    torch.save(released.extracted(state), "a.pt")
    convert("checkpoint=a.pt", "output=sd.safetensors")
    codec = load_model("sd.safetensors").config["codec"]
    assert codec["name"] == "sd_vae" and codec["statistics"]["multiplier"] == 0.18215
    torch.save({"mean": torch.arange(4.0).view(1, 4, 1, 1), "std": torch.ones(1, 4, 1, 1)}, "latents_stats.pt")
    vavae = ["checkpoint=a.pt", "codec=vavae", "codec.statistics=latents_stats.pt"]
    assert "codec=vavae has latents of 32 channels and the network draws 4" in refused(*vavae, "output=b.safetensors")
    convert(*vavae, "output=va.safetensors", "codec.latent_channels=4")
    codec = load_model("va.safetensors").config["codec"]
    assert codec["name"] == "vavae" and codec["statistics"]["mean"] == [0, 1, 2, 3]
    torch.save({"mean": torch.zeros(1, 3, 1, 1), "std": torch.ones(1, 3, 1, 1)}, "latents_stats.pt")
    assert "3 channels" in refused(*vavae, "output=b.safetensors", "codec.latent_channels=4")


def changed(**replaced):
    state = dict(RAW)
    for name, value in replaced.items():
        state.pop(name) if value is None else state.update({name: value})
    return released.extracted(state)


@pytest.mark.parametrize(
    ("content", "arguments", "expected"),
    [
        (released.stage_one(WIDE, RAW), [], "tells what it was trained for: add kind=flow"),
        (released.stage_one(WIDE, RAW), ["kind=best"], "kind=best is not known"),
        (released.stage_one(WIDE, RAW), ["kind=flow", "interval=half"], "interval=half is not known: use one of plain"),
        (released.extracted(RAW), ["ema_profile=power_0.1"], "holds no weights 'power_0.1'"),
        (released.extracted(released.golden("dit")[0]), [], "add backbone=sit, backbone=dit or backbone=lightningdit"),
        (released.extracted(released.golden("dit")[0]), ["backbone=lightningdit"], "add num_heads=N"),
        (changed(**{"blocks.1.attn.proj.bias": None}), [], "lacks blocks.1.attn.proj.bias"),
        (changed(**{"blocks.7.extra": torch.zeros(1)}), [], "lacks blocks.2"),
        (changed(**{"head.weight": torch.zeros(1)}), [], "has the unknown head.weight"),
        (changed(**{"blocks.1.attn.proj.bias": torch.zeros(3)}), [], "another shape of blocks.1.attn.proj.bias 3, wan"),
        (released.extracted(RAW), ["dtype=int8"], "dtype=int8 is not known"),
        (released.extracted(RAW), ["format=onnx"], "'onnx' for format: choose one of authors, diffusers, flowa"),
        (released.extracted(RAW), ["backbone=lightningdit", "backbone.depth=3"], "sizes are read off the weights"),
        (released.extracted(RAW), ["num_heads=two"], "num_heads=two is not a whole number"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_one_sentence(refused, tmp_path, content, arguments, expected):
    torch.save(content, "a.pt")
    assert expected in refused("checkpoint=a.pt", "output=new.safetensors", *arguments)
    assert [path.name for path in tmp_path.iterdir()] == ["a.pt"], "nothing is written"


def test_a_foreign_file_is_sent_to_the_importer(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(released.stage_one(WIDE, RAW), "released.pt")
    with pytest.raises(
        CheckpointError, match=r"convert it first: python src/convert.py checkpoint=released.pt output="
    ):
        load_model("released.pt")
    torch.save({"model": RAW}, "plain.pt")
    with pytest.raises(CheckpointError, match="was not written by flowanchor.*convert it first"):
        CheckpointVelocity("plain.pt")
    with pytest.raises(CheckpointError, match="convert it first"):
        initialise_student(LightningDiT(**CONFIG), "plain.pt")


def test_evaluation_of_an_import_asks_for_data(convert, monkeypatch, capsys):
    from flowanchor.programs.evaluate import main as evaluate

    torch.save(released.extracted(RAW), "a.pt")
    convert("checkpoint=a.pt", "output=a.safetensors", "codec=identity")
    GlobalHydra.instance().clear()
    monkeypatch.setattr(sys, "argv", ["src/eval.py", "checkpoint=a.safetensors", "nfe=1", "num_samples=10"])
    with pytest.raises(SystemExit):
        evaluate()
    assert "a.safetensors was imported and knows no data of its own: add data=OPTION" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["sit", "dit"])
def test_releases_of_sit_and_dit(convert, name):
    module = importlib.import_module(f"flowanchor.plugins.backbones.{name}")
    network = {"sit": "SiT", "dit": "DiT"}[name]
    torch.manual_seed(0)
    sizes = dict(CONFIG, patch_size=2, learn_sigma=True, hidden_size=384, num_heads=6, input_size=8, depth=1)
    theirs = LightningDiT(**{key: value for key, value in sizes.items() if not key.startswith("use_")})
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.1) if parameter.requires_grad else None
    torch.save(theirs.state_dict(), "release.pt")
    convert("checkpoint=release.pt", "output=a.safetensors", f"backbone={name}")
    model = load_model("a.safetensors")
    assert isinstance(model.backbone, getattr(module, network)) and model.kind == "flow"
    assert model.backbone.conditioning.classes == 1000 and model.backbone.conditioning.has_null
    assert type(model.interval).__name__ == "PlainInterval"
    assert model.config["sampler"]["_target_"].endswith("FlowSampler")
    assert model.config["codec"]["statistics"]["multiplier"] == 0.18215
    assert same(model.backbone.state_dict(), theirs.state_dict())


# ------------------------------------------------------------------------------------------------------------ exporting


def authors_load(path: str):
    """What the authors' evaluation does with a file, but strictly: their names, taken from the golden file."""
    checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    assert "emas" not in checkpoint and "step" not in checkpoint
    network = LightningDiT(**CONFIG)
    assert network.state_dict().keys() == RAW.keys()
    network.load_state_dict(checkpoint["ema"], strict=True)
    return network, checkpoint


def test_there_and_back_again(convert):
    torch.save(released.stage_two(NARROW, WIDE, RAW), "stage2.pt")
    convert("checkpoint=stage2.pt", "output=ours.safetensors", "codec=vavae", "codec.latent_channels=4")
    convert("checkpoint=ours.safetensors", "output=theirs.pt", "format=authors")
    network, checkpoint = authors_load("theirs.pt")
    assert same(network.state_dict(), WIDE) and "model" not in checkpoint
    convert("checkpoint=theirs.pt", "output=again.safetensors")
    first, second = load_model("ours.safetensors"), load_model("again.safetensors")
    assert same(second.backbone.state_dict(), WIDE) and torch.equal(predicted(first), predicted(second))
    for what in ("ema", "kind", "step", "config"):
        assert getattr(first, what) == getattr(second, what), what
    convert("checkpoint=stage2.pt", "output=direct.pt", "format=authors", "ema_profile=power_0.05")
    network, checkpoint = authors_load("direct.pt")
    assert same(network.state_dict(), NARROW) and same(checkpoint["model"], RAW)


def test_an_export_that_asks_for_foreign_code_is_refused(refused, tmp_path):
    attack = {"_target_": "os.system", "command": f"touch {tmp_path / 'sprung'}"}
    config = {"backbone": attack, "objective": {"interval": attack}}
    torch.save({"ema": RAW, "flowanchor_export": {"kind": "flow", "ema": "x", "step": 0, "config": config}}, "a.pt")
    assert "asks for 'os.system'" in refused("checkpoint=a.pt", "output=b.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["a.pt"]


def test_an_export_whose_description_is_not_plain_is_refused(refused):
    for odd in ("${oc.env:HOME}", torch.zeros(2), {1: 2}):
        config = {"backbone": {"_target_": "x"}, "sampler": {"steps": odd}}
        torch.save({"ema": RAW, "flowanchor_export": {"kind": "flow", "ema": "x", "step": 0, "config": config}}, "a.pt")
        assert "only plain values may stand there" in refused("checkpoint=a.pt", "output=b.safetensors")


def test_networks_that_the_authors_do_not_know(convert, refused):
    torch.save(released.extracted(RAW), "a.pt")
    convert("checkpoint=a.pt", "output=ours.safetensors")
    content = Path("ours.safetensors").read_bytes()
    changed = content.replace(b".lightningdit.LightningDiT", b".lightningdot.LightningDiT")
    Path("other.safetensors").write_bytes(re.sub(rb'"[0-9a-f]{64}"', b'"' + b"0" * 64 + b'"', changed))
    seal(Path("other.safetensors"))
    assert "knows LightningDiT alone" in refused("checkpoint=other.safetensors", "output=b.pt", "format=authors")
    assert "Add output=FILE.pt" in refused("checkpoint=ours.safetensors", "output=b.zip", "format=authors")


# ----------------------------------------------------------------------------------------------------------- publishing


def published(convert, *arguments):
    torch.save(released.extracted(WIDE), "a.pt")
    convert("checkpoint=a.pt", "output=ours.safetensors", "codec=identity")
    convert("checkpoint=ours.safetensors", "output=folder", "format=huggingface", *arguments)
    return Path("folder")


def test_a_published_folder_opens_everywhere(convert):
    folder = published(convert)
    assert {path.name for path in folder.iterdir()} == {"config.json", "model.safetensors", "README.md"}
    model = flowanchor.load(folder)
    assert same(model.backbone.state_dict(), WIDE) and model.ema == "power_0.2" and model.kind == "shortcut"
    assert same(CheckpointVelocity(str(folder)).network.state_dict(), WIDE)
    student = LightningDiT(**CONFIG)
    initialise_student(student, folder)
    assert same(student.state_dict(), WIDE)
    assert "folder/model.safetensors: a checkpoint of flowanchor" in convert(f"inspect={folder}")
    card = (folder / "README.md").read_text()
    front = yaml.safe_load(card.split("---")[1])
    assert front["library_name"] == "flowanchor" and "model-index" not in front
    assert "Not measured." in card and "LightningDiT" in card


def test_metrics_are_those_of_eval_and_of_this_checkpoint(convert, refused):
    folder = published(convert)
    digest = load_model("ours.safetensors").digest
    line = {"sampler": "consistency", "nfe": 2, "fd": 12.345, "kid": None, "n": 50, "protocol": "balanced"}
    settings = {"checkpoint_hash": digest, "ema": "power_0.2", "data": "digits", "metric": "small"}
    Path("metrics.json").write_text(json.dumps({"settings": settings, "results": [line]}))
    again = ["checkpoint=ours.safetensors", "output=folder", "format=huggingface", "overwrite=true"]
    convert(*again, "metrics=metrics.json", "name=mine")
    card = (folder / "README.md").read_text()
    assert "| consistency | 2 | 12.35 | 50 | balanced |" in card and "Not measured" not in card
    (index,) = yaml.safe_load(card.split("---")[1])["model-index"]
    assert index["name"] == "mine" and index["results"][0]["metrics"] == [
        {"type": "fd", "name": "FD (consistency, NFE 2, small features)", "value": 12.345}
    ]
    before = card
    for changed_by in ({"checkpoint_hash": "0" * 12}, {"ema": "none"}):
        report = {"settings": {**settings, **changed_by}, "results": [line]}
        Path("metrics.json").write_text(json.dumps(report))
        assert "evaluate this checkpoint" in refused(*again, "metrics=metrics.json")
    Path("metrics.json").write_text("{}")
    assert "is no metrics.json of eval.py" in refused(*again, "metrics=metrics.json")
    assert "There is no file" in refused(*again, "metrics=none.json")
    assert (folder / "README.md").read_text() == before


def test_a_codec_goes_along(convert, refused):
    from diffusers import AutoencoderKL
    from safetensors.torch import save_file

    torch.manual_seed(0)
    vae = AutoencoderKL(block_out_channels=[32] * 4, down_block_types=["DownEncoderBlock2D"] * 4, latent_channels=4,
                        up_block_types=["UpDecoderBlock2D"] * 4)  # fmt: skip
    save_file(vae.state_dict(), "vae.safetensors")
    torch.save(released.extracted(WIDE), "a.pt")
    publish = ["checkpoint=a.pt", "format=huggingface", "with_codec=true"]
    assert "Add codec=sd_vae codec.weights=FILE" in refused(*publish, "output=folder")
    convert(*publish, "output=folder", "codec=sd_vae", "codec.weights=vae.safetensors")
    assert (Path("folder") / "codec.safetensors").is_file()
    expected = flowanchor.load("folder").sample([0, 1], steps=1, seed=3)
    assert expected.shape == (2, 32, 32, 3) and expected.dtype == torch.uint8
    Path("vae.safetensors").rename("elsewhere.safetensors")
    Path("folder").rename("moved")
    assert torch.equal(flowanchor.load("moved").sample([0, 1], steps=1, seed=3), expected)
    convert("checkpoint=a.pt", "output=a.safetensors")
    elsewhere = flowanchor.load("a.safetensors", codec={"weights": "elsewhere.safetensors"})
    assert torch.equal(elsewhere.sample([0, 1], steps=1, seed=3), expected)


def test_settings_of_the_machine_are_not_published(convert):
    torch.save(released.extracted(RAW), "a.pt")
    convert("checkpoint=a.pt", "output=ours.safetensors")
    from flowanchor.checkpoints.consolidated import write_consolidated

    model = load_model("ours.safetensors")
    config = {**model.config, "data": {**model.config["data"], "root": "/home/me/images"}, "logger": {"key": "secret"}}
    meta = {"format": 1, "kind": "shortcut", "step": 3, "config": config}
    write_consolidated(Path("run.safetensors"), model.backbone.state_dict(), meta, "none")
    convert("checkpoint=run.safetensors", "output=folder", "format=huggingface")
    text = Path("folder/config.json").read_text()
    assert "/home/me" not in text and "secret" not in text
    assert b"/home/me" not in Path("folder/model.safetensors").read_bytes()


def test_an_existing_folder_of_another_kind_is_never_replaced(convert, refused):
    published(convert)
    Path("precious").mkdir()
    Path("precious/thesis.txt").write_text("x")
    publish = ["checkpoint=ours.safetensors", "format=huggingface", "output=precious"]
    assert "exists already" in refused(*publish)
    assert "is not replaced" in refused(*publish, "overwrite=true")
    assert Path("precious/thesis.txt").read_text() == "x"


def test_what_a_checkpoint_of_ours_says_itself_cannot_be_set(convert, refused):
    published(convert)
    assert "leave out kind, interval" in refused(
        "checkpoint=ours.safetensors", "output=b.safetensors", "kind=flow", "interval=plain"
    )
    assert "leave out backbone, codec" in refused(
        "checkpoint=ours.safetensors", "output=b.safetensors", "backbone=lightningdit", "codec=identity"
    )


# ----------------------------------------------------------------------------------------------------------- inspecting


def test_inspecting_a_released_file(convert, tmp_path):
    torch.save(released.stage_two(NARROW, WIDE, RAW), "stage2.pt")
    text = convert("inspect=stage2.pt")
    numbers = sum(value.numel() for value in RAW.values())
    for part in (
        "stage2.pt: FACM stage 2",
        "shortcut, step 40",
        f"power_0.2: {len(RAW)} tensors, {numbers:,} numbers, float32 (the default)",
        "power_0.05:",
        "also holds   opt, args, epoch, step, scheduler",
        "LightningDiT",
        "depth=2",
        "num_heads=2",
        "use_rope=True",
        f"matched      {len(RAW)} of {len(RAW)} names and shapes",
        "python src/convert.py checkpoint=stage2.pt output=NAME.safetensors",
    ):
        assert part in text, part
    assert [path.name for path in tmp_path.iterdir()] == ["stage2.pt"]


def test_inspecting_names_what_does_not_match_and_what_is_missing(convert):
    state = {**RAW, "head.weight": torch.zeros(1), "blocks.1.attn.proj.bias": torch.zeros(3)}
    del state["final_layer.linear.bias"]
    torch.save(released.stage_one(state, RAW), "odd.pt")
    text = convert("inspect=odd.pt")
    for part in (
        f"matched      {len(RAW) - 2} of {len(RAW)} names",
        "missing      final_layer.linear.bias",
        "unknown      head.weight",
        "other shape  blocks.1.attn.proj.bias 3, wanted 32",
        "trained as   not told: kind=flow or kind=shortcut",
    ):
        assert part in text, part
    assert "add kind=flow" in convert("inspect=odd.pt", "ema_profile=none")
    told = convert("inspect=odd.pt", "ema_profile=none", "kind=flow")
    assert "checkpoint=odd.pt output=NAME.safetensors ema_profile=none kind=flow" in told


def test_inspecting_other_files(convert, refused):
    torch.save(released.extracted(released.golden("dit")[0]), "plain.pt")
    assert "add backbone=sit" in convert("inspect=plain.pt")
    torch.save({"encoder.conv_in.weight": torch.zeros(1), "decoder.conv_in.weight": torch.zeros(1)}, "vae.pt")
    assert "weights of an autoencoder, for codec.weights=vae.pt" in convert("inspect=vae.pt")
    torch.save({"w": torch.zeros(1)}, "other.pt")
    assert "have no x_embedder.proj.weight" in convert("inspect=other.pt")
    Path("cut.pt").write_bytes(Path("plain.pt").read_bytes()[:5000])
    assert "damaged or cut off" in refused("inspect=cut.pt")
    assert "There is no checkpoint at none.pt" in refused("inspect=none.pt")
    published(convert)
    ours = convert("inspect=ours.safetensors")
    assert "a checkpoint of flowanchor" in ours and "shortcut, step 0" in ours and "power_0.2: " in ours
