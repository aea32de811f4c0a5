"""The arguments of `mtml::task_linear` and its backward op."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

__all__ = ["BACKWARD_SCHEMA", "FORWARD_SCHEMA", "NO_ACTIVATION", "LinearForm"]

_TENSORS = "Tensor x, Tensor weight, Tensor? bias"
_OPTIONS = "int activation, float c0, float c1"
FORWARD_SCHEMA = f"task_linear({_TENSORS}, {_OPTIONS}, str backend) -> Tensor"
# `y`: what the forward op gave. Bit i of `needs`: the i-th of x, weight and bias wants its gradient.
BACKWARD_SCHEMA = (
    f"task_linear_backward(Tensor grad, Tensor y, {_TENSORS}, {_OPTIONS}, int needs, str backend) -> Tensor[]"
)
NO_ACTIVATION = -1


class LinearForm(NamedTuple):
    """All that is not a tensor: the activation by its code (program.activations.Act) and its two constants."""

    activation: int = NO_ACTIVATION
    c0: float = 1.0
    c1: float = 0.0

    @property
    def plain(self) -> LinearForm:
        """The same without the activation."""
        return LinearForm()

    def output_shape(self, x: Tensor, weight: Tensor) -> tuple[int, ...]:
        """[T, N, O]"""
        return (*x.shape[:2], weight.shape[1])
