"""What is predicted: the op alone, forward and backward, on tensors of the CPU that nobody but the emulation reads.

A loss's mean and what autograd adds are left out. Heads of `bench.workloads.heads` by the cases of
`bench.gpu.multihead_loss`, which are the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from bench.gpu.head_inner_loop import CASES as HEADS
from bench.gpu.head_inner_loop import OPTIONS, Shape, draw_case
from bench.gpu.multihead_loss import CASES as LOSSES
from bench.gpu.multihead_loss import Heads
from bench.measure import flops
from bench.workloads import WORKLOADS
from bench.workloads.heads import Draw
from mtml_kernels.schema.head_inner_loop import HeadArgs, encode_options
from mtml_kernels.schema.linear_multihead_loss import LinearHead, Wants
from mtml_kernels.triton import head_inner_loop, multihead_loss
from mtml_kernels.triton.linear_multihead_loss import Problem

__all__ = ["DEFAULT", "NAMES", "Case", "case_of"]

OF_LOSSES = {
    "heads_linear_ce": "linear_many",
    "heads_vocab_ce": "vocab",
    "heads_segmentation": "segmentation",
    "heads_many_small": "many_small",
}
DEFAULT = ("anil_head", "one_shot", *OF_LOSSES)
OF_STEPS = tuple(name for name in HEADS if name == "anil_head" or name not in WORKLOADS)  # "tiny" is a network's
NAMES = (*OF_STEPS, *OF_LOSSES, "mixed", "long_narrow")
NEEDS = 0b1111  # gradients of both feature sets, weight and bias
DRAWN = 1 << 20  # elements of a tensor at most that get values: of larger ones nobody reads any


class Case(NamedTuple):
    """A step, what is there before it, and what it has to do at least: FLOPs, bytes of all arguments and results."""

    name: str
    run: Callable[[], object]
    tensors: Sequence[Tensor]
    flops: int
    bytes: int


class _Drawn(Draw):
    """Draws what is small."""

    def leaf(self, *shape: int, scale: float = 1.0) -> Tensor:
        if torch.Size(shape).numel() <= DRAWN:
            return super().leaf(*shape, scale=scale).detach()
        return torch.empty(*shape, dtype=self.dtype)


def _inner_loop(name: str, shape: Shape) -> Case:
    drawn = [t.detach() for t in draw_case(shape, "cpu")]
    support, query, weight, bias, labels, query_labels, rates = drawn
    options = encode_options(OPTIONS)
    args = HeadArgs(support, query, weight, bias, rates, labels, query_labels, None, None, options, NEEDS)
    ones = torch.ones(shape.tasks)

    def run() -> object:
        *_, carry = head_inner_loop.forward(args)
        return head_inner_loop.backward((ones, None, None, None), args, carry)

    tasks, support_size, query_size, features, classes, steps = shape
    like = replace(
        WORKLOADS["anil_head"], tasks=tasks, support=support_size, query=query_size, out=classes, steps=steps
    )
    done = flops.gram_head(like, features)
    gradients = sum(t.nbytes for t in (support, query, weight, bias))
    return Case(name, run, [*drawn, ones], done, sum(t.nbytes for t in drawn) + gradients)


def _linear(heads: Heads) -> Callable[[], object]:
    features, *weights = heads.leaves
    none = (None, None, None)
    biases = [torch.zeros(len(w)) for w in weights]
    rows = zip(heads.specs, weights, biases, heads.targets, strict=True)
    problem = Problem(features, [LinearHead(i, s, w, b, y, *none) for i, (s, w, b, y) in enumerate(rows)], False)
    ones = list(torch.ones(len(weights)).unbind())

    def run() -> object:
        _, kept = problem.keep()
        return problem.back(kept, ones, Wants(True, [True] * len(weights), [True] * len(weights)))

    return run


def _apart(heads: Heads) -> Callable[[], object]:
    ones = torch.ones(len(heads.leaves))

    def run() -> object:
        _, gradients = multihead_loss.forward(heads.leaves, heads.targets, heads.specs)
        return multihead_loss.call_hand_out(gradients, ones, [1] * len(gradients))

    return run


def _losses(name: str, case: str) -> Case:
    heads = LOSSES[case](_Drawn(torch.float32, "cpu", 0))
    products = 6 * sum(heads.leaves[0].numel() * len(w) for w in heads.leaves[1:]) if heads.linear else 0
    moved = 2 * sum(z.nbytes for z in heads.leaves) + sum(y.nbytes for y in heads.targets)
    run = _linear(heads) if heads.linear else _apart(heads)
    return Case(name, run, [*heads.leaves, *heads.targets], products, moved)


def case_of(name: str) -> Case:
    """By its name, one of NAMES."""
    return _inner_loop(name, HEADS[name]) if name in OF_STEPS else _losses(name, OF_LOSSES.get(name, name))
