"""Small problems for the tests of `head_inner_loop`: the op's arguments, and what to ask of its results."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from mtml_kernels.losses import LossSpec
from mtml_kernels.ops.head_inner_loop import BACKENDS, head_inner_loop_call
from mtml_kernels.reference.head_inner_loop import weight_space
from mtml_kernels.schema.head_inner_loop import HeadArgs, HeadOptions, encode_options

BACKEND_NAMES = BACKENDS.available()
DIFFERENTIABLE = ("support", "query", "weight", "bias", "rates")


@dataclasses.dataclass
class HeadCase:
    """The arguments of one call."""

    args: HeadArgs
    options: HeadOptions

    def tensors(self) -> list[Tensor]:
        """All tensors that may have a gradient."""
        return [t for t in self.args[:5] if t is not None]

    def with_tensors(self, tensors: list[Tensor] | tuple[Tensor, ...]) -> HeadCase:
        given = iter(tensors)
        first = [None if t is None else next(given) for t in self.args[:5]]
        return dataclasses.replace(self, args=HeadArgs._make((*first, *self.args[5:])))

    def requiring_grad(self) -> HeadCase:
        return self.with_tensors([t.detach().clone().requires_grad_() for t in self.tensors()])

    def replace(self, **fields: Any) -> HeadCase:
        return dataclasses.replace(self, args=self.args._replace(**fields))

    def call(self, backend: str) -> tuple[Tensor, ...]:
        """loss, logits, support_losses, coefficients."""
        return head_inner_loop_call(self.args, backend)

    def op(self, backend: str) -> tuple[Tensor, ...]:
        """The same through the registered op."""
        needs = sum(t.requires_grad << i for i, t in enumerate(self.args[:5]) if t is not None)
        found: tuple[Tensor, ...] = torch.ops.mtml.head_inner_loop(*self.args._replace(needs=needs), backend)[:4]
        return found

    def by_weights(self) -> tuple[Tensor, ...]:
        """loss, logits, support_losses, weight [T, C, D], bias [T, C], by the specification in weight space."""
        a = self.args
        sets = (a.support, a.labels, a.query, a.query_labels, a.weight, a.bias, a.rates)
        return weight_space(*sets, a.support_mask, a.query_mask, self.options)


def labels_for(spec: LossSpec, lead: tuple[int, int], classes: int, **like: Any) -> Tensor:
    if spec.kind == "cross_entropy":
        return torch.randint(classes, lead)
    return torch.rand(*lead, classes, **like) if spec.kind == "bce_with_logits" else torch.randn(*lead, classes, **like)


def make_head_case(
    *,
    tasks: int = 2,
    support: int = 4,
    query: int = 3,
    features: int = 6,
    classes: int = 3,
    steps: int = 3,
    loss: LossSpec | None = None,
    query_loss: LossSpec | None = None,
    groups: int = 1,
    bias: bool = True,
    masks: bool = False,
    targets: bool = True,
    decay: float = 0.0,
    proximal: float = 0.0,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> HeadCase:
    """A random problem; rates differ by step and by class."""
    torch.manual_seed(seed)
    like: dict[str, Any] = {"dtype": dtype}
    loss = loss or LossSpec("cross_entropy")
    options = HeadOptions(loss, query_loss or loss, decay, proximal)
    scale = features**-0.5
    args = HeadArgs(
        support=scale * torch.randn(tasks, support, features, **like),
        query=scale * torch.randn(tasks, query, features, **like),
        weight=torch.randn(classes, features, **like),
        bias=torch.randn(classes, **like) if bias else None,
        rates=0.1 + 0.3 * torch.rand(groups, steps, classes, **like),
        labels=labels_for(loss, (tasks, support), classes, **like),
        query_labels=labels_for(options.query_loss, (tasks, query), classes, **like) if targets else None,
        support_mask=torch.rand(tasks, support, **like) if masks else None,
        query_mask=torch.rand(tasks, query, **like) if masks and targets else None,
        options=encode_options(options),
        needs=0,
    )
    return HeadCase(args, options)


def total(outputs: tuple[Tensor, ...]) -> Tensor:
    """A number that depends on every output, each element with a weight of its own."""
    flat = torch.cat([t.flatten() for t in outputs])
    return flat @ torch.linspace(0.5, 1.5, len(flat), dtype=flat.dtype)


def gradients(case: HeadCase, backend: str) -> tuple[Tensor, ...]:
    case = case.requiring_grad()
    return torch.autograd.grad(total(case.call(backend)), case.tensors(), allow_unused=True, materialize_grads=True)
