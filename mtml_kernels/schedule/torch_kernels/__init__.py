"""The kernels of `schedule.kernels` as PyTorch operations: a file for each family. Any device and floating-point type.

A result that is wanted, but zero because everything it is made of is absent, is None.
"""

from __future__ import annotations

from mtml_kernels.schedule.torch_kernels.common import TorchKernel
from mtml_kernels.schedule.torch_kernels.conv import CONV
from mtml_kernels.schedule.torch_kernels.linear import LINEAR
from mtml_kernels.schedule.torch_kernels.loss import LOSS
from mtml_kernels.schedule.torch_kernels.moves import MOVES
from mtml_kernels.schedule.torch_kernels.norm import NORM
from mtml_kernels.schedule.torch_kernels.pointwise import ACTIVATIONS
from mtml_kernels.schedule.torch_kernels.pool import POOL
from mtml_kernels.schedule.torch_kernels.softmax import SOFTMAX
from mtml_kernels.schedule.torch_kernels.sums import SUMS
from mtml_kernels.schedule.torch_kernels.update import UPDATE

__all__ = ["TORCH"]

TORCH: dict[str, TorchKernel] = {
    **LINEAR,
    **CONV,
    **NORM,
    **POOL,
    **ACTIVATIONS,
    **MOVES,
    **SOFTMAX,
    **LOSS,
    **UPDATE,
    **SUMS,
}
