"""The documented functions of the engine: tensors in, tensors out, everything checked."""

from mtml_kernels.functional.head_inner_loop import HeadResult, head_inner_loop
from mtml_kernels.functional.hvp import hvp
from mtml_kernels.functional.inner_loop import InnerLoopResult, inner_loop
from mtml_kernels.functional.linear_multihead_loss import linear_multihead_gram, linear_multihead_loss
from mtml_kernels.functional.multihead_loss import multihead_loss
from mtml_kernels.functional.task_conv2d import task_conv2d
from mtml_kernels.functional.task_linear import task_linear
from mtml_kernels.functional.task_update import task_update

__all__ = [
    "HeadResult",
    "InnerLoopResult",
    "head_inner_loop",
    "hvp",
    "inner_loop",
    "linear_multihead_gram",
    "linear_multihead_loss",
    "multihead_loss",
    "task_conv2d",
    "task_linear",
    "task_update",
]
