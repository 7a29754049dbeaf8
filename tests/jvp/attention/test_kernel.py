"""The Triton kernel on inputs of more than 2^31 values, under Triton's interpreter."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

FAR_APART = """
import json, sys
import torch
from flowanchor.jvp.attention import Math, Triton
torch.manual_seed(0)
stride = 2**30 + 64  # of the samples: the third begins beyond 2^31; the file between them has holes and needs no disk
file = torch.from_file(sys.argv[1], shared=True, size=3 * stride, dtype=torch.float16)
q = file.as_strided((3, 1, 16, 16), (stride, 256, 16, 1)).copy_(torch.randn(3, 1, 16, 16))
k, v, dk, dv = torch.randn(4, 3, 1, 16, 16).half()
exact = Math()(*(x.double() for x in (q, k, v)), None, dk.double(), dv.double())
print(json.dumps([float((a.double() - b).norm() / b.norm()) for a, b in zip(Triton()(q, k, v, None, dk, dv), exact)]))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Triton has wheels for Linux only")
def test_offsets_beyond_32_bits(tmp_path):
    pytest.importorskip("triton")
    command = [sys.executable, "-c", FAR_APART, str(tmp_path / "inputs")]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, cwd=tmp_path)
    (tmp_path / "inputs").unlink(missing_ok=True)
    assert done.returncode == 0, done.stderr
    assert max(json.loads(done.stdout.splitlines()[-1])) < 0.003
