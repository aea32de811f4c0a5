"""The compiled head losses: takes what is checked, makes it contiguous, and gives tensors back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mtml_kernels import native
from mtml_kernels.ops._multihead_schema import HeadsCall, HeadTensors

__all__ = ["multihead_forward", "recycled", "recycled_like"]

_DTYPES = {torch.float32: 0, torch.float64: 1}
_LARGE = 1 << 20  # bytes from which memory is recycled: PyTorch's own comes with fresh pages


def recycled(elements: int, dtype: torch.dtype) -> Tensor:
    """Uninitialised memory [elements], which goes back to the engine's pool with its last view."""
    if elements * dtype.itemsize < _LARGE:
        return torch.empty(elements, dtype=dtype, device="cpu")
    return torch.frombuffer(native._engine().Memory(elements * dtype.itemsize), dtype=dtype)


def recycled_like(t: Tensor) -> Tensor:
    """Uninitialised contiguous memory of a tensor's shape."""
    if t.numel() * t.dtype.itemsize < _LARGE:
        return torch.empty(t.shape, dtype=t.dtype, device="cpu")
    return recycled(t.numel(), t.dtype).view(t.shape)


def _room(tensors: Sequence[Tensor], call: HeadsCall) -> list[Tensor]:
    """Memory for a gradient of every tensor; small ones in one piece, 64 pieces are a third of 64 small heads' time."""
    if call.elements * call.dtype.itemsize >= _LARGE:
        return [recycled_like(t) for t in tensors]
    room = recycled(call.elements, call.dtype)
    if call.shape is not None:
        return list(room.view(len(tensors), *call.shape).unbind())
    return list(torch._C._nn.unflatten_dense_tensors(room, list(tensors)))


def _addresses(tensors: Sequence[Tensor | None], held: list[Any]) -> list[int]:
    """Where the tensors lie, made contiguous; [] where there are none."""
    plain = [t.data_ptr() for t in tensors if t is not None and t.is_contiguous() and not t.is_neg()]
    if len(plain) == len(tensors):
        return plain
    ready = [t if t is None else t.resolve_neg().contiguous() for t in tensors]
    held.append(ready)
    return [0 if t is None else t.data_ptr() for t in ready]


def multihead_forward(call: HeadsCall, tensors: HeadTensors, differentiate: bool) -> tuple[Tensor, list[Tensor]]:
    """The losses [sum of counts], and the gradient of each at its logits ([] unless asked for).

    Raises:
        ValueError: a class id is neither in range nor the ignored one; it names head, row and id.
    """
    engine = native._engine()
    if call.compiled is None:
        call.compiled = engine.Heads(_DTYPES[call.dtype], call.sizes, call.options)
    held: list[Any] = []
    addresses = [_addresses(column, held) for column in (tensors if call.weighted else tensors[:2])]
    addresses += [[]] * (5 - len(addresses))
    losses = torch.empty(sum(call.counts), dtype=call.dtype, device="cpu")
    gradients = _room(tensors.logits, call) if differentiate else []
    into = (losses.data_ptr(), [g.data_ptr() for g in gradients])
    try:
        call.compiled.run(torch.get_num_threads(), *addresses, *into)
    except engine.BadLabel as error:
        raise ValueError(bad_label(call, str(error))) from None
    return losses, gradients


def bad_label(call: HeadsCall, where: str) -> str:
    """The message for "head row label" as the engine gives it; its heads are counted through the stacks."""
    at, row, label = map(int, where.split())
    head = 0
    while at >= call.counts[head]:
        at -= call.counts[head]
        head += 1
    name = f"targets[{head}][{at}]" if call.stacked[head] else f"targets[{head}]"
    return label_message(name, row, label, call.sizes[head * 10 + 5], call.specs[head].ignore_index)


def label_message(name: str, row: int, label: int, classes: int, ignored: int) -> str:
    """What is wrong with a class id."""
    return (
        f"{name}: expected class ids in [0, {classes}), as the logits have classes, or ignore_index = {ignored}; got "
        f"{label} in row {row}; relabel the classes from 0, or pass a HeadLoss whose ignore_index is that id"
    )
