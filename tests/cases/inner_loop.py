"""Small inner-loop problems for the op-level tests: programs written by hand, and every optional argument."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from mtml_kernels.losses import LossSpec
from mtml_kernels.ops.inner_loop import BACKENDS, InnerLoopSpec, inner_loop_call
from mtml_kernels.program import VERSION, Act, Op
from mtml_kernels.schema.inner_loop import PER_STEP, STARTS, InnerLoopArgs
from mtml_kernels.schema.update import UpdateSpec

BACKEND_NAMES = BACKENDS.available()

# clip_norm, weight_decay, momentum, dampening, beta1, beta2, eps, eps_root
HYPER = torch.tensor([0.4, 0.1, 0.8, 0.2, 0.7, 0.9, 1e-2, 1e-3], dtype=torch.float64)

Result = tuple[Tensor, Tensor, Tensor, list[Tensor]]


def encode(
    inputs: list[int], params: list[tuple[int, int, int]], nodes: list[list[int]], output: int | None = None
) -> list[int]:
    """The ints of a program (see mtml_kernels.program); the last node is the output unless told otherwise."""
    header = [VERSION, len(inputs), len(params), len(nodes), len(nodes) - 1 if output is None else output]
    return [*header, *inputs, *(i for p in params for i in p), *(i for node in nodes for i in node)]


def mlp(features: int = 3, hidden: int = 4, out: int = 2) -> tuple[list[int], list[tuple[int, ...]]]:
    """Linear, tanh, linear: program and parameter shapes."""
    nodes = [
        [Op.INPUT, 0, -1, -1, -1, 1, features, 1, -1],
        [Op.LINEAR, 0, -1, 0, 1, 1, hidden, 1, -1],
        [Op.ACT, 1, Act.TANH, -1, -1, 1, hidden, 1, -1],
        [Op.LINEAR, 2, -1, 2, 3, 1, out, 1, -1],
    ]
    params = [(0, hidden, features), (1, 1, hidden), (0, out, hidden), (1, 1, out)]
    return encode([features], params, nodes), [(hidden, features), (hidden,), (out, hidden), (out,)]


def latent(features: int = 3, hidden: int = 4, out: int = 2) -> tuple[list[int], list[tuple[int, ...]]]:
    """A shared MLP whose hidden layer is shifted by a vector: the last parameter, which alone is usually adapted."""
    nodes = [
        [Op.INPUT, 0, -1, -1, -1, 1, features, 1, -1],
        [Op.LINEAR, 0, -1, 0, 1, 1, hidden, 1, -1],
        [Op.PARAM, -1, -1, 4, -1, 1, hidden, 0, -1],
        [Op.ADD, 1, 2, -1, -1, 1, hidden, 1, -1],
        [Op.ACT, 3, Act.TANH, -1, -1, 1, hidden, 1, -1],
        [Op.LINEAR, 4, -1, 2, 3, 1, out, 1, -1],
    ]
    params = [(0, hidden, features), (1, 1, hidden), (0, out, hidden), (1, 1, out), (1, 1, hidden)]
    shapes = [(hidden, features), (hidden,), (out, hidden), (out,), (hidden,)]
    return encode([features], params, nodes), shapes


@dataclasses.dataclass
class Case:
    """The arguments of one call."""

    spec: InnerLoopSpec
    params: list[Tensor]
    support_x: list[Tensor]
    support_y: Tensor
    query_x: list[Tensor]
    query_y: Tensor | None
    support_mask: Tensor | None
    query_mask: Tensor | None
    lr: list[Tensor]
    step_weights: Tensor | None
    hyper: list[Tensor] = dataclasses.field(default_factory=list)
    moments: list[Tensor] = dataclasses.field(default_factory=list)

    def tensors(self) -> list[Tensor]:
        """All tensors that may have a gradient."""
        return [t for group in self.groups() for t in group]

    def groups(self) -> tuple[list[Tensor], ...]:
        return self.params, self.lr, self.support_x, self.query_x, self.hyper, self.moments

    def with_tensors(self, tensors: Sequence[Tensor]) -> Case:
        """The same call with other differentiable tensors (in the order of `tensors()`)."""
        it = iter(tensors)
        names = ("params", "lr", "support_x", "query_x", "hyper", "moments")
        found = {name: [next(it) for _ in group] for name, group in zip(names, self.groups(), strict=True)}
        return dataclasses.replace(self, **found)

    def requiring_grad(self) -> Case:
        return self.with_tensors([t.detach().clone().requires_grad_() for t in self.tensors()])

    def call(self, backend: str) -> Result:
        *fields, hyper, moments = [getattr(self, f.name) for f in dataclasses.fields(self)]
        return inner_loop_call(*fields, backend, hyper, moments)

    def op_arguments(self, needs: int) -> tuple[Any, ...]:
        """The arguments of torch.ops.mtml.inner_loop, less the backend."""
        adapted, *rest = self.spec.values
        tensors = (self.support_x, self.support_y, self.query_x, self.query_y, self.support_mask, self.query_mask)
        rule = (self.lr, self.hyper, self.moments)
        return (self.params, adapted, *tensors, *rule, self.step_weights, *rest, needs)

    def flat(self, backend: str) -> Callable[..., tuple[Tensor, ...]]:
        """The call as a function of its differentiable tensors to its outputs that are not empty, for gradcheck."""

        def function(*tensors: Tensor) -> tuple[Tensor, ...]:
            loss, output, support_losses, adapted = self.with_tensors(tensors).call(backend)
            return tuple(t for t in (loss, output, support_losses, *adapted) if t.numel())

        return function


def named_arguments(needs: int = 0, **named: Any) -> InnerLoopArgs:
    """The arguments of a call by name, those of the spec among them."""
    fields = {f.name for f in dataclasses.fields(InnerLoopSpec) if f.init}
    spec = InnerLoopSpec(**{name: named.pop(name) for name in list(named) if name in fields})
    return InnerLoopArgs(**{"hyper": [], "moments": [], **named}, spec=spec, needs=needs)


def rates(kind: str, shapes: list[tuple[int, ...]], adapted: list[bool], steps: int, **like: Any) -> list[Tensor]:
    """Learning rates in one of the op's forms."""
    changed = [shape for shape, flag in zip(shapes, adapted, strict=True) if flag]
    wanted = {
        "all": [(1,)],
        "all_per_step": [(steps,)],
        "tensor": [(1,)] * len(changed),
        "tensor_per_step": [(steps,)] * len(changed),
        "element": [(1, *shape) for shape in changed],
        "element_per_step": [(steps, *shape) for shape in changed],
    }[kind]
    return [0.2 + 0.3 * torch.rand(shape, **like) for shape in wanted]


def target(loss: LossSpec, lead: tuple[int, ...], out: int, **like: Any) -> Tensor:
    if loss.kind == "cross_entropy":
        return torch.randint(out, lead)
    if loss.kind == "bce_with_logits":
        return torch.rand(*lead, out, **like)
    return torch.randn(*lead, out, **like)


def make_case(
    *,
    program: tuple[list[int], list[tuple[int, ...]]] | None = None,
    adapted: list[bool] | None = None,
    tasks: int = 2,
    support: int = 3,
    query: int = 2,
    steps: int = 2,
    loss: LossSpec | None = None,
    query_loss: LossSpec | None = None,
    lr: str = "all",
    masks: bool = False,
    step_weights: bool = False,
    first_order: bool = False,
    keep: int = 0,
    features: int = 3,
    out: int = 2,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
    update: UpdateSpec | None = None,
    moments: bool = False,
    axes: int = 0,
) -> Case:
    """A random problem. query = 0 leaves the query set out."""
    torch.manual_seed(seed)
    like: dict[str, Any] = {"dtype": dtype}
    ints, shapes = program or mlp(features, out=out)
    adapted = adapted or [True] * len(shapes)
    loss = loss or LossSpec("mse")
    query_loss = query_loss or loss
    kind, reduction, p0 = loss.encode()
    query_kind, query_reduction, query_p0 = query_loss.encode()
    codes = [0, 0, 0] if update is None else [*update.encode(), 3 if moments else 0]
    losses = ([kind, reduction], [query_kind, query_reduction], [p0, query_p0])
    spec = InnerLoopSpec(adapted, ints, [], steps, *losses, first_order, keep, codes, axes)
    own = [(tasks,) if axes & STARTS and flag else () for flag in adapted]
    lead = (tasks, steps, support) if axes & PER_STEP else (tasks, support)
    planes = 0 if update is None or not moments else len(update.moments)
    changed = [shape for shape, flag in zip(shapes, adapted, strict=True) if flag]
    query_x = [torch.randn(tasks, query, features, **like)] if query else []
    return Case(
        spec=spec,
        params=[0.7 * torch.randn(*first, *shape, **like) for first, shape in zip(own, shapes, strict=True)],
        support_x=[torch.randn(*lead, features, **like)],
        support_y=target(loss, lead, out, **like),
        query_x=query_x,
        query_y=target(query_loss, (tasks, query), out, **like) if query else None,
        support_mask=torch.rand(lead, **like) if masks else None,
        query_mask=torch.rand(tasks, query, **like) if masks and query else None,
        lr=rates(lr, shapes, adapted, steps, **like),
        step_weights=torch.rand(steps + 1, **like) if step_weights else None,
        hyper=[] if update is None else [HYPER.clone()],
        moments=[1 + 0.1 * torch.rand(tasks, *shape, **like) for _ in range(planes) for shape in changed],
    )
