"""The arguments of `mtml::inner_loop` and its backward op: their order, their groups and the shapes that follow."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from mtml_kernels.program import HEADER_INTS, NODE_INTS, PARAM_INTS

ARGUMENTS = (
    "Tensor[] params, bool[] adapted, Tensor[] support_x, Tensor support_y, Tensor[] query_x, Tensor? query_y, "
    "Tensor? support_mask, Tensor? query_mask, Tensor[] lr, Tensor? step_weights, int[] program, float[] consts, "
    "int steps, int[] support_loss, int[] query_loss, float[] loss_args, bool first_order, int keep, int needs"
)
FORWARD_SCHEMA = f"inner_loop({ARGUMENTS}, str backend) -> (Tensor, Tensor, Tensor, Tensor[], Tensor[])"
# The cotangents of the adapted parameters travel as the defined ones plus a flag for each: PyTorch does not track a
# Tensor?[] argument that holds a None, and an untracked cotangent would have a silent zero for its derivative.
BACKWARD_SCHEMA = (
    "inner_loop_backward(Tensor? grad_loss, Tensor? grad_output, Tensor? grad_support_losses, Tensor[] grad_adapted, "
    f"bool[] grad_adapted_given, {ARGUMENTS}, Tensor[] carry, str backend) -> Tensor[]"
)

NEED_PARAMS, NEED_LR, NEED_SUPPORT_X, NEED_QUERY_X = 1, 2, 4, 8
KEEP_NONE, KEEP_LAST, KEEP_STEPS = 0, 1, 2

# adapted, program, consts, steps, support_loss, query_loss, loss_args, first_order, keep
StaticValues: TypeAlias = tuple[list[bool], list[int], list[float], int, list[int], list[int], list[float], bool, int]

_ROWS, _FEATURES = 5, 6  # positions within a node


@dataclasses.dataclass(frozen=True)
class InnerLoopSpec:
    """All that is not a tensor; built once per program and options, then reused by every call.

    `values` are the fields in schema order, ready to be passed on. `text` says the same in a string: torch.compile
    takes a string for a constant with one guard, where it would make a symbol (and a recompilation) of every int.
    """

    adapted: list[bool]  # per param: does the inner loop change it
    program: list[int]
    consts: list[float]
    steps: int
    support_loss: list[int]  # [kind, reduction]
    query_loss: list[int]
    loss_args: list[float]  # [support p0, query p0]
    first_order: bool
    keep: int  # 0 none, 1 theta_K, 2 theta_0..theta_K
    values: StaticValues = dataclasses.field(init=False, repr=False, compare=False)
    text: str = dataclasses.field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        values = (
            list(self.adapted),
            list(self.program),
            list(self.consts),
            self.steps,
            list(self.support_loss),
            list(self.query_loss),
            list(self.loss_args),
            self.first_order,
            self.keep,
        )
        numbers = [v if isinstance(v, list) else [v] for v in values]
        text = ";".join(" ".join(repr(float(x) if i in _FLOATS else int(x)) for x in v) for i, v in enumerate(numbers))
        object.__setattr__(self, "values", values)
        object.__setattr__(self, "text", text)


_FLOATS = (2, 6)  # consts and loss_args, among the fields of the spec


def parse_spec(text: str) -> StaticValues:
    """The `values` of a spec from its `text`, in steps that torch.compile folds into constants."""
    fields = [field.split() for field in text.split(";")]
    adapted, program, consts, steps, support_loss, query_loss, loss_args, first_order, keep = fields
    return (
        [flag == "1" for flag in adapted],
        [int(i) for i in program],
        [float(x) for x in consts],
        int(steps[0]),
        [int(i) for i in support_loss],
        [int(i) for i in query_loss],
        [float(x) for x in loss_args],
        first_order[0] == "1",
        int(keep[0]),
    )


class InnerLoopArgs(NamedTuple):
    """The op's arguments in schema order, less the backend's name."""

    params: list[Tensor]
    adapted: list[bool]
    support_x: list[Tensor]
    support_y: Tensor
    query_x: list[Tensor]
    query_y: Tensor | None
    support_mask: Tensor | None
    query_mask: Tensor | None
    lr: list[Tensor]
    step_weights: Tensor | None
    program: list[int]
    consts: list[float]
    steps: int
    support_loss: list[int]
    query_loss: list[int]
    loss_args: list[float]
    first_order: bool
    keep: int
    needs: int

    def static(self) -> StaticValues:
        """What an `InnerLoopSpec` holds as `values`."""
        return (
            self.adapted,
            self.program,
            self.consts,
            self.steps,
            self.support_loss,
            self.query_loss,
            self.loss_args,
            self.first_order,
            self.keep,
        )


def output_size(program: Sequence[int]) -> int:
    """Elements per sample of the program's output: rows * features of its output node."""
    _, n_inputs, n_params, _, output = program[:HEADER_INTS]
    node = HEADER_INTS + n_inputs + PARAM_INTS * n_params + NODE_INTS * output
    return program[node + _ROWS] * program[node + _FEATURES]


def _any_requires_grad(tensors: Sequence[Tensor]) -> bool:
    for tensor in tensors:  # noqa: SIM110 - starting a generator costs more than the whole scan
        if tensor.requires_grad:
            return True
    return False


def wanted_gradients(
    params: Sequence[Tensor], lr: Sequence[Tensor], support_x: Sequence[Tensor], query_x: Sequence[Tensor]
) -> int:
    """The `needs` bits: which groups of tensors have one that requires a gradient."""
    needs = NEED_PARAMS if _any_requires_grad(params) else 0
    if _any_requires_grad(lr):
        needs |= NEED_LR
    if _any_requires_grad(support_x):
        needs |= NEED_SUPPORT_X
    if _any_requires_grad(query_x):
        needs |= NEED_QUERY_X
    return needs


def refuse_gradients(*fixed: Tensor | None) -> None:
    """Raises where one of support_y, query_y, support_mask, query_mask, step_weights would silently get no gradient."""
    for index, tensor in enumerate(fixed):
        if tensor is not None and tensor.requires_grad:
            name = _FIXED[index]
            raise ValueError(
                f"inner_loop: {name} requires grad, but the fused inner loop gives gradients to params, lr, support_x "
                f'and query_x only. Pass {name}.detach(), or take the general path: mtml.MAML(..., backend="general").'
            )


_FIXED = ("support_y", "query_y", "support_mask", "query_mask", "step_weights")


def _groups(a: InnerLoopArgs) -> tuple[tuple[int, list[Tensor]], ...]:
    return (
        (a.needs & NEED_PARAMS, a.params),
        (a.needs & NEED_LR, a.lr),
        (a.needs & NEED_SUPPORT_X, a.support_x),
        (a.needs & NEED_QUERY_X, a.query_x),
    )


def gradient_inputs(a: InnerLoopArgs) -> list[Tensor]:
    """The tensors whose gradients `needs` asks for, in the order in which the backward op returns them."""
    return [t for needed, tensors in _groups(a) if needed for t in tensors if t.is_floating_point()]


def flat_gradients(a: InnerLoopArgs, grads: Sequence[Sequence[Tensor | None]]) -> list[Tensor]:
    """A backend's four groups of gradients as the backward op's result, one tensor per `gradient_inputs`."""
    flat: list[Tensor] = []
    for (needed, tensors), group in zip(_groups(a), grads, strict=True):
        for tensor, grad in zip(tensors, group, strict=True) if needed else ():
            if tensor.is_floating_point():
                flat.append(torch.zeros_like(tensor, memory_format=torch.contiguous_format) if grad is None else grad)
    return flat


def group_gradients(a: InnerLoopArgs, flat: Sequence[Tensor]) -> list[list[Tensor | None]]:
    """The inverse of `flat_gradients`: None for every input that got no gradient."""
    grads = iter(flat)
    return [[next(grads) if needed and t.is_floating_point() else None for t in ts] for needed, ts in _groups(a)]


def output_shapes(a: InnerLoopArgs) -> tuple[list[int], list[int], list[int], list[list[int]]]:
    """Shapes of loss, output, support_losses and of each adapted parameter."""
    tasks = a.support_y.shape[0]
    queries = a.query_x[0].shape[1] if a.query_x else 0
    loss = [tasks] if a.query_x and a.query_y is not None else [0]
    lead = {KEEP_NONE: None, KEEP_LAST: [tasks], KEEP_STEPS: [a.steps + 1, tasks]}[a.keep]
    kept = [] if lead is None else [[*lead, *p.shape] for p, flag in zip(a.params, a.adapted, strict=True) if flag]
    return loss, [tasks, queries, output_size(a.program)], [a.steps, tasks], kept


Outputs = tuple[Tensor, Tensor, Tensor, list[Tensor], list[Tensor]]


def empty_outputs(a: InnerLoopArgs, carry: Sequence[tuple[tuple[int, ...], torch.dtype]]) -> Outputs:
    """Uninitialised outputs of the right shapes: what the fake returns."""
    loss, output, support_losses, kept = output_shapes(a)
    like = a.params[0]
    return (
        like.new_empty(loss),
        like.new_empty(output),
        like.new_empty(support_losses),
        [like.new_empty(shape) for shape in kept],
        [like.new_empty(shape, dtype=dtype) for shape, dtype in carry],
    )
