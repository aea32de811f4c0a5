"""The compiled head losses: takes what is checked, makes it contiguous, and gives tensors back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mtml_kernels import native
from mtml_kernels.native import addresses_of, plain_tensors
from mtml_kernels.schema.multihead_loss import HEAD_INTS, LARGE, HeadsCall, HeadTensors

__all__ = [
    "divided",
    "multihead_forward",
    "plain_backward",
    "plain_forward",
    "read_plain",
    "recycled",
    "recycled_like",
]

_DTYPES = {torch.float32: 0, torch.float64: 1}
_NAMES = HeadTensors._fields


def recycled(elements: int, dtype: torch.dtype) -> Tensor:
    """Uninitialised memory [elements], which goes back to the engine's pool with its last view."""
    if elements * dtype.itemsize < LARGE:
        return torch.empty(elements, dtype=dtype, device="cpu")
    return torch.frombuffer(native._engine().Memory(elements * dtype.itemsize), dtype=dtype)


def recycled_like(t: Tensor) -> Tensor:
    """Uninitialised contiguous memory of a tensor's shape."""
    if t.numel() * t.dtype.itemsize < LARGE:
        return torch.empty(t.shape, dtype=t.dtype, device="cpu")
    return recycled(t.numel(), t.dtype).view(t.shape)


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
    columns = tensors if call.weighted else tensors[:2]
    ready = [addresses_of(name, column, call.dtype, ids=True) for name, column in zip(_NAMES, columns, strict=False)]
    addresses = [found for _, found in ready] + [[]] * (5 - len(ready))
    losses = torch.empty(call.total, dtype=call.dtype, device="cpu")
    gradients = _room(tensors.logits, call) if differentiate else []
    _run(call, "run", *addresses, losses.data_ptr(), [g.data_ptr() for g in gradients])
    return losses, gradients


def _run(call: HeadsCall, method: str, *arguments: Any) -> None:
    engine = native._engine()
    if call.compiled is None:
        call.compiled = engine.Heads(_DTYPES[call.dtype], call.sizes, call.options)
    try:
        getattr(call.compiled, method)(torch.get_num_threads(), *arguments)
    except engine.BadLabel as error:
        raise ValueError(bad_label(call, str(error))) from None


# --- plain tensors ----------------------------------------------------------------------------------------------------


def read_plain(logits: list[Tensor], targets: list[Tensor]) -> tuple[bytes, bytes] | None:
    """Of CPU tensors that the engine takes as they are, their form (what a check would look at) and their addresses.

    None where there is one that needs more than that: any other dtype, memory that is not contiguous, no elements, a
    subclass, a tensor that stands for others, a target that requires grad.
    """
    reader = plain_tensors()
    found: tuple[bytes, bytes] | None = None if reader is None else reader.read(logits, targets)
    return found


def plain_forward(call: HeadsCall, addresses: bytes, differentiate: bool) -> tuple[Tensor, Tensor | None]:
    """`multihead_forward` by what `read_plain` gives: a call without weights, its gradients in one piece."""
    losses = torch.empty(call.total, dtype=call.dtype, device="cpu")
    piece = recycled(call.elements, call.dtype) if differentiate else None
    _run(call, "run_plain", addresses, losses.data_ptr(), 0 if piece is None else piece.data_ptr())
    return losses, piece


def plain_backward(call: HeadsCall, form: bytes, piece: Tensor, cotangent: Tensor) -> list[Tensor]:
    """The gradients in `piece`, which is handed out in parts, or what they are times the cotangents of their losses."""
    if not plain_tensors().only_ones(cotangent):
        piece = piece * cotangent.repeat_interleave(call.loss_elements, output_size=call.elements)
    return divided(piece, form)


def divided(piece: Tensor, form: bytes) -> list[Tensor]:
    """A piece of memory as a tensor for each of the logits of that form, none of them a view of it."""
    found: list[Tensor] = plain_tensors().divide(piece, form)
    return found


def bad_label(call: HeadsCall, where: str) -> str:
    """The message for "head row label" as the engine gives it; its heads are counted through the stacks."""
    at, row, label = map(int, where.split())
    head = 0
    while at >= call.counts[head]:
        at -= call.counts[head]
        head += 1
    name = f"targets[{head}][{at}]" if call.stacked[head] else f"targets[{head}]"
    return label_message(name, row, label, call.sizes[head * HEAD_INTS + 5], call.specs[head].ignore_index)


def label_message(name: str, row: int, label: int, classes: int, ignored: int) -> str:
    """What is wrong with a class id."""
    return (
        f"{name}: expected class ids in [0, {classes}), as the logits have classes, or ignore_index = {ignored}; got "
        f"{label} in row {row}; relabel the classes from 0, or pass a HeadLoss whose ignore_index is that id"
    )
