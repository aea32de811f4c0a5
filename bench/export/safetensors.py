"""Tensors as a .safetensors file: the length of a JSON header in eight bytes, the header, then the tensors' bytes."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

CODES = {torch.float64: "F64", torch.float32: "F32", torch.int64: "I64", torch.int32: "I32", torch.bool: "BOOL"}


def write(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write named tensors. Raises ValueError for a dtype that is not in CODES."""
    header: dict[str, object] = {}
    parts: list[bytes] = []
    at = 0
    for name, tensor in tensors.items():
        if tensor.dtype not in CODES:
            raise ValueError(f"{name}: expected one of {', '.join(map(str, CODES))}, got {tensor.dtype}")
        parts.append(tensor.detach().cpu().contiguous().numpy().tobytes())
        span = [at, at + len(parts[-1])]
        header[name] = {"dtype": CODES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": span}
        at = span[1]
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # so that the tensors begin at a multiple of eight bytes
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(parts))
