"""What each described class of diffusers comes to: errors of value, tangent and gradient, and what a tiny step takes.

    python benchmarks/described.py            # about two CPU minutes; writes the table of docs/add_a_diffusers_model.md
    python benchmarks/described.py --table    # the table from the record; runs nothing

Tiny random networks, those of the tests (tests/plugins/diffusers_cases.py). Value: against the stock network, called by
hand. Tangent: against central differences. Gradient and tangent of Chain-JVP: against `torch.func.jvp` over the whole.
All in float64. A step is a prediction with its tangent and the backward pass, in float32, the two engines in turns.
"""

from __future__ import annotations

import argparse
import inspect
import json
import statistics
import sys
import time
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from counting import LiveBytes
from harness import RESULTS, ROOT, machine, markdown, refresh, write_json

sys.path.insert(0, str(ROOT / "src"))
sys.path.insert(1, str(ROOT / "tests" / "plugins"))

from diffusers_cases import CASES

from flowanchor.interfaces import Question
from flowanchor.jvp import Chain, Full
from flowanchor.plugins.backbones.diffusers.exactness import exact

RECORD = RESULTS / "described.json"
PAGE, NAME = ROOT / "docs" / "add_a_diffusers_model.md", "described classes"
ROUNDS = 5
LEFT_OUT = ("padded", " dev")  # the same classes with masks, or with a guidance embedding
KINK = 1e-9  # step of the difference where attention has a ReLU


def relative(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).detach().norm() / theirs.detach().norm())


def errors(name: str) -> dict[str, float]:
    """In float64."""
    case = CASES[name]
    network = case.network().double()
    x, t, cond = case.inputs()
    dx, dt, weight = torch.randn_like(x), torch.ones_like(t), torch.randn_like(x)
    with torch.no_grad(), exact(x):
        value = relative(network.predict(x, t, cond), case.ask(network.network, x, t, cond))
    found = {}
    for key, engine in {"full": Full(), "chain": Chain()}.items():
        network.zero_grad()
        answer = engine(network, x, cond, [Question(t, along=(dx, dt))])[0]
        (answer.prediction * weight).sum().backward()
        gradient = torch.cat([p.grad.flatten() for p in network.parameters() if p.grad is not None])
        found[key] = (answer.tangent, gradient)
    h = KINK if name == "Sana" else 1e-7
    with torch.no_grad():
        at = {s: network.predict(x + s * h * dx, t + s * h * dt, cond) for s in (-2, -1, 1, 2)}
    slope = (8 * (at[1] - at[-1]) - (at[2] - at[-2])) / (12 * h)
    return {
        "value": value, "tangent": relative(found["chain"][0], slope),
        "engines": relative(found["chain"][0], found["full"][0]),
        "gradient": relative(found["chain"][1], found["full"][1]),
    }  # fmt: skip


def step(name: str) -> dict[str, dict[str, float]]:
    """CPU seconds (median, the engines in turns) and the peak of live tensors, float32."""
    case = CASES[name]
    network = case.network()
    x, t, cond = case.inputs(torch.float32)
    along, weight = (torch.randn_like(x), torch.ones_like(t)), torch.randn_like(x)

    def run(engine: Any) -> None:
        network.zero_grad()
        answer = engine(network, x, cond, [Question(t, along=along)])[0]
        (answer.prediction * weight).sum().backward()

    engines: dict[str, Any] = {"chain": Chain(), "full": Full()}
    taken: dict[str, list[float]] = {key: [] for key in engines}
    for _ in range(ROUNDS + 1):
        for key, engine in engines.items():
            begun = time.process_time()
            run(engine)
            taken[key].append(time.process_time() - begun)
    found = {}
    for key, engine in engines.items():
        network.zero_grad()
        with LiveBytes() as counter:
            run(engine)
        found[key] = {"cpu_seconds": statistics.median(taken[key][1:]), "bytes": float(counter.peak)}
    return found


def lines_of(name: str) -> int:
    """Of the description's class: its members, without its docstring and comments."""
    kind = CASES[name].description
    text = inspect.getsource(kind).replace(f'"""{kind.__doc__}"""', "")
    return sum(bool(line.strip()) and not line.strip().startswith("#") for line in text.splitlines()) - 1


def table(record: Mapping[str, Any]) -> str:
    header = (
        "class", "lines", "value", "tangent, central difference", "tangent, chain to full", "gradient", "CPU ms, chain",
        "full", "peak KB, chain", "full",
    )  # fmt: skip
    rows = [
        [name, one["lines"], *(f"{one['errors'][key]:.0e}" if one["errors"][key] else "0"
                               for key in ("value", "tangent", "engines", "gradient")),
         *(f"{1000 * one['step'][key]['cpu_seconds']:.0f}" for key in ("chain", "full")),
         *(f"{one['step'][key]['bytes'] / 1e3:,.0f}" for key in ("chain", "full"))]
        for name, one in record["classes"].items()
    ]  # fmt: skip
    about = record["machine"]
    told = (
        "Relative errors in float64, on tiny random networks of two or three blocks; lines: of the description. A "
        "tiny step, float32, is mostly the time of Python: Chain-JVP runs each block twice. "
        f"`python benchmarks/described.py` on {about['cpu']}, one thread, torch {about['torch']}, {about['date']}, "
        f"commit {about['commit']}."
    )
    return f"{markdown(header, rows)}\n\n{told}"


def main() -> None:
    parser = argparse.ArgumentParser(description="Errors and costs of the described classes of diffusers.")
    parser.add_argument("--table", action="store_true", help="the table from the record; run nothing")
    if not parser.parse_args().table:
        torch.set_num_threads(1)
        warnings.simplefilter("ignore")
        record: dict[str, Any] = {"machine": machine(), "classes": {}}
        for name in CASES:
            if not name.endswith(LEFT_OUT):
                record["classes"][name] = {"lines": lines_of(name), "errors": errors(name), "step": step(name)}
                print(name, record["classes"][name], flush=True)
        write_json(RECORD, record)
    text = table(json.loads(RECORD.read_text()))
    print(text)
    refresh(PAGE, NAME, text)


if __name__ == "__main__":
    main()
