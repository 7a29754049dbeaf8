"""What a record says, for the README and the documentation; without one, that nobody measured."""

from __future__ import annotations

from typing import Any

from gpu import checks, training
from gpu.attention import FORWARDS, HEAD_SIZES
from harness import markdown

MISSING = "not measured"
NOBODY = "No GPU has been measured with this code yet: `make gpu-check` fills these rows."
# A step, and the flow-matching step that it is held against.
BESIDE = {
    "XL/1, 32, compiled, graph": "XL/1, 32, flow matching, compiled, graph",
    "XL/1, 32, recompute=false, compiled, graph": "XL/1, 32, flow matching, compiled, graph",
    "XL/1, 128, compiled, graph": "XL/1, 128, flow matching, compiled, graph",
    "XL/1, 128, recompute=false, compiled, graph": "XL/1, 128, flow matching, compiled, graph",
    "XL/1, 8, compiled, graph": "XL/1, 8, flow matching, compiled, graph",
    "digits, 64, compiled, graph": "digits, 64, flow matching, compiled, graph",
    "XL/1, 32, eager": "XL/1, 32, flow matching, eager",
    "Wan 1.3B, 2 images, eager": "Wan 1.3B, 2 images, flow matching, eager",
}
SHOWN = (1024, 8192)  # lengths of the attention table


def training_names() -> list[str]:
    made = (training.rows, training.more_rows, training.spread_rows, training.wan_rows)
    return [row.name for rows in made for row in rows(False)]


def table(record: dict[str, Any] | None) -> str:
    """Training steps, attention, and a note on where they were measured."""
    rows = {} if record is None else record["rows"]
    return "\n\n".join([_steps(rows), _attention(rows), _note(record, rows)])


def _steps(rows: dict[str, Any]) -> str:
    peak = rows.get("card", {}).get("matrix_tflops")
    head = ["training step", "ms", "host ms", "device ms", "images/s", "TFLOP/s (share)", "GB", "/ flow matching"]
    return markdown(head, [[name, *_step(name, rows, peak)] for name in training_names()])


def _step(name: str, rows: dict[str, Any], peak: float | None) -> list[str]:
    found = rows.get(name, {})
    if "step_ms" not in found:
        return [MISSING, *[""] * 6]
    rate = found.get("tflops")
    share = "" if rate is None else f"{rate:.0f}" + ("" if peak is None else f" ({100 * rate / peak:.0f} %)")
    beside = rows.get(BESIDE.get(name, ""), {}).get("step_ms")
    device = found.get("device_ms")
    return [
        f"{found['step_ms']:.1f}",
        f"{found['host_ms']:.1f}",
        "" if device is None else f"{device:.1f}",
        f"{found['images_per_second']:,.1f}",
        share,
        f"{found['reserved_gb']:.1f}" if "reserved_gb" in found else "",
        "" if beside is None else f"{found['step_ms'] / beside:.2f}",
    ]


def _attention(rows: dict[str, Any]) -> str:
    ways = [*FORWARDS, "tangent"]
    lines = []
    for d in HEAD_SIZES:
        found = rows.get(f"attention, heads of {d}", {})
        for tokens in SHOWN:
            lines.append([f"{d}, {tokens:,}", *(_rate(found.get(str(tokens), {}).get(way, {})) for way in ways)])
    names = ["head size, tokens: TFLOP/s", *(f"SDPA {name}" for name in FORWARDS), "output and tangent"]
    return markdown(names, lines)


def _rate(found: dict[str, Any]) -> str:
    return f"{found['tflops']:.0f}" if "tflops" in found else "refused" if found else MISSING


def _note(record: dict[str, Any] | None, rows: dict[str, Any]) -> str:
    if record is None:
        return NOBODY
    about, card, tests = record["machine"], rows.get("card", {}), rows.get("tests", {})
    peak = "" if "matrix_tflops" not in card else (
        f" Of the card: {card['matrix_tflops']:.0f} TFLOP/s in a bfloat16 product, {card['copy_tb_s']:.2f} TB/s in a "
        "copy."
    )  # fmt: skip
    verdict = tests.get("verdict", f"not run ({tests.get('missing', MISSING)})")
    return (
        f"Measured by `make gpu-check` on {about['device']}, torch {about['torch']}, {about['date']}, commit "
        f"{about['commit']}; bf16-mixed, random weights and latents.{peak} Tests on the card: {verdict}. "
        "TFLOP/s: the products of a step's forward and backward passes, those computed again included."
    )


# ---------------------------------------------------------------------------------------------------------- what ran

# A row of the page, and what must have been measured for it.
RUNS = {
    "one process, eager": ("XL/1, 32, eager",),
    "`compile=true`": ("XL/1, 32, compiled",),
    "`cuda_graph=true`": ("XL/1, 32, eager, graph", "XL/1, 32, compiled, graph"),
    "`jvp=two_pass`": ("XL/1, 16, jvp=two_pass, eager",),
    "`jvp=full`": ("XL/1, 16, jvp=full, eager",),
    "`jvp.recompute=false`": ("XL/1, 32, recompute=false, compiled, graph",),
    "`strategy=ddp`, one card": ("XL/1, 32, DDP on one card, eager", "XL/1, 32, DDP on one card, compiled, graph"),
    "`strategy=fsdp_chain_jvp`, one card": ("XL/1, 32, FSDP2 on one card, eager",),
    "`backbone=wan`": ("Wan 1.3B, 8 images, eager", "Wan 1.3B, 81 frames, eager"),
    "several cards": (),
}


def runs(record: dict[str, Any] | None) -> str:
    """What has trained on a GPU: for the page on compatibility."""
    rows = [[what, _ran(record, names)] for what, names in RUNS.items()]
    for row, where in (("tests", "tests/gpu"), ("graphs, tests", checks.GRAPHS)):
        tests = {} if record is None else record["rows"].get(row, {})
        rows.append([f"the tests in `{where}`", tests.get("verdict", "not yet")])
    head = "run on a GPU" if record is None else f"run on {record['machine']['device']}"
    return markdown(["bf16-mixed", head], rows)


def _ran(record: dict[str, Any] | None, names: tuple[str, ...]) -> str:
    """`yes` where all rows of these names were measured on a GPU and no step among them was skipped."""
    rows = {} if record is None else record["rows"]
    found = [rows.get(name, {}) for name in names]
    return "yes" if found and all("step_ms" in one and not one.get("skipped_steps") for one in found) else "not yet"
