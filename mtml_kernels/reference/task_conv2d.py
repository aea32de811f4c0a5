"""`task_conv2d` in plain PyTorch: one convolution with a group of channels for each task and group."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from mtml_kernels.schema.task_conv2d import ConvForm

__all__ = ["task_conv2d"]


def task_conv2d(x: Tensor, weight: Tensor, bias: Tensor | None, form: ConvForm) -> Tensor:
    """y [T, N, O, OH, OW] of x [T, N, C, H, W], weight [T or 1, O, C / groups, kh, kw], bias [T or 1, O] or None."""
    tasks = x.shape[0]
    if tasks == 0:
        return x.new_zeros(form.output_shape(x, weight))
    images = x.transpose(0, 1).flatten(1, 2)  # [N, T C, H, W]
    kernels = weight.expand(tasks, *weight.shape[1:]).flatten(0, 1)  # [T O, C / groups, kh, kw]
    biases = None if bias is None else bias.expand(tasks, -1).flatten()
    y = F.conv2d(images, kernels, biases, form.stride, form.padding, form.dilation, form.groups * tasks)
    return y.unflatten(1, (tasks, weight.shape[1])).transpose(0, 1)
