"""The compiled engine's `task_update`: addresses in, tensors out."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mtml_kernels.memory import in_memory
from mtml_kernels.native import engine
from mtml_kernels.native.tensors import addresses_of, checked, recycled_like
from mtml_kernels.schema.dtypes import DTYPES
from mtml_kernels.schema.task_update import UpdateArgs, UpdateForm
from mtml_kernels.schema.update import HYPERS

__all__ = ["update_backward", "update_forward"]

Lists = list[list[int]]


class _Call:
    """The inputs of one call, made contiguous and kept alive."""

    def __init__(self, a: UpdateArgs, form: UpdateForm) -> None:
        dtype = a.params[0].dtype
        self.tasks = tasks = a.params[0].shape[0]
        sizes = [p.numel() // tasks for p in a.params]
        elements = [int(r.numel() > r.shape[0]) for r in a.rates]
        self.table = [*sizes, *(int(r.shape[0] > 1) for r in a.rates), *elements]
        self.numbers = [DTYPES[dtype], torch.get_num_threads(), *form.spec.encode(), tasks, form.step]
        self.hyper = in_memory("hyper", a.hyper).tolist()
        groups = zip(("params", "grads", "lr", "state"), a[:4], strict=True)
        found = [checked(lambda i, name=name: f"{name}[{i}]", ts, dtype) for name, ts in groups]  # type: ignore[misc]
        self.held = [tensors for tensors, _ in found]
        self.inputs: Lists = [addresses for _, addresses in found]


def _like(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [recycled_like(t) for t in tensors]


def update_forward(a: UpdateArgs, form: UpdateForm) -> list[Tensor]:
    """The parameters after one step, then the moments."""
    results = _like(a.results(form.spec))
    if not any(p.numel() for p in a.params):
        return results
    call, n = _Call(a, form), len(a.params)
    outputs = [addresses_of(results[:n]), addresses_of(results[n:])]
    engine().task_update(call.numbers, call.hyper, call.table, call.inputs, outputs)
    return results


def update_backward(cotangents: Sequence[Tensor], a: UpdateArgs, form: UpdateForm) -> list[Tensor]:
    """Gradients of `a.flat()` from contiguous cotangents of the results."""
    if not any(p.numel() for p in a.params):
        return [torch.zeros_like(t, memory_format=torch.contiguous_format) for t in a.flat()]
    call, n, like = _Call(a, form), len(a.params), a.params[0]
    ready, at = checked(lambda i: f"cotangents[{i}]", cotangents, like.dtype)
    rates = [torch.empty((call.tasks, *r.shape[1:]), dtype=like.dtype, device="cpu") for r in a.rates]
    params, grads, moments = _like(a.params), _like(a.grads), _like(a.moments)
    hyper = torch.empty((call.tasks, len(HYPERS)), dtype=torch.float64, device="cpu")
    outputs = [addresses_of(group) for group in (params, grads, rates)]
    outputs += [addresses_of(moments) or [0] * (n * len(form.spec.moments)), [hyper.data_ptr()]]
    engine().task_update_back(call.numbers, call.hyper, call.table, [*call.inputs, at[:n], at[n:]], outputs)
    del ready  # until here: copies that were made for the call
    shared = [g if r.shape[0] == call.tasks else g.sum(0, keepdim=True) for g, r in zip(rates, a.rates, strict=True)]
    return [*params, *grads, *shared, *moments, hyper.sum(0)]
