"""Update rules: a step of one tensor and its adjoint, by the formulas of `schedule.torch_kernels.update`.

All tensors of a task are rows [P] of elements; alpha is one number or a row; hyper holds the rule's numbers in double
precision, in the order of HYPERS, and everything made of them alone is computed in it: 1 - 0.999 keeps its digits.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from mtml_kernels.schedule.call import Part
from mtml_kernels.schedule.kernels import Rule
from mtml_kernels.schema.update import RULES
from mtml_kernels.triton.device import on
from mtml_kernels.triton.inner_loop.grid import task_and_block
from mtml_kernels.triton.inner_loop.operands import OPTIONS, Results, new, power, strides, type_of
from mtml_kernels.triton.inner_loop.sums import total
from mtml_kernels.triton.inner_loop.update_rules import adjoint_kernel, rule_kernel

__all__ = ["UPDATES", "element_tile"]


def element_tile(elements: int, back: bool = False) -> int:
    """The launch policy: how many elements a program takes.

    1024 are 8 for each of 128 threads, of up to six tensors: many loads in flight, and at most 80 registers. The way
    `back` has twenty numbers of an element at once, which for 8 were 174 registers and two programs a multiprocessor:
    it takes 512. What is small is padded to a power of two. Of one task's shape alone. Reasoned, not yet measured.
    """
    return power(elements, 512 if back else 1024)


@triton.jit
def step_kernel(
    theta, g,  # [T, P]
    alpha,  # [1 or T, 1 or P]
    after,  # [T, P]
    P, theta_t, theta_p, g_t, g_p, alpha_t, alpha_p,
    DIRECTION: tl.constexpr, BLOCK: tl.constexpr, TYPE: tl.constexpr,
):  # fmt: skip
    """after = theta - alpha g; DIRECTION: after = -alpha g"""
    task, block = task_and_block(tl.cdiv(P, BLOCK))
    p = block * BLOCK + tl.arange(0, BLOCK)
    live = p < P
    rate = tl.load(alpha + task * alpha_t + p * alpha_p, mask=live, other=0.0).to(TYPE)
    move = rate * tl.load(g + task * g_t + p * g_p, mask=live, other=0.0).to(TYPE)
    found = -move if DIRECTION else tl.load(theta + task * theta_t + p * theta_p, mask=live, other=0.0).to(TYPE) - move
    tl.store(after + task * P + p, found, mask=live)


def _flat(t: Tensor | None, tasks: int) -> Tensor | None:
    """[T, rows, cols] as [T, P]"""
    return None if t is None else t.flatten(1).expand(tasks, -1)


def _rate_steps(alpha: Tensor) -> tuple[Tensor, tuple[int, int]]:
    """alpha [] or [1 or T, 1 or rows, 1 or cols], and its strides from one task, and one element, to the next."""
    rows = alpha.reshape(1, 1) if alpha.ndim == 0 else alpha.flatten(1)
    return rows, (rows.stride(0) if len(rows) > 1 else 0, rows.stride(1) if rows.shape[1] > 1 else 0)


def _plain(theta: Tensor | None, g: Tensor, alpha: Tensor) -> Results:
    tasks = max(t.shape[0] for t in (theta, g) if t is not None)
    after = new((tasks, *g.shape[1:]), g)
    if after.numel():
        elements = g.shape[1] * g.shape[2]
        block = element_tile(elements)
        rate, steps = _rate_steps(alpha)
        flat = [_flat(t, tasks) for t in (theta, g)]
        with on(g.device):
            step_kernel[(tasks * -(-elements // block),)](
                *(g if t is None else t for t in flat), rate, after, elements,
                *(s for t in flat for s in strides(t, 2)), *steps, theta is None, block, type_of(g), **OPTIONS,
            )  # fmt: skip
    return (after,)


def _step(part: Part, theta: Tensor, g: Tensor, alpha: Tensor) -> Results:
    return _plain(theta, g, alpha)


def _direction(part: Part, lam: Tensor, alpha: Tensor) -> Results:
    return _plain(None, lam, alpha)


def _flags(rule: Rule) -> dict[str, Any]:
    spec = rule.spec
    return {
        "RULE": RULES.index(spec.rule), "MOMENTUM": spec.momentum, "NESTEROV": spec.nesterov,
        "DECOUPLED": spec.decoupled, "CENTERED": spec.centered, "DECAYED": spec.decayed, "FIRST": rule.step == 0,
    }  # fmt: skip


def _rule(part: Part, theta: Tensor, g: Tensor, alpha: Tensor, hyper: Tensor, *s: Tensor | None) -> Results:
    rule: Rule = part.constants
    tasks, elements, count = max(theta.shape[0], g.shape[0]), g.shape[1] * g.shape[2], len(rule.spec.moments)
    shape = (tasks, *g.shape[1:])
    after, *moments = (new(shape, g) for _ in range(1 + count))
    if after.numel():
        block = element_tile(elements)
        rate, steps = _rate_steps(alpha)
        flat = [_flat(t, tasks) for t in (theta, g, *s)]
        with on(g.device):
            rule_kernel[(tasks * -(-elements // block),)](
                *(g if t is None else t for t in flat), rate, hyper, *[*(after, *moments), g, g, g][:4], elements,
                *(each for t in flat for each in strides(t, 2)), *steps, hyper.stride(0), rule.step + 1,
                **{f"HAS_S{i}": t is not None for i, t in enumerate(s)}, **_flags(rule),
                BLOCK=block, TYPE=type_of(g), **OPTIONS,
            )  # fmt: skip
    return after, *moments, *[None] * (3 - count)


def _adjoint(
    part: Part, theta: Tensor, g: Tensor, alpha: Tensor, hyper: Tensor, s0: Tensor | None, s1: Tensor | None,
    s2: Tensor | None, lam: Tensor | None, *mu: Tensor | None,
) -> Results:  # fmt: skip
    rule: Rule = part.constants
    planes = (theta, g, s0, s1, s2, lam, *mu)
    tasks, elements = max(t.shape[0] for t in planes if t is not None), g.shape[1] * g.shape[2]
    shape, count = (tasks, *g.shape[1:]), len(rule.spec.moments)
    *_, want_rate, want_hyper = part.wants
    v, below, *before = (new(shape, g) for _ in range(2 + count))
    block = element_tile(elements, back=True)
    blocks = -(-elements // block)
    rates = new(shape, g) if want_rate else g
    numbers = new((tasks, blocks, hyper.shape[0]), hyper) if want_hyper else hyper
    if v.numel():
        rate, steps = _rate_steps(alpha)
        flat = [_flat(t, tasks) for t in planes]
        with on(g.device):
            adjoint_kernel[(tasks * blocks,)](
                *(g if t is None else t for t in flat), rate, hyper, v, below, *[*before, g, g, g][:3], rates, numbers,
                elements, *(each for t in flat for each in strides(t, 2)), *steps, hyper.stride(0), rule.step + 1,
                **{f"HAS_S{i}": t is not None for i, t in enumerate((s0, s1, s2))}, HAS_LAM=lam is not None,
                **{f"HAS_MU{i}": t is not None for i, t in enumerate(mu)}, **_flags(rule), WANT_RATE=want_rate,
                WANT_HYPER=want_hyper, BLOCK=block, TYPE=type_of(g), **OPTIONS,
            )  # fmt: skip
    dalpha = total(alpha.shape, rates) if want_rate else None
    dhyper = total((1, 1, hyper.shape[0]), numbers).view(-1) if want_hyper else None
    return v, below, *before, *[None] * (3 - count), dalpha, dhyper


def _rate(part: Part, g: Tensor, lam: Tensor) -> Results:
    return (total(part.constants.shape, g, lam, minus=True),)


UPDATES: dict[str, Any] = {
    "update.step": _step,
    "update.direction": _direction,
    "update.rule": _rule,
    "update.adjoint": _adjoint,
    "update.rate": _rate,
}
