"""The arguments of `mtml::head_inner_loop` and its backward op: their order and the shapes that follow from them."""

from __future__ import annotations

import functools
from typing import NamedTuple, TypeAlias

from torch import Tensor

from mtml_kernels.schema.losses import LossSpec

__all__ = [
    "BACKWARD_SCHEMA",
    "DIFFERENTIABLE",
    "FIXED",
    "FORWARD_SCHEMA",
    "NEEDS_RATES",
    "Cotangents",
    "HeadArgs",
    "HeadOptions",
    "HeadOutputs",
    "carry_size",
    "empty_outputs",
    "encode_options",
    "parse_options",
    "wanted",
]

ARGUMENTS = (
    "Tensor support, Tensor query, Tensor weight, Tensor? bias, Tensor rates, Tensor labels, Tensor? query_labels, "
    "Tensor? support_mask, Tensor? query_mask, str options, int needs"
)
FORWARD_SCHEMA = f"head_inner_loop({ARGUMENTS}, str backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
BACKWARD_SCHEMA = (
    "head_inner_loop_backward(Tensor? grad_loss, Tensor? grad_logits, Tensor? grad_support_losses, "
    f"Tensor? grad_coefficients, {ARGUMENTS}, Tensor carry, str backend) -> Tensor[]"
)
NEEDS_RATES = 16

# loss, logits, support_losses, coefficients, carry
HeadOutputs: TypeAlias = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
Cotangents: TypeAlias = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]


class HeadArgs(NamedTuple):
    """The op's arguments in schema order, less the backend's name. Bit i of `needs`: tensor i wants a gradient."""

    support: Tensor  # [T, S, D]
    query: Tensor  # [T, Q, D]
    weight: Tensor  # [C, D]
    bias: Tensor | None  # [C]
    rates: Tensor  # [1 or 2, K, C]
    labels: Tensor  # [T, S] or [T, S, C]
    query_labels: Tensor | None
    support_mask: Tensor | None  # [T, S]
    query_mask: Tensor | None  # [T, Q]
    options: str
    needs: int

    @property
    def differentiable(self) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor]:
        """The tensors that may get a gradient, in the order of the bits of `needs`."""
        return (self.support, self.query, self.weight, self.bias, self.rates)

    @property
    def fixed(self) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
        """The tensors that get none, as `FIXED` names them."""
        return (self.labels, self.query_labels, self.support_mask, self.query_mask)

    @property
    def has_loss(self) -> bool:
        """Whether the query sets have labels."""
        return self.query_labels is not None

    def asks(self) -> list[bool]:
        """Which of the differentiable tensors are to get a gradient."""
        return [t is not None and bool(self.needs >> i & 1) for i, t in enumerate(self.differentiable)]


DIFFERENTIABLE = HeadArgs._fields[:5]
FIXED = HeadArgs._fields[5:9]


class HeadOptions(NamedTuple):
    """All that is not a tensor."""

    support_loss: LossSpec
    query_loss: LossSpec
    decay: float = 0.0
    proximal: float = 0.0


def encode_options(options: HeadOptions) -> str:
    """A string: torch.compile takes it for a constant, where it would make a symbol of every number."""
    numbers = (*options.support_loss.encode(), *options.query_loss.encode(), options.decay, options.proximal)
    return " ".join(f"{number}" for number in numbers)


@functools.lru_cache(maxsize=256)
def parse_options(text: str) -> HeadOptions:
    """The inverse of `encode_options`."""
    kind, reduction, p0, query_kind, query_reduction, query_p0, decay, proximal = text.split()
    return HeadOptions(
        LossSpec.decode(int(kind), int(reduction), float(p0)),
        LossSpec.decode(int(query_kind), int(query_reduction), float(query_p0)),
        float(decay),
        float(proximal),
    )


def carry_size(a: HeadArgs) -> int:
    """Elements a task of what the compiled forward leaves for its backward (csrc/cpu/head_inner_loop/chain.h)."""
    support, query, classes = a.support.shape[1], a.query.shape[1], a.weight.shape[0]
    return support * (support + 2 * classes) + query * classes + 2 * classes + a.rates.numel()


def wanted(a: HeadArgs) -> list[Tensor]:
    """The tensors whose gradients `needs` asks for, in the order in which the backward op returns them."""
    return [t for t, asked in zip(a.differentiable, a.asks(), strict=True) if asked and t is not None]


def empty_outputs(a: HeadArgs, carried: bool) -> HeadOutputs:
    """Uninitialised outputs of the right shapes: what the fake returns."""
    tasks, support, _ = a.support.shape
    groups, steps, classes = a.rates.shape
    like = a.weight
    return (
        like.new_empty(tasks if a.has_loss else 0),
        like.new_empty((tasks, a.query.shape[1], classes)),
        like.new_empty((steps, tasks)),
        like.new_empty((tasks, groups, classes, support)),
        like.new_empty((tasks, carry_size(a)) if carried and a.needs and a.has_loss else 0),
    )
