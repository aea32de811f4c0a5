"""The autograd of the multi-head losses: for eager code, for torch.func, and for gradients that are differentiated."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mtml_kernels.ops.multihead_loss_backends import along, reference_call, scaled
from mtml_kernels.registry import Backend
from mtml_kernels.schema.multihead_loss import HeadsCall, HeadTensors, Plain, make_call
from mtml_kernels.transforms import abstract, alive, is_forward_mode

__all__ = ["Eager", "Losses", "fast_losses", "gradient_formula", "gradients_at"]


def gradient_formula(call: HeadsCall, tensors: HeadTensors, cotangent: Tensor) -> tuple[Tensor, ...]:
    """The gradients at the logits, of PyTorch operations: differentiable any number of times."""
    tensors = HeadTensors.of(alive(tensors.flat()))

    def losses(*logits: Tensor) -> Tensor:
        return reference_call(call, tensors._replace(logits=logits))

    gradients: tuple[Tensor, ...] = torch.func.vjp(losses, *tensors.logits)[1](cotangent)
    return gradients


def gradients_at(call: HeadsCall, backend: Backend, cotangent: Tensor, tensors: HeadTensors) -> tuple[Tensor, ...]:
    """The gradients at the logits by the way that every transform around it follows."""
    if is_forward_mode():
        return gradient_formula(call, tensors, cotangent)
    gradients: tuple[Tensor, ...] = _Gradients.apply(call, backend, cotangent, *tensors.flat())
    return gradients


# --- eager code -------------------------------------------------------------------------------------------------------


class Eager(torch.autograd.Function):
    """The backend's forward and backward, without the dispatcher between."""

    @staticmethod
    def forward(ctx: Any, call: HeadsCall, backend: Backend, tensors: HeadTensors, *logits: Tensor) -> Tensor:
        """`logits` are those of `tensors`, which autograd tracks."""
        losses, ctx.gradients = backend.forward(call, tensors, True)
        ctx.call, ctx.backend = call, backend
        ctx.save_for_backward(*(tensors.flat() if call.weighted else (*logits, *tensors.targets)))
        return losses

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
        call: HeadsCall = ctx.call
        if torch.is_grad_enabled():  # create_graph=True
            return (None, None, None, *gradients_at(call, ctx.backend, cotangent, _saved(ctx)))
        gradients = ctx.gradients
        if gradients is None:
            gradients = ctx.backend.forward(call, _saved(ctx), True)[1]
        if abstract(cotangent):  # its values cannot be looked at
            ctx.gradients = gradients
            parts = cotangent.split(call.counts)
            return (None, None, None, *(g * along(g, c) for g, c in zip(gradients, parts, strict=True)))
        # Handed out, a gradient is the caller's, who may change it in place: a second backward makes them again.
        ctx.gradients = None
        if ctx.backend.hand_out is not None:
            return (None, None, None, *ctx.backend.hand_out(gradients, cotangent, call.counts))
        if cotangent.tolist().count(1.0) == len(cotangent):
            return (None, None, None, *gradients)
        parts = cotangent.split(call.counts)
        ones = [part.tolist().count(1.0) == len(part) for part in parts]
        found = [g if one else scaled(g, c) for g, c, one in zip(gradients, parts, ones, strict=True)]
        return (None, None, None, *found)


class Fast(Eager):
    """`Eager` in a backend's fast lane, where the gradients stay in one piece until they are handed out."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, call: HeadsCall, backend: Backend, tensors: HeadTensors, plain: Plain, *logits: Tensor
    ) -> Tensor:
        """`plain`: what the fast lane has read of the logits and targets."""
        losses, ctx.piece = backend.fast_lane.forward(call, plain, True)
        ctx.call, ctx.backend, ctx.form, ctx.gradients = call, backend, plain.form, None
        ctx.save_for_backward(*logits, *tensors.targets)
        return losses

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
        piece, ctx.piece = ctx.piece, None
        lane = ctx.backend.fast_lane
        if piece is None or torch.is_grad_enabled() or abstract(cotangent):
            if piece is not None:
                ctx.gradients = lane.divided(piece, ctx.form)
            return (None, *Eager.backward(ctx, cotangent))
        return (None, None, None, None, *lane.backward(ctx.call, ctx.form, piece, cotangent))


# Function.apply looks at each argument for what torch.func left behind, which no plain tensor is: 64 looks take 10 us.
fast_losses = super(torch.autograd.Function, Fast).apply


def _saved(ctx: Any) -> HeadTensors:
    """The tensors of a call that `Eager` saved."""
    none = (None,) * (0 if ctx.call.weighted else 3 * len(ctx.call.specs))
    return HeadTensors.of((*ctx.saved_tensors, *none))


# --- torch.func, and gradients that are differentiated ----------------------------------------------------------------


def _stacks(info: Any, in_dims: Sequence[Any], call: HeadsCall, flat: Sequence[Any]) -> tuple[HeadsCall, HeadTensors]:
    """A batch of calls is one call on heads that are stacks."""
    stacked = call.stacked * 5  # one for each of the columns
    batch: list[Tensor | None] = []
    for t, dim, stack in zip(flat, in_dims, stacked, strict=True):
        moved = t if t is None else t.expand(info.batch_size, *t.shape) if dim is None else t.movedim(dim, 0)
        batch.append(moved.flatten(0, 1) if moved is not None and stack else moved)
    tensors = HeadTensors.of(batch)
    return make_call(call.specs, (True,) * len(call.specs), tensors), tensors


class Losses(torch.autograd.Function):
    """The losses under torch.func's grad, vjp, jacrev and vmap, in any nesting.

    Neither this nor `_Gradients` has a rule for forward mode: PyTorch runs such a rule with forward mode switched off,
    so that the tangents of the levels around it would be lost. There the formulas run.
    """

    @staticmethod
    def forward(call: HeadsCall, backend: Backend, *flat: Tensor | None) -> Tensor:
        losses, _ = backend.forward(call, HeadTensors.of(flat), False)
        return losses

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.call, ctx.backend, *flat = inputs
        ctx.save_for_backward(*flat)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
        found = gradients_at(ctx.call, ctx.backend, cotangent, HeadTensors.of(ctx.saved_tensors))
        return (None, None, *found, *(None,) * (len(ctx.saved_tensors) - len(found)))

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], call: HeadsCall, backend: Backend, *flat: Any) -> tuple[Tensor, int]:
        together, tensors = _stacks(info, in_dims[2:], call, flat)
        parts = Losses.apply(together, backend, *tensors.flat()).split(together.counts)
        shaped = [part.view(info.batch_size, count) for part, count in zip(parts, call.counts, strict=True)]
        return torch.cat(shaped, 1), 0


class _Gradients(torch.autograd.Function):
    """The gradients at the logits for a cotangent, from the backend; their derivatives are those of the formula."""

    @staticmethod
    def forward(call: HeadsCall, backend: Backend, cotangent: Tensor, *flat: Tensor | None) -> tuple[Tensor, ...]:
        _, gradients = backend.forward(call, HeadTensors.of(flat), True)
        return tuple(backend.backward(gradients, cotangent, call.counts))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.call, _, *tensors = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        cotangent, *flat = alive(ctx.saved_tensors)
        tensors = HeadTensors.of(flat)

        def formula(cotangent: Tensor, *logits: Tensor) -> tuple[Tensor, ...]:
            return gradient_formula(ctx.call, tensors._replace(logits=logits), cotangent)

        found = torch.func.vjp(formula, cotangent, *tensors.logits)[1](cotangents)
        return (None, None, *found, *(None,) * (4 * len(cotangents)))

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], call: HeadsCall, backend: Backend, *rest: Any) -> tuple[Any, Any]:
        cotangent, *flat = rest
        _, _, dim, *dims = in_dims
        together, tensors = _stacks(info, dims, call, flat)
        size = info.batch_size
        moved = cotangent.expand(size, *cotangent.shape) if dim is None else cotangent.movedim(dim, 0)
        every = torch.cat([part.flatten() for part in moved.split(call.counts, 1)])
        found = _Gradients.apply(together, backend, every, *tensors.flat())
        apart = [g.unflatten(0, (size, -1)) if k else g for g, k in zip(found, call.stacked, strict=True)]
        return tuple(apart), (0,) * len(apart)
