"""Half precision and autocast: what is stored in float16 or bfloat16 is computed in float32.

The compiled engine has no kernels in half precision. A call with tensors of it runs on float32 copies, one of each
tensor, made on the way in: nothing is rounded until the results are, so K inner steps keep their weights in float32.
Backends that take half precision themselves (the schedules, Triton's losses) get it as it is: they too keep weights and
sums in float32.

Under torch.autocast calls take any mixture of float16, bfloat16 and float32, as PyTorch's operations do there, and all
is computed in float32: the products too that autocast would round, and on the way back, whatever surrounds it. Losses
and outputs are float32. float64 stays what it is, which autocast leaves alone too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.compiler import is_compiling
from torch.utils import _pytree as pytree

from mtml_kernels.registry import Registry

__all__ = [
    "HALF",
    "autocast_dtype",
    "cast",
    "casts",
    "computed_in",
    "first_floating",
    "float32_call",
    "mixes",
    "plainly",
    "result_dtype",
]

HALF = frozenset({torch.float16, torch.bfloat16})
SINGLE = frozenset({torch.float32})

T = TypeVar("T")
Computed = Callable[[str | None, str, torch.dtype], torch.dtype]


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """What torch.autocast casts to on such devices, None where it is off or they have none."""
    known = torch.amp.is_autocast_available(device_type)  # not of "meta", which raises an error below
    return torch.get_autocast_dtype(device_type) if known and torch.is_autocast_enabled(device_type) else None


def casts(like: Tensor) -> bool:
    """Whether autocast is on for the device of a tensor."""
    if not (is_compiling() or torch._C._is_any_autocast_enabled()):  # which a tracer cannot ask, and is soon asked
        return False
    return autocast_dtype(like.device.type) is not None


def plainly(like: Tensor) -> AbstractContextManager[Any]:
    """Within it products of such tensors are computed as they stand."""
    return torch.autocast(like.device.type, enabled=False) if casts(like) else nullcontext()


def mixes(dtype: torch.dtype) -> bool:
    """Whether autocast mixes a dtype with others."""
    return dtype is torch.float32 or dtype in HALF


def computed_in(backends: Registry) -> Computed:
    """(backend asked for, device type, dtype) -> the dtype in which an op runs where autocast is off, a constant to
    torch.compile: half precision only where the backend that float32 would get takes it itself.
    """

    def computed(requested: str | None, device_type: str, dtype: torch.dtype) -> torch.dtype:
        if dtype not in HALF:
            return dtype
        chosen = backends.resolve(requested, device_type, torch.float32)
        return dtype if chosen.supports(device_type, dtype) is None else torch.float32

    # as `mtml_kernels.ops.common.resolved_name_in`
    computed._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return computed


def float32_call(computed: Computed, requested: str | None, like: Any, *given: Any) -> bool:
    """Whether a call is to run on float32 copies of what it is given in half precision, tensors or lists and dicts of
    them. `like`: the first tensor; one of another dtype without autocast is for the checks to refuse.
    """
    if not isinstance(like, Tensor) or not (like.dtype in HALF or casts(like)):
        return False
    kinds = {t.dtype for t in pytree.tree_leaves(given) if isinstance(t, Tensor) and t.is_floating_point()}
    if casts(like):
        return mixes(like.dtype) and not kinds.isdisjoint(HALF)
    return kinds == {like.dtype} and computed(requested, like.device.type, like.dtype) is torch.float32


def first_floating(tensors: Iterable[Tensor]) -> Tensor:
    """The first tensor of floating point, whose dtype and device are a model's: tables of integers among its parameters
    say nothing. Where there is none, an empty one of the default dtype on the CPU.
    """
    return next((t for t in tensors if t.is_floating_point()), torch.empty(0))


def result_dtype(like: Tensor) -> torch.dtype:
    """Of losses and outputs where `float32_call` is true: float32 under autocast, else that of the first tensor."""
    return torch.float32 if casts(like) else like.dtype


def cast(value: T, to: torch.dtype, only: frozenset[torch.dtype] = HALF) -> T:
    """A tensor, or lists and dicts of tensors, with those of the dtypes `only` in `to`; differentiable. What is one
    tensor stays one.
    """
    made: dict[int, Tensor] = {}

    def walk(item: Any) -> Any:
        if isinstance(item, Tensor):
            if item.dtype not in only or item.dtype is to:
                return item
            if id(item) not in made:
                made[id(item)] = item.to(to)
            return made[id(item)]
        if isinstance(item, Mapping):
            return {name: walk(part) for name, part in item.items()}
        return type(item)(map(walk, item)) if type(item) in (list, tuple) else item

    found: T = walk(value)
    return found
