"""Networks without values: the same initial weights as whole ones, and never more than two stages in memory."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from flowanchor.checkpoints import initialise_student, load_model
from flowanchor.checkpoints.consolidated import write_consolidated
from flowanchor.checkpoints.sharded import write_sharded
from flowanchor.deferred import defer_loading, is_deferred, materialise, parameters_on_meta
from flowanchor.interfaces import Backbone
from flowanchor.plugins.backbones.lightningdit import LightningDiT

CPU = torch.device("cpu")


def state(network: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in network.state_dict().items()}


def same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def checkpoint(training, network: nn.Module) -> dict:
    return {
        "state_dict": {f"student.{name}": value for name, value in network.state_dict().items()},
        "flowanchor": {"format": 1, "kind": "flow", "step": 3, "config": training.CONFIG},
    }


@pytest.fixture(scope="module")
def sources(training, folder):
    """The same weights, other than the initial ones, as a file, a sharded folder and a consolidated file."""
    network = training.network(**training.LARGER)
    torch.manual_seed(1)
    for parameter in network.parameters():
        nn.init.normal_(parameter)
    content = checkpoint(training, network)
    torch.save(content, folder / "weights.ckpt")
    (folder / "weights").mkdir()
    write_sharded(folder / "weights", content)
    write_consolidated(folder / "weights.safetensors", network.state_dict(), content["flowanchor"], "none")
    return {name: str(folder / name) for name in ("weights.ckpt", "weights", "weights.safetensors")}, state(network)


@pytest.fixture(scope="module")
def three(torchrun, sources):
    """Three processes (which divide no layer evenly) fill a network from nothing and from each source."""
    drawn = {"do": "fill", "name": "drawn"}
    return torchrun(3, drawn, *({"do": "fill", "name": name, "source": path} for name, path in sources[0].items()))


def test_initial_weights_do_not_depend_on_the_number_of_processes(training, three):
    expected = state(training.network(**training.LARGER))
    for rank in three["drawn"]:
        assert same(rank["weights"], expected)


@pytest.mark.parametrize("source", ["weights.ckpt", "weights", "weights.safetensors"])
def test_weights_are_loaded_into_their_shards(three, sources, source):
    for rank in three[source]:
        assert same(rank["weights"], sources[1])


@pytest.mark.parametrize("name", ["drawn", "weights.ckpt", "weights", "weights.safetensors"])
def test_no_process_ever_holds_more_than_two_stages(training, three, name):
    network = training.network(**training.LARGER)
    stages = [sum(p.nbytes for module in stage for p in module.parameters()) for stage in network.stage_modules()]
    whole = sum(p.nbytes for p in network.parameters())
    assert 2 * max(stages) < whole / 2, "the network must be large enough for the bound to say something"
    for rank in three[name]:
        assert 0 < rank["peak"] <= 2 * max(stages)
        assert rank["kept"] < max(stages), "whole stages are given back"


def test_a_deferred_network_has_real_tables_and_one_process_fills_it(training):
    network = training.network(deferred=True)
    assert is_deferred(network) and all(p.is_meta for p in network.parameters())
    assert torch.equal(network.feat_rope.freqs_cos, training.network().feat_rope.freqs_cos)
    materialise(network, CPU)
    assert same(state(network), state(training.network()))
    assert network.pos_embed.requires_grad is False and network.y_embedder.embedding_table.weight.requires_grad


def test_what_the_weights_lack_is_drawn(training, sources):
    older = training.network(**training.LARGER)
    student = training.network(deferred=True, auxiliary_time_cond=True, **training.LARGER)
    initialise_student(student, sources[0]["weights"])
    materialise(student, CPU)
    assert torch.equal(student.x_embedder.proj.weight, sources[1]["x_embedder.proj.weight"])
    assert not torch.equal(student.x_embedder.proj.weight, older.x_embedder.proj.weight)
    fresh = training.network(auxiliary_time_cond=True, **training.LARGER)
    assert torch.equal(student.r_embedder.mlp[0].weight, fresh.r_embedder.mlp[0].weight)
    assert student.r_embedder.mlp[2].weight.abs().max() == 0, "the new embedder starts silent"


def test_load_model_within_the_context_reads_nothing_yet(training, folder):
    network = training.network()
    torch.save(checkpoint(training, network), folder / "teacher.ckpt")
    with defer_loading():
        model, other = load_model(folder / "teacher.ckpt"), nn.Linear(2, 2)
    assert not other.weight.is_meta, "only what has its weights in a file is deferred"
    assert is_deferred(model.backbone) and model.backbone.pending is not None
    materialise(model.backbone, CPU)
    assert same(state(model.backbone), state(network)) and model.backbone.pending is None


def test_random_numbers_outside_are_left_alone(training):
    torch.manual_seed(7)
    expected = torch.rand(3)
    network = training.network(deferred=True)
    torch.manual_seed(7)
    materialise(network, CPU)
    assert torch.equal(torch.rand(3), expected)


def test_tied_parameters_stay_tied():
    with parameters_on_meta():
        first, second = nn.Linear(4, 4), nn.Linear(4, 4)
        second.weight = first.weight
        pair = nn.Sequential(first, second)
    assert pair[0].weight is pair[1].weight and pair[0].weight.is_meta
    assert not nn.Linear(2, 2).weight.is_meta, "the context ends"


class Layers(Backbone):
    """Built of PyTorch's layers alone; `staged` says whether its constructor ends with `initialise`."""

    def __init__(self, staged: bool) -> None:
        super().__init__()
        self.first = nn.Linear(3, 5)
        self.blocks = nn.ModuleList(nn.Linear(5, 5) for _ in range(2))
        self.last = nn.Linear(5, 3)
        if staged:
            self.initialise()

    def embed(self, x, t, cond, r=None):
        raise NotImplementedError

    def head(self, tokens, context):
        raise NotImplementedError


def test_layers_of_pytorch_need_no_initialisation_of_their_own():
    torch.manual_seed(2)
    expected = Layers(staged=True)
    torch.manual_seed(2)
    with parameters_on_meta():
        network = Layers(staged=True)
    materialise(network, CPU)
    assert same(state(network), state(expected)) and network.initialised_by_stage
    assert not torch.equal(expected.blocks[0].weight, expected.blocks[1].weight), "each stage has its own stream"


def test_a_backbone_with_another_initialisation_is_built_whole(caplog):
    from omegaconf import OmegaConf

    from flowanchor.programs.train import build_student

    cfg = OmegaConf.create({"backbone": {"_target_": f"{__name__}.Layers", "staged": False}})
    import sys

    sys.modules.setdefault(__name__, sys.modules[Layers.__module__])
    torch.manual_seed(2)
    expected = Layers(staged=False)
    torch.manual_seed(2)
    with pytest.warns(UserWarning, match="Layers is built whole on every process .*self.initialise"):
        student = build_student(cfg, deferred=True)
    assert not is_deferred(student) and same(state(student), state(expected))


def test_lightningdit_says_how_its_stages_begin():
    network = LightningDiT(8, 2, 1, 16, 2, 2, num_classes=3, auxiliary_time_cond=True)
    assert network.initialised_by_stage
    zero = {name for name, p in network.named_parameters() if p.abs().max() == 0 and not name.endswith("bias")}
    assert zero == {
        "blocks.0.adaLN_modulation.1.weight", "blocks.1.adaLN_modulation.1.weight", "r_embedder.mlp.2.weight",
        "final_layer.adaLN_modulation.1.weight", "final_layer.linear.weight",
    }  # fmt: skip
