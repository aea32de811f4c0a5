"""The linear heads of CUDA tensors: computed by Triton's interpreter, and left alone where there is no GPU."""

from __future__ import annotations

import pytest
import torch
from cases.triton_process import interpret

from mtml_kernels import linear_multihead_loss
from mtml_kernels.errors import BackendUnavailable

pytest.importorskip("triton", reason="triton is required on Linux only")


def test_through_the_interpreter() -> None:
    interpret("linear_multihead_loss.py", "")


def test_cpu_tensors_are_refused() -> None:
    x, w, y = torch.zeros(2, 3), torch.zeros(4, 3), torch.zeros(2, dtype=torch.long)
    with pytest.raises(BackendUnavailable, match="triton"):
        linear_multihead_loss(x, [w], None, [y], backend="triton")
