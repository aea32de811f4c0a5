"""What `torch.ops.mtml.task_update` and its backward op ask of their arguments before a backend reads them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mtml_kernels.ops.checks import Door
from mtml_kernels.schema.task_update import UpdateArgs, UpdateForm
from mtml_kernels.schema.update import HYPERS

__all__ = ["check_arguments", "check_cotangents"]

_DOOR = Door(
    "task_update",
    "Shapes are params[i] [T, *shape], grads[i] like it, lr a number, [*shape], or [T, *shape] or [T, 1, ...] for each "
    "task; state is what the step before returned behind the parameters",
)


def check_arguments(a: UpdateArgs, form: UpdateForm, traced: bool = False) -> None:
    """Raises TypeError or ValueError where a tensor does not fit the parameters, and names it.

    `traced`: sizes may be symbols, by which nothing is remembered.
    """
    if traced:
        _check_all(a, form)
        return
    key = _DOOR.passed((*a.params, *a.grads, *a.rates, *a.moments, a.hyper), form, tuple(map(len, a[:4])))
    if key is not True:
        _check_all(a, form)
        _DOOR.remember(key)


def _check_all(a: UpdateArgs, form: UpdateForm) -> None:
    named = (("params", a.params), ("grads", a.grads), ("lr", a.rates), ("state", a.moments))
    for name, tensors in named:
        _DOOR.given(name, *tensors)
    _DOOR.given("hyper", a.hyper)
    n, like = len(a.params), a.params[0] if a.params else None
    _DOOR.expect(like is not None, "params", "at least one tensor", "none")
    assert like is not None
    _DOOR.floats(like, "params[0]")
    _DOOR.expect(like.ndim > 0, "params[0]", "a dimension of tasks", like)
    _DOOR.expect(0 <= form.step < 1 << 53, "step", "a number of steps taken, from 0 on", form.step)
    _DOOR.length("grads", a.grads, n)
    _DOOR.length("lr", a.rates, n)
    _DOOR.length("state", a.moments, *sorted({0, n * len(form.spec.moments)}))
    for i, p in enumerate(a.params):
        _DOOR.shape(f"params[{i}]", p, (like.shape[0], *p.shape[1:]))
        _DOOR.shape(f"grads[{i}]", a.grads[i], p.shape)
        ones = (1,) * (p.ndim - 1)
        _DOOR.shape(
            f"lr[{i}]", a.rates[i], *((rows, *rest) for rows in (1, p.shape[0]) for rest in (ones, p.shape[1:]))
        )
    for j, t in enumerate(a.moments):
        _DOOR.shape(f"state[{j}]", t, a.params[j % n].shape)
    _DOOR.shape("hyper", a.hyper, (len(HYPERS),))
    _DOOR.kinds([(f"{name}[{i}]", t, like.dtype) for name, ts in named for i, t in enumerate(ts)], like.device)
    _DOOR.kinds([("hyper", a.hyper, torch.float64)], like.device)


def check_cotangents(cotangents: Sequence[Tensor], a: UpdateArgs, form: UpdateForm) -> None:
    """The same for what the backward op is given beside checked arguments."""
    expected = a.results(form.spec)
    _DOOR.given("cotangents", *cotangents)
    _DOOR.length("cotangents", cotangents, len(expected))
    for i, (c, t) in enumerate(zip(cotangents, expected, strict=True)):
        _DOOR.shape(f"cotangents[{i}]", c, t.shape)
        _DOOR.kinds([(f"cotangents[{i}]", c, t.dtype)], t.device)
        _DOOR.memory([(f"cotangents[{i}]", c)])
