"""Linear heads with their losses: the products and the losses in one pass over blocks of rows.

Heads of moderate size keep the gradients at their logits (as many numbers as PyTorch keeps logits) until backward knows
the heads' cotangents. A head whose logits are large keeps none: its gradients at features, weight and bias are made in
the forward pass, for its own loss, and passed on times its cotangent. Second and higher derivatives are those of the
PyTorch formula. The CPU engine and Triton do both alike, each in a `Problem` of its own; on a device cotangents stay
tensors, for a look at them would wait for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mtml_kernels.native.linear_multihead_loss import Problem
from mtml_kernels.native.tensors import recycled_like
from mtml_kernels.precision import plainly
from mtml_kernels.reference.linear_multihead_loss import linear_multihead_loss as reference_losses
from mtml_kernels.schema.linear_multihead_loss import Grads, LinearHead, Wants
from mtml_kernels.transforms import abstract
from mtml_kernels.triton.backends import linear_problem

__all__ = ["FUSED", "LinearCall", "linear_multihead_loss_call"]

FUSED = ("cpu", "triton")  # backends of `multihead_loss` that do it without all logits

LARGE = 32 << 20  # bytes of logits from which a head keeps none


class LinearCall(NamedTuple):
    """The flattened call: of every head the place of its features among `features`, and the rest in `heads`.

    `backend`: one of `FUSED`.
    """

    features: list[Tensor]  # [N, D], each once
    of: list[int]
    heads: list[LinearHead]
    backend: str

    def differentiable(self) -> list[Tensor | None]:
        """Features, weights and biases."""
        return [*self.features, *(h.weight for h in self.heads), *(h.bias for h in self.heads)]

    def problems(self) -> list[tuple[int, list[LinearHead], bool]]:
        """(place of the features, heads, large?): the large heads alone, the others of the same features together."""
        found: list[tuple[int, list[LinearHead], bool]] = []
        for at, x in enumerate(self.features):
            mine = [h for h, place in zip(self.heads, self.of, strict=True) if place == at]
            large = [h for h in mine if x.shape[0] * h.weight.shape[0] * x.dtype.itemsize > LARGE]
            small = [h for h in mine if x.shape[0] * h.weight.shape[0] * x.dtype.itemsize <= LARGE]
            found += [(at, [h], True) for h in large]
            found += [(at, small, False)] if small else []
        return found


def _formula_gradients(call: LinearCall, cotangent: Tensor) -> list[Tensor | None]:
    """Gradients at `call.differentiable()`, themselves differentiable any number of times."""
    tensors, n, heads = call.differentiable(), len(call.features), len(call.heads)
    given = [t for t in tensors if t is not None]

    def losses(*args: Tensor) -> Tensor:
        rest = iter(args)
        found: list[Any] = [t if t is None else next(rest) for t in tensors]
        return reference_losses([found[at] for at in call.of], found[n : n + heads], found[n + heads :], call.heads)

    found = iter(torch.func.vjp(losses, *given)[1](cotangent))
    return [t if t is None else next(found) for t in tensors]


def _wants(call: LinearCall, at: int, heads: list[LinearHead]) -> Wants:
    biases = [h.bias is not None and h.bias.requires_grad for h in heads]
    return Wants(call.features[at].requires_grad, [h.weight.requires_grad for h in heads], biases)


class _Part(NamedTuple):
    """What is left of one problem's forward pass: kept gradients at the logits, or those at the inputs."""

    at: int
    problem: Any  # Problem, or Triton's
    wants: Wants
    kept: Any
    made: tuple[Tensor | None, Grads, Grads]


def _problem(call: LinearCall, at: int, heads: list[LinearHead], large: bool) -> Any:
    x = call.features[at]
    return linear_problem(x, heads, large) if call.backend == "triton" else Problem(x, heads)


def _forward(call: LinearCall) -> tuple[Tensor, list[_Part]]:
    losses: list[Any] = [None] * len(call.heads)
    parts: list[_Part] = []
    for at, heads, large in call.problems():
        problem, wants = _problem(call, at, heads, large), _wants(call, at, heads)
        if large or not (wants.features or any(wants.weights) or any(wants.biases)):
            own, dx, dw, db = problem.blocks(wants)
            parts.append(_Part(at, problem, wants, None, (dx, dw, db)))
        else:
            own, kept = problem.keep()
            parts.append(_Part(at, problem, wants, kept, (None, [], [])))
        if len(heads) == len(call.heads):
            return own, parts
        for h, loss in zip(heads, own.unbind(), strict=True):
            losses[h.place] = loss
    return torch.stack(losses), parts


def _times(gradient: Tensor | None, by: float) -> Tensor | None:
    if gradient is None or by == 1:
        return gradient
    return torch.mul(gradient, by, out=recycled_like(gradient))


def _made(part: _Part, by: Any) -> tuple[Tensor | None, Grads, Grads]:
    """The gradients that the forward pass made, times the cotangents of their heads."""
    (dx, dw, db), heads = part.made, len(part.problem.heads)
    if isinstance(by[0], Tensor):
        dx, *rest = part.problem.times([dx, *dw, *db], by[0])
    else:
        dx, *rest = (_times(g, by[0]) for g in (dx, *dw, *db))
    return dx, rest[:heads], rest[heads:]


def _backward(call: LinearCall, parts: Sequence[_Part], cotangents: Sequence[Any]) -> list[Tensor | None]:
    """Gradients at `call.differentiable()`; cotangents: numbers, or tensors on a device."""
    n, heads = len(call.features), len(call.heads)
    found: list[Tensor | None] = [None] * (n + 2 * heads)
    for part in parts:
        by = [cotangents[h.place] for h in part.problem.heads]
        if part.kept is not None:
            dx, dw, db = part.problem.back(part.kept, by, part.wants)
        else:
            dx, dw, db = _made(part, by)
        before = found[part.at]
        found[part.at] = dx if before is None or dx is None else before + dx
        for h, w, b in zip(part.problem.heads, dw, db, strict=True):
            found[n + h.place], found[n + heads + h.place] = w, b
    return found


class _Linear(torch.autograd.Function):
    """The compiled forward and backward."""

    @staticmethod
    def forward(ctx: Any, call: LinearCall, *tensors: Tensor | None) -> Tensor:
        """`tensors` are the differentiable ones of `call`, which autograd tracks."""
        losses, ctx.parts = _forward(call)
        ctx.of, ctx.heads = call.of, [h._replace(weight=None, bias=None) for h in call.heads]  # type: ignore[arg-type]
        ctx.backend = call.backend
        ctx.save_for_backward(*tensors)
        return losses

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
        saved, heads = ctx.saved_tensors, len(ctx.heads)
        n = len(saved) - 2 * heads
        pairs = zip(ctx.heads, saved[n : n + heads], saved[n + heads :], strict=True)
        call = LinearCall(list(saved[:n]), ctx.of, [h._replace(weight=w, bias=b) for h, w, b in pairs], ctx.backend)
        # create_graph=True, is_grads_batched=True, or compiled autograd
        if torch.is_grad_enabled() or abstract(cotangent):
            with plainly(cotangent):
                return (None, *_formula_gradients(call, cotangent))
        parts = _forward(call)[1] if ctx.parts is None else ctx.parts
        # What was made in the forward pass is the caller's now, who may change it: a second backward makes it again.
        ctx.parts = None if any(part.kept is None for part in parts) else parts
        by = cotangent.tolist() if call.backend == "cpu" else cotangent.unbind()
        return (None, *_backward(call, parts, by))


def linear_multihead_loss_call(call: LinearCall) -> Tensor:
    """The losses [H] of a checked call, outside of any transform."""
    tensors = call.differentiable()
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        return _Linear.apply(call, *tensors)
    with torch.no_grad():
        features, heads = [x.detach() for x in call.features], [_detached(h) for h in call.heads]
        return _forward(call._replace(features=features, heads=heads))[0]


def _detached(h: LinearHead) -> LinearHead:
    return h._replace(weight=h.weight.detach(), bias=h.bias if h.bias is None else h.bias.detach())
