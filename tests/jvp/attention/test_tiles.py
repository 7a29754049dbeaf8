"""The kernel as it is launched, compiled for cards that are not here: loads, shared memory, registers; the tuner."""

from __future__ import annotations

import json
import re
import subprocess
from unittest.mock import patch

import pytest
import torch

from flowanchor.jvp.attention.tiles import LARGE, OTHERS, SMALL, Card, Tile, candidates, choose
from flowanchor.jvp.attention.tuning import length_class, tuned

triton = pytest.importorskip("triton")
triton_kernel = pytest.importorskip("flowanchor.jvp.attention.triton_kernel")

CARDS = {
    80: Card("NVIDIA A100", (8, 0), 163 << 10),
    86: Card("NVIDIA A10", (8, 6), SMALL),
    90: Card("NVIDIA H100", (9, 0), LARGE),
}
SIZES = [48, 64, 72, 80, 88, 96, 112, 128, 160, 192, 224, 256]  # of every entry of the table
QUICK = [64, 72, 128]


class Driver:
    """Stands for a card's driver: tells what is compiled for."""

    def __init__(self, architecture: int) -> None:
        self.architecture = architecture

    def get_current_device(self) -> int:
        return self.architecture  # Triton keeps what it compiled per device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.architecture, 32)


def in_a_network(d: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """q, k, v and their tangents: q and k after their norms, v a slice of the joint projection."""

    def dense(tokens: int) -> torch.Tensor:
        return torch.zeros(2, tokens, 4, d, dtype=dtype).transpose(1, 2)

    def sliced(tokens: int) -> torch.Tensor:
        return torch.zeros(2, tokens, 3, 4, d, dtype=dtype)[:, :, 2].transpose(1, 2)

    return [dense(40), dense(50), sliced(50), dense(40), dense(50), sliced(50)]


def built(d: int, dtype: torch.dtype, architecture: int, tmp_path, precision: str = "ieee"):
    """PTX, shared memory in bytes, and spilled bytes of a launch with the table's tile."""
    from triton import knobs
    from triton.runtime import driver

    tile = choose(d, dtype, CARDS[architecture], precision)
    grid, arguments, options, _ = triton_kernel.launch(*in_a_network(d, dtype), 0.1, tile, precision)
    with patch.object(driver, "_active", Driver(architecture)):
        kernel = triton_kernel._kernel.warmup(*arguments, grid=grid, **options)
    (tmp_path / "kernel.ptx").write_text(kernel.asm["ptx"])
    name = "sm_90a" if architecture == 90 else f"sm_{architecture}"
    command = [knobs.nvidia.ptxas.path, "-v", f"--gpu-name={name}", str(tmp_path / "kernel.ptx"), "-o", "/dev/null"]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    spilled = re.search(r"(\d+) bytes spill stores", said)
    assert spilled is not None, said
    return kernel.asm["ptx"], kernel.metadata.shared, int(spilled[1])


@pytest.mark.parametrize("architecture", CARDS)
@pytest.mark.parametrize(
    "d, dtype",
    [
        *((d, torch.bfloat16) for d in QUICK),
        *(pytest.param(d, torch.bfloat16, marks=pytest.mark.slow) for d in SIZES if d not in QUICK),
        *(pytest.param(d, torch.float16, marks=pytest.mark.slow) for d in SIZES),
    ],
)
def test_half_precision_on_a_card(d, dtype, architecture, tmp_path):
    ptx, shared, spilled = built(d, dtype, architecture, tmp_path)
    assert not re.search(r"ld\.global\S*\.b16", ptx), "loads of two bytes: the rows are not known to be aligned"
    assert "cp.async" in ptx, "nothing is loaded ahead"
    assert shared <= CARDS[architecture].shared
    assert spilled == 0


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["ieee", "tf32x3"])
@pytest.mark.parametrize("architecture", CARDS)
@pytest.mark.parametrize("d", SIZES)
def test_float32_on_a_card(d, architecture, precision, tmp_path, record_property):
    """Twice the registers of half precision: some are spilled, which costs time and is recorded here."""
    ptx, shared, spilled = built(d, torch.float32, architecture, tmp_path, precision)
    record_property("spilled_bytes", spilled)
    assert shared <= CARDS[architecture].shared
    assert ("tf32" in ptx) == (precision == "tf32x3")


@pytest.mark.parametrize("d, unit", [(72, 8), (36, 4), (10, 2), (9, 1)])
def test_strides_come_in_the_largest_unit_that_16_bytes_hold(d, unit):
    given = in_a_network(d, torch.bfloat16)
    _, arguments, options, _ = triton_kernel.launch(*given, 0.1, Tile(16, 16, 4, 1), "ieee")
    assert options["UNIT"] == unit
    assert [stride * unit for stride in arguments[13:16]] == list(given[0].stride()[:3])


def test_strides_that_nobody_steps_do_not_count():
    given = [tensor[:1] for tensor in in_a_network(72, torch.bfloat16)]
    given = [tensor.as_strided(tensor.shape, (7, *tensor.stride()[1:])) for tensor in given]
    assert triton_kernel.launch(*given, 0.1, Tile(16, 16, 4, 1), "ieee")[2]["UNIT"] == 8


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_every_head_size_has_a_tile(dtype):
    for d in range(1, 257):
        for card in CARDS.values():
            for precision in ("ieee", "tf32x3", "tf32"):
                assert choose(d, dtype, card, precision) == candidates(d, dtype, card, precision)[0]
    measured = {64: (128, 64, 8, 3), 72: (128, 64, 8, 3), 128: (128, 64, 8, 2)}
    assert {d: tuple(choose(d, torch.bfloat16, CARDS[90])) for d in measured} == measured


# ---------------------------------------------------------------------------------------------------------- autotuner


def tune(tmp_path, seconds, card=CARDS[90], keys=1000, d=72):
    """The tile that is found where a call with a tile takes `seconds(tile)`, and the tiles that were timed."""
    timed = []

    def run(tile):
        timed.append(tile)
        return seconds(tile)

    return tuned(card, d, torch.bfloat16, "ieee", keys, run, str(tmp_path), lambda call: call()), timed


def forget():
    from flowanchor.jvp.attention import tuning

    tuning._KNOWN.clear()


def test_the_fastest_tile_is_found_once_and_remembered(tmp_path):
    forget()
    best = OTHERS[4]
    found, timed = tune(tmp_path, lambda tile: 1.0 if tile == best else 2.0)
    assert found == best and timed == candidates(72, torch.bfloat16, CARDS[90])
    assert tune(tmp_path, lambda tile: 1.0, keys=900) == (best, []), "900 and 1,000 keys are of one class"
    forget()
    assert tune(tmp_path, lambda tile: 1.0) == (best, []), "another process reads the file"
    (file,) = tmp_path.iterdir()
    assert file.name == "attention-nvidia-h100.json"
    assert json.loads(file.read_text()) == {f"triton {triton.__version__}, head 72, bfloat16, 1024 keys": list(best)}
    assert tune(tmp_path, lambda tile: 1.0, keys=5000)[1] and tune(tmp_path, lambda tile: 1.0, CARDS[86])[1]
    assert len(list(tmp_path.iterdir())) == 2 and len(json.loads(file.read_text())) == 2


def test_what_a_card_refuses_is_no_candidate(tmp_path):
    from triton.runtime.errors import OutOfResources

    forget()

    def seconds(tile):
        if tile.stages == 3:
            raise OutOfResources(300_000, 232_448, "shared memory")
        if tile.keys == 32:
            raise RuntimeError("a launch that fails")
        return tile.queries

    assert tune(tmp_path, seconds)[0] == Tile(64, 64, 4, 2)


@pytest.mark.parametrize("content", ["{", "[1]", '{"a": ', "{}"])
def test_a_damaged_file_is_measured_again(content, tmp_path):
    forget()
    path = tmp_path / "attention-nvidia-h100.json"
    path.write_text(content)
    assert tune(tmp_path, lambda tile: tile.keys)[1]
    assert len(json.loads(path.read_text())) == 1
    name = next(iter(json.loads(path.read_text())))
    for strange in ([1, 2, 3, 4], "x", None, [64, 32]):
        forget()
        path.write_text(json.dumps({name: strange}))
        assert tune(tmp_path, lambda tile: tile.keys)[1], "a tile that is no candidate is not believed"


def test_without_a_disk_the_tile_is_known_to_this_process(tmp_path):
    forget()
    blocked = tmp_path / "file"
    blocked.write_text("")
    found, timed = tune(blocked / "folder", lambda tile: tile.keys)
    assert timed and tune(blocked / "folder", lambda tile: 1.0) == (found, [])


def test_length_classes():
    assert [length_class(n) for n in (1, 256, 257, 1024, 1025, 16_384, 100_000)] == [
        256, 256, 512, 1024, 2048, 16_384, 16_384,
    ]  # fmt: skip
