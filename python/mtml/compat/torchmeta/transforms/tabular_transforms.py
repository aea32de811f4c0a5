"""Transforms of rows of tables."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

__all__ = ["NumpyToTorch"]


class NumpyToTorch:
    """numpy.ndarray -> torch.Tensor, contiguous, of the same dtype."""

    def __call__(self, numpy_array: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(numpy_array))

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"
