"""AdamW with moments in 8 bits: against torchao's, against AdamW, and its rounding against the nearest level."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from flowanchor.errors import ConfigError
from flowanchor.optimizer_settings import kept_bytes, with_own_settings
from flowanchor.optimizers import AdamW8bit, AdamWBF16
from flowanchor.optimizers.adamw_8bit import dequantised, levels, quantised
from flowanchor.strategies.chain_jvp import _restore_optimizer

CPU = torch.device("cpu")
SHAPES = [(24, 512), (40, 3, 100), (300,), (4096, 2)]  # whole blocks; a short one in each row; two that stay float32


def made(values: list[torch.Tensor], make: Any = AdamW8bit, **settings: Any) -> tuple[list[nn.Parameter], Any]:
    weights = [nn.Parameter(value.clone()) for value in values]
    return weights, make(weights, lr=1e-2, weight_decay=0.01, **settings)


def go_on(weights: list[nn.Parameter], optimizer: torch.optim.Optimizer, first: int, last: int) -> None:
    """Steps along gradients that neither depend on the weights nor are alike in size."""
    for step in range(first, last):
        draw = torch.Generator().manual_seed(step)
        for p in weights:
            p.grad = gradient(p.shape, draw).to(p.dtype)
        optimizer.step()


def gradient(shape: torch.Size, draw: torch.Generator) -> torch.Tensor:
    return torch.randn(shape, generator=draw) * torch.rand(shape, generator=draw) ** 4


def start(shapes: Any = SHAPES) -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [torch.randn(shape) for shape in shapes]


@pytest.fixture
def torchao_adamw8bit() -> Iterator[Any]:
    """As it is written: its compiled step adds in another order."""
    optim = pytest.importorskip("torchao.optim")
    with patch.object(torch, "compile", lambda function, **_: function):
        yield optim.AdamW8bit


def test_step_for_step_it_is_that_of_torchao(torchao_adamw8bit):
    """Where no gradient is next to nothing beside the others of its block."""
    values = start([(24, 512), (16, 256), (300,)])
    (ours, optimizer), (theirs, reference) = made(values), made(values, torchao_adamw8bit)
    draw = torch.Generator().manual_seed(1)
    for _ in range(10):
        for p, q in zip(ours, theirs, strict=True):
            p.grad = (torch.rand(p.shape, generator=draw) + 0.1) * torch.randn(p.shape, generator=draw).sign()
            q.grad = p.grad.clone()
        optimizer.step()
        reference.step()
        for p, q in zip(ours, theirs, strict=True):
            torch.testing.assert_close(p, q, rtol=0, atol=1e-3)  # a step is 1e-2; a sum may end on a border
            assert ((p - q).abs() > 2e-6).float().mean() < 0.01
    for p, q in list(zip(ours, theirs, strict=True))[:2]:
        for name in ("exp_avg", "exp_avg_sq"):
            other = reference.state[q][name]
            apart = (optimizer.state[p][name].int() - other.codes.int()).abs()
            assert apart.max() <= 1 and (apart > 0).float().mean() < 1e-3
            torch.testing.assert_close(optimizer.state[p][f"{name}_scale"].flatten(), other.scale)
            assert torch.equal(levels(name == "exp_avg", CPU), other.qmap)


def test_no_step_is_longer_than_adamw_would_make_it(torchao_adamw8bit):
    """Gradients of many sizes in a block, those of the second step smaller: the smallest second moments are lost."""
    sizes = (10.0 ** torch.linspace(-6, 0, 4096))[torch.randperm(4096, generator=torch.Generator().manual_seed(0))]
    sizes = sizes.view(16, 256)
    longest = {}
    for make in (torch.optim.AdamW, AdamW8bit, torchao_adamw8bit):
        p = nn.Parameter(torch.zeros(16, 256))
        optimizer = make([p], lr=1.0, weight_decay=0.0, eps=1e-12)
        for share in (1.0, 1e-3):
            before = p.detach().clone()
            p.grad = share * sizes
            optimizer.step()
        longest[make] = float((p.detach() - before).abs().max())
    assert longest[AdamW8bit] < 1.5 * longest[torch.optim.AdamW] < 2 and longest[torchao_adamw8bit] > 100


@pytest.mark.parametrize("signed", [True, False])
def test_each_value_becomes_the_nearest_level_of_its_block(signed):
    torch.manual_seed(0)
    exact = torch.randn(5, 700) * 10.0 ** torch.randint(-9, 3, (5, 700))
    exact = exact if signed else exact.abs()
    exact[2, 256:512] = 0.0
    codes, scale = quantised(exact, signed)
    assert scale.shape == (5, 3) and codes.dtype == torch.uint8
    found = dequantised(codes, scale, signed)
    for row in range(5):
        for block, part in enumerate(exact[row].split(256)):
            most = max(float(part.abs().max()), 1e-12)
            wanted = most * levels(signed, CPU)
            nearest = wanted[(part[:, None] - wanted).abs().argmin(1)]
            if not signed:
                nearest = torch.where((part > 0) & (nearest == 0), wanted[1], nearest)
            torch.testing.assert_close(found[row].split(256)[block], nearest, rtol=1e-6, atol=1e-30)
    assert levels(signed, CPU).shape == (256,) and levels(signed, CPU).diff().min() > 0


def test_it_follows_adamw():
    """A regression with noise: where its weights come to."""

    def trained(make: Any, steps: int) -> torch.Tensor:
        torch.manual_seed(0)
        layer, right = nn.Linear(300, 32), torch.randn(32, 300)
        optimizer = make(layer.parameters(), lr=3e-3, weight_decay=0.01)
        draw = torch.Generator().manual_seed(1)
        for _ in range(steps):
            x = torch.randn(16, 300, generator=draw)
            optimizer.zero_grad()
            (layer(x) - x @ right.T).square().mean().backward()
            optimizer.step()
        return layer.weight.detach()

    exact, low, begun = (trained(make, n) for make, n in ((torch.optim.AdamW, 300), (AdamW8bit, 300), (AdamW8bit, 0)))
    assert 0 < (low - exact).norm() < 0.02 * (exact - begun).norm()


@pytest.mark.parametrize("make", [AdamW8bit, AdamWBF16])
@pytest.mark.parametrize("load", [torch.optim.Optimizer.load_state_dict, _restore_optimizer])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_resume_goes_on_bit_for_bit(make, load, dtype):
    values = [value.to(dtype) for value in start()]
    whole, optimizer = made(values, make)
    go_on(whole, optimizer, 0, 8)
    half, optimizer = made(values, make)
    go_on(half, optimizer, 0, 4)
    stored = optimizer.state_dict()
    again, fresh = made([p.detach() for p in half], make)
    load(with_own_settings(fresh), stored)
    for p, entries in zip(again, stored["state"].values(), strict=True):
        for name, value in entries.items():
            assert torch.equal(fresh.state[p][name], value) and fresh.state[p][name].dtype == value.dtype, name
    go_on(again, fresh, 4, 8)
    for p, q in zip(again, whole, strict=True):
        assert torch.equal(p, q)


def test_the_state_is_plain_tensors_of_two_bytes_per_value(tmp_path):
    weights, optimizer = made(start())
    go_on(weights, optimizer, 0, 1)
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)["state"]
    assert {type(value) for entries in state.values() for value in entries.values()} == {torch.Tensor}
    assert sum(state[0][name].nbytes for name in state[0] if name != "step") == 24 * 512 * 2 + 24 * 2 * 4 * 2
    assert state[1]["exp_avg"].dtype == torch.uint8 and state[1]["exp_avg_sq_scale"].shape == (40, 2)
    assert all(state[i]["exp_avg"].dtype == torch.float32 and len(state[i]) == 3 for i in (2, 3))


@pytest.mark.parametrize("make", [AdamW8bit, AdamWBF16, torch.optim.AdamW])
def test_its_bytes_are_known_beforehand(make):
    values = start([*SHAPES, (5000, 40), (16, 512), (7,), ()])
    weights, optimizer = made(values, make)
    before = torch.random.get_rng_state()
    planned = kept_bytes(make, weights)
    assert torch.equal(torch.random.get_rng_state(), before) and not optimizer.state
    go_on(weights, optimizer, 0, 1)
    entries = [v for p in weights for name, v in optimizer.state[p].items() if name != "step"]
    assert planned == pytest.approx(sum(v.nbytes for v in entries), rel=1e-4)


def test_a_part_of_a_sharded_parameter_is_rounded_as_in_the_whole():
    """Seven rows on three processes, of which the last is played, which holds one."""
    values = start([(7, 700)])
    (whole,), optimizer = made(values)
    go_on([whole], optimizer, 0, 3)
    dist.init_process_group("fake", store=FakeStore(), rank=2, world_size=3)
    try:
        mesh = init_device_mesh("cpu", (3,))

        def shared(value: torch.Tensor, dim: int = 0) -> Any:
            return distribute_tensor(value, mesh, [Shard(dim)], src_data_rank=None)

        p = nn.Parameter(shared(values[0]))
        part = AdamW8bit([p], lr=1e-2, weight_decay=0.01)
        for step in range(3):
            p.grad = shared(gradient(p.shape, torch.Generator().manual_seed(step)))
            part.step()
        assert torch.equal(p.detach().to_local(), whole.detach()[6:])
        for name, value in optimizer.state[whole].items():
            if name != "step":
                assert torch.equal(part.state[p][name].to_local(), value[6:]), name
                assert part.state[p][name].shape == value.shape
        across = nn.Parameter(shared(values[0], 1))
        across.grad = shared(values[0], 1)
        with pytest.raises(ConfigError, match="sharded along their first dimension"):
            AdamW8bit([across]).step()
    finally:
        dist.destroy_process_group()


def test_parameters_without_gradient_stay_as_they_are():
    used, idle = nn.Parameter(torch.ones(64, 64)), nn.Parameter(torch.ones(64, 64))
    used.grad = torch.ones(64, 64)
    optimizer = AdamW8bit([used, idle], weight_decay=0.5)
    optimizer.step()
    assert torch.equal(idle, torch.ones(64, 64)) and not optimizer.state[idle]
    again = AdamW8bit([nn.Parameter(torch.ones(64, 64)), nn.Parameter(torch.ones(64, 64))])
    again.load_state_dict(optimizer.state_dict())
    assert [len(again.state[p]) for p in again.param_groups[0]["params"]] == [5, 0]


@pytest.mark.parametrize(("setting", "value"), [("lr", -1.0), ("betas", (0.9, 1.0)), ("eps", -1e-8)])
def test_settings_out_of_range_are_refused(setting, value):
    with pytest.raises(ConfigError, match=rf"optimizer.{setting} is out of range"):
        AdamW8bit([nn.Parameter(torch.ones(1))], **{setting: value})
