"""What `torch.ops.mtml.head_inner_loop` and its backward op ask of their arguments before a backend reads them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mtml_kernels.ops.checks import Door
from mtml_kernels.reference.head_inner_loop import KINDS
from mtml_kernels.schema.head_inner_loop import (
    DIFFERENTIABLE,
    Cotangents,
    HeadArgs,
    HeadOptions,
    carry_size,
    parse_options,
)

__all__ = ["check_arguments", "check_cotangents", "check_ranks"]

_DOOR = Door("mtml::head_inner_loop", "mtml_kernels.head_inner_loop prepares these arguments")


def check_arguments(a: HeadArgs) -> None:
    """Raises ValueError or TypeError where an argument does not fit the others, and names it."""
    key = _DOOR.passed((*a.differentiable, *a.fixed), a.options, a.needs)
    if key is not True:
        _check_all(a)
        _DOOR.remember(key)


def _check_all(a: HeadArgs) -> None:
    options = _options(a.options)
    check_ranks(a)
    _DOOR.floats(a.weight, "weight")
    tasks, support, features = a.support.shape
    classes, steps = a.weight.shape[0], a.rates.shape[1]
    queries = a.query.shape[1]
    _DOOR.shape("query", a.query, (tasks, queries, features))
    _DOOR.shape("weight", a.weight, (classes, features))
    _DOOR.expect(classes > 0 and features > 0, "weight", "at least one class and feature", a.weight)
    _DOOR.shape("bias", a.bias, (classes,))
    _DOOR.shape("rates", a.rates, (1, steps, classes), *([] if a.bias is None else [(2, steps, classes)]))
    _DOOR.expect(support > 0 or steps == 0, "support", "at least one sample a task for a step", a.support)
    _DOOR.expect(0 <= a.needs < 1 << len(DIFFERENTIABLE), "needs", "a number from 0 to 31", a.needs)
    named: list[tuple[str, Tensor | None, torch.dtype]]
    named = [(n, getattr(a, n), a.weight.dtype) for n in DIFFERENTIABLE]
    sets = (("labels", "support_mask", support), ("query_labels", "query_mask", queries))
    for (name, mask_name, samples), loss in zip(sets, (options.support_loss, options.query_loss), strict=True):
        y, mask, ids = getattr(a, name), getattr(a, mask_name), loss.kind == "cross_entropy"
        _DOOR.shape(name, y, (tasks, samples) if ids else (tasks, samples, classes))
        _DOOR.shape(mask_name, mask, (tasks, samples))
        named += [(name, y, torch.int64 if ids else a.weight.dtype), (mask_name, mask, a.weight.dtype)]
    _DOOR.kinds(named, a.weight.device)


def check_ranks(a: HeadArgs) -> None:
    """What the shapes of the results are read from, for tracing."""
    for name, ndim in (("support", 3), ("query", 3), ("weight", 2), ("rates", 3), ("labels", None)):
        t = getattr(a, name)
        _DOOR.given(name, t)
        _DOOR.expect(ndim is None or t.ndim == ndim, name, f"{ndim} dimensions", t)


def _options(text: str) -> HeadOptions:
    try:
        options = parse_options(text)
    except (ValueError, IndexError, TypeError) as error:
        raise ValueError(f"{_DOOR.op}: options: expected what encode_options gives, got {text!r} ({error})") from None
    for loss in (options.support_loss, options.query_loss):
        _DOOR.expect(loss.kind in KINDS, "options", f"a loss among {', '.join(KINDS)}", loss.kind)
    finite = math.isfinite(options.decay) and math.isfinite(options.proximal)
    _DOOR.expect(finite, "options", "finite decay and proximal terms", text)
    return options


def check_cotangents(a: HeadArgs, cotangents: Cotangents, carry: Tensor) -> None:
    """The same for what the backward op is given beside checked arguments."""
    _DOOR.given("carry", carry)
    tasks, support, _ = a.support.shape
    groups, steps, classes = a.rates.shape
    shapes = ((0 if a.query_labels is None else tasks,), (tasks, a.query.shape[1], classes), (steps, tasks))
    names = ("grad_loss", "grad_logits", "grad_support_losses", "grad_coefficients")
    for name, t, shape in zip(names, cotangents, (*shapes, (tasks, groups, classes, support)), strict=True):
        _DOOR.shape(name, t, shape)
    _DOOR.shape("carry", carry, (0,), (tasks, carry_size(a)))
    named = [*zip((*names, "carry"), (*cotangents, carry), strict=True)]
    _DOOR.kinds([(name, t, a.weight.dtype) for name, t in named], a.weight.device)
    _DOOR.memory(named)
