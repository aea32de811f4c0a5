"""An optimiser's numbers as tensors to learn, and back."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mtml.compat.higher.optimizer import Override
from mtml.compat.higher.utils import flatten, recursive_map
from mtml.compat.rate import number
from mtml_kernels.checks import shown

__all__ = ["apply_trainable_opt_params", "get_trainable_opt_params"]


def get_trainable_opt_params(opt: torch.optim.Optimizer, device: torch.device | None = None) -> dict[str, list[Any]]:
    """An override with a tensor that requires grad for every number among the optimiser's settings.

    Switches, and settings that hold anything else than numbers, are left out.

    Example:
        >>> import torch
        >>> opt = torch.optim.SGD([torch.zeros(2, requires_grad=True)], lr=0.5)
        >>> get_trainable_opt_params(opt)["lr"]
        [tensor(0.5000, requires_grad=True)]
    """

    def tensor(value: Any) -> Tensor:
        if isinstance(value, Tensor):
            return value.detach().to(device, copy=True).requires_grad_()
        return torch.tensor(float(value), device=device, requires_grad=True)

    override: dict[str, list[Any]] = {}
    for group in opt.param_groups:
        for name, given in group.items():
            value = given if name == "params" else recursive_map(given, number)
            if name != "params" and all(map(_is_number, flatten(value))):
                override.setdefault(name, []).append(recursive_map(value, tensor))
    return override


def _is_number(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.is_floating_point()
    return isinstance(value, int | float) and not isinstance(value, bool)


def apply_trainable_opt_params(opt: torch.optim.Optimizer, override: Override) -> None:
    """Give the optimiser the values of an override, in the types that its settings have.

    Raises:
        ValueError: as many values as neither one nor one a group of parameters; a setting that the optimiser has not;
            a value of another structure than the setting's.

    Example:
        >>> import torch
        >>> opt = torch.optim.SGD([torch.zeros(2, requires_grad=True)], lr=0.5)
        >>> apply_trainable_opt_params(opt, {"lr": [torch.tensor(0.25)]})
        >>> opt.param_groups[0]["lr"]
        0.25
    """
    for name, values in override.items():
        if len(values) not in (1, len(opt.param_groups)):
            raise ValueError(
                f"override[{name!r}]: expected one value, or one for each of {len(opt.param_groups)} groups of "
                f"parameters, got {len(values)}"
            )
        for i, group in enumerate(opt.param_groups):
            if name not in group:
                raise ValueError(f"override: expected settings of {type(opt).__name__}, got {name!r}")
            group[name] = _applied(name, values[0] if len(values) == 1 else values[i], group[name])


def _applied(name: str, value: Any, present: Any) -> Any:
    """`present` with the numbers of `value`."""
    value = number(value)
    if isinstance(present, Tensor):
        present.data = torch.as_tensor(value).detach().to(present)
        return present
    if isinstance(present, dict) and isinstance(value, dict) and len(present) == len(value):
        return type(present)({key: _applied(name, value[key], old) for key, old in present.items()})
    if isinstance(present, list | tuple) and isinstance(value, list | tuple) and len(present) == len(value):
        new = [_applied(name, v, old) for v, old in zip(value, present, strict=True)]
        return type(present)(*new) if hasattr(present, "_fields") else type(present)(new)
    single = isinstance(value, int | float) or (isinstance(value, Tensor) and value.numel() == 1)
    if single and not isinstance(present, list | tuple | dict):
        return type(present)(value.item() if isinstance(value, Tensor) else value)
    raise ValueError(f"override[{name!r}]: expected what is built like {shown(present)}, got {shown(value)}")
