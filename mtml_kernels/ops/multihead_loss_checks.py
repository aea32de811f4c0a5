"""What `torch.ops.mtml.multihead_loss` and its backward op ask of their arguments before a backend reads them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mtml_kernels.losses.head_checks import check_head
from mtml_kernels.ops.checks import Door
from mtml_kernels.schema.losses import HeadLoss
from mtml_kernels.schema.multihead_loss import HeadTensors, decode, is_ids

__all__ = ["check_arguments", "check_gradients", "gathered", "specifications"]

_DOOR = Door("mtml::multihead_loss", "mtml_kernels.multihead_loss prepares these arguments")


def gathered(logits: list[Tensor], targets: list[Tensor], weights: list[Tensor], places: list[int]) -> HeadTensors:
    """The columns of a call, from the weights that are given and their places among all that could be."""
    for name, tensors in (("logits", logits), ("targets", targets), ("weights", weights)):
        _DOOR.given(name, *tensors)
    n = len(logits)
    _DOOR.expect(n > 0, "logits", "at least one head", "none")
    _DOOR.length("targets", targets, n)
    _DOOR.length("places", places, len(weights))
    right = len(set(places)) == len(places) and all(0 <= place < 3 * n for place in places)
    _DOOR.expect(right, "places", f"different numbers from 0 to {3 * n - 1}", places)
    others: list[Tensor | None] = [None] * (3 * n)
    for place, t in zip(places, weights, strict=True):
        others[place] = t
    return HeadTensors(logits, targets, others[:n], others[n : 2 * n], others[2 * n :])


def specifications(heads: str, count: int) -> tuple[tuple[HeadLoss, ...], tuple[bool, ...]]:
    """The losses and stacks of `count` heads, from their text."""
    try:
        specs, stacked = decode(heads)
    except (ValueError, IndexError) as error:
        raise ValueError(f"{_DOOR.op}: heads: expected what encode gives, got {heads!r} ({error})") from None
    _DOOR.expect(count > 0, "logits", "at least one head", "none")
    _DOOR.length("heads", specs, count)
    return specs, stacked


def check_arguments(tensors: HeadTensors, heads: str) -> tuple[tuple[HeadLoss, ...], tuple[bool, ...]]:
    """The losses and stacks; raises ValueError or TypeError where a tensor does not fit, and names it."""
    key = _DOOR.passed(tensors.flat(), heads)
    specs, stacked = specifications(heads, len(tensors.logits))
    if key is not True:
        _check_all(tensors, specs, stacked)
        _DOOR.remember(key)
    return specs, stacked


def _check_all(tensors: HeadTensors, specs: Sequence[HeadLoss], stacked: Sequence[bool]) -> None:
    like = tensors.logits[0]
    _DOOR.floats(like, "logits[0]")
    for i, (spec, stack, *head) in enumerate(zip(specs, stacked, *tensors, strict=True)):
        lead = int(stack)
        for name, t in (("logits", head[0]), ("targets", head[1])):
            _DOOR.expect(t.ndim > lead, f"{name}[{i}]", f"more than {lead} dimensions", t)
        _DOOR.expect(not stack or head[0].shape[0] > 0, f"logits[{i}]", "a stack of at least one head", head[0])
        check_head(f"[{i}]", spec, head, like, lead)
        ids = torch.int64 if is_ids(spec, head[1]) else like.dtype
        weights = zip(("sample_weights", "class_weights", "pos_weights"), head[2:], strict=True)
        named = [(f"logits[{i}]", head[0], like.dtype), (f"targets[{i}]", head[1], ids)]
        _DOOR.kinds([*named, *((f"{n}[{i}]", t, like.dtype) for n, t in weights)], like.device)
        samples = (head[0].shape[0], *head[0].shape[2:]) if stack else head[0].shape[1:]
        _DOOR.shape(f"pos_weights[{i}]", head[4], samples)


def check_gradients(
    cotangent: Tensor, gradients: Sequence[Tensor], logits: Sequence[Tensor], counts: Sequence[int]
) -> None:
    """The same for the backward op."""
    for name, tensors in (("cotangent", (cotangent,)), ("gradients", gradients), ("logits", logits)):
        _DOOR.given(name, *tensors)
    _DOOR.length("gradients", gradients, len(logits))
    _DOOR.length("counts", counts, len(logits))
    for i, (g, z, count) in enumerate(zip(gradients, logits, counts, strict=True)):
        _DOOR.shape(f"gradients[{i}]", g, z.shape)
        _DOOR.expect(
            count == 1 or (z.ndim > 0 and z.shape[0] == count), "counts", "1, or the height of a stack", counts
        )
        _DOOR.kinds([(f"gradients[{i}]", g, z.dtype), (f"logits[{i}]", z, z.dtype)], cotangent.device)
    _DOOR.shape("cotangent", cotangent, (sum(counts),))
    if gradients:
        _DOOR.kinds([("cotangent", cotangent, gradients[0].dtype)], cotangent.device)
    _DOOR.memory([("cotangent", cotangent), *((f"gradients[{i}]", g) for i, g in enumerate(gradients))])
