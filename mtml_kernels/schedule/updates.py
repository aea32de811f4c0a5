"""Update rules as parts: a step of all adapted tensors, and its way back (kernels.py has the formulas)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from mtml_kernels.program.encoding import LAYOUT_IN_OUT, Encoded
from mtml_kernels.schedule.call import ABSENT
from mtml_kernels.schedule.draft import Dims, Draft
from mtml_kernels.schedule.kernels import Rule, Shape
from mtml_kernels.schema.inner_loop import NEED_HYPER, NEED_LR, InnerLoopArgs
from mtml_kernels.schema.update import HYPERS
from mtml_kernels.schema.update import PLAIN as GRADIENT_DESCENT

__all__ = ["Update"]

Planes = list[int]  # by parameter; ABSENT where there is none
SLOTS = 3  # moments that a rule may keep


class Left(Protocol):
    """What a step left."""

    gradients: Planes
    raw: Planes
    scale: int


class Update:
    """The rule of one inner loop."""

    def __init__(self, draft: Draft, a: InnerLoopArgs, program: Encoded) -> None:
        self.draft, self.a, self.spec = draft, a, a.spec
        self.rule = a.spec.rule
        self.plain = self.rule == GRADIENT_DESCENT
        self.names = self.rule.moments
        self.moving = [i for i, flag in enumerate(a.spec.adapted) if flag]
        self.hyper_gradient = ABSENT
        self._program = program
        self._rates: dict[int, dict[int, int]] = {}  # of lr tensor j the gradient by step (0 for all)

    # --- arguments --------------------------------------------------------------------------------------------------

    def _stored(self, i: int) -> Dims:
        layout, rows, cols = self._program.params[i]
        return (cols, rows) if layout == LAYOUT_IN_OUT else (rows, cols)

    def given_moments(self) -> list[Planes]:
        """Those at the start, by plane and parameter."""
        found: list[Planes] = [[ABSENT] * len(self.spec.adapted) for _ in self.names]
        for index in range(len(self.a.moments)):
            plane, i = index // len(self.moving), self.moving[index % len(self.moving)]
            found[plane][i] = self.draft.argument("moments", index, (self.a.tasks, *self._stored(i)), self.names[plane])
        return found

    def _lr_of(self, i: int) -> int:
        return 0 if len(self.a.lr) == 1 else self.moving.index(i)

    def _rate(self, i: int, k: int) -> int:
        """alpha_k of a parameter: [], or [1, rows, cols]."""
        j = self._lr_of(i)
        tensor = self.a.lr[j]
        shape = (1, *self._stored(i)) if tensor.ndim > 1 else ()
        return self.draft.argument("lr", j, shape, f"rate of parameter {i}", step=k if tensor.shape[0] > 1 else 0)

    def _hyper(self) -> int:
        return self.draft.argument("hyper", 0, (len(HYPERS),), "numbers of the rule", dtype=torch.float64)

    # --- a step -----------------------------------------------------------------------------------------------------

    def clip(self, raw: Planes) -> tuple[Planes, int]:
        """The gradients scaled to the norm, and by how much."""
        found = [i for i in self.moving if raw[i] != ABSENT]
        if not self.rule.clipped or not found:
            return raw, ABSENT
        draft, reads = self.draft, (self._hyper(), *(raw[i] for i in found))
        shapes = [(self.a.tasks,), *(draft.shape(raw[i]) for i in found)]
        scale, *clipped = draft.emit("update.clip", reads, shapes, "clipped", None, [draft.wide] * len(shapes))
        return self._replaced(raw, found, clipped), scale

    def step(self, k: int, theta: Planes, gradients: Planes, moments: list[Planes]) -> tuple[Planes, list[Planes]]:
        """theta_{k+1} and the moments after step k."""
        if not self.plain and self.moving:
            return self._rule_step(k, theta, gradients, moments)
        after = list(theta)
        for i in self.moving:
            if gradients[i] != ABSENT:
                reads = (theta[i], gradients[i], self._rate(i, k))
                after[i] = self._own("update.step", reads, i, f"parameter {i} after step {k}")
        return after, moments

    def _own(self, kernel: str, reads: Sequence[int], i: int, name: str) -> int:
        return self.draft.emit(kernel, reads, [(self.a.tasks, *self._stored(i))], name, None, [self.draft.wide])[0]

    def _slots(self, moments: Sequence[Planes], tensors: Planes) -> Planes:
        """Of some tensors the moments that a rule may keep, one after the other."""
        found = [plane[i] for plane in moments for i in tensors]
        return [*found, *[ABSENT] * (SLOTS * len(tensors) - len(found))]

    def _operands(self, k: int, theta: Planes, gradients: Planes, moments: Sequence[Planes], of: Planes) -> Planes:
        """What a step of some tensors reads."""
        own = [self._gradient(i, gradients[i]) for i in of]
        return [*(theta[i] for i in of), *own, *(self._rate(i, k) for i in of), *self._slots(moments, of)]

    def _gradient(self, i: int, gradient: int) -> int:
        """The plane, zeros where there is none."""
        if gradient != ABSENT:
            return gradient
        shape, like = (self.a.tasks, *self._stored(i)), self._rate(i, 0)
        return self.draft.zeros(shape, like, self.draft.wide, f"no gradient of parameter {i}")

    def _rule_step(
        self, k: int, theta: Planes, gradients: Planes, moments: Sequence[Planes]
    ) -> tuple[Planes, list[Planes]]:
        draft, of = self.draft, self.moving
        own: list[Dims | None] = [(self.a.tasks, *self._stored(i)) for i in of]
        shapes = [*own * (1 + len(self.names)), *[None] * (len(own) * (SLOTS - len(self.names)))]
        reads = (*self._operands(k, theta, gradients, moments, of), self._hyper())
        name, constants = f"parameters after step {k}", Rule(self.rule, self.spec.update[2] + k)
        found = draft.emit("update.rule", reads, shapes, name, constants, [draft.wide] * len(shapes))
        after, *kept = (self._replaced(old, of, found[j * len(of) :]) for j, old in enumerate((theta, *moments)))
        return after, kept

    @staticmethod
    def _replaced(planes: Planes, of: Planes, by: Sequence[int]) -> Planes:
        """The planes with others of some tensors."""
        found = list(planes)
        for i, plane in zip(of, by, strict=False):
            found[i] = plane
        return found

    # --- the way back -----------------------------------------------------------------------------------------------

    def back(
        self, k: int, left: Left, theta: Planes, moments: list[Planes], lam: Planes, mu: list[Planes]
    ) -> tuple[Planes, Planes, list[Planes]]:
        """(V, lambda less H V, the moments' cotangents before step k)."""
        return self._plain_back(k, left, lam, mu) if self.plain else self._rule_back(k, left, theta, moments, lam, mu)

    def _plain_back(self, k: int, left: Left, lam: Planes, mu: list[Planes]) -> tuple[Planes, Planes, list[Planes]]:
        directions = [ABSENT] * len(lam)
        for i in self.moving:
            if lam[i] == ABSENT or left.gradients[i] == ABSENT:
                continue
            rate = self._rate(i, k)
            if self.a.needs & NEED_LR:
                shape = self.draft.shape(rate)
                reads = (left.gradients[i], lam[i])
                (found,) = self.draft.emit(
                    "update.rate", reads, [shape], f"to the rate of parameter {i}", Shape(shape), [self.draft.wide]
                )
                self._add_rate(i, k, found)
            if not self.spec.first_order:
                directions[i] = self._own("update.direction", (lam[i], rate), i, f"V of parameter {i}")
        return directions, list(lam), mu

    def _rule_back(
        self, k: int, left: Left, theta: Planes, moments: list[Planes], lam: Planes, mu: list[Planes]
    ) -> tuple[Planes, Planes, list[Planes]]:
        of = [i for i in self.moving if lam[i] != ABSENT or any(plane[i] != ABSENT for plane in mu)]
        if not of:
            return [ABSENT] * len(lam), list(lam), mu
        found = self._adjoint(k, of, self._operands(k, theta, left.gradients, moments, of), lam, mu)
        v, below, *before = (found[j * len(of) : (j + 1) * len(of)] for j in range(2 + len(self.names)))
        directions = self._replaced([ABSENT] * len(lam), of, v)
        directions = [ABSENT if g == ABSENT else plane for plane, g in zip(directions, left.gradients, strict=True)]
        earlier = [self._replaced(plane, of, now) for plane, now in zip(mu, before, strict=True)]
        return self._unclipped(left, directions), self._replaced(lam, of, below), earlier

    def _adjoint(self, k: int, of: Planes, operands: Planes, lam: Planes, mu: list[Planes]) -> Sequence[int]:
        """V, then lambda less the rule's share, then the moments' cotangents, of each of some tensors."""
        draft, rates = self.draft, [self._rate(i, k) for i in of]
        own: list[Dims | None] = [(self.a.tasks, *self._stored(i)) for i in of]
        kept = len(self.names)
        shapes = [*own * (2 + kept), *[None] * (len(of) * (SLOTS - kept))]
        shapes += [draft.shape(rate) if self.a.needs & NEED_LR else None for rate in rates]
        shapes.append((len(HYPERS),) if self.a.needs & NEED_HYPER else None)
        cotangents = [*(self._gradient(i, lam[i]) for i in of), *self._slots(mu, of)]
        constants, name = Rule(self.rule, self.spec.update[2] + k), "V and what is below"
        reads = (*operands, *cotangents, self._hyper())
        found = draft.emit("update.adjoint", reads, shapes, name, constants, [draft.wide] * len(shapes))
        *_, to_hyper = found
        for i, to_rate in zip(of, found[(2 + SLOTS) * len(of) : -1], strict=True):
            if to_rate != ABSENT:
                self._add_rate(i, k, to_rate)
        self.hyper_gradient = draft.sum_of(self.hyper_gradient, to_hyper, "to the rule's numbers")
        for plane in found[len(of) : 2 * len(of)]:
            draft.own(plane)
        return found

    def _unclipped(self, left: Left, directions: Planes) -> Planes:
        """V of the gradients before they were clipped."""
        found = [i for i in self.moving if left.raw[i] != ABSENT]
        if left.scale == ABSENT or all(plane == ABSENT for plane in directions):
            return directions
        draft, result = self.draft, list(directions)
        along = [self._gradient(i, directions[i]) for i in found]
        reads = (self._hyper(), left.scale, *along, *(left.raw[i] for i in found))
        shapes: list[Dims | None] = [draft.shape(plane) for plane in along]
        shapes.append((len(HYPERS),) if self.a.needs & NEED_HYPER else None)
        *planes, to_hyper = draft.emit(
            "update.unclip", reads, shapes, "V before clipping", len(found), [draft.wide] * len(shapes)
        )
        for i, plane in zip(found, planes, strict=True):
            result[i] = plane
        self.hyper_gradient = draft.sum_of(self.hyper_gradient, to_hyper, "to the rule's numbers")
        return result

    # --- gradients of the rates -------------------------------------------------------------------------------------

    def _add_rate(self, i: int, k: int, plane: int) -> None:
        j = self._lr_of(i)
        at = k if self.a.lr[j].shape[0] > 1 else 0
        by_step = self._rates.setdefault(j, {})
        by_step[at] = self.draft.sum_of(by_step.get(at, ABSENT), plane, f"gradient of rate {j}")

    def rate_gradients(self) -> Planes:
        """Of every tensor of rates, [1 or K, ...]."""
        return [self._rate_gradient(j) for j in range(len(self.a.lr))]

    def _rate_gradient(self, j: int) -> int:
        by_step = self._rates.get(j, {})
        if not by_step:
            return ABSENT
        draft, any_plane = self.draft, next(iter(by_step.values()))
        shape, dtype = draft.shape(any_plane), draft.planes[any_plane].dtype
        rows = []
        for k in range(self.a.lr[j].shape[0]):
            if k not in by_step:
                by_step[k] = draft.zeros(shape, any_plane, dtype, "no gradient")
            rows.append(by_step[k])
        return draft.emit("stack", rows, [(len(rows), *shape)], f"gradient of rate {j}", 0, [dtype])[0]
