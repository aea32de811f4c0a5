"""The arguments of `mtml::multihead_loss`: what is static in a call, and the sizes by which the kernels see a head."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mtml_kernels.memory import LARGE
from mtml_kernels.schema.losses import CLASS_KINDS, HeadLoss
from mtml_kernels.schema.losses import HEAD_KINDS as KINDS

__all__ = [
    "BACKWARD_SCHEMA",
    "CLASSES",
    "FORWARD_SCHEMA",
    "HEAD_INTS",
    "FastLane",
    "HeadTensors",
    "HeadsCall",
    "Plain",
    "decode",
    "encode",
    "is_ids",
    "make_call",
]

FORWARD_SCHEMA = (
    "multihead_loss(Tensor[] logits, Tensor[] targets, Tensor[] weights, int[] places, str heads, bool differentiate, "
    "str backend) -> (Tensor, Tensor[])"
)
# The logits are arguments so that a gradient of this gradient is noticed, and raises.
BACKWARD_SCHEMA = (
    "multihead_loss_backward(Tensor cotangent, Tensor[] gradients, Tensor[] logits, int[] counts, str backend) "
    "-> Tensor[]"
)

HEAD_INTS = 10  # numbers in `HeadsCall.sizes` for each entry
ROWS, CLASSES = 4, 5  # places among them


class HeadTensors(NamedTuple):
    """The tensors of a call, one entry a head; a stacked head's have a leading dimension of that many equal heads."""

    logits: Sequence[Tensor]
    targets: Sequence[Tensor]
    sample_weights: Sequence[Tensor | None]
    class_weights: Sequence[Tensor | None]
    pos_weights: Sequence[Tensor | None]

    def unweighted(self) -> dict[str, Sequence[Tensor]]:
        """The columns that every call has, by name."""
        return {"logits": self.logits, "targets": self.targets}

    def weights(self) -> list[Tensor | None]:
        """The columns of weights, one after another."""
        return [*self.sample_weights, *self.class_weights, *self.pos_weights]

    def flat(self) -> list[Tensor | None]:
        """All of them, column by column."""
        return [t for column in self for t in column]

    @staticmethod
    def of(flat: Sequence[Any]) -> HeadTensors:
        """The inverse of `flat`."""
        columns = len(HeadTensors._fields)
        n = len(flat) // columns
        return HeadTensors(*(list(flat[i * n : (i + 1) * n]) for i in range(columns)))


@dataclass(eq=False)
class HeadsCall:
    """What is static in a call: the losses, which heads are stacks of equal ones, and every head's sizes.

    counts: how many losses each head gives (1, or the height of its stack). `sizes` and `options` are what
    `mtml_kernels._C.Heads` takes; the compiled object is kept in `compiled`. elements: of all logits; shape: of each,
    where it is the same; total: how many losses there are; weighted: whether there are weights of any kind.
    """

    specs: tuple[HeadLoss, ...]
    stacked: tuple[bool, ...]
    counts: list[int]
    sizes: list[int]
    options: list[float]
    dtype: torch.dtype
    elements: int
    shape: tuple[int, ...] | None
    total: int
    weighted: bool
    compiled: Any = field(default=None, repr=False)

    @property
    def text(self) -> str:
        """The losses and stacks in a string, which torch.compile guards with one comparison."""
        return encode(self.specs, self.stacked)

    @functools.cached_property
    def small(self) -> bool:
        """Whether all gradients lie in one piece of memory: 64 pieces are a third of 64 small heads' time."""
        return self.elements * self.dtype.itemsize < LARGE

    @functools.cached_property
    def loss_elements(self) -> Tensor:
        """How many logits every loss has [total]."""
        sizes = [
            self.sizes[g * HEAD_INTS + ROWS] * self.sizes[g * HEAD_INTS + CLASSES]
            for g, count in enumerate(self.counts)
            for _ in range(count)
        ]
        return torch.tensor(sizes, device="cpu")


class Plain(NamedTuple):
    """What a fast lane has read of logits and targets."""

    form: bytes  # what a check would look at; equal forms need one check
    addresses: bytes


@dataclass(frozen=True)
class FastLane:
    """A backend's way for small calls on plain tensors without weights, whose gradients lie in one piece of memory."""

    # (logits, targets). None where one needs more than to be read as it is: any other dtype, memory that is not
    # contiguous, no elements, a subclass, a tensor that stands for others, a target that requires grad.
    read: Callable[[list[Tensor], list[Tensor]], Plain | None]
    # (call, what was read, differentiate?) -> losses [sum of counts], the piece
    forward: Callable[[HeadsCall, Plain, bool], tuple[Tensor, Tensor | None]]
    # (call, form, piece, cotangent [sum of counts]) -> the gradients, parts of the piece where all cotangents are 1
    backward: Callable[[HeadsCall, bytes, Tensor, Tensor], list[Tensor]]
    # (piece, form) -> a tensor for each of the logits, none of them a view of it
    divided: Callable[[Tensor, bytes], list[Tensor]]


def encode(specs: Sequence[HeadLoss], stacked: Sequence[bool]) -> str:
    """Losses and stacks as text."""
    return ";".join(
        f"{s.kind},{s.reduction},{s.ignore_index},{s.label_smoothing!r},{s.delta!r},{s.class_dim},{int(k)}"
        for s, k in zip(specs, stacked, strict=True)
    )


@functools.lru_cache(256)
def decode(text: str) -> tuple[tuple[HeadLoss, ...], tuple[bool, ...]]:
    """The inverse of `encode`."""
    rows = [row.split(",") for row in text.split(";") if row]
    specs = [HeadLoss(r[0], r[1], int(r[2]), float(r[3]), float(r[4]), int(r[5])) for r in rows]
    return tuple(specs), tuple(r[6] == "1" for r in rows)


def is_ids(spec: HeadLoss, target: Tensor) -> bool:
    """Whether the target is class ids."""
    return spec.kind == "cross_entropy" and not target.is_floating_point()


def _sizes(spec: HeadLoss, shape: Sequence[int], ids: bool, weights: Sequence[int] | None, pos: bool) -> list[int]:
    """[rows, classes, inner, rows a sample weight, elements of the target] of one head (not a stack)."""
    if spec.kind in CLASS_KINDS:
        dim = spec.class_dim % len(shape)
        classes, inner = shape[dim], math.prod(shape[dim + 1 :])
        rows = math.prod(shape[:dim]) * inner
        given = rows if weights is None else math.prod(weights)
        return [rows, classes, inner, max(rows // max(given, 1), 1), rows if ids else rows * classes]
    if spec.kind == "gaussian_nll":
        per = math.prod(shape[1:-1])
        return [shape[0] * per, shape[-1], 1, max(per, 1), shape[0] * per * (shape[-1] // 2)]
    total = math.prod(shape)
    if weights is None and not pos:  # one long row
        return [min(total, 1), total, 1, 1, total]
    return [shape[0], math.prod(shape[1:]), 1, 1, total]


def make_call(specs: Sequence[HeadLoss], stacked: Sequence[bool], tensors: HeadTensors) -> HeadsCall:
    """The static part of a call on these tensors, which are already checked."""
    counts: list[int] = []
    sizes: list[int] = []
    options: list[float] = []
    for spec, stack, z, y, own, _, pos in zip(specs, stacked, *tensors, strict=True):
        lead = int(stack)
        ids = is_ids(spec, y)
        weights = None if own is None else own.shape[lead:]
        rows, classes, inner, per, target = _sizes(spec, z.shape[lead:], ids, weights, pos is not None)
        counts.append(z.shape[0] if stack else 1)
        codes = [KINDS.index(spec.kind), int(spec.reduction == "mean"), int(ids)]
        sizes += [*codes, counts[-1], rows, classes, inner, per, spec.ignore_index, target]
        options.append(spec.delta if spec.kind == "huber" else spec.label_smoothing)
    shapes = {tuple(z.shape) for z in tensors.logits}
    return HeadsCall(
        tuple(specs),
        tuple(stacked),
        counts,
        sizes,
        options,
        tensors.logits[0].dtype,
        sum(math.prod(z.shape) for z in tensors.logits),
        shapes.pop() if len(shapes) == 1 else None,
        sum(counts),
        any(t is not None for t in tensors.weights()),
    )
