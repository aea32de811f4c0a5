"""The arguments of `mtml::inner_loop` and its backward op: their order, their groups and the shapes that follow."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from mtml_kernels.schema.losses import KINDS
from mtml_kernels.schema.program import output_size
from mtml_kernels.schema.update import UpdateSpec

if TYPE_CHECKING:
    from mtml_kernels.program import Program
    from mtml_kernels.schema.losses import LossSpec

__all__ = [
    "ARGUMENTS",
    "BACKWARD_SCHEMA",
    "CLASS_IDS",
    "DATA",
    "DATA_NEEDS",
    "FIXED",
    "FORWARD_SCHEMA",
    "KEEP_LAST",
    "KEEP_NONE",
    "KEEP_STEPS",
    "LISTS",
    "MOMENTS",
    "NEED_HYPER",
    "NEED_LR",
    "NEED_MOMENTS",
    "NEED_PARAMS",
    "NEED_QUERY_MASK",
    "NEED_QUERY_X",
    "NEED_QUERY_Y",
    "NEED_SUPPORT_MASK",
    "NEED_SUPPORT_X",
    "NEED_SUPPORT_Y",
    "PER_STEP",
    "PLAIN",
    "QUERY_STEPS",
    "SINGLE",
    "STARTS",
    "TASKS_APART",
    "Grads",
    "InnerLoopArgs",
    "InnerLoopSpec",
    "Outputs",
    "StaticValues",
    "empty_outputs",
    "flat_gradients",
    "gradient_inputs",
    "group_gradients",
    "output_shapes",
    "parse_spec",
]

Grads: TypeAlias = list[Tensor | None]

ARGUMENTS = (
    "Tensor[] params, bool[] adapted, Tensor[] support_x, Tensor support_y, Tensor[] query_x, Tensor? query_y, "
    "Tensor? support_mask, Tensor? query_mask, Tensor[] lr, Tensor[] hyper, Tensor[] moments, Tensor? step_weights, "
    "int[] program, float[] consts, int steps, int[] support_loss, int[] query_loss, float[] loss_args, "
    "bool first_order, int keep, int[] update, int axes, int needs"
)
FORWARD_SCHEMA = f"inner_loop({ARGUMENTS}, str backend) -> (Tensor, Tensor, Tensor, Tensor[], Tensor[])"
# The cotangents of the adapted parameters travel as the defined ones plus a flag for each: PyTorch does not track a
# Tensor?[] argument that holds a None, and an untracked cotangent would have a silent zero for its derivative.
BACKWARD_SCHEMA = (
    "inner_loop_backward(Tensor? grad_loss, Tensor? grad_output, Tensor? grad_support_losses, Tensor[] grad_adapted, "
    f"bool[] grad_adapted_given, {ARGUMENTS}, Tensor[] carry, str backend) -> Tensor[]"
)

# The bits of `needs`: which groups of tensors are to get a gradient.
NEED_PARAMS, NEED_LR, NEED_SUPPORT_X, NEED_QUERY_X, NEED_HYPER, NEED_MOMENTS = 1, 2, 4, 8, 16, 32
NEED_SUPPORT_Y, NEED_QUERY_Y, NEED_SUPPORT_MASK, NEED_QUERY_MASK = 64, 128, 256, 512
# Which adapted parameters come back: none, theta_K, or theta_0 .. theta_K.
KEEP_NONE, KEEP_LAST, KEEP_STEPS = 0, 1, 2

CLASS_IDS = KINDS.index("cross_entropy")  # the kind of the losses whose targets are class ids

# The bits of `axes`: what of a call has a dimension more than in plain MAML.
PER_STEP = 1  # the support sets: [T, K, S, ...]
STARTS = 2  # the adapted parameters: each task starts from its own, [T, *shape]
QUERY_STEPS = 4  # loss and output: of theta_0 .. theta_K, [K + 1, T, ...]
TASKS_APART = 8  # gradients of all parameters: [T, *shape]
MOMENTS = 16  # the update rule's moments after the last step come back behind the adapted parameters

# adapted, program, consts, steps, support_loss, query_loss, loss_args, first_order, keep, update, axes
StaticValues: TypeAlias = tuple[
    list[bool], list[int], list[float], int, list[int], list[int], list[float], bool, int, list[int], int
]
PLAIN = [0, 0, 0]  # gradient descent


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
    keep: int  # KEEP_NONE, KEEP_LAST or KEEP_STEPS
    update: list[int] = dataclasses.field(default_factory=lambda: list(PLAIN))  # `UpdateSpec.encode`, steps taken
    axes: int = 0  # bits PER_STEP ..
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
            list(self.update),
            self.axes,
        )
        numbers = [v if isinstance(v, list) else [v] for v in values]
        text = ";".join(" ".join(repr(float(x) if i in _FLOATS else int(x)) for x in v) for i, v in enumerate(numbers))
        object.__setattr__(self, "values", values)
        object.__setattr__(self, "text", text)

    @staticmethod
    def of(
        program: Program,
        adapted: Sequence[bool],
        losses: Sequence[LossSpec],
        *,
        steps: int,
        first_order: bool = False,
        keep: int = KEEP_NONE,
        update: UpdateSpec | None = None,
        taken: int = 0,
        axes: int = 0,
    ) -> InnerLoopSpec:
        """The spec of a traced program; `losses`: of the support and of the query sets. `update`: None for gradient
        descent; `taken`: how many steps the rule has taken before these.
        """
        (*support, support_p0), (*query, query_p0) = (loss.encode() for loss in losses)
        static = (list(adapted), list(program.ints), list(program.consts), steps)
        rule = PLAIN if update is None else [*update.encode(), taken]
        return InnerLoopSpec(*static, support, query, [support_p0, query_p0], first_order, keep, rule, axes)

    @functools.cached_property
    def rule(self) -> UpdateSpec:
        """The update rule."""
        return UpdateSpec.decode(*self.update[:2])

    def has(self, axis: int) -> bool:
        """Whether an axis is there."""
        return bool(self.axes & axis)


_FLOATS = (2, 6)  # consts and loss_args, among the fields of the spec


def parse_spec(text: str) -> StaticValues:
    """The `values` of a spec from its `text`, in steps that torch.compile folds into constants."""
    fields = [field.split() for field in text.split(";")]
    adapted, program, consts, steps, support_loss, query_loss, loss_args, first_order, keep, update, axes = fields
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
        [int(i) for i in update],
        int(axes[0]),
    )


class InnerLoopArgs(NamedTuple):
    """The arguments of one call: what every backend takes."""

    params: list[Tensor]  # [*shape], or [T, *shape] where each task starts from its own
    lr: list[Tensor]
    support_x: list[Tensor]  # [T, S, ...], or [T, K, S, ...] with a set for every step; targets and masks alike
    query_x: list[Tensor]  # [T, Q, ...]; empty: no query set
    hyper: list[Tensor]  # one [8], float64: the numbers of the update rule (`HYPERS`); empty for gradient descent
    moments: list[Tensor]  # of the rule at the start, plane by plane, [T, *shape] of each adapted one; empty: zeros
    support_y: Tensor  # [T, S, ...]
    query_y: Tensor | None
    support_mask: Tensor | None  # [T, S]
    query_mask: Tensor | None
    step_weights: Tensor | None  # [K + 1]
    spec: InnerLoopSpec
    needs: int  # bits NEED_*

    @staticmethod
    def of_schema(arguments: Sequence[Any]) -> InnerLoopArgs:
        """From the op's arguments in schema order (`ARGUMENTS`)."""
        params, adapted, support_x, support_y, query_x, query_y, *rest = arguments
        support_mask, query_mask, lr, hyper, moments, step_weights, *static, needs = rest
        groups = (params, lr, support_x, query_x, hyper, moments)
        single = (support_y, query_y, support_mask, query_mask, step_weights)
        return InnerLoopArgs(*groups, *single, _spec_of((adapted, *static)), needs)

    def in_schema(self, static: StaticValues) -> tuple[Any, ...]:
        """The op's arguments in schema order; `static`: the values of the spec."""
        adapted, *rest = static
        sets = (self.support_x, self.support_y, self.query_x, self.query_y, self.support_mask, self.query_mask)
        rule = (self.lr, self.hyper, self.moments)
        return (self.params, adapted, *sets, *rule, self.step_weights, *rest, self.needs)

    @property
    def tensors(self) -> list[Tensor | None]:
        """All of them, `LISTS` one after another, then `SINGLE`."""
        lists = (*self.params, *self.lr, *self.support_x, *self.query_x, *self.hyper, *self.moments)
        return [*lists, self.support_y, self.query_y, self.support_mask, self.query_mask, self.step_weights]

    @property
    def tasks(self) -> int:
        """T."""
        return self.support_y.shape[0]

    @property
    def support_samples(self) -> int:
        """S."""
        return self.support_y.shape[2 if self.spec.has(PER_STEP) else 1]

    def task_shape(self, param: int) -> torch.Size:
        """The shape of a parameter in one task."""
        own = self.spec.adapted[param] and self.spec.has(STARTS)
        return self.params[param].shape[1 if own else 0 :]

    @property
    def has_loss(self) -> bool:
        """Whether the query sets have targets."""
        return self.query_y is not None and bool(self.query_x)

    @property
    def fixed(self) -> tuple[Tensor | None, ...]:
        """The tensors that get no gradient, as `FIXED` names them."""
        return (self.step_weights,)

    @property
    def groups(self) -> tuple[tuple[int, list[Tensor]], ...]:
        """The tensors that may get a gradient, each group with its bit of `needs`; those of `DATA` hold one or none."""
        query_y, query_mask = (self.query_y, self.query_mask) if self.has_loss else (None, None)
        return (
            (self.needs & NEED_PARAMS, self.params),
            (self.needs & NEED_LR, self.lr),
            (self.needs & NEED_SUPPORT_X, self.support_x),
            (self.needs & NEED_QUERY_X, self.query_x),
            (self.needs & NEED_HYPER, self.hyper),
            (self.needs & NEED_MOMENTS, self.moments),
            (self.needs & NEED_SUPPORT_Y, [self.support_y]),
            (self.needs & NEED_QUERY_Y, [] if query_y is None else [query_y]),
            (self.needs & NEED_SUPPORT_MASK, [] if self.support_mask is None else [self.support_mask]),
            (self.needs & NEED_QUERY_MASK, [] if query_mask is None else [query_mask]),
        )

    def gradient_shape(self, group: int, index: int) -> torch.Size:
        """The shape of the gradient of a tensor of a group: as the tensor but for parameters of tasks apart."""
        own = self.groups[group][1][index].shape
        if group == 0 and self.spec.has(TASKS_APART):
            return torch.Size([self.tasks, *self.task_shape(index)])
        return own


# Single tensors: those that may get a gradient (class ids do not), with the bits of `needs`, and those that do not.
DATA = ("support_y", "query_y", "support_mask", "query_mask")
DATA_NEEDS = (NEED_SUPPORT_Y, NEED_QUERY_Y, NEED_SUPPORT_MASK, NEED_QUERY_MASK)
FIXED = ("step_weights",)
SINGLE = (*DATA, *FIXED)
LISTS = ("params", "lr", "support_x", "query_x", "hyper", "moments")

_specs: dict[Any, InnerLoopSpec] = {}
_MAX_SPECS = 512


def _spec_of(static: tuple[Any, ...]) -> InnerLoopSpec:
    """The spec of these values, the same one for equal values: the op's door gets new lists at every call."""
    key = tuple([tuple(v) if isinstance(v, list) else v for v in static])
    try:
        found = _specs.get(key)
    except TypeError:  # numbers that are being traced
        return InnerLoopSpec(*static)
    if found is None:
        if len(_specs) >= _MAX_SPECS:
            _specs.clear()
        found = _specs[key] = InnerLoopSpec(*static)
    return found


def gradient_inputs(a: InnerLoopArgs) -> list[Tensor]:
    """The tensors whose gradients `needs` asks for, in the order in which the backward op returns them."""
    return [t for needed, tensors in a.groups if needed for t in tensors if t.is_floating_point()]


def flat_gradients(a: InnerLoopArgs, grads: Sequence[Sequence[Tensor | None]]) -> list[Tensor]:
    """A backend's groups of gradients as the backward op's result, one tensor per `gradient_inputs`."""
    flat: list[Tensor] = []
    for at, ((needed, tensors), group) in enumerate(zip(a.groups, grads, strict=True)):
        for i, (tensor, grad) in enumerate(zip(tensors, group, strict=True) if needed else ()):
            if tensor.is_floating_point():
                flat.append(tensor.new_zeros(a.gradient_shape(at, i)) if grad is None else grad)
    return flat


def group_gradients(a: InnerLoopArgs, flat: Sequence[Tensor]) -> list[list[Tensor | None]]:
    """The inverse of `flat_gradients`: None for every input that got no gradient."""
    grads = iter(flat)
    return [[next(grads) if needed and t.is_floating_point() else None for t in ts] for needed, ts in a.groups]


def output_shapes(a: InnerLoopArgs) -> tuple[list[int], list[int], list[int], list[list[int]]]:
    """Shapes of loss, output, support_losses and of what is kept: adapted parameters, then moments plane by plane."""
    tasks, spec = a.tasks, a.spec
    queries = a.query_x[0].shape[1] if a.query_x else 0
    every = [spec.steps + 1] if spec.has(QUERY_STEPS) else []
    loss = [*every, tasks] if a.has_loss else [0]
    own = [list(a.task_shape(i)) for i, flag in enumerate(spec.adapted) if flag]
    lead = {KEEP_NONE: None, KEEP_LAST: [tasks], KEEP_STEPS: [spec.steps + 1, tasks]}[spec.keep]
    kept = [] if lead is None else [[*lead, *shape] for shape in own]
    if spec.has(MOMENTS):
        kept += [[tasks, *shape] for _ in spec.rule.moments for shape in own]
    return loss, [*every, tasks, queries, output_size(spec.program)], [spec.steps, tasks], kept


# loss, output, support_losses, adapted parameters, carry
Outputs: TypeAlias = tuple[Tensor, Tensor, Tensor, list[Tensor], list[Tensor]]


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
