"""Types of numbers by their names: in settings, and in safetensors files."""

from __future__ import annotations

import torch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
FLOATS = ("F64", "F32", "F16", "BF16")  # as safetensors names them
WHOLE = ("I64", "I32", "I16", "I8", "U8")
