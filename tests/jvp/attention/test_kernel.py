"""The Triton kernel on inputs of more than 2^31 values, under Triton's interpreter."""

from __future__ import annotations

import sys

import pytest

from ..interpreted import interpreted

FAR_APART = """
import json, sys
import torch
from flowanchor.jvp.attention import Math, Triton
torch.manual_seed(0)
# The file has holes and needs no disk. Samples far apart: the third begins beyond 2^31, then the second.
file = torch.from_file(sys.argv[1], shared=True, size=3 * 2**30 + 256, dtype=torch.float16)
errors = []
for batch, stride in ((3, 2**30 + 64), (2, 2**31 + 64)):
    q = file.as_strided((batch, 1, 16, 16), (stride, 256, 16, 1)).copy_(torch.randn(batch, 1, 16, 16))
    k, v, dk, dv = torch.randn(4, batch, 1, 16, 16).half()
    exact = Math()(*(x.double() for x in (q, k, v)), None, dk.double(), dv.double())
    errors += [float((a.double() - b).norm() / b.norm()) for a, b in zip(Triton()(q, k, v, None, dk, dv), exact)]
print(json.dumps(errors))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Triton has wheels for Linux only")
def test_offsets_beyond_32_bits(tmp_path):
    pytest.importorskip("triton")
    try:
        assert max(interpreted(FAR_APART, str(tmp_path / "inputs"), tmp_path)) < 0.003
    finally:
        (tmp_path / "inputs").unlink(missing_ok=True)
