"""The plan of memory: what it counts, against arithmetic and against real processes."""

from __future__ import annotations

import copy
import warnings
from dataclasses import asdict, replace
from functools import cache

import pytest
import torch

import memory_plan
from flowanchor.jvp.attention import resolve
from memory_plan import SMALL, Case, Checked, check, check_table, configured, plan_one, section
from planning import ENGINES, Plan, Setting, lasting, networks, plan

LEAN = "Chain(recompute)"


def of(case: Case, **size) -> Case:
    """With a smaller network."""
    return replace(case, size={**case.size, **size})


DIT, WAN = of(SMALL[0], depth=2), of(SMALL[1], num_layers=1)


@pytest.fixture(autouse=True)
def _quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@cache
def planned(engine):
    """From one run of a step, for two processes and for eight."""
    return plan_one(WAN, engine, (2, 8))


@cache
def small_dit(depth):
    """Of one of four processes, in float32."""
    return plan(of(SMALL[0], depth=depth).build, ENGINES[LEAN](resolve("auto")), Setting(1, low_precision=False), 4)


def test_what_lasts_is_shared_out_and_what_a_sample_needs_is_not():
    two, eight = planned(LEAN).values()
    with torch.device("meta"):
        parameters = sum(p.nbytes for p in WAN.build().parameters())
    for found, processes in ((two, 2), (eight, 8)):
        # FSDP2 pads a dimension that the processes do not divide.
        assert found.parts["parameters"] == pytest.approx(parameters / processes, rel=0.05)
        assert found.parts["optimizer"] == 2 * found.parts["parameters"] == found.parts["averages"]
    assert two.parts["kept for backward"] == eight.parts["kept for backward"]
    assert eight.peak < two.peak


def test_a_teacher_in_bfloat16_and_low_moments_take_half():
    case = SMALL[0]
    shares = {}
    for low, moments in ((False, False), (True, False), (True, True)):
        setting = Setting(2, low_precision=low, low_moments=moments)
        shares[low, moments] = lasting(networks(case.build, setting)[1], setting, 2)
    exact, mixed, lean = shares.values()
    assert 0.5 * exact["teacher"] <= mixed["teacher"] < 0.75 * exact["teacher"], "embedders and modulations stay"
    assert lean["optimizer"] == mixed["optimizer"] // 2 == exact["optimizer"] // 2
    assert {part: lean[part] for part in ("parameters", "averages", "teacher")} == {
        part: mixed[part] for part in ("parameters", "averages", "teacher")
    }


def test_what_lasts_can_be_counted_anew_without_a_step(monkeypatch):
    case = WAN
    found = {case.name: {LEAN: {str(world): asdict(one) for world, one in planned(LEAN).items()}}}
    wanted = copy.deepcopy(found)
    for one in found[case.name][LEAN].values():
        one["parts"].update(teacher=1, optimizer=2)
    monkeypatch.setattr(memory_plan, "CASES", [case])
    memory_plan.renew_lasting(found)
    assert found == wanted


@pytest.mark.parametrize("engine", [LEAN, pytest.param("Chain(recompute=False)", marks=pytest.mark.slow)])
def test_one_run_tells_of_any_number_of_processes(engine):
    derived, run = planned(engine)[8], plan_one(WAN, engine, (8,))[8]
    assert derived.step_peak == pytest.approx(run.step_peak, rel=0.02)
    assert derived.parts == pytest.approx(run.parts, rel=0.02, abs=0.02 * run.step_peak)
    assert derived.communication == pytest.approx(run.communication, rel=0.05)  # padding


def test_a_block_more_keeps_one_input_of_each_branch():
    kept = [small_dit(depth).parts["kept for backward"] for depth in (1, 2)]
    tokens = 16 * 16 * 96 * 4  # rows x columns x width, float32
    assert kept[1] - kept[0] == pytest.approx(2 * tokens, rel=0.1)  # anchor and shortcut


def test_collectives_are_counted():
    with torch.device("meta"):
        network = DIT.build()
    parameters = sum(p.nbytes for p in network.parameters())
    planned = small_dit(2)
    # Teacher, forward and backward gather everything once; each process lacks three quarters. Root and head stay whole.
    assert planned.communication["all_gather"] == pytest.approx(3 * 0.75 * parameters, rel=0.05)
    assert planned.communication["reduce_scatter"] == pytest.approx(0.75 * parameters, rel=0.05)


@pytest.mark.parametrize(
    ("engine", "case"),
    [
        (LEAN, of(WAN, num_layers=2)),
        pytest.param("Chain(recompute=False)", replace(DIT, precisions=(False,)), marks=pytest.mark.slow),
    ],
    ids=["wan", "dit"],
)
def test_the_plan_is_what_two_processes_allocate(engine, case):
    (one,) = check([engine], (2,), [case], rounds=1)
    if abs(one.error) > 0.1:  # a collective that ended late: the least of several rounds counts
        (one,) = check([engine], (2,), [case])
    assert abs(one.error) <= 0.1, one
    assert "Largest error" in check_table([one])


@pytest.mark.slow
def test_the_plan_is_what_four_processes_allocate():
    for one in check(list(ENGINES), (4,)):
        assert abs(one.error) <= 0.1, one


def test_the_error_is_against_the_largest_process():
    assert Checked("n", "e", 2, False, 90, [50, 100]).error == pytest.approx(-0.1)


def test_the_table_says_from_how_many_gpus_on_it_fits():
    plans = {8: Plan({"parameters": int(90e9)}, 0, {}), 16: Plan({"parameters": int(45e9)}, 0, {})}
    text = section("name", {LEAN: plans})
    assert "| Chain(recompute) | 90.0 | **45.0** | 16 GPUs |" in text


def test_a_network_of_any_config():
    network = configured(["backbone.preset=nano", "backbone.depth=3"])
    assert len(network.blocks) == 3
