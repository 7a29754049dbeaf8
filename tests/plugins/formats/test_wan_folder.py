"""Folders with Wan's weights, of diffusers and of the release: read part by part; clear words for bad ones."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from flowanchor.checkpoints import initialise_student, load_model
from flowanchor.checkpoints.digest import file_digest
from flowanchor.checkpoints.find import find_checkpoint
from flowanchor.checkpoints.read import read_checkpoint
from flowanchor.codecs.load import load_codec
from flowanchor.deferred import defer_loading, is_deferred, materialise
from flowanchor.errors import CheckpointError, ConfigError
from flowanchor.generation.prompts import load_text_encoder
from flowanchor.generation.samplers import build_sampler
from flowanchor.plugins.backbones.wan import Wan
from flowanchor.plugins.backbones.wan_experts import WanExperts
from flowanchor.plugins.formats.wan_weights import diffusers_names
from flowanchor.text.base import Tokens

SMALL = {
    "in_channels": 4, "height": 8, "width": 6, "num_attention_heads": 2, "attention_head_dim": 24, "ffn_dim": 64,
    "num_layers": 2, "freq_dim": 32, "text_dim": 12,
}  # fmt: skip


@pytest.fixture
def network():
    torch.manual_seed(0)
    network = Wan(**SMALL)
    torch.nn.init.normal_(network.proj_out.weight)
    return network


@pytest.fixture
def folder(network, tmp_path):
    """As diffusers saves it, in several files."""
    network.transformer().save_pretrained(tmp_path / "transformer", max_shard_size="60KB")
    assert len(list((tmp_path / "transformer").glob("*.safetensors"))) > 2
    return tmp_path / "transformer"


def test_sharded_files_of_diffusers(network, folder):
    model = load_model(folder)
    assert model.kind == "flow" and model.backbone.state_dict().keys() == network.state_dict().keys()
    for name, value in network.state_dict().items():
        assert torch.equal(model.backbone.state_dict()[name], value), name
    assert load_model(folder.parent).path == str(folder.parent), "the folder of a pipeline will do"


@pytest.mark.parametrize("patch", [(2, 2, 2), (1, 1, 1), (3, 4, 7)])
def test_networks_of_other_patches(patch, tmp_path):
    """Nothing in a folder says what size is drawn; whole patches are."""
    network = Wan(**{**SMALL, "patch_size": patch, "frames": patch[0], "height": 4 * patch[1], "width": 2 * patch[2]})
    torch.nn.init.normal_(network.proj_out.weight)
    network.transformer().save_pretrained(tmp_path)
    opened = load_model(tmp_path).backbone
    assert all(size % one == 0 for size, one in zip(opened.sample_shape[1:], patch, strict=True))
    x, t, text = torch.randn(1, *network.sample_shape), torch.tensor([0.4]), Tokens(torch.randn(1, 3, 12))
    with torch.no_grad():
        assert torch.equal(opened(x, t, text), network(x, t, text)) and opened(x, t, text).any()


def test_the_layout_of_the_release(network, folder, tmp_path):
    merged = {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
    released = {_released(name): tensor for name, tensor in merged.items()}
    assert "blocks.0.self_attn.q.weight" in released and "head.modulation" in released
    (tmp_path / "released").mkdir()
    save_file(released, tmp_path / "released" / "diffusion_pytorch_model.safetensors")
    config = {
        "_class_name": "WanModel", "dim": 48, "ffn_dim": 64, "freq_dim": 32, "in_dim": 4, "model_type": "t2v",
        "num_heads": 2, "num_layers": 2, "out_dim": 4, "text_dim": 12, "text_len": 512, "eps": 1e-6,
    }  # fmt: skip
    (tmp_path / "released" / "config.json").write_text(json.dumps(config))
    state = load_model(tmp_path / "released").backbone.state_dict()
    for name, value in network.state_dict().items():
        assert torch.equal(state[name], value), name


def _released(name: str) -> str:
    """The names of the release, written down from its code independently of the table in use."""
    if name == "scale_shift_table":
        return "head.modulation"
    for ours, theirs in (
        ("condition_embedder.time_embedder.linear_1", "time_embedding.0"),
        ("condition_embedder.time_embedder.linear_2", "time_embedding.2"),
        ("condition_embedder.text_embedder.linear_1", "text_embedding.0"),
        ("condition_embedder.text_embedder.linear_2", "text_embedding.2"),
        ("condition_embedder.time_proj", "time_projection.1"), ("proj_out", "head.head"), (".norm2.", ".norm3."),
        ("attn1", "self_attn"), ("attn2", "cross_attn"), ("to_q.", "q."), ("to_k.", "k."), ("to_v.", "v."),
        ("to_out.0", "o"), ("ffn.net.0.proj", "ffn.0"), ("ffn.net.2", "ffn.2"), ("scale_shift_table", "modulation"),
    ):  # fmt: skip
        name = name.replace(ours, theirs)
    return name


def test_names_of_both_layouts_agree(network):
    ours = list(network.state_dict())
    assert diffusers_names([_released(name) for name in ours]) == {_released(name): name for name in ours}


def test_deferred_weights_are_read_later(network, folder):
    with defer_loading():
        model = load_model(folder)
    assert is_deferred(model.backbone)
    materialise(model.backbone, torch.device("cpu"))
    for name, value in network.state_dict().items():
        assert torch.equal(model.backbone.state_dict()[name], value), name


def test_a_student_with_a_second_embedder_starts_from_it(network, folder):
    student = Wan(**SMALL, auxiliary_time_cond=True)
    initialise_student(student, folder)
    x, t, text = torch.randn(2, 4, 1, 8, 6), torch.rand(2), Tokens(torch.randn(2, 3, 12))
    with torch.no_grad():
        torch.testing.assert_close(student(x, t, text, t), network(x, t, text))


def test_the_digest_knows_the_files_by_their_headers(folder):
    first = file_digest(folder)
    assert file_digest(folder) == first
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "eps": 1e-5}))
    assert file_digest(folder) != first


def test_two_experts_are_one_network(network, folder):
    other = Wan(**SMALL)
    torch.nn.init.normal_(other.proj_out.weight)
    other.transformer().save_pretrained(folder.parent / "transformer_2")
    index = {"_class_name": "WanPipeline", "boundary_ratio": 0.9}
    (folder.parent / "model_index.json").write_text(json.dumps(index))
    pair = load_model(folder.parent).backbone
    assert isinstance(pair, WanExperts) and pair.boundary == 0.9
    x, text = torch.randn(2, 4, 1, 8, 6), Tokens(torch.randn(2, 3, 12))
    with torch.no_grad():
        for expert, t in ((network, 0.05), (other, 0.5)):
            times = torch.full((2,), t)
            assert torch.equal(pair(x, times, text), expert.eval()(x, times, text))
    assert (
        load_model(folder.parent, dtype=torch.bfloat16).backbone.low.blocks[0].attn1.to_q.weight.dtype == torch.bfloat16
    )
    student = WanExperts(**SMALL)
    initialise_student(student, folder.parent)
    assert torch.equal(student.low.proj_out.weight, other.proj_out.weight)
    assert find_checkpoint(folder.parent / "transformer_2") == folder.parent / "transformer_2"
    (folder.parent / "model_index.json").unlink()
    assert load_model(folder.parent).backbone.boundary == 0.875


def test_two_experts_of_different_sizes(folder):
    Wan(**{**SMALL, "num_layers": 1}).transformer().save_pretrained(folder.parent / "transformer_2")
    with pytest.raises(CheckpointError, match="transformer and .*transformer_2 are networks of different sizes"):
        load_model(folder.parent)


def test_a_file_that_the_index_lists_is_missing(folder):
    next(folder.glob("*-00002-*.safetensors")).unlink()
    with pytest.raises(CheckpointError, match="lacks .*-00002-.*gated release"):
        read_checkpoint(folder)


def test_a_pointer_of_git_lfs(folder):
    next(folder.glob("*-00001-*.safetensors")).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    with pytest.raises(CheckpointError, match="pointer of Git LFS"):
        load_model(folder)


def test_no_weights_at_all(folder):
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    with pytest.raises(CheckpointError, match="no weights"):
        load_model(folder)


def test_an_image_to_video_network_is_refused(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "in_channels": 36}))
    with pytest.raises(CheckpointError, match="conditioned on an image"):
        load_model(folder)


def test_what_released_weights_do_not_say_is_asked_for(folder):
    model = load_model(folder)
    with pytest.raises(ConfigError, match="does not say how its samples become images: add its codec"):
        load_codec(model)
    with pytest.raises(ConfigError, match="does not say how it is sampled: add for example sampler=flow"):
        build_sampler({"steps": 4}, model)
    with pytest.raises(ConfigError, match="does not say how its prompts are encoded: add text_encoder=umt5"):
        load_text_encoder(model)


@pytest.mark.parametrize("place", ["../secret.safetensors", "/dev/zero", "x/y.safetensors", 3, "weights.bin"])
def test_an_index_that_leads_out_of_its_folder(folder, place):
    index = next(folder.glob("*.index.json"))
    listed = json.loads(index.read_text())
    listed["weight_map"][sorted(listed["weight_map"])[0]] = place
    index.write_text(json.dumps(listed))
    with pytest.raises(CheckpointError, match="does not list files of its folder"):
        load_model(folder)


@pytest.mark.parametrize(
    "entries",
    [
        {"num_layers": "many"}, {"num_layers": 10**9}, {"attention_head_dim": 10**9}, {"patch_size": [0, 0, 0]},
        {"patch_size": 3}, {"in_channels": None}, {"rope_max_seq_len": 10**12}, {"eps": "${oc.env:HOME}"},
        {"ffn_dim": [1]}, {"freq_dim": -1}, {"text_dim": 1.5},
    ],
)  # fmt: skip
def test_a_config_that_is_wrong_is_one_sentence(folder, entries):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **entries}))
    with pytest.raises(CheckpointError) as refused:
        load_model(folder)
    assert "\n" not in str(refused.value) and str(folder) in str(refused.value)
