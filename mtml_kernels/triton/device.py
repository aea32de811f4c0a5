"""Where launches go."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

__all__ = ["on"]


def on(device: torch.device) -> AbstractContextManager[Any]:
    """Makes a GPU the current one, as launches need it. Tensors on the CPU are the interpreter's."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
