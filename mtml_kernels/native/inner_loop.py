"""The compiled engine's `inner_loop`: plans made once, then addresses in and tensors out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mtml_kernels.checks import Sizes, id_message
from mtml_kernels.native import engine
from mtml_kernels.native.tensors import (
    address_of,
    addresses_of,
    checked,
    checked_inputs,
    checked_one,
    cotangent_address,
    plain_tensors,
)
from mtml_kernels.schema.dtypes import DTYPES
from mtml_kernels.schema.inner_loop import (
    CLASS_IDS,
    DATA_NEEDS,
    KEEP_NONE,
    MOMENTS,
    NEED_HYPER,
    NEED_LR,
    NEED_MOMENTS,
    NEED_PARAMS,
    NEED_QUERY_X,
    NEED_SUPPORT_X,
    PER_STEP,
    PLAIN,
    QUERY_STEPS,
    STARTS,
    TASKS_APART,
    Grads,
    InnerLoopArgs,
    InnerLoopSpec,
    Outputs,
    output_shapes,
)
from mtml_kernels.schema.program import output_size

__all__ = [
    "AUTO",
    "LOW_RANK",
    "WEIGHTS",
    "Plan",
    "carry_shapes_of",
    "data_places",
    "in_words",
    "inner_loop_backward",
    "inner_loop_carry_shapes",
    "inner_loop_forward",
    "label_error",
    "low_rank_weights",
    "plan_of",
]

# How adapted weights of linear layers are held (csrc/cpu/inner_loop/low_rank.h): chosen by the plan's cost model, each
# task's own, or in low-rank form. The op's backends "cpu", "cpu:weights" and "cpu:low_rank".
AUTO, WEIGHTS, LOW_RANK = 0, 1, 2
NO_LOW_RANK = (
    'backend: expected a call that low-rank form can run, got "cpu:low_rank" where {}. Use backend="cpu", which takes '
    "each task's own weights there"
)


# --- plans ------------------------------------------------------------------------------------------------------------


class Plan:
    """A plan of the engine, and all that it settles of a call before there are tensors."""

    __slots__ = (
        "bits",
        "carry_cols",
        "carry_per_task",
        "dtype",
        "engine_plan",
        "ids",
        "low_rank",
        "output_size",
        "query_ids",
        "spec",
        "support_ids",
    )

    def __init__(self, engine_plan: Any, spec: InnerLoopSpec, dtype: torch.dtype) -> None:
        info = engine_plan.info()
        self.engine_plan, self.spec, self.dtype, self.bits = engine_plan, spec, dtype, dtype.itemsize * 8
        self.carry_cols: int = info.carry_cols
        self.carry_per_task: bool = info.carry_per_task
        self.low_rank: int = info.low_rank
        self.ids: tuple[int, ...] = info.ids
        self.support_ids, self.query_ids = (loss[0] == CLASS_IDS for loss in (spec.support_loss, spec.query_loss))
        self.output_size = output_size(spec.program)

    def carry_shape(self, tasks: int) -> tuple[int, int]:
        return tasks if self.carry_per_task else 1, self.carry_cols


_plans: dict[Any, Plan] = {}  # by the identity of the spec, which each of them keeps alive
_engine_plans: dict[Any, Any] = {}  # by its contents
_MAX_PLANS = 512


def _plan(a: InnerLoopArgs, support: int, query: int, form: int) -> Plan:
    """The plan for these arguments, S and Q samples a task."""
    rates = tuple([(int(t.shape[0]), t.dim()) for t in a.lr])  # int(): a traced size is symbolic
    if form != WEIGHTS and (why := _needs_weights(a)):
        if form == LOW_RANK:
            raise ValueError(NO_LOW_RANK.format(why))
        form = WEIGHTS
    dtype = a.params[0].dtype
    options = (support, query, dtype, rates, a.needs, form)
    key = (id(a.spec), options)
    found = _plans.get(key)
    if found is None:
        if len(_plans) >= _MAX_PLANS:
            _plans.clear()
        found = _plans[key] = Plan(_engine_plan(a, options), a.spec, dtype)
    return found


def plan_of(a: InnerLoopArgs, form: int) -> Plan:
    """The plan of a call."""
    return _plan(a, a.support_samples, a.query_x[0].shape[1] if a.query_x else 0, form)


def _needs_weights(a: InnerLoopArgs) -> str:
    """What of a call low-rank form has no place for, in words."""
    if a.step_weights is not None:  # query losses between the steps need each step's weights
        return "step_weights were given"
    if a.spec.update[:2] != PLAIN[:2]:
        return "the update rule is not gradient descent"
    return "the call has axes that need each task's own" if a.spec.axes & ~PER_STEP else ""


def _engine_plan(a: InnerLoopArgs, options: tuple[Any, ...]) -> Any:
    """The engine's own plan, found by what the spec says."""
    key = (tuple([tuple(v) if isinstance(v, list) else v for v in a.spec.values]), options)
    plan = _engine_plans.get(key)
    if plan is None:
        if len(_engine_plans) >= _MAX_PLANS:
            _engine_plans.clear()
        plan = _engine_plans[key] = _make_plan(a, *options)
    return plan


def _make_plan(
    a: InnerLoopArgs, support: int, query: int, dtype: torch.dtype, rates: Any, needs: int, form: int
) -> Any:
    spec, count = a.spec, sum(a.spec.adapted)
    rate_steps = [steps for steps, _ in rates]
    if any(n not in (1, spec.steps) for n in rate_steps):
        raise ValueError(f"lr: expected rates for 1 or {spec.steps} steps, got leading sizes {rate_steps}")
    if len(rates) not in (1, count):
        raise ValueError(f"lr: expected 1 tensor or one per adapted parameter ({count}), got {len(rates)}")
    module = engine()
    try:
        return module.Plan(
            dtype=DTYPES[dtype],
            program=spec.program,
            consts=spec.consts,
            adapted=spec.adapted,
            support=support,
            query=query,
            steps=spec.steps,
            support_loss=spec.support_loss,
            query_loss=spec.query_loss,
            loss_args=spec.loss_args,
            first_order=bool(spec.first_order),
            needs=needs,
            keep=spec.keep,
            lr_steps=rate_steps,
            lr_elements=[dims > 1 for _, dims in rates],
            form=form,
            update=spec.update,
            starts=spec.has(STARTS),
            per_step=spec.has(PER_STEP),
            query_steps=spec.has(QUERY_STEPS),
            tasks_apart=spec.has(TASKS_APART),
        )
    except module.NoLowRank:
        why = "adapted parameters were asked for" if spec.keep else "no linear layer of this model admits it"
        raise ValueError(NO_LOW_RANK.format(why)) from None


def low_rank_weights(
    params: list[Tensor], lr: list[Tensor], spec: InnerLoopSpec, support: int, query: int, form: int = AUTO
) -> int:
    """How many weights training calls of these sizes hold in low-rank form."""
    return _training_plan(params, lr, spec, support, query, form).low_rank


def call_threads(
    params: list[Tensor], lr: list[Tensor], spec: InnerLoopSpec, sizes: Sizes, form: int = AUTO
) -> tuple[int, int]:
    """How many threads training calls of these sizes use at most, and how many PyTorch allows."""
    most = torch.get_num_threads()
    plan = _training_plan(params, lr, spec, sizes.support, sizes.query, form)
    return plan.engine_plan.threads(sizes.tasks, most), most


def _training_plan(
    params: list[Tensor], lr: list[Tensor], spec: InnerLoopSpec, support: int, query: int, form: int
) -> Plan:
    a = InnerLoopArgs(params, lr, [], [], [], [], params[0], None, None, None, None, spec, NEED_PARAMS)
    return _plan(a, support, query, form)


# --- what goes in -----------------------------------------------------------------------------------------------------


def _inputs(a: InnerLoopArgs, plan: Plan) -> tuple[Any, Any]:
    """Where all tensors of a call lie, and what must outlive it."""
    reader = plain_tensors()
    if reader is not None:
        found = reader.inner_loop(
            a.params,
            a.support_x,
            a.support_y,
            a.query_x,
            a.query_y,
            a.support_mask,
            a.query_mask,
            a.lr,
            a.step_weights,
            plan.bits,
            plan.support_ids,
            plan.query_ids,
            plan.ids,
        )
        if found is not None:
            return found, _with_rule(found, a, plan)
    return _inputs_closely(a, plan)


def _with_rule(inputs: Any, a: InnerLoopArgs, plan: Plan) -> Any:
    """Adds what an update rule reads; returns what must outlive the call."""
    if not a.hyper:
        return a
    (hyper,), (inputs.hyper,) = checked("hyper", a.hyper, torch.float64)
    moments, inputs.moments = checked("moments", a.moments, plan.dtype) if a.moments else ([], [])
    return a, hyper, moments


def _inputs_closely(a: InnerLoopArgs, plan: Plan) -> tuple[Any, Any]:
    """The same where some tensor needs a contiguous copy first, or has no memory."""
    dtype = plan.dtype
    found: dict[str, tuple[Any, Any]] = {
        "params": checked("params", a.params, dtype),
        "lr": checked("lr", a.lr, dtype),
        "support_x": checked_inputs("support_x", a.support_x, dtype, plan.ids),
        "query_x": checked_inputs("query_x", a.query_x, dtype, plan.ids),
        "support_y": checked_one("support_y", a.support_y, torch.int64 if plan.support_ids else dtype),
        "query_y": checked_one("query_y", a.query_y, torch.int64 if plan.query_ids else dtype),
        "support_mask": checked_one("support_mask", a.support_mask, dtype),
        "query_mask": checked_one("query_mask", a.query_mask, dtype),
        "step_weights": checked_one("step_weights", a.step_weights, dtype),
    }
    inputs = engine().InnerLoopInputs(**{name: at for name, (_, at) in found.items()})
    return inputs, (found, _with_rule(inputs, a, plan))


def in_words(error: ValueError) -> ValueError:
    """An error of the engine, of which a bad label or id comes as numbers."""
    module = engine()
    if isinstance(error, module.BadLabel):
        return label_error(str(error), "support_y", "query_y")
    if isinstance(error, module.BadId):
        is_query, _, task, sample, found, rows = map(int, str(error).split())
        name = "query_x (qx)" if is_query else "support_x (sx)"
        return ValueError(id_message(name, found, rows, f" at task {task}, sample {sample}"))
    return error


def label_error(text: str, support: str, query: str) -> ValueError:
    """The error for "is_query task sample label", as the engine says it, of labels that are called by these names."""
    is_query, task, sample, label = text.split()
    name = query if int(is_query) else support
    return ValueError(
        f"{name}: expected class ids from 0 to the number of outputs less one (or -100, ignored), got {label} at task "
        f"{task}, sample {sample}. Relabel each task's classes as 0..ways-1, or widen the model's last layer"
    )


# --- forward ----------------------------------------------------------------------------------------------------------


def inner_loop_forward(a: InnerLoopArgs, form: int = AUTO) -> Outputs:
    """The op's forward, which goes on to the meta-gradient of each task's loss where `needs` asks for gradients."""
    spec, has_loss = a.spec, a.has_loss
    axes, tasks, query = spec.axes, a.tasks, a.query_x[0].shape[1] if a.query_x else 0
    plan = plan_of(a, form)
    dtype = plan.dtype
    inputs, held = _inputs(a, plan)
    every = (spec.steps + 1,) if axes & QUERY_STEPS else ()
    loss = torch.empty((*every, tasks) if has_loss else 0, dtype=dtype, device="cpu")
    output = torch.empty((*every, tasks, query, plan.output_size), dtype=dtype, device="cpu")
    support_losses = torch.empty((spec.steps, tasks), dtype=dtype, device="cpu")
    kept = _kept(a) if spec.keep != KEEP_NONE or axes & MOMENTS else []
    at_kept = addresses_of(kept) if kept else kept
    carry: list[Tensor] = []
    at_carry, at_data = 0, _NOWHERE
    differentiate = _carries(a)
    if differentiate:
        carry = [(torch.empty if tasks else torch.zeros)(plan.carry_shape(tasks), dtype=dtype, device="cpu")]
        at_carry = carry[0].data_ptr()
        if a.needs & _OF_DATA:
            rooms = _data_gradients(a)
            carry += [t for t in rooms if t is not None]
            at_data = addresses_of(rooms)
    at_loss = loss.data_ptr() if has_loss else 0
    at_outputs = (at_loss, output.data_ptr(), support_losses.data_ptr(), at_kept)
    try:
        plan.engine_plan.forward(tasks, torch.get_num_threads(), inputs, *at_outputs, differentiate, at_carry, at_data)
    except ValueError as error:
        raise in_words(error) from None
    del held
    return loss, output, support_losses, kept, carry


def _kept(a: InnerLoopArgs) -> list[Tensor]:
    """Room for the adapted parameters and the rule's moments."""
    return [torch.empty(shape, dtype=a.params[0].dtype, device="cpu") for shape in output_shapes(a)[3]]


_OF_DATA = sum((NEED_SUPPORT_X, NEED_QUERY_X, *DATA_NEEDS))
_NOWHERE: list[int] = []


def _data_groups(a: InnerLoopArgs) -> Sequence[tuple[int, list[Tensor]]]:
    """Inputs, targets and masks of the two sets with their bits: their gradients come from the passes themselves."""
    return a.groups[2:4] + a.groups[6:]


def data_places(a: InnerLoopArgs) -> list[int]:
    """Which of the groups of data have gradients."""
    return [i for i, (needed, _) in enumerate(_data_groups(a)) if needed]


def _differentiable(tensors: Sequence[Tensor]) -> int:
    """Elements of the tensors that have a gradient: ids have none."""
    return sum(x.numel() for x in tensors if x.is_floating_point())


def _data_gradients(a: InnerLoopArgs) -> Grads:
    """Room for the gradients of the data, each group's (all inputs of a set but ids, say) in one flat tensor."""
    dtype = a.params[0].dtype
    sizes = [_differentiable(tensors) if needed else None for needed, tensors in _data_groups(a)]
    return [None if size is None else torch.empty(size, dtype=dtype, device="cpu") for size in sizes]


def inner_loop_carry_shapes(a: InnerLoopArgs, form: int = AUTO) -> list[tuple[tuple[int, ...], torch.dtype]]:
    """Shapes and dtypes of what `inner_loop_forward` leaves for `inner_loop_backward`; arithmetic on sizes only."""
    if not _carries(a):
        return []
    return [(shape, a.params[0].dtype) for shape in carry_shapes_of(_plan(a, 1, 1, form), a)]


def _carries(a: InnerLoopArgs) -> bool:
    """Whether the forward goes on to gradients; losses of all steps have cotangents of their own."""
    return bool(a.needs) and a.has_loss and not a.spec.has(QUERY_STEPS)


def carry_shapes_of(plan: Plan, a: InnerLoopArgs) -> list[tuple[int, ...]]:
    """What a plan's forward leaves: the carry, and the gradients of each group of data, flat; else nothing."""
    if not _carries(a):
        return []
    data = [(_differentiable(tensors),) for needed, tensors in _data_groups(a) if needed]
    return [plan.carry_shape(a.support_x[0].shape[0]), *data]


# --- backward ---------------------------------------------------------------------------------------------------------


def inner_loop_backward(
    grad_loss: Tensor | None,
    grad_output: Tensor | None,
    grad_support_losses: Tensor | None,
    grad_adapted: Sequence[Tensor | None],
    a: InnerLoopArgs,
    carry: Sequence[Tensor],
    form: int = AUTO,
) -> tuple[Grads, ...]:
    """The op's backward: scales what the forward carried, or runs again where other cotangents came in."""
    needs = a.needs
    if not needs:
        return tuple([None] * len(tensors) for _, tensors in a.groups)
    targets = _Targets.of(a)
    plan = plan_of(a, form)
    others = [g for g in (grad_output, grad_support_losses, *grad_adapted) if g is not None]
    groups = _data_groups(a)
    if carry and grad_loss is not None and not others and _spread(plan, carry[0], grad_loss, targets):
        rest = iter(carry[1:])
        found = [_scaled(next(rest), tensors, grad_loss) if needed else None for needed, tensors in groups]
    else:
        again, found = _run_again(plan, a, grad_loss, grad_output, grad_support_losses, grad_adapted)
        _spread(plan, again, torch.ones(a.tasks, dtype=plan.dtype, device="cpu"), targets)
    to_support, to_query, *of_data = (_split(t, tensors) for t, (_, tensors) in zip(found, groups, strict=True))
    return targets.params, targets.lr, to_support, to_query, targets.hyper_grads(a), targets.moments, *of_data


def _room(t: Tensor) -> Tensor:
    return torch.empty_like(t) if t.is_contiguous() else torch.empty_like(t, memory_format=torch.contiguous_format)


class _Targets(NamedTuple):
    """Room for the gradients that are read from the carry."""

    params: Grads
    lr: Grads
    hyper: Grads  # one [8], of the engine's dtype
    moments: Grads

    @staticmethod
    def of(a: InnerLoopArgs) -> _Targets:
        needs, apart = a.needs, a.spec.has(TASKS_APART)
        rooms = [a.params[0].new_empty(a.gradient_shape(0, i)) if apart else _room(p) for i, p in enumerate(a.params)]
        return _Targets(
            [*rooms] if needs & NEED_PARAMS else [None] * len(a.params),
            [_room(t) for t in a.lr] if needs & NEED_LR else [None] * len(a.lr),
            [a.params[0].new_empty(t.shape) if needs & NEED_HYPER else None for t in a.hyper],
            [_room(t) if needs & NEED_MOMENTS else None for t in a.moments],
        )

    def hyper_grads(self, a: InnerLoopArgs) -> Grads:
        return [None if grad is None else grad.to(t.dtype) for grad, t in zip(self.hyper, a.hyper, strict=True)]


def _spread(plan: Plan, carry: Tensor, scale: Tensor, to: _Targets) -> bool:
    """Writes sum_t scale_t carry_t; False where only the tasks' sum was carried and the scales differ."""
    tasks = scale.shape[0]
    if tasks == 0:
        for grad in (*to.params, *to.lr, *to.hyper, *to.moments):
            if grad is not None:
                grad.zero_()
        return True
    at_carry, at_scale = cotangent_address("carry", carry), cotangent_address("grad_loss", scale)
    into: tuple[Any, ...] = (addresses_of(to.params), addresses_of(to.lr), torch.get_num_threads())
    if to.hyper:
        into += (address_of(to.hyper[0]), addresses_of(to.moments))
    done: bool = plan.engine_plan.carry_to_grads(at_carry, tasks, at_scale, 1, *into)
    return done


def _run_again(
    plan: Plan,
    a: InnerLoopArgs,
    grad_loss: Tensor | None,
    grad_output: Tensor | None,
    grad_support_losses: Tensor | None,
    grad_adapted: Sequence[Tensor | None],
) -> tuple[Tensor, Grads]:
    """A carry for any cotangents and the gradients of the data, from a second run that knows them."""
    tasks, dtype = a.tasks, plan.dtype
    inputs, held = _inputs(a, plan)
    carry = torch.empty(plan.carry_shape(tasks), dtype=dtype, device="cpu")
    every = (a.spec.steps + 1,) if a.spec.has(QUERY_STEPS) else ()
    scale = torch.zeros((*every, tasks), dtype=dtype, device="cpu") if grad_loss is None else grad_loss
    rooms = _data_gradients(a)
    at_cotangents = (
        cotangent_address("grad_loss", scale),
        cotangent_address("grad_output", grad_output),
        cotangent_address("grad_support_losses", grad_support_losses),
        [cotangent_address("grad_adapted", g) for g in grad_adapted],
    )
    at_gradients = carry.data_ptr(), addresses_of(rooms)
    try:
        plan.engine_plan.backward(tasks, torch.get_num_threads(), inputs, *at_cotangents, *at_gradients)
    except ValueError as error:
        raise in_words(error) from None
    del held
    return carry, rooms


def _scaled(flat: Tensor, tensors: Sequence[Tensor], scale: Tensor) -> Tensor:
    """Each task's part of the tensors' gradients times its cotangent, in new memory."""
    out = torch.empty_like(flat)
    start = 0
    for x in tensors:
        if not x.is_floating_point():
            continue
        end = start + x.numel()
        shape = x.shape[0], math.prod(x.shape[1:])  # of no tasks too, where -1 could be anything
        torch.mul(flat[start:end].view(shape), scale[:, None], out=out[start:end].view(shape))
        start = end
    return out


def _split(flat: Tensor | None, tensors: Sequence[Tensor]) -> Grads:
    if flat is None:
        return [None] * len(tensors)
    if len(tensors) == 1 and tensors[0].is_floating_point():
        return [flat.view(tensors[0].shape)]
    parts = iter(flat.split([x.numel() for x in tensors if x.is_floating_point()]))
    return [next(parts).clone().view(x.shape) if x.is_floating_point() else None for x in tensors]
