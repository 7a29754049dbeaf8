"""Transformers of diffusers, stage by stage, against the stock networks; and what would go wrong silently."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import nullcontext
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from diffusers.models.attention_dispatch import attention_backend
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from flowanchor.deferred import materialise, parameters_on_meta
from flowanchor.errors import ConfigError
from flowanchor.interfaces import Batch, Question
from flowanchor.jvp import Chain, Full, TwoPass, compile_blocks
from flowanchor.jvp.memory_plan import ShapesOnly, StepOfShapes
from flowanchor.plugins.backbones.diffusers import network as adapter
from flowanchor.plugins.backbones.diffusers.description import description_of
from flowanchor.plugins.backbones.diffusers.exactness import exact
from flowanchor.plugins.backbones.diffusers.ltx_video import LTXVideo
from flowanchor.plugins.backbones.diffusers.network import DiffusersTransformer
from flowanchor.plugins.backbones.diffusers.sd3 import StableDiffusion3
from flowanchor.plugins.objectives.anchors.flow_matching import FlowMatchingAnchor
from flowanchor.plugins.objectives.composed import ComposedObjective
from flowanchor.plugins.objectives.intervals.expanded import ExpandedInterval
from flowanchor.plugins.objectives.shortcuts.consistency import ConsistencyShortcut
from flowanchor.plugins.objectives.times.uniform import Uniform
from flowanchor.plugins.teachers.base import BaseVelocity
from flowanchor.text.base import Tokens

from .diffusers_cases import CASES, cast, ltx_video

PROGRAM = Path(__file__).with_name("diffusers_cases.py")
every = pytest.mark.parametrize("name", CASES)


def relative(a, b):
    return float((a - b).detach().norm() / b.detach().norm())


def ask(network, x, t, cond, along, engine, **more):
    return engine(network, x, cond, [Question(t, along=along, **more)])[0]


@every
def test_value_is_the_stock_networks(name):
    """To the bit, in float32 as it comes, and in float64 where the stock forward is kept from narrowing it."""
    case = CASES[name]
    network = case.network()
    for made, dtype in ((network, torch.float32), (deepcopy(network).double(), torch.float64)):
        x, t, cond = case.inputs(dtype)
        with torch.no_grad(), exact(x):
            wanted = case.ask(made.network, x, t, cond)
        with torch.no_grad():
            found = made.predict(x, t, cond)
        limit = case.loss if dtype == torch.float64 else 1e8 * case.loss
        assert found.dtype == dtype and found.shape == x.shape
        assert torch.equal(found, wanted) if not limit else relative(found, wanted) <= limit
    assert set(network.state_dict()) == set(network.network.state_dict())


@every
def test_tangents_and_gradients(name):
    """The tangent is the derivative (central differences in float64), and all engines agree on it, and on gradients."""
    case = CASES[name]
    network = case.network().double()
    x, t, cond = case.inputs()
    dx, dt, weight = torch.randn_like(x), torch.ones_like(t), torch.randn_like(x)
    answers = {}
    engines = {"full": Full(), "chain": Chain(), "selective": Chain("selective")}
    if name in ("SD3", "Z-Image, padded"):
        engines["two"] = TwoPass()
    for key, engine in engines.items():
        network.zero_grad()
        out = ask(network, x, t, cond, (dx, dt), engine)
        (out.prediction * weight).sum().backward()
        lacking = [name for name, p in network.named_parameters() if p.grad is None]
        gradient = torch.cat([p.grad.flatten() for p in network.parameters() if p.grad is not None])
        answers[key] = (out.prediction.detach(), out.tangent, gradient, lacking)

    def slope(h):
        with torch.no_grad():
            at = {s: network.predict(x + s * h * dx, t + s * h * dt, cond) for s in (-2, -1, 1, 2)}
        return (8 * (at[1] - at[-1]) - (at[2] - at[-2])) / (12 * h)

    # Sana's attention has a ReLU, whose kinks wider steps meet.
    assert relative(answers["full"][1], slope(1e-9 if name == "Sana" else 1e-7)) < 1e-6
    for key, found in answers.items():
        for value, wanted in zip(found[:3], answers["full"][:3], strict=True):
            assert relative(value, wanted) < 1e-11, key
        assert not found[3], "every parameter is in a stage, and is used"
    stages = {id(p) for stage in network.stage_modules() for module in stage for p in module.parameters()}
    assert stages | {id(p) for p in network.parameters(recurse=False)} == {id(p) for p in network.parameters()}


@pytest.mark.parametrize("name", ["SD3", "Z-Image", "LTX-Video"])  # of both signs; with frames
def test_a_network_that_predicts_the_data(name):
    """`F = (X - x_t) / clip(1 - t, 0.05, 1)` of the answer X of the same weights, and its derivative by hand."""
    case = CASES[name]
    plain, made = case.network().double(), case.network(predicts="x").double()
    x, _, cond = case.inputs()
    t = torch.tensor([0.4, 0.97], dtype=torch.float64)
    dx, dt = torch.randn_like(x), torch.ones_like(t)
    data, found = (ask(network, x, t, cond, (dx, dt), Chain()) for network in (plain, made))
    for row, (divisor, rate) in enumerate([(0.6, -1.0), (0.05, 0.0)]):
        velocity = (data.prediction[row] - x[row]) / divisor
        slope = (data.tangent[row] - dx[row] - rate * velocity) / divisor
        assert relative(found.prediction[row], velocity) < 1e-12
        assert relative(found.tangent[row], slope) < 1e-12
    full = ask(made, x, t, cond, (dx, dt), Full())
    assert relative(found.tangent, full.tangent) < 1e-11


@pytest.mark.parametrize("name", [name for name in CASES if "padded" in name] + ["FLUX.1", "Sana"])
def test_a_sample_does_not_see_how_long_its_neighbours_text_is(name):
    case = CASES[name]
    network = case.network().double()
    x, t, cond = case.inputs()
    masks = {field: getattr(cond, field) for field in cond._fields if field.startswith("mask")}
    lengths = {field: int(kept[1].sum()) for field, kept in masks.items()} or {"": 3}
    cut = {}
    for field, value in cond._asdict().items():
        length = lengths.get(field.replace("tokens", "mask"), 3)
        is_sequence = field in network.conditioning.longest
        cut[field] = value[1:, :length] if is_sequence else value[1:]
        if is_sequence and not masks:  # unmasked text ends in zeros
            value[1, length:] = 0
    with torch.no_grad():
        both = network.predict(x, t, cond)
        alone = network.predict(x[1:], t[1:], type(cond)(**cut))
    assert relative(both[1:], alone) < 1e-12


# --------------------------------------------------------------------------------------- what would go wrong silently


@pytest.mark.parametrize("name", ["FLUX.1", "FLUX.2", "Qwen-Image", "HunyuanVideo 1.5", "SD3", "Z-Image", "Krea 2"])
@pytest.mark.parametrize("mixed", [False, True], ids=["weights", "autocast"])
def test_times_are_not_rounded_to_bfloat16(name, mixed, monkeypatch):
    """FLUX, Qwen-Image and HunyuanVideo round them before they multiply by 1,000: the tangent is off by half."""
    case = CASES[name]
    network = case.network()
    x, t, cond = case.inputs(torch.float32)
    dx = torch.randn_like(x)
    wanted = ask(network, x, t, cond, (dx, torch.ones_like(t)), Chain())
    if not mixed:
        network, x, dx, cond = network.bfloat16(), x.bfloat16(), dx.bfloat16(), cast(cond, torch.bfloat16)

    def error():
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            out = ask(network, x, t, cond, (dx, torch.ones_like(t)), Chain())
        return relative(out.tangent.float(), wanted.tangent), relative(out.prediction.float(), wanted.prediction)

    assert max(error()) < 0.08
    if name in ("FLUX.1", "Qwen-Image") or name in ("FLUX.2", "HunyuanVideo 1.5") and not mixed:
        monkeypatch.setattr(adapter, "exact_times", lambda *_: nullcontext())
        assert error()[0] > 0.2, "what the stock forward makes of the same times"


@pytest.mark.parametrize("name", ["SD3", "Z-Image"])
def test_tangents_of_averaged_sinusoids(name):
    """Against the derivative along the table of sinusoids, each column of it damped by hand."""
    case, width = CASES[name], 0.002
    network = case.network(tangent_smoothing=width).double()
    x, t, cond = case.inputs()
    embedder = network.network.get_submodule(case.description.time)
    with torch.no_grad():
        assert relative(network.predict(x, t, cond), case.network().double().predict(x, t, cond)) < 1e-6
    found = ask(network, x, t, cond, (torch.zeros_like(x), torch.ones_like(t)), Full()).tangent
    half = next(embedder.parameters()).shape[1] // 2
    turns = 1000 * 10_000.0 ** (-torch.arange(half).double() / half)  # both count 1,000 timesteps from 0 to 1
    level = (1 - t if name == "SD3" else t)[:, None]
    angles, sign = level * turns, -1 if name == "SD3" else 1
    table = torch.cat([angles.cos(), angles.sin()], 1)
    moved = sign * torch.cat([-turns * angles.sin(), turns * angles.cos()], 1)
    moved = moved * torch.exp(-0.5 * (turns.repeat(2) * width) ** 2)
    network = case.network().double()
    embedder = network.network.get_submodule(case.description.time)

    def at(table):
        handle = embedder.register_forward_pre_hook(lambda module, given: (table, *given[1:]))
        try:
            return network.predict(x, t, cond)
        finally:
            handle.remove()

    with sdpa_kernel(SDPBackend.MATH):  # the others have no forward mode
        wanted = torch.func.jvp(at, (table,), (moved,))[1]
    assert relative(found, wanted) < 1e-4  # of frequencies in float32
    with pytest.raises(ConfigError, match="tangent_smoothing=0.01 is a width in time.*which this one is not"):
        CASES["Krea 2"].network(tangent_smoothing=0.01)


def test_a_moving_value_that_is_not_carried_is_refused():
    class Forgetful(StableDiffusion3):
        carried = ()

    case = CASES["SD3"]
    network = DiffusersTransformer(None, case.settings, Forgetful(), **case.sizes(), **case.more)
    x, t, cond = case.inputs(torch.float32)
    with pytest.raises(ConfigError, match="depends on x or a time into StageContext.fixed.*'temb'"):
        ask(network, x, t, cond, (torch.randn_like(x), torch.ones_like(t)), Chain())


def test_a_description_that_names_what_no_block_is_given_is_refused():
    class Hopeful(StableDiffusion3):
        carried = ("temb", "time_embedding")

    case = CASES["SD3"]
    network = DiffusersTransformer(None, case.settings, Hopeful(), **case.sizes(), **case.more)
    with pytest.raises(ConfigError, match="not given time_embedding but .*temb"):
        network.predict(*case.inputs(torch.float32))


def test_positions_of_ltx_are_told_in_seconds_and_pixels():
    case = CASES["LTX-Video"]
    network = case.network()
    x, t, cond = case.inputs(torch.float32)
    with torch.no_grad():
        found = network.predict(x, t, cond)
        assert relative(found, ltx_video(network.network, x, t, cond, scale=None)) > 1e-3
        slower = case.network(description=LTXVideo(frame_rate=12.5)).predict(x, t, cond)
        assert relative(slower, ltx_video(network.network, x, t, cond, scale=(8 / 12.5, 32, 32))) < 1e-6
    with pytest.raises(ConfigError, match="frame_rate=0"):
        LTXVideo(frame_rate=0)


def test_attention_that_tangents_do_not_see_is_refused():
    case = CASES["SD3"]
    network = case.network()
    given = case.inputs(torch.float32)
    with attention_backend("_native_math"), pytest.raises(ConfigError, match="_native_math.*leave it at native"):
        case.network()
    flux = CASES["FLUX.1"].network()
    try:
        flux.network.set_attention_backend("_native_math")
        with pytest.raises(ConfigError, match="leave it at native"):
            flux.predict(*CASES["FLUX.1"].inputs(torch.float32))
    finally:
        flux.network.set_attention_backend("native")  # which chooses it for all networks
    flux.predict(*CASES["FLUX.1"].inputs(torch.float32))
    network.network.enable_gradient_checkpointing()
    with pytest.raises(ConfigError, match="disable_gradient_checkpointing"):
        network.predict(*given)
    network.network.disable_gradient_checkpointing()
    network.predict(*given)


class Masks(TorchFunctionMode):
    """How many calls of attention have a mask."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is functional.scaled_dot_product_attention:
            self.calls.append(((kwargs or {}).get("attn_mask") if len(args) < 4 else args[3]) is not None)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["Qwen-Image", "Krea 2", "HunyuanVideo 1.5", "Z-Image"])
def test_a_mask_that_leaves_nothing_out_is_none(name):
    """With one the scores of a tangent are held whole."""
    for key, masked in ((name, False), (f"{name}, padded", True)):
        network = CASES[key].network()
        with torch.no_grad():
            tokens, context = network.embed(*CASES[key].inputs(torch.float32))
            with Masks() as seen:
                network.blocks[-1](tokens, context)
        assert seen.calls == [masked]


# ------------------------------------------------------------------------------------------------- how it is asked for


def test_what_cannot_be_built_is_told_in_a_sentence():
    case = CASES["SD3"]
    with pytest.raises(ConfigError, match="Nothing describes.*AuraFlow.*docs/add_a_diffusers_model.md"):
        description_of("AuraFlowTransformer2DModel")
    with pytest.raises(ConfigError, match="add initialise_from=FOLDER"):
        DiffusersTransformer()
    with pytest.raises(ConfigError, match="that of SD3Transformer2DModel, and the network is a FluxTransformer2DModel"):
        DiffusersTransformer("FluxTransformer2DModel", {}, StableDiffusion3())
    with pytest.raises(ConfigError, match="have 3 channels and this SD3Transformer2DModel reads 4"):
        DiffusersTransformer(None, case.settings, StableDiffusion3(), channels=3)
    with pytest.raises(ConfigError, match="multiples of 2 and 2"):
        DiffusersTransformer(None, case.settings, StableDiffusion3(), height=7)
    with pytest.warns(UserWarning, match="does not take brand_new"):
        DiffusersTransformer(None, {**case.settings, "brand_new": 1}, StableDiffusion3(), height=8, width=8)

    class Tomorrow(StableDiffusion3):
        stock = "StableDiffusion9Transformer2DModel"

    with pytest.raises(ConfigError, match="has no StableDiffusion9.*pip install --upgrade diffusers"):
        DiffusersTransformer(None, {}, Tomorrow())
    network, (x, t, cond) = case.network(), case.inputs(torch.float32)
    with pytest.raises(ConfigError, match="pass a PooledTokens with tokens, pooled"):
        network.predict(x, t, Tokens(cond.tokens))
    with pytest.raises(ConfigError, match=r"reads \[B, L, 24\]"):
        network.predict(x, t, cond._replace(tokens=cond.tokens[..., :7]))
    with pytest.raises(ConfigError, match="has 6 tokens, and SD3Transformer2DModel reads 5"):
        network.predict(x, t, cond._replace(tokens=torch.zeros(2, 6, 24)))
    with pytest.raises(ConfigError, match=r"reads samples \[B, 4, h, w\]"):
        network.predict(x[:, :3], t, cond)


def test_an_image_is_one_frame_where_the_data_says_so():
    case = CASES["SD3"]
    network = case.network(frames=1)
    x, t, cond = case.inputs(torch.float32)
    assert network.sample_shape == (4, 1, 8, 8)
    framed = network.predict(x.unsqueeze(2), t, cond)
    assert framed.shape == (2, 4, 1, 8, 8) and torch.equal(framed.squeeze(2), network.predict(x, t, cond))


def test_conditions_are_dropped_and_guided():
    """By `Text`, as any other's: the null text in the place of one, and both in one batch."""
    case = CASES["Qwen-Image, padded"]
    network = case.network(condition_dropout=1.0)
    x, t, cond = case.inputs(torch.float32)
    null = network.conditioning.null(cond)
    assert null.mask.sum(1).tolist() == [1, 1] and torch.equal(network.train()(x, t, cond), network.predict(x, t, null))
    pair = network.conditioning.stack(cond, null)
    both = network.eval().predict(torch.cat([x, x]), torch.cat([t, t]), pair)
    assert torch.allclose(both[2:], network.predict(x, t, null), atol=1e-5)


@pytest.mark.parametrize("name", ["SD3", "Z-Image", "Sana"])
def test_first_values_do_not_depend_on_when_they_are_drawn(name):
    case = CASES[name]

    def made():
        torch.manual_seed(5)
        return DiffusersTransformer(case.description.stock, case.settings, **case.sizes(), **case.more)

    whole = made()
    with parameters_on_meta():
        later = made()
    materialise(later, torch.device("cpu"))
    for key, value in whole.state_dict().items():
        assert torch.equal(value, later.state_dict()[key]), key
        assert value.isfinite().all()
    x, t, cond = case.inputs(torch.float32)
    assert not whole.predict(x, t, cond).any(), "training starts from a velocity of zero"


# ------------------------------------------------------------------------------------------ spread, compiled, replaced


SHARDED = ("SD3", "Z-Image, padded")


@pytest.mark.parametrize(
    "names", [SHARDED, *(pytest.param((n,), marks=pytest.mark.slow) for n in CASES if n not in SHARDED)], ids=" ".join
)
def test_sharded_over_two_processes(names, tmp_path):
    results = [tmp_path / f"{rank}.json" for rank in range(2)]
    processes = [
        subprocess.Popen(
            [sys.executable, str(PROGRAM), str(rank), str(tmp_path / "store"), str(result), *names],
            env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank, result in enumerate(results)
    ]  # fmt: skip
    try:
        said = [process.communicate(timeout=300)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert not any(process.returncode for process in processes), "\n".join(said)
    for result in results:
        found = json.loads(result.read_text())
        assert len(found) == 2 * len(names) and all(max(apart.values()) < 1e-12 for apart in found.values()), found


@pytest.mark.parametrize(
    "name", [n if n in ("FLUX.1", "LTX-Video") else pytest.param(n, marks=pytest.mark.slow) for n in CASES]
)
def test_compiled_blocks_answer_the_same(name):
    case = CASES[name]
    network = case.network()
    x, t, cond = case.inputs(torch.float32)
    along, weight = (torch.randn_like(x), torch.ones_like(t)), torch.randn_like(x)

    def answer():
        network.zero_grad()
        out = ask(network, x, t, cond, along, Chain())
        (out.prediction * weight).sum().backward()
        return out.prediction.detach(), out.tangent, torch.cat([p.grad.flatten() for p in network.parameters()])

    before = answer()
    torch._dynamo.reset()
    compile_blocks(network, backend="eager", fullgraph=True)
    for found, wanted in zip(answer(), before, strict=True):
        assert relative(found, wanted) < 1e-4
    torch._dynamo.reset()


MASKED = ["Z-Image, padded", "Qwen-Image, padded", "Krea 2, padded", "Sana", "LTX-Video"]


def test_a_plan_knows_how_long_a_text_is():
    mask = torch.tensor([True, True, False, True, False])
    with ShapesOnly(allow_non_fake_inputs=True) as mode:
        tokens = mode.from_tensor(torch.randn(5, 24))
        assert tokens[mask.nonzero()[:, 0]].shape == (3, 24) and not bool(mask.all()) and bool(mask[:2].all())


@pytest.mark.slow
@pytest.mark.parametrize("name", MASKED)
def test_a_step_under_masks_can_be_planned(name):
    """As jvp.recompute=auto asks; the teacher's null text has a mask of its own. Two samples take more than one."""
    network, goal = (
        CASES[name].network(lora={"rank": 2}),
        ComposedObjective(ExpandedInterval(), Uniform(), FlowMatchingAnchor(), ConsistencyShortcut()),
    )
    x, _, cond = CASES[name].inputs(torch.float32)
    step, peaks = StepOfShapes(network, goal, BaseVelocity(4.0, 0.0, 1.0)), []
    for samples in (slice(1), slice(2)):
        batch = Batch(x[samples], cond._make(value[samples] for value in cond))
        times = goal.draw(len(batch.x1), x.device)
        peaks.append(step.peak(Chain(False), batch, torch.randn_like(batch.x1), times, times.t, 0))
    assert 1.3 * peaks[0] < peaks[1]
