"""Inner learning rates in every form a caller may write them, turned into the one form that the op takes.

That form is a list: one tensor for all adapted parameters, or one for each in their order. A tensor is [1] or [K]
(one rate, or one per step), or [1, *shape] or [K, *shape] (a rate per element).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from mtml_kernels.checks import check_finite, shown

__all__ = ["Shapes", "number_as_rates", "op_rates", "rate_at"]

Shapes = Mapping[str, torch.Size]


def _enough(name: str, rates: Tensor, steps: int) -> Tensor:
    """The first `steps` of rates [K, ...]; a K = 1 stays as it is, and no step still leaves one row."""
    if rates.shape[0] < steps:
        raise ValueError(
            f"{name}: expected at least steps={steps} rates, got {rates.shape[0]} in a tensor {list(rates.shape)}; "
            "pass a scalar for one rate at every step, or fewer steps"
        )
    return rates if rates.shape[0] == max(steps, 1) else rates[: max(steps, 1)]


def _for_all(rates: Tensor, steps: int) -> Tensor:
    """A rate, or one per step, for every parameter: [1] or [K]."""
    if rates.ndim == 0:
        return rates.reshape(1)
    if rates.ndim == 1:
        return _enough("lr", rates, steps)
    raise ValueError(
        f"lr: expected a number, a scalar tensor or one rate per step [K], got {shown(rates)}; "
        "for rates per tensor or element pass {name: tensor} or mtml.InnerLR"
    )


def _for_one(name: str, rates: Tensor, shape: torch.Size, steps: int) -> Tensor:
    """The rates of one parameter: scalar, [*shape], or per step with exactly 1 + ndim dimensions."""
    label, dims = f"lr[{name!r}]", len(shape)
    if rates.ndim == 0:
        return rates.reshape(1)
    if dims and rates.shape == shape:
        return rates.unsqueeze(0)
    if rates.ndim == 1 + dims:
        if rates.shape[1:] == shape:
            return _enough(label, rates, steps)
        if all(size == 1 for size in rates.shape[1:]):
            return _enough(label, rates.reshape(-1), steps)
    raise ValueError(
        f"{label}: expected a scalar, the parameter's shape {list(shape)}, or one rate per step as "
        f"[K{''.join(', 1' for _ in shape)}] or {['K', *shape]}; got {shown(rates)}".replace("'K'", "K")
    )


def number_as_rates(name: str, value: Any, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A rate that is a number in a tensor of this shape. Raises as `check_finite`."""
    if not is_dynamo_compiling():
        check_finite(name, value)
        return torch.full(shape, float(value), dtype=dtype, device=device)
    if isinstance(value, bool) or not isinstance(value, float | int):
        check_finite(name, value)  # which raises
    # as a factor a number is an input of the graph; anywhere else every other number would make a graph of its own
    rates = torch.ones(shape, dtype=dtype, device=device) * value
    check_finite(name, rates)
    return rates


def op_rates(
    lr: Any, shapes: Shapes, steps: int, dtype: torch.dtype, device: torch.device, known: Sequence[str] = ()
) -> list[Tensor]:
    """The list of rates for the parameters `shapes` (name -> shape, in the op's order), differentiable to `lr`.

    Args:
        lr: a number, a scalar tensor, [K], or {name: number or tensor}.
        known: names in a dict that are allowed although they are not adapted.

    Raises:
        TypeError: `lr` is none of these.
        ValueError: a rate is not finite, a shape does not fit, a name is missing or unknown, or steps outnumber rates.
    """
    if isinstance(lr, Tensor):
        check_finite("lr", lr)
        return [_for_all(lr.to(device, dtype), steps)]
    if isinstance(lr, float | int) or not hasattr(lr, "items"):
        return [number_as_rates("lr", lr, (1,), dtype, device)]
    table = dict(lr.items())
    _check_names(table, shapes, known)
    rates = []
    for name, shape in shapes.items():
        value = table[name]
        if isinstance(value, Tensor):
            check_finite(f"lr[{name!r}]", value)
            rates.append(_for_one(name, value.to(device, dtype), shape, steps))
        else:
            rates.append(number_as_rates(f"lr[{name!r}]", value, (1,), dtype, device))
    return rates


def _check_names(table: Mapping[str, Any], shapes: Shapes, known: Sequence[str]) -> None:
    missing = [name for name in shapes if name not in table]
    if missing:
        raise ValueError(
            f"lr: expected a rate for every adapted tensor, got none for {', '.join(map(repr, missing[:5]))}; "
            "add it (0.0 keeps a tensor as it is) or exclude the tensor with params="
        )
    unknown = [name for name in table if name not in shapes and name not in known]
    if unknown:
        raise ValueError(f"lr: expected names of the model's tensors, got {', '.join(map(repr, unknown[:5]))}")


def rate_at(rates: Sequence[Tensor], index: int, step: int) -> Tensor:
    """The rate of adapted parameter `index` at `step`: a scalar or [*shape]."""
    table = rates[index] if len(rates) > 1 else rates[0]
    return table[0 if table.shape[0] == 1 else step]
