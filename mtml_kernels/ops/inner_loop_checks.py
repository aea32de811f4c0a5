"""What `torch.ops.mtml.inner_loop` and its backward op ask of their arguments before a backend reads them.

`mtml.MAML` and `mtml_kernels.inner_loop` check in their callers' words and go to a backend directly; these checks stand
at the ops' own door. That a program is sound in itself the engine checks when it makes a plan.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import chain

import torch
from torch import Tensor

from mtml_kernels.ops.checks import Door
from mtml_kernels.program import Encoded, decode
from mtml_kernels.schema.inner_loop import (
    CLASS_IDS,
    KEEP_NONE,
    KEEP_STEPS,
    MOMENTS,
    NEED_QUERY_MASK,
    PER_STEP,
    PLAIN,
    QUERY_STEPS,
    STARTS,
    TASKS_APART,
    InnerLoopArgs,
    output_shapes,
)
from mtml_kernels.schema.losses import KINDS, REDUCTIONS, SOFT
from mtml_kernels.schema.update import HYPERS, RULES

__all__ = ["check_arguments", "check_cotangents", "check_ranks"]

_DOOR = Door("mtml::inner_loop", "mtml_kernels.inner_loop and mtml.MAML prepare these arguments")
_ALL = 2 * NEED_QUERY_MASK - 1
_AXES = PER_STEP | STARTS | QUERY_STEPS | TASKS_APART | MOMENTS

Carry = Sequence[tuple[tuple[int, ...], torch.dtype]]


def check_arguments(a: InnerLoopArgs) -> None:
    """Raises ValueError or TypeError where an argument does not fit the program or the others; it names it."""
    lists = (a.spec.adapted, a.spec.program, a.spec.support_loss, a.spec.query_loss, a.spec.update)
    groups = (a.params, a.lr, a.support_x, a.query_x, a.hyper, a.moments)
    single = (a.support_y, a.query_y, a.support_mask, a.query_mask, a.step_weights)
    counts = (*map(len, groups), len(a.spec.loss_args), a.spec.steps, a.spec.keep, a.spec.axes, a.needs)
    key = _DOOR.passed((*chain.from_iterable(groups), *single), *(tuple(values) for values in lists), *counts)
    if key is not True:
        _check_all(a)
        _DOOR.remember(key)


def _check_all(a: InnerLoopArgs) -> None:
    program = check_ranks(a)
    _check_numbers(a)
    _DOOR.floats(a.params[0], "params[0]")
    for i, (t, (_, rows, cols)) in enumerate(zip(a.params, program.params, strict=True)):
        own = a.spec.has(STARTS) and a.spec.adapted[i]
        fits = t.numel() == rows * cols * (a.tasks if own else 1) and (not own or t.shape[:1] == (a.tasks,))
        _DOOR.expect(fits, f"params[{i}]", f"{rows * cols} elements{' a task' if own else ''}", t)
    _check_rates(a)
    _check_rule(a)
    sets = (a.tasks, a.spec.steps) if a.spec.has(PER_STEP) else (a.tasks,)
    _DOOR.length("support_x", a.support_x, len(program.input_sizes))
    _check_set(a, program, "support", (*sets, a.support_samples))
    if a.query_x:
        _DOOR.length("query_x", a.query_x, 0, len(program.input_sizes))
        _check_set(a, program, "query", (a.tasks, a.query_x[0].shape[1]))
    _DOOR.shape("step_weights", a.step_weights, (a.spec.steps + 1,))
    _check_kinds(a, program)


def check_ranks(a: InnerLoopArgs) -> Encoded:
    """The program, and what the shapes of the results are read from: all that tracing checks, which has no sizes."""
    for name in ("params", "lr", "support_x", "query_x", "hyper", "moments"):
        _DOOR.given(name, *getattr(a, name))
    _DOOR.given("support_y", a.support_y)
    for name, tensors in (("params", a.params), ("support_x", a.support_x)):
        _DOOR.expect(bool(tensors), name, "at least one tensor", "none")
    _DOOR.expect(0 <= a.spec.axes <= _AXES, "axes", f"bits up to {_AXES}", a.spec.axes)
    steps = 1 if a.spec.has(PER_STEP) else 0
    for name, tensors, least in (
        ("support_x", a.support_x, 2 + steps),
        ("query_x", a.query_x, 2),
        ("support_y", [a.support_y], 2 + steps),
    ):
        for t in tensors:
            words = (
                "tasks, steps and samples first, [T, K, N, ...]"
                if least == 3
                else "tasks and samples first, [T, N, ...]"
            )
            _DOOR.expect(t.ndim >= least, name, words, t)
    _DOOR.expect(KEEP_NONE <= a.spec.keep <= KEEP_STEPS, "keep", "a number from 0 to 2", a.spec.keep)
    for name, codes in (
        ("support_loss", a.spec.support_loss),
        ("query_loss", a.spec.query_loss),
        ("loss_args", a.spec.loss_args),
    ):
        _DOOR.length(name, codes, 2)
    _DOOR.length("update", a.spec.update, 3)
    rule, flags, taken = a.spec.update
    known = 0 <= rule < len(RULES) and 0 <= flags < 2**6 and taken >= 0
    _DOOR.expect(known, "update", "[rule 0 to 2, flags 0 to 63, steps taken from 0]", a.spec.update)
    program = _decoded(a)
    for name, values in (("params", a.params), ("adapted", a.spec.adapted)):
        _DOOR.length(name, values, len(program.params))
    return program


def _check_numbers(a: InnerLoopArgs) -> None:
    for name, codes in (("support_loss", a.spec.support_loss), ("query_loss", a.spec.query_loss)):
        right = 0 <= codes[0] <= max(len(KINDS) - 1, SOFT) and 0 <= codes[1] < len(REDUCTIONS)
        _DOOR.expect(right, name, "[kind 0 to 5, reduction 0 or 1]", codes)
    for name, value, most in (("steps", a.spec.steps, 2**31 - 1), ("needs", a.needs, _ALL)):
        _DOOR.expect(0 <= value <= most, name, f"a number from 0 to {most}", value)


def _decoded(a: InnerLoopArgs) -> Encoded:
    try:
        program = decode(tuple(a.spec.program))
        _ = program.tables  # so that what it raises is said at this door
        return program
    except ValueError as error:
        raise ValueError(f"{_DOOR.op}: {error}") from None


def _check_rates(a: InnerLoopArgs) -> None:
    changed = [a.task_shape(i) for i, flag in enumerate(a.spec.adapted) if flag]
    _DOOR.length("lr", a.lr, 1, len(changed))
    for i, t in enumerate(a.lr):
        steps = t.ndim >= 1 and t.shape[0] in (1, a.spec.steps)
        of = changed[i] if len(a.lr) == len(changed) else None
        fits = t.ndim == 1 or (of is not None and t.shape[1:] == of)
        shape = f"[1 or {a.spec.steps}]" + ("" if of is None else f" or [1 or {a.spec.steps}, *{list(of)}]")
        _DOOR.expect(steps and fits, f"lr[{i}]", f"rates {shape}", t)


def _check_rule(a: InnerLoopArgs) -> None:
    """What an update rule reads: gradient descent has no numbers, and moments there are all or none."""
    try:
        planes = len(a.spec.rule.moments)
    except ValueError as error:
        raise ValueError(f"{_DOOR.op}: update: {error}") from None
    plain = a.spec.update[:2] == PLAIN[:2]
    _DOOR.length("hyper", a.hyper, 0 if plain else 1)
    for t in a.hyper:
        _DOOR.shape("hyper[0]", t, (len(HYPERS),))
    shapes = [a.task_shape(i) for i, flag in enumerate(a.spec.adapted) if flag]
    if a.moments:
        _DOOR.length("moments", a.moments, planes * len(shapes))
        for i, t in enumerate(a.moments):
            _DOOR.shape(f"moments[{i}]", t, (a.tasks, *shapes[i % len(shapes)]))


def _check_set(a: InnerLoopArgs, program: Encoded, which: str, lead: tuple[int, ...]) -> None:
    support = which == "support"
    inputs, y, mask = (a.support_x, a.support_y, a.support_mask) if support else (a.query_x, a.query_y, a.query_mask)
    ids = (a.spec.support_loss if support else a.spec.query_loss)[0] == CLASS_IDS
    words = f"[{', '.join(map(str, lead))}, ...]"
    for i, (x, size) in enumerate(zip(inputs, program.input_sizes, strict=True)):
        right = tuple(x.shape[: len(lead)]) == lead and x.numel() == math.prod(lead) * size
        _DOOR.expect(right, f"{which}_x[{i}]", f"{words} of {size} elements a sample", x)
    if y is not None:
        each = 1 if ids else program.output_size
        right = tuple(y.shape[: len(lead)]) == lead and y.numel() == math.prod(lead) * each
        _DOOR.expect(right, f"{which}_y", f"{words} of {each} elements a sample", y)
    _DOOR.shape(f"{which}_mask", mask, lead)


def _check_kinds(a: InnerLoopArgs, program: Encoded) -> None:
    like = a.params[0]
    ids = {at for at, _ in program.tables}
    named: list[tuple[str, Tensor | None, torch.dtype]]
    named = [
        (f"{name}[{i}]", t, like.dtype) for name in ("params", "lr", "moments") for i, t in enumerate(getattr(a, name))
    ]
    for name in ("support_x", "query_x"):
        for i, t in enumerate(getattr(a, name)):
            integer = torch.int32 if t.dtype == torch.int32 else torch.int64
            named.append((f"{name}[{i}]", t, integer if i in ids else like.dtype))
    targets = (("support_y", a.support_y, a.spec.support_loss), ("query_y", a.query_y, a.spec.query_loss))
    named += [(name, y, torch.int64 if loss[0] == CLASS_IDS else like.dtype) for name, y, loss in targets]
    named += [("hyper[0]", t, torch.float64) for t in a.hyper]
    others = (("support_mask", a.support_mask), ("query_mask", a.query_mask), ("step_weights", a.step_weights))
    named += [(name, t, like.dtype) for name, t in others]
    _DOOR.kinds(named, like.device)


def check_cotangents(
    a: InnerLoopArgs,
    cotangents: Sequence[Tensor | None],
    grad_adapted: Sequence[Tensor],
    given: Sequence[bool],
    carry: Sequence[Tensor],
    shapes: Carry,
) -> None:
    """The same for what the backward op is given beside checked arguments; `shapes`: what the forward pass leaves."""
    like = a.params[0]
    _DOOR.given("grad_adapted", *grad_adapted)
    _DOOR.given("carry", *carry)
    *fixed, kept = output_shapes(a)
    _DOOR.length("grad_adapted_given", given, len(kept))
    _DOOR.length("grad_adapted", grad_adapted, sum(given))
    names = [
        "grad_loss",
        "grad_output",
        "grad_support_losses",
        *(f"grad_adapted[{i}]" for i in range(len(grad_adapted))),
    ]
    wanted = [*fixed, *(shape for shape, flag in zip(kept, given, strict=True) if flag)]
    for name, t, shape in zip(names, (*cotangents, *grad_adapted), wanted, strict=True):
        _DOOR.shape(name, t, shape)
        _DOOR.kinds([(name, t, like.dtype)], like.device)
    _DOOR.memory(zip(names, (*cotangents, *grad_adapted), strict=True))
    if carry:
        _DOOR.length("carry", carry, len(shapes))
        for i, (t, (size, dtype)) in enumerate(zip(carry, shapes, strict=True)):
            _DOOR.shape(f"carry[{i}]", t, size)
            _DOOR.kinds([(f"carry[{i}]", t, dtype)], like.device)
            _DOOR.memory([(f"carry[{i}]", t)])
