"""The compatibility matrix: visit every cell, and write docs/compatibility.md from what came out.

python tests/compatibility/matrix.py          # or: make compatibility
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "benchmarks"))

from gpu.table import runs  # noqa: E402 - after the path
from gpu_check import recorded  # noqa: E402

PAGE = ROOT / "docs" / "compatibility.md"
PROGRAM = Path(__file__).with_name("cells.py")
SPREADS = ("plain", "DDP", "FSDP2", "FSDP2 + bf16")
EXACT = 1e-5
# The largest relative error of prediction, tangent and gradients, each.
ALLOWED = {
    "exact": {"prediction": EXACT, "tangent": EXACT, "gradients": EXACT},
    "finite_difference": {"prediction": EXACT, "tangent": 5e-4, "gradients": 5e-5},
    "bf16": {"prediction": 0.02, "tangent": 0.02, "gradients": 0.02},
}
ROWS = {
    ("chain", "on"): "`jvp=chain`",
    ("chain", "selective"): "`jvp=chain jvp.recompute=selective`",
    ("chain", "off"): "`jvp=chain jvp.recompute=false`",
    ("two_pass", "on"): "`jvp=two_pass jvp.checkpoint=true`",
    ("two_pass", "off"): "`jvp=two_pass`",
    ("full", "on"): "`jvp=full jvp.checkpoint=true`",
    ("full", "off"): "`jvp=full`",
    ("finite_difference", "on"): "`jvp=finite_difference jvp.checkpoint=true`",
    ("finite_difference", "off"): "`jvp=finite_difference`",
}

Outcome = dict[str, Any]  # what cells.py writes for one cell


def visit(folder: Path, extent: str = "all") -> list[Outcome]:
    """Every cell once, or those of the part that stands for all (`extent="part"`), by two gloo processes."""
    results = [folder / f"cells{rank}.json" for rank in range(2)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, str(PROGRAM), str(rank), str(folder / "store"), str(result), extent],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank, result in enumerate(results)
    ]  # fmt: skip
    try:
        said = [process.communicate(timeout=560)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    if any(process.returncode for process in processes):
        raise RuntimeError("\n".join(said))
    first, second = (json.loads(result.read_text()) for result in results)
    return [*first, *(cell for cell in second if cell["spread"] == "plain")]  # the others were run by both together


def allowed(cell: Outcome) -> dict[str, float]:
    """The tolerances of a cell."""
    if cell["spread"].endswith("bf16"):
        return ALLOWED["bf16"]
    return ALLOWED["finite_difference" if cell["engine"] == "finite_difference" else "exact"]


def wrong(cell: Outcome) -> bool:
    """Whether a cell ran and came to something else than the reference."""
    return cell["verdict"] == "yes" and any(cell["errors"][name] > most for name, most in allowed(cell).items())


def words(cells: list[Outcome]) -> dict[str, list[Outcome]]:
    """What is to be said of cells, and of which: how exact they are, the sentence that refuses them, or a failure."""
    said: dict[str, list[Outcome]] = {}
    for cell in cells:
        if cell["verdict"] != "yes":
            key = cell["reason"] if cell["verdict"] == "no" else "**fails**"
        else:
            key = "**wrong**" if wrong(cell) else "exact" if allowed(cell) is ALLOWED["exact"] else "yes"
        said.setdefault(key, []).append(cell)
    return said


def figure(value: float, percent: bool) -> str:
    return f"{100 * value:.1f} %" if percent else f"{value:.0e}".replace("e-0", "e-")


def render(cells: list[Outcome]) -> str:
    """The page."""
    letters: dict[str, str] = {}

    def short(said: str, found: list[Outcome]) -> str:
        if found[0]["verdict"] == "no":
            return f"no ({letters.setdefault(said, 'abcdefgh'[len(letters)])})"
        if said != "yes":
            return said
        tangent = max(cell["errors"]["tangent"] for cell in found)
        return f"tangent to {figure(tangent, found[0]['spread'].endswith('bf16'))}"

    def entry(network: str, row: tuple[str, str], spread: str) -> str:
        keys = ("network", "engine", "checkpointing", "spread")
        here = words([cell for cell in cells if tuple(map(cell.get, keys)) == (network, *row, spread)])
        if len(here) == 1:
            return short(*next(iter(here.items())))
        return "; ".join(
            f"{short(said, found)}: "
            + ", ".join(f"{c['attention']} {'compiled' if c['compiled'] else 'eager'}" for c in found)
            for said, found in here.items()
        )

    def table(network: str) -> str:
        """Of the settings and spreads that there are of a network."""
        own = [cell for cell in cells if cell["network"] == network]
        spreads = [spread for spread in SPREADS if any(cell["spread"] == spread for cell in own)]
        rows = [row for row in ROWS if any((cell["engine"], cell["checkpointing"]) == row for cell in own)]
        lines = [f"| {ROWS[row]} | {' | '.join(entry(network, row, spread) for spread in spreads)} |" for row in rows]
        return "\n".join([f"| setting | {' | '.join(spreads)} |", "|---" * (1 + len(spreads)) + "|", *lines])

    main = [cell for cell in cells if cell["network"] == "lightningdit"]
    return TEXT.format(
        count=len(main), possible=sum(cell["verdict"] == "yes" for cell in main), table=table("lightningdit"),
        stock=table("sd3"),
        refusals="\n".join(f"- ({letter}) {sentence}" for sentence, letter in letters.items()),
        version=torch.__version__.split("+")[0], exact=figure(EXACT, False),
        fd=figure(ALLOWED["finite_difference"]["tangent"], False), low=figure(ALLOWED["bf16"]["tangent"], True),
        runs=runs(recorded()),
    )  # fmt: skip


def without_figures(page: str) -> str:
    """What must not change from run to run, or from machine to machine."""
    return re.sub(r"\d+(\.\d+)*(e-\d+)?", "#", page)


TEXT = """\
# Compatibility

<!-- Written by `make compatibility`; a test compares it with what it finds. -->

One training step of FACM (anchor and shortcut, forward and backward) of a small LightningDiT in each combination of
tangent engine, spread over processes, checkpointing, attention tangent and compilation: {count} cells, of which
{possible} are possible. Each is compared with `jvp=full` in one process, float32, eager: prediction, tangent and
gradients, by the norm of the difference relative to the norm. The spread cells run on two processes. Made with torch
{version}.

An entry stands for four cells: attention tangent `math` and `streaming`, eager and `compile=true`. **exact**: all three
differ by less than {exact}.

{table}

{refusals}

Such a choice is refused with that sentence before training starts.

- **plain** is one process (`strategy=auto`), **DDP** `strategy=ddp`, **FSDP2** `strategy=fsdp_chain_jvp`, **FSDP2 +
  bf16** the same with `trainer.precision=bf16-mixed`.
- Before torch 2.13 `jvp=full` is refused under FSDP2, since `torch.func.jvp` does not pass through it there.
- `finite_difference` uses no attention tangent, so `math` and `streaming` are one for it; its error is that of the
  difference quotient, allowed up to {fd}.
- In bf16 the figure is the largest relative error of the tangent against float32, allowed up to {low}; it is that of a
  small network with random weights, not of a trained one.
- `compile=true` compiles the blocks of student and teacher (`torch.compile` with inductor, no breaks of the graph): the
  passes of teacher and anchor, ordinary forwards, and what `jvp=chain` recomputes run compiled. Tangent
  passes of `chain` and `two_pass` run in a compiled graph of their own, those of `full` eagerly; what
  `recompute=selective` and `recompute=false` differentiate runs compiled too. Compiled code draws other random numbers
  than eager code, so a block with dropout runs eagerly wherever it repeats what a tangent pass drew.
- The network here is told one time. One that is told the end of an average too (`objective/interval=auxiliary`, `span`,
  `decoupled`, `gated`) has tests of its own: every engine against `jvp=full` and central differences, each part of a
  decoupled one compiled, two processes under FSDP2 against one.

## A transformer of diffusers

The same step of a small network of SD 3.5's class (`backbone=diffusers`), with `math` and eager; the others of its kind
have [tests of their own](add_a_diffusers_model.md#proven).

{stock}

## On a GPU

In `trainer.precision=32-true` a GPU multiplies float32 matrices in TF32 as `matmul_precision=high` (the default) has
it: ten bits of mantissa, so that a tangent has about three exact digits. A run says so. `matmul_precision=highest`
computes all digits; `jvp=finite_difference` asks for it. Attention's kernel takes three products for one there
(`tf32x3`) and stays nearly exact ([attention tiles](performance.md#attention-tiles)).

The cells above are those of a CPU. What `make gpu-check` has trained on a GPU, with LightningDiT-XL/1 where no other
network is named:

<!-- gpu runs: make gpu-check -->
{runs}
<!-- end of gpu runs -->

**yes**: the run was measured, and no step was skipped for a loss that was not finite; that the same gradients come out
is what the tests in `tests/gpu` hold, against `jvp=full` on the same card.
"""


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        cells = visit(Path(folder))
    PAGE.write_text(render(cells))
    for cell in cells:
        if cell["verdict"] == "fails" or wrong(cell):
            print(json.dumps(cell, indent=2))
    print(f"{PAGE.relative_to(ROOT)}: {len(cells)} cells")


if __name__ == "__main__":
    main()
