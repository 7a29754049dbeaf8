"""The counters, on steps whose bytes can be told by hand."""

from __future__ import annotations

import torch
from torch.autograd import forward_ad

from counting import LiveBytes, allocator_peak
from workloads import engine_step

SIZE = {"input_size": 8, "patch_size": 2, "hidden_size": 32, "depth": 1, "num_heads": 2}
KB = 1000 * 4  # a thousand float32


def test_a_graph_keeps_what_the_backward_pass_needs():
    x, w = torch.randn(1000, 10, requires_grad=True), torch.randn(10, 10, requires_grad=True)
    with LiveBytes() as counter:
        h = x @ w  # 10 KB; not needed by relu's backward
        h = h.relu()  # 10 KB
        assert counter.live == 10 * KB and counter.peak == 20 * KB
        y = h.square().sum()  # 10 KB for the squares, which go
        assert counter.live == 10 * KB + 4 and counter.peak == 20 * KB + 4
        y.backward()
        del h, y
        assert counter.live == 10 * KB + 400, "the two gradients are left"


def test_views_count_once_and_what_existed_counts_nothing():
    x = torch.randn(1000)
    with LiveBytes() as counter:
        y = x.view(10, 100)
        z = y.t()
        assert counter.peak == 0
        copy = z.contiguous()
        kept = copy[0]
        del copy
        assert counter.live == KB, "a view keeps its whole storage"
        del kept
        assert counter.live == 0


def test_tangents_count():
    x, dx = torch.randn(1000), torch.randn(1000)
    with LiveBytes() as counter, torch.no_grad(), forward_ad.dual_level():
        y = forward_ad.make_dual(x, dx).sin()
        assert counter.live == 2 * KB  # the value and its tangent
        del y
        assert counter.live == 0


def test_a_backward_pass_inside_a_function_counts():
    class Recompute(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x.sum()

        @staticmethod
        def backward(ctx, gradient):
            (x,) = ctx.saved_tensors
            return x.exp() * gradient

    x = torch.randn(1000, requires_grad=True)
    y = Recompute.apply(x)
    with LiveBytes() as counter:
        y.backward()
    assert counter.peak == 2 * KB + 4  # the exponential, its product, and the one that a backward pass starts with


def test_storages_that_are_emptied_and_filled_again(monkeypatch):
    monkeypatch.setattr("flowanchor.jvp.live_bytes.RESIZING", ("aten",))
    with LiveBytes() as counter:
        x = torch.zeros(1000)
        x.untyped_storage().resize_(0)
        torch.zeros(1)
        assert counter.live == 0
        x.untyped_storage().resize_(KB)
        torch.zeros(1)
        assert counter.live == KB


def test_the_count_is_what_the_allocator_hands_out():
    for engine in ("Full", "Chain(recompute)", 'Chain("selective")', "Chain(recompute=False)", "TwoPass(checkpoint)"):
        work = engine_step(engine, batch=2, **SIZE)
        work.step()
        work.forget()
        with LiveBytes() as counter:
            work.step()
        work.forget()
        handed_out = allocator_peak(work.step)
        # Beside tensors of operators there are states of random generators, of 5 KB each.
        assert abs(counter.peak - handed_out) <= 0.01 * handed_out + 20_000, engine
