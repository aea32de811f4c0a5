"""The arguments of `mtml::task_update` and its backward op."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from mtml_kernels.schema.update import RULES, UpdateSpec

__all__ = ["BACKWARD_SCHEMA", "FORWARD_SCHEMA", "UpdateArgs", "UpdateForm", "form_of"]

_ARGUMENTS = "Tensor[] params, Tensor[] grads, Tensor[] rates, Tensor[] moments, Tensor hyper, int[] rule, int step"
FORWARD_SCHEMA = f"task_update({_ARGUMENTS}, str backend) -> Tensor[]"
# Cotangents of all results, and gradients of all that has one: params, grads, rates, moments and hyper.
BACKWARD_SCHEMA = f"task_update_backward(Tensor[] cotangents, {_ARGUMENTS}, str backend) -> Tensor[]"


class UpdateForm(NamedTuple):
    """All that is not a tensor: the rule, and how many steps it has taken before this one."""

    spec: UpdateSpec
    step: int


@functools.lru_cache(maxsize=64)
def _decoded(rule: tuple[int, ...]) -> UpdateSpec:
    return UpdateSpec.decode(*rule)


class UpdateArgs(NamedTuple):
    """The op's tensors in schema order. Of P parameters and M moments a parameter:"""

    params: list[Tensor]  # P, [T, *shape]
    grads: list[Tensor]  # the same
    rates: list[Tensor]  # P, [1 or T, *shape or ones]
    moments: list[Tensor]  # M P, those of the first moment first; none: zeros
    hyper: Tensor  # [8] float64, by the names of schema.update.HYPERS

    def flat(self) -> list[Tensor]:
        """All tensors one after another."""
        return [*self.params, *self.grads, *self.rates, *self.moments, self.hyper]

    def divide(self, flat: Sequence[Tensor]) -> UpdateArgs:
        """The inverse of `flat`, for as many."""
        n, m = len(self.params), len(self.moments)
        flat = list(flat)
        return UpdateArgs(flat[:n], flat[n : 2 * n], flat[2 * n : 3 * n], flat[3 * n : 3 * n + m], flat[3 * n + m])

    def results(self, spec: UpdateSpec) -> list[Tensor]:
        """Tensors of the shapes of the results: parameters, then moments."""
        return self.params * (1 + len(spec.moments))


def form_of(rule: Sequence[int], step: int) -> UpdateForm:
    """A form of the op's options; ValueError where `rule` is not what UpdateSpec.encode gives."""
    if len(rule) != 2 or not (0 <= rule[0] < len(RULES) and 0 <= rule[1] < 64):
        raise ValueError(f"rule: expected what UpdateSpec.encode gives, got {list(rule)}")
    return UpdateForm(_decoded(tuple(rule)), step)
