"""The compiled head losses: takes what is checked, makes it contiguous, and gives tensors back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mtml_kernels.checks import label_message
from mtml_kernels.native import engine
from mtml_kernels.native.tensors import addresses_of, checked, plain_tensors, recycled, recycled_like
from mtml_kernels.schema.dtypes import DTYPES
from mtml_kernels.schema.multihead_loss import CLASSES, HEAD_INTS, FastLane, HeadsCall, HeadTensors, Plain

__all__ = ["FAST_LANE", "multihead_forward"]


def _room(tensors: Sequence[Tensor], call: HeadsCall) -> list[Tensor]:
    """Memory for a gradient of every tensor."""
    if not call.small:
        return [recycled_like(t) for t in tensors]
    room = recycled(call.elements, call.dtype)
    if call.shape is not None:
        return list(room.view(len(tensors), *call.shape).unbind())
    return list(torch._C._nn.unflatten_dense_tensors(room, list(tensors)))


def multihead_forward(call: HeadsCall, tensors: HeadTensors, differentiate: bool) -> tuple[Tensor, list[Tensor]]:
    """The losses [sum of counts], and the gradient of each at its logits ([] unless asked for).

    Raises:
        ValueError: a class id is neither in range nor the ignored one; it names head, row and id.
    """
    columns = tensors._asdict().items() if call.weighted else tensors.unweighted().items()
    ready = [checked(name, column, call.dtype, ids=True) for name, column in columns]
    addresses = [found for _, found in ready] + [[]] * (len(tensors) - len(ready))
    losses = torch.empty(call.total, dtype=call.dtype, device="cpu")
    gradients = _room(tensors.logits, call) if differentiate else []
    _run(call, "run", *addresses, losses.data_ptr(), addresses_of(gradients))
    return losses, gradients


def _run(call: HeadsCall, method: str, *arguments: Any) -> None:
    module = engine()
    if call.compiled is None:
        call.compiled = module.Heads(DTYPES[call.dtype], call.sizes, call.options)
    try:
        getattr(call.compiled, method)(torch.get_num_threads(), *arguments)
    except module.BadLabel as error:
        raise ValueError(_bad_label(call, str(error))) from None


def _bad_label(call: HeadsCall, where: str) -> str:
    """The message for "head row label" as the engine gives it; its heads are counted through the stacks."""
    at, row, label = map(int, where.split())
    head = 0
    while at >= call.counts[head]:
        at -= call.counts[head]
        head += 1
    name = f"targets[{head}][{at}]" if call.stacked[head] else f"targets[{head}]"
    classes = call.sizes[head * HEAD_INTS + CLASSES]
    return label_message(name, row, label, classes, call.specs[head].ignore_index)


# --- the fast lane: small calls on plain tensors ----------------------------------------------------------------------


def _read(logits: list[Tensor], targets: list[Tensor]) -> Plain | None:
    reader = plain_tensors()
    found = None if reader is None else reader.read(logits, targets)
    return None if found is None else Plain(*found)


def _forward(call: HeadsCall, plain: Plain, differentiate: bool) -> tuple[Tensor, Tensor | None]:
    losses = torch.empty(call.total, dtype=call.dtype, device="cpu")
    piece = recycled(call.elements, call.dtype) if differentiate else None
    _run(call, "run_plain", plain.addresses, losses.data_ptr(), 0 if piece is None else piece.data_ptr())
    return losses, piece


def _backward(call: HeadsCall, form: bytes, piece: Tensor, cotangent: Tensor) -> list[Tensor]:
    if not plain_tensors().only_ones(cotangent):
        piece = piece * cotangent.repeat_interleave(call.loss_elements, output_size=call.elements)
    return _divided(piece, form)


def _divided(piece: Tensor, form: bytes) -> list[Tensor]:
    found: list[Tensor] = plain_tensors().divide(piece, form)
    return found


FAST_LANE = FastLane(_read, _forward, _backward, _divided)
