"""The inner learning rates of a call, in the form that the engine takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import copy
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from mtml.inner_lr import InnerLR
from mtml.params import by_first_name
from mtml_kernels.checks import check_finite
from mtml_kernels.rates import op_rates

__all__ = ["Rates"]


class Rates:
    """Reads the inner learning rates of one call: [1] or [K], or [1 or K, *shape], one for all tensors or one for each.

    Numbers are converted once, `constant`; tensors every time.
    """

    def __init__(
        self,
        lr: Any,
        shapes: Mapping[str, torch.Size],
        steps: int,
        like: Tensor,
        known: Sequence[str],
        others: Mapping[str, str],  # further names of shared tensors, with their first
    ) -> None:
        self.lr, self.shapes, self.steps, self.known, self.others = lr, shapes, steps, known, others
        self.dtype, self.device, self.names = like.dtype, like.device, list(shapes)
        self.factor = 1.0
        self._checked: list[int] | None = None
        first = self._read()
        # numbers alone never change, so their list is made once
        table = dict(lr.items()) if hasattr(lr, "items") else {"": lr}
        numbers = not isinstance(lr, InnerLR) and not any(isinstance(rate, Tensor) for rate in table.values())
        self.constant = first if numbers else None

    def __call__(self) -> list[Tensor]:
        if self.constant is not None:
            return self.constant
        return self._read() if self.factor == 1.0 else [self.factor * rate for rate in self._read()]

    def times(self, factor: float) -> Rates:
        """The same rates, each times a number."""
        if factor == 1.0:
            return self
        found = copy(self)
        found.factor = self.factor * factor
        found.constant = None if self.constant is None else [factor * rate for rate in self.constant]
        return found

    def read_by_calls(self) -> dict[str, Any]:
        """What calls depend on: not on numbers, of which `constant` was made."""
        unread = {"_checked"} if self.constant is None else {"_checked", "lr"}
        return {name: value for name, value in vars(self).items() if name not in unread}

    def _read(self) -> list[Tensor]:
        if not isinstance(self.lr, InnerLR):
            lr = by_first_name(self.lr, self.others) if self.others and hasattr(self.lr, "items") else self.lr
            return op_rates(lr, self.shapes, self.steps, self.dtype, self.device, self.known)
        if self.lr.steps is not None and self.lr.steps < self.steps:
            raise ValueError(
                f"lr: expected at least steps={self.steps} rates, got InnerLR(steps={self.lr.steps}); "
                "pass fewer steps, or steps=None to share one rate"
            )
        rates = self.lr.read(self.names)
        self._check_finite(rates)
        count = max(self.steps, 1)
        rates = [r if r.shape[0] in (1, count) else r[:count] for r in rates]
        if rates and (rates[0].dtype, rates[0].device) != (self.dtype, self.device):
            return [r.to(self.device, self.dtype) for r in rates]
        return rates

    def _check_finite(self, rates: list[Tensor]) -> None:
        """Look at the values again only where they were written to since; a graph looks at every run."""
        if is_compiling():
            for rate in rates:
                check_finite("lr", rate)
            return
        versions = [rate._version for rate in self.lr.rates._parameters.values()]
        if versions != self._checked:
            for rate in rates:
                check_finite("lr", rate)
            self._checked = versions
