"""Update rules: a step of all tensors and its adjoint, a launch each, by `schedule.torch_kernels.update`'s formulas.

A tensor of a task is a row [P] of elements; alpha is one number or a row; hyper holds the rule's numbers in double
precision, in the order of HYPERS, and everything made of them alone is computed in it: 1 - 0.999 keeps its digits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from mtml_kernels.schedule.call import Part, by_role, by_tensor
from mtml_kernels.schedule.kernels import Rule
from mtml_kernels.schema.update import HYPERS, RULES
from mtml_kernels.triton.device import on
from mtml_kernels.triton.inner_loop.grid import task_and_block
from mtml_kernels.triton.inner_loop.operands import OPTIONS, Results, new, power, strides, type_of
from mtml_kernels.triton.inner_loop.segments import Segments, batches, pointers, role
from mtml_kernels.triton.inner_loop.sums import total
from mtml_kernels.triton.inner_loop.update_rules import BY_BLOCK, BY_ELEMENT, adjoint_kernel, rates_kernel, rule_kernel

__all__ = ["UPDATES", "element_tile"]

_ALPHA = 2  # among a tensor's operands: the one without tasks


def element_tile(back: bool = False) -> int:
    """The launch policy: how many elements a program takes at most.

    1024 are 8 for each of 128 threads, of up to six tensors: many loads in flight, and at most 80 registers. The way
    `back` has twenty numbers of an element at once, which for 8 were 174 registers and two programs a multiprocessor:
    it takes 512. Reasoned, not yet measured.
    """
    return 512 if back else 1024


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
        block = power(elements, element_tile())
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


def _results(count: int, tasks: int, tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    """Memory for so many results like each of the tensors."""
    return [[new((tasks, *g.shape[1:]), g) for _ in range(count)] for g in tensors]


def _padded(found: Sequence[Sequence[Tensor]], roles: int) -> list[Tensor | None]:
    """Results role after role, None of those that the rule has not."""
    return by_role([[*own, *[None] * (roles - len(own))] for own in found])


def _rule(part: Part, *operands: Any) -> Results:
    *planes, hyper = operands
    found = [each for some in batches(by_tensor(planes, 6)) for each in _rule_launch(part.constants, some, hyper)]
    return tuple(_padded(found, 4))


def _rule_launch(rule: Rule, tensors: Sequence[Sequence[Any]], hyper: Tensor) -> list[list[Tensor]]:
    """(after, the moments) of each tensor."""
    like = [g for _, g, *_ in tensors]
    tasks = max(t.shape[0] for theta, g, *_ in tensors for t in (theta, g))
    found = _results(1 + len(rule.spec.moments), tasks, like)
    segments = Segments.of([g.shape[1:].numel() for g in like], element_tile())
    if tasks:
        roles = [role(operands, like) for operands in zip(*tensors, strict=True)]
        with on(hyper.device):
            rule_kernel[(tasks * segments.blocks,)](
                *(each.tensors for each in roles), hyper, *pointers(found, 4), hyper.stride(0), rule.step + 1,
                tuple(each.steps for each in roles), *segments, type_of(like[0]), *(each.there for each in roles[3:]),
                **_flags(rule), **OPTIONS,
            )  # fmt: skip
    return found


def _adjoint(part: Part, *operands: Any) -> Results:
    *planes, hyper = operands
    tensors = by_tensor(planes, 10)
    *_, want_hyper = part.wants
    wants = part.wants[5 * len(tensors) : -1]
    every = [_Adjoint(part.constants, some, hyper, any(wants), want_hyper) for some in batches(tensors)]
    found = [own for launch in every for own in launch.found]
    terms = [own for launch in every for own in launch.rates()] if any(wants) else [hyper] * len(tensors)
    rates = zip(tensors, terms, wants, strict=True)
    dalphas = [_dalpha(own[_ALPHA], each) if want else None for own, each, want in rates]
    sums = [total((1, 1, len(HYPERS)), launch.numbers).view(-1) for launch in every] if want_hyper else []
    return *_padded(found, 5), *dalphas, sum(sums[1:], sums[0]) if sums else None


def _dalpha(alpha: Tensor, terms: Tensor) -> Tensor:
    """The cotangent of a rate from its terms, or from their sum."""
    return terms.view(alpha.shape) if terms.ndim == 0 else total(alpha.shape, terms)


class _Adjoint:
    """One launch: `found`, (v, below, nu) of each tensor, and `numbers`, sums [T, blocks, 8] of the numbers' terms."""

    def __init__(
        self, rule: Rule, tensors: Sequence[Sequence[Any]], hyper: Tensor, want_rate: bool, want_hyper: bool
    ) -> None:
        self.like = like = [g for _, g, *_ in tensors]
        self.tasks = max(t.shape[0] for own in tensors for i, t in enumerate(own) if t is not None and i != _ALPHA)
        self.found = _results(2 + len(rule.spec.moments), self.tasks, like)
        self.segments = Segments.of([g.shape[1:].numel() for g in like], element_tile(back=True))
        self.single = all(own[_ALPHA].numel() == 1 for own in tensors)
        self.numbers = new((self.tasks, self.segments.blocks, len(HYPERS)), hyper) if want_hyper else hyper
        self.terms = self._terms() if want_rate else like
        if self.tasks:
            self._run(rule, tensors, hyper, want_rate, want_hyper)

    def _terms(self) -> list[Tensor]:
        if self.single:
            return [new((self.tasks, self.segments.blocks), self.like[0])]
        return [own for (own,) in _results(1, self.tasks, self.like)]

    def _run(
        self, rule: Rule, tensors: Sequence[Sequence[Any]], hyper: Tensor, want_rate: bool, want_hyper: bool
    ) -> None:
        roles = [role(operands, self.like) for operands in zip(*tensors, strict=True)]
        rates = (BY_BLOCK if self.single else BY_ELEMENT).value if want_rate else 0
        with on(hyper.device):
            adjoint_kernel[(self.tasks * self.segments.blocks,)](
                *(each.tensors for each in roles), hyper, *pointers(self.found, 5), tuple(self.terms), self.numbers,
                hyper.stride(0), rule.step + 1, tuple(each.steps for each in roles), *self.segments,
                type_of(self.like[0]), *(each.there for each in roles[3:]), **_flags(rule), RATES=rates,
                WANT_HYPER=want_hyper, **OPTIONS,
            )  # fmt: skip

    def rates(self) -> Sequence[Tensor]:
        """Of each tensor the terms of its rate's cotangent, or, where that is one number for all, their sum []."""
        if not self.single:
            return self.terms
        (sums,), (_, firsts, blocks, _) = self.terms, self.segments
        found = new((len(firsts),), sums)
        lanes = power(self.tasks * blocks, element_tile())
        with on(found.device):
            rates_kernel[(len(firsts),)](
                sums, found, self.tasks, firsts, (*firsts[1:], blocks), blocks, lanes, type_of(sums), **OPTIONS
            )
        return found.unbind()


def _rate(part: Part, g: Tensor, lam: Tensor) -> Results:
    return (total(part.constants.shape, g, lam, minus=True),)


UPDATES: dict[str, Any] = {
    "update.step": _step,
    "update.direction": _direction,
    "update.rule": _rule,
    "update.adjoint": _adjoint,
    "update.rate": _rate,
}
