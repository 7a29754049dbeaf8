"""Every golden file (reference numbers of the authors' code), each by its kind and config; see tests/golden/README.md.

The folder is `FLOWANCHOR_GOLDEN` (default tests/golden); nothing about a file is assumed beyond its own metadata.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from flowanchor.checkpoints import load_model
from flowanchor.interfaces import Backbone, Batch, Objective, Question, VelocityField
from flowanchor.jumps.guidance import Guidance
from flowanchor.jvp import Chain, Full, TwoPass
from flowanchor.plugins.backbones.lightningdit import LightningDiT
from flowanchor.plugins.codecs.kl import KLCodec
from flowanchor.plugins.objectives.anchors.flow_matching import FlowMatchingAnchor
from flowanchor.plugins.objectives.composed import ComposedObjective
from flowanchor.plugins.objectives.intervals.auxiliary import AuxiliaryInterval
from flowanchor.plugins.objectives.intervals.expanded import ExpandedInterval
from flowanchor.plugins.objectives.intervals.plain import PlainInterval
from flowanchor.plugins.objectives.shortcuts.consistency import ConsistencyShortcut
from flowanchor.plugins.objectives.shortcuts.meanflow import MeanFlowShortcut
from flowanchor.plugins.objectives.shortcuts.scm import SCMShortcut
from flowanchor.plugins.objectives.times.arctan_lognormal import ArctanLogNormal
from flowanchor.plugins.objectives.times.logit_normal import LogitNormal
from flowanchor.plugins.objectives.times.uniform import Uniform
from flowanchor.plugins.samplers.consistency import ConsistencySampler
from flowanchor.plugins.samplers.flow import FlowSampler
from flowanchor.plugins.teachers.checkpoint import CheckpointVelocity
from flowanchor.plugins.teachers.data import DataVelocity
from flowanchor.text.base import Tokens

FOLDER = Path(os.environ.get("FLOWANCHOR_GOLDEN", Path(__file__).parent / "golden"))
INTERVALS = {"plain": PlainInterval, "expanded": ExpandedInterval, "auxiliary": AuxiliaryInterval}
ENGINES = {
    "full": Full(),
    "chain": Chain(),
    "chain_selective": Chain("selective"),
    "chain_graph": Chain(False),
    "two_pass": TwoPass(),
    "two_pass_checkpoint": TwoPass(checkpoint=True),
}


class Golden:
    """One file: metadata and tensors, with the prefixes taken apart."""

    def __init__(self, path: Path) -> None:
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
            self.tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dict
        self.kind = metadata["kind"]
        self.schema = metadata.get("schema")
        self.config: dict[str, Any] = json.loads(metadata["config"])

    def group(self, prefix: str) -> dict[str, Tensor]:
        return {key.removeprefix(prefix): value for key, value in self.tensors.items() if key.startswith(prefix)}

    def __getitem__(self, key: str) -> Tensor:
        return self.tensors[key]

    def get(self, key: str) -> Tensor | None:
        return self.tensors.get(key)

    def network(self, prefix: str = "state.") -> Backbone:
        network = LightningDiT(**self.config.get("backbone", self.config))
        network.load_state_dict(self.group(prefix), strict=True)
        return network


def relative(ours: Tensor, theirs: Tensor) -> float:
    assert ours.shape == theirs.shape or ours.numel() == theirs.numel() == 1, (ours.shape, theirs.shape)
    difference = ours.detach().double().reshape(-1) - theirs.double().reshape(-1)
    return float(difference.norm() / theirs.double().norm())


def check_wan(golden: Golden) -> None:
    """The released key layout, opened as a folder; our velocity is the negative of the released prediction."""
    settings = golden.config
    # In float64, so that 1000 (1 - t) is the file's timestep again, to its last digit.
    x, context, t = golden["in.x"], golden["in.context"], 1 - golden["in.timestep"].double() / 1000
    with TemporaryDirectory() as folder:
        description = {"_class_name": "WanModel", **settings, "text_dim": context.shape[-1]}
        (Path(folder) / "config.json").write_text(json.dumps(description))
        save_file(golden.group("state."), Path(folder) / "model.safetensors")
        network = load_model(folder).backbone
    assert relative(-network.predict(x, t, Tokens(context)), golden["out.prediction"]) <= 1e-5
    assert relative(network.transformer()(x, golden["in.timestep"], padded(context, settings)).sample,
                    golden["out.prediction"]) <= 1e-5  # fmt: skip
    draw = torch.Generator().manual_seed(0)
    dx = torch.randn(x.shape, generator=draw)
    check_engines_in_float64(network.double().eval(), x, t, Tokens(context.double()), dx, torch.ones_like(t))


def padded(context: Tensor, settings: dict[str, Any]) -> Tensor:
    return torch.nn.functional.pad(context, (0, 0, 0, settings["text_len"] - context.shape[1]))


def check_backbone(golden: Golden) -> None:
    network = golden.network().eval()
    x, t, y, r = golden["in.x"], golden["in.t"], golden["in.y"], golden.get("in.r")
    assert relative(network(x, t, y, r), golden["out.prediction"]) <= 1e-5
    for name, engine in ENGINES.items():
        (dual,) = engine(network, x, y, [Question(t, r, (golden["in.dx"], golden["in.dt"]))])
        assert relative(dual.prediction, golden["out.prediction"]) <= 1e-5, name
        assert relative(dual.tangent, golden["out.tangent"]) <= 1e-5, name
    check_engines_in_float64(network.double().eval(), x, t, y, golden["in.dx"], golden["in.dt"], r)


def check_engines_in_float64(
    network: Backbone, x: Tensor, t: Tensor, y: Tensor, dx: Tensor, dt: Tensor, r: Tensor | None = None
) -> None:
    """Every exact engine against `Full`, and `Full` against central differences (extrapolated: O(step^4))."""
    x, t, dx, dt = (value.double() for value in (x, t, dx, dt))
    r = None if r is None else r.double()
    weights = torch.randn(x.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def answer(engine: Any) -> tuple[Tensor, Tensor, Tensor]:
        network.zero_grad()
        (dual,) = engine(network, x, y, [Question(t, r, (dx, dt))])
        (dual.prediction * weights).sum().backward()
        gradients = [p.grad.flatten() for p in network.parameters() if p.grad is not None]
        return dual.prediction.detach(), dual.tangent, torch.cat(gradients)

    wanted = answer(ENGINES["full"])
    with torch.no_grad():

        def slope(step: float) -> Tensor:
            ahead, behind = (network(x + way * dx, t + way * dt, y, r) for way in (step, -step))
            return (ahead - behind) / (2 * step)

        step = 4e-6
        assert relative(wanted[1], (4 * slope(step) - slope(2 * step)) / 3) <= 1e-7
    for name, engine in ENGINES.items():
        found = answer(engine)
        for value, right, limit in zip(found, wanted, (1e-10, 1e-10, 1e-9), strict=True):
            assert relative(value, right) <= limit, name


def make_objective(config: dict[str, Any]) -> Objective:
    interval = INTERVALS[config["interval"]]()
    if config["objective"] == "flow_matching":
        return ComposedObjective(interval, Uniform(), FlowMatchingAnchor(cosine="channel", branch="pretraining"))
    if config["objective"] == "meanflow":
        return ComposedObjective(interval, Uniform(), shortcut=MeanFlowShortcut(share=config["r2t_ratio"]))
    if config["objective"] == "scm":
        objective = ComposedObjective(interval, ArctanLogNormal(), shortcut=SCMShortcut(config["warmup_steps"]))
        objective.at_step(config["step"])
        return objective
    shortcut = ConsistencyShortcut(relaxation_exponent=config["relaxation_exponent"])
    return ComposedObjective(interval, ArctanLogNormal(), FlowMatchingAnchor(cosine="channel"), shortcut)


def make_velocity(golden: Golden) -> VelocityField:
    if not golden.config.get("distill"):
        assert golden.config.get("cfg_scale", 1.0) == 1.0, (
            "the authors' guided training from scratch is not a reference"
        )
        return DataVelocity()
    guidance = Guidance(
        golden.config["cfg_scale"], golden.config.get("guidance_low", 0.0), golden.config.get("guidance_high", 1.0)
    )
    return CheckpointVelocity.of_network(golden.network("teacher."), guidance)


def check_objective(golden: Golden) -> None:
    for engine in ENGINES:
        check_objective_with(golden, engine)


def check_objective_with(golden: Golden, engine: str) -> None:
    if golden.config["objective"] not in ("facm", "flow_matching", "meanflow", "scm"):
        pytest.skip(f"objective '{golden.config['objective']}' is not built yet")
    student = golden.network().train()  # the files have label dropout disabled
    batch = Batch(golden["in.x1"], golden["in.y"])
    result = make_objective(golden.config)(
        student, batch, make_velocity(golden), ENGINES[engine], golden["in.noise"], golden["in.t"], golden.get("in.r")
    )
    if golden.config["objective"] == "scm":  # the authors' weighting has a fault: no loss to compare with
        assert result.prediction is not None and result.tangent is not None
        assert relative(result.velocity, golden["out.velocity"]) <= 1e-5
        assert relative(result.prediction, golden["out.prediction"]) <= 1e-5
        assert relative(result.tangent, golden["out.tangent"]) <= 1e-5
        return
    result.loss.backward()

    assert relative(result.loss, golden["out.loss"]) <= 1e-5
    if golden.config["objective"] in ("facm", "meanflow"):
        assert result.prediction is not None and result.tangent is not None
        assert relative(result.velocity, golden["out.velocity"]) <= 1e-5
        assert relative(result.prediction, golden["out.prediction"]) <= 1e-5
        assert relative(result.tangent, golden["out.tangent"]) <= 1e-5
        assert relative(result.terms["shortcut"], golden["out.shortcut_loss"]) <= 1e-5
        if float(golden["out.anchor_loss"]):
            assert relative(result.terms["anchor"], golden["out.anchor_loss"]) <= 1e-5
    else:
        interval, t = INTERVALS[golden.config["interval"]](), golden["in.t"]
        times = t.view(-1, *[1] * (batch.x1.ndim - 1))
        told = interval.pretraining(t)
        prediction = student.predict((1 - times) * golden["in.noise"] + times * batch.x1, told.t, batch.cond, told.r)
        term = FlowMatchingAnchor(cosine="channel").loss(prediction, batch.x1 - golden["in.noise"], t)
        assert relative(term.parts["mse"], golden["out.mse"]) <= 1e-5
        assert relative(term.parts["cosine"], golden["out.cosine"]) <= 1e-5

    references = golden.group("grad.")
    ours = {name: parameter.grad for name, parameter in student.named_parameters() if parameter.grad is not None}
    assert references and set(references) <= set(ours)
    for name, reference in references.items():
        error = (ours[name].double() - reference.double()).norm()
        assert error <= max(1e-4 * float(reference.double().norm()), 1e-7), name
    for name in set(ours) - set(references):
        assert float(ours[name].norm()) <= 1e-7, name


def check_sampler(golden: Golden) -> None:
    config = golden.config
    network = golden.network().eval()
    guidance = {
        "guidance_scale": config.get("cfg_scale", 1.0),
        "guidance_low": config.get("guidance_low", 0.0),
        "guidance_high": config.get("guidance_high", 1.0),
    }
    default = "auxiliary" if network.takes_end_time else "expanded"
    interval = INTERVALS[config.get("interval", default)]()
    if config["sampler"] == "consistency":
        sampler: Any = ConsistencySampler(config["steps"], timestep_shift=config.get("timestep_shift", 0.0), **guidance)
        renoise = golden["in.renoise"].__getitem__
        sample = sampler.sample(network, golden["in.noise"], golden["in.y"], interval, renoise)
    else:
        sampler = FlowSampler(
            config["steps"], config["sampler"], timestep_shift=config.get("timestep_shift", 0.0), **guidance
        )
        sample = sampler.sample(network, golden["in.noise"], golden["in.y"], interval)
    assert sample.dtype == torch.float64
    assert relative(sample, golden["out.sample"]) <= 1e-5


def check_time(golden: Golden) -> None:
    distributions = {"arctan_lognormal": ArctanLogNormal, "logit_normal": LogitNormal}
    config = dict(golden.config)
    distribution = distributions[config.pop("distribution")](**config)
    assert relative(distribution.from_draw(golden["in.z"]), golden["out.t"]) <= 1e-6


def check_autoencoder(golden: Golden) -> None:
    codec = KLCodec.of_weights(golden.group("state."))
    posterior = codec.posterior(golden["in.image"])
    assert posterior.logvar is not None
    assert relative(posterior.mean, golden["out.mean"]) <= 1e-4
    assert relative(posterior.logvar, golden["out.logvar"]) <= 1e-4
    assert relative(codec.decode(golden["out.mean"]), golden["out.image"]) <= 1e-4


CHECKS = {
    "backbone": check_backbone,
    "objective": check_objective,
    "sampler": check_sampler,
    "time": check_time,
    "autoencoder": check_autoencoder,
    "wan": check_wan,
}
FILES = sorted(FOLDER.glob("*.safetensors"))


def test_the_folder_holds_golden_files() -> None:
    assert FILES, f"no golden files in {FOLDER}: set FLOWANCHOR_GOLDEN to a folder that has some"


@pytest.mark.parametrize("path", FILES, ids=[path.stem for path in FILES])
def test_golden(path: Path) -> None:
    golden = Golden(path)
    assert golden.schema == "1"
    CHECKS[golden.kind](golden)
