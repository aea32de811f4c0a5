"""The arguments of `mtml::task_conv2d` and its backward op."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

__all__ = ["BACKWARD_SCHEMA", "FORWARD_SCHEMA", "ConvForm"]

_TENSORS = "Tensor x, Tensor weight, Tensor? bias"
_OPTIONS = "int[] stride, int[] padding, int[] dilation, int groups"
FORWARD_SCHEMA = f"task_conv2d({_TENSORS}, {_OPTIONS}, str backend) -> Tensor"
# `y`: what the forward op gave. Bit i of `needs`: the i-th of x, weight and bias wants its gradient.
BACKWARD_SCHEMA = (
    f"task_conv2d_backward(Tensor grad, Tensor y, {_TENSORS}, {_OPTIONS}, int needs, str backend) -> Tensor[]"
)

Pair = tuple[int, int]


class ConvForm(NamedTuple):
    """All that is not a tensor; pairs are (along the height, along the width)."""

    stride: Pair = (1, 1)
    padding: Pair = (0, 0)
    dilation: Pair = (1, 1)
    groups: int = 1

    @property
    def plain(self) -> ConvForm:
        """The same without an activation: there is none."""
        return self

    def outputs(self, x: Tensor, weight: Tensor) -> tuple[int, int]:
        """(OH, OW), which are below 1 where the image is too small."""
        height, width = (
            (x.shape[3 + i] + 2 * self.padding[i] - self.dilation[i] * (weight.shape[3 + i] - 1) - 1) // self.stride[i]
            + 1
            for i in (0, 1)
        )
        return height, width

    def output_shape(self, x: Tensor, weight: Tensor) -> tuple[int, ...]:
        """[T, N, O, OH, OW]"""
        return (*x.shape[:2], weight.shape[1], *self.outputs(x, weight))
