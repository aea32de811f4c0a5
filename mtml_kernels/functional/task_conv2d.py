"""`task_conv2d`, the documented function."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mtml_kernels.checks import shown
from mtml_kernels.functional.task_tensors import of_tasks
from mtml_kernels.ops.task_conv2d import BACKENDS, task_conv2d_call
from mtml_kernels.precision import cast, computed_in, float32_call, result_dtype
from mtml_kernels.schema.task_conv2d import ConvForm

__all__ = ["task_conv2d"]

Size = int | tuple[int, int]

_computed = computed_in(BACKENDS)


def task_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: Size = 1,
    padding: Size = 0,
    dilation: Size = 1,
    groups: int = 1,
    backend: str = "auto",
) -> Tensor:
    """A convolution for a batch of tasks, each with its own weights: y[t] = x[t] * W[t] + b[t].

    Differentiable any number of times, in forward mode and under torch.func's transforms. A weight or bias without the
    task dimension is shared by all tasks; its gradient is the sum over them.

    Args:
        x: [T, N, C, H, W].
        weight: [T, O, C / groups, kh, kw], or [O, C / groups, kh, kw] for all tasks.
        bias: [T, O], or [O] for all tasks, or None.
        stride, padding, dilation: a whole number, or a pair (along the height, along the width). Padding is of zeros.
        groups: into how many the channels and the outputs are divided.
        backend: "auto", "cpu" (float32 and float64), "triton" (CUDA tensors), "torch" (any device) or "reference".

    float16 and bfloat16 are computed in float32 where the backend does not take them; under autocast dtypes may differ,
    and y is float32.

    Returns:
        y [T, N, O, OH, OW].

    Raises:
        ValueError: shapes or devices disagree, the image is smaller than the kernel, a size is out of range, or an
            unknown backend.
        TypeError: an argument is no tensor or no whole number, or dtypes disagree.
        BackendUnavailable: `backend` names one that cannot run here.

    Example:
        >>> import torch
        >>> from mtml_kernels import task_conv2d
        >>> x, weight = torch.randn(4, 10, 3, 8, 8), torch.randn(4, 5, 3, 3, 3, requires_grad=True)
        >>> y = task_conv2d(x, weight, torch.zeros(5), stride=2, padding=1)
        >>> y.square().mean().backward()
        >>> y.shape, weight.grad.shape
        (torch.Size([4, 10, 5, 4, 4]), torch.Size([4, 5, 3, 3, 3]))
    """
    if float32_call(_computed, backend, x, x, weight, bias):
        options: Any = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
        given = cast((x, weight, bias), torch.float32)
        return task_conv2d(*given, **options, backend=backend).to(result_dtype(x))
    pairs = (_pair("stride", stride), _pair("padding", padding), _pair("dilation", dilation))
    if not _whole(groups):
        raise TypeError(f"groups: expected a whole number, got {shown(groups)}")
    weights, biases = of_tasks("weight", weight, 4), of_tasks("bias", bias, 1)
    return task_conv2d_call(x, weights, biases, ConvForm(*pairs, groups), backend)


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _pair(name: str, value: Size) -> tuple[int, int]:
    """A size along both axes."""
    pair: Any = (value, value) if _whole(value) else value
    if not isinstance(pair, tuple | list) or len(pair) != 2 or not all(map(_whole, pair)):
        raise TypeError(
            f"{name}: expected a whole number or a pair (along the height, along the width), got {shown(value)}"
        )
    return (pair[0], pair[1])
