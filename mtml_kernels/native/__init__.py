"""The compiled CPU engine: finds it, checks what goes in, and gives tensors back.

The engine takes addresses; what a wrong address could break is checked here: dtype, contiguity, memory of its own.
"""

from __future__ import annotations

import functools
import importlib
import math
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from mtml_kernels.checks import check_ids, id_message
from mtml_kernels.memory import in_memory

__all__ = [
    "addresses_of",
    "availability",
    "fma_peak",
    "info",
    "inner_loop_backward",
    "inner_loop_carry_shapes",
    "inner_loop_forward",
    "low_rank_weights",
    "native_seconds",
    "plain_tensors",
]

Grads = list[Tensor | None]

_DTYPES = {torch.float32: 0, torch.float64: 1}
_NEED_PARAMS, _NEED_LR, _NEED_SUPPORT_X, _NEED_QUERY_X = 1, 2, 4, 8
_MAX_PLANS = 512
_LOW = 1 << 36  # views of a freed storage lie at their offset from null

# How adapted weights of linear layers are held (csrc/cpu/inner_loop/low_rank.h): chosen by the plan's cost model, each
# task's own, or in low-rank form. The op's backends "cpu", "cpu:weights" and "cpu:low_rank".
AUTO, WEIGHTS, LOW_RANK = 0, 1, 2
NO_LOW_RANK = (
    'backend: expected a call that low-rank form can run, got "cpu:low_rank" where {}. Use backend="cpu", which takes '
    "each task's own weights there"
)

_module: ModuleType | None = None
_reason: str | None = None


def _load() -> ModuleType | None:
    global _module, _reason
    if _module is None and _reason is None:
        try:
            # torch is already imported, so the engine and torch share one OpenMP pool.
            module = importlib.import_module("mtml_kernels._C")
        except ImportError as error:
            _reason = (
                f"the compiled module mtml_kernels._C cannot be loaded ({error}). Build it with `pip install .` (or "
                "`pip install -e .` in a checkout); from a checkout's root, Python imports the source tree"
            )
        else:
            if not module.isa():
                _reason = module.isa_reason()
            else:
                _module = module
    return _module


def availability() -> str | None:
    """None where the compiled engine can run, else the reason why it cannot."""
    return None if _load() is not None else _reason


def _engine() -> ModuleType:
    module = _load()
    if module is None:
        raise RuntimeError(_reason)
    return module


def info() -> dict[str, Any]:
    """The instruction set that runs, why it was chosen, and those that could run here."""
    engine = _engine()
    return {
        "isa": engine.isa(),
        "isa_reason": engine.isa_reason(),
        "available": engine.isa_available().split(","),
        "path": engine.__file__,
    }


def fma_peak(dtype: str = "float32", threads: int = 0, seconds: float = 0.2) -> float:
    """The machine's measured multiply-add peak in GFLOP/s, all `threads` (0: torch's number) together."""
    codes = {"float32": 0, "float64": 1}
    if dtype not in codes:
        raise ValueError(f"dtype: expected 'float32' or 'float64', got {dtype!r}")
    peak: float = _engine().fma_peak(codes[dtype], threads or torch.get_num_threads(), seconds)
    return peak


def native_seconds() -> float:
    """Seconds that this process has spent inside the engine: what remains of a step's time is the host's."""
    seconds: float = _engine().native_seconds()
    return seconds


_plans: dict[Any, Any] = {}
_plans_by_value: dict[Any, Any] = {}


def _plan(args: Sequence[Any], support: int, query: int, dtype: torch.dtype, lr: Sequence[Tensor], form: int) -> Any:
    """The engine's plan for these arguments; found by the identity of the spec's lists, else by their contents.

    An entry keeps its lists alive, so that an identity is not given to another list meanwhile.
    """
    adapted, program, consts = args[1], args[10], args[11]
    steps, support_loss, query_loss, loss_args, first_order, keep, needs = args[12:19]
    rates = tuple([(int(t.shape[0]), t.dim()) for t in lr])  # int(): a traced size is symbolic
    if args[9] is not None and form != WEIGHTS:  # query losses between the steps need each step's weights
        if form == LOW_RANK:
            raise ValueError(NO_LOW_RANK.format("step_weights were given"))
        form = WEIGHTS
    options = (support, query, dtype, rates, steps, first_order, keep, needs, form)
    lists = (adapted, program, consts, support_loss, query_loss, loss_args)
    key = (id(adapted), id(program), id(consts), id(support_loss), id(query_loss), id(loss_args), options)
    found = _plans.get(key)
    if found is not None:
        return found[0]
    value_key = (tuple(map(tuple, lists)), options)
    plan = _plans_by_value.get(value_key)
    if plan is None:
        if len(_plans_by_value) >= _MAX_PLANS:
            _plans_by_value.clear()
        plan = _plans_by_value[value_key] = _make_plan(args, support, query, dtype, lr, form)
    if len(_plans) >= _MAX_PLANS:
        _plans.clear()
    _plans[key] = (plan, lists)
    return plan


def _make_plan(
    args: Sequence[Any], support: int, query: int, dtype: torch.dtype, lr: Sequence[Tensor], form: int
) -> Any:
    adapted, program, consts = args[1], args[10], args[11]
    steps, support_loss, query_loss, loss_args, first_order, keep, needs = args[12:19]
    rate_steps = [int(t.shape[0]) for t in lr]
    if any(n not in (1, steps) for n in rate_steps):
        raise ValueError(f"lr: expected rates for 1 or {steps} steps, got leading sizes {rate_steps}")
    if len(lr) not in (1, sum(adapted)):
        raise ValueError(f"lr: expected 1 tensor or one per adapted parameter ({sum(adapted)}), got {len(lr)}")
    losses = [*support_loss, *query_loss]
    rates = (rate_steps, [t.dim() > 1 for t in lr])
    flags = (bool(first_order), needs, keep)
    head = (_DTYPES[dtype], program, consts, adapted, support, query, steps, losses, loss_args)
    engine = _engine()
    try:
        return engine.Plan(*head, *flags, *rates, form)
    except engine.NoLowRank:
        why = "adapted parameters were asked for" if keep else "no linear layer of this model admits it"
        raise ValueError(NO_LOW_RANK.format(why)) from None


def low_rank_weights(
    params: list[Tensor], lr: list[Tensor], static: Sequence[Any], support: int, query: int, form: int = AUTO
) -> int:
    """How many weights training calls of these sizes hold in low-rank form; `static` as in `InnerLoopSpec.values`."""
    args = (params, static[0], [], None, [], None, None, None, lr, None, *static[1:], _NEED_PARAMS)
    count: int = _plan(args, support, query, params[0].dtype, lr, form).info()[4]
    return count


@functools.cache
def plain_tensors() -> Any:
    """The engine's reader of tensors, None where there is no engine or PyTorch lets nobody read them this way."""
    table = getattr(Tensor, "__dlpack_c_exchange_api__", None)
    if table is None or availability() is not None:
        return None
    return _engine().PlainTensors(table, Tensor, torch.nn.Parameter, torch.UntypedStorage)


def addresses_of(
    name: str | Callable[[int], str], tensors: Sequence[Tensor | None], dtype: torch.dtype, *, ids: bool = False
) -> tuple[Sequence[Any], list[int]]:
    """The tensors as the engine reads them (mostly the very same), which must outlive the call, and where they lie.

    0 stands for None and for tensors without elements. `ids`: there may be class ids among them.

    Raises:
        TypeError: a tensor has another dtype, or no memory of its own; it names the tensor.
    """
    reader = plain_tensors()
    if reader is not None:
        floats = 0 if dtype is torch.int64 else dtype.itemsize * 8
        found: list[int] | None = reader.addresses(tensors, floats, ids or not floats)
        if found is not None:
            return tensors, found
    ready: list[Tensor | None] = []
    for i, t in enumerate(tensors):
        at = name(i) if callable(name) else name if len(tensors) == 1 else f"{name}[{i}]"
        if t is not None and t.dtype is not dtype and not (ids and t.dtype is torch.int64):
            raise TypeError(f"{at}: expected {dtype}, got {t.dtype}. Convert it with .to({dtype})")
        ready.append(None if t is None else in_memory(at, t))
    return ready, [0 if t is None else t.data_ptr() for t in ready]


def _inputs(
    name: str, tensors: Sequence[Tensor], dtype: torch.dtype, ids: Sequence[int]
) -> tuple[Sequence[Any], list[int]]:
    """As `addresses_of`, of which the tensors in `ids` are an embedding's ids, read as int64."""
    if not ids:
        return addresses_of(name, tensors, dtype)
    ready: list[Any] = []
    for i, t in enumerate(tensors):
        at = name if len(tensors) == 1 else f"{name}[{i}]"
        if i in ids:
            check_ids(at, t)
            ready.append(in_memory(at, t).long())
        else:
            ready += addresses_of(at, (t,), dtype)[0]
    return ready, _all_at(ready)


def _one(name: str, t: Tensor | None, dtype: torch.dtype) -> tuple[Tensor | None, int]:
    if t is None:
        return None, 0
    (ready,), (at,) = addresses_of(name, (t,), dtype)
    return ready, at


def _at(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


def _all_at(tensors: Sequence[Tensor | None]) -> list[int]:
    return [0 if t is None else t.data_ptr() for t in tensors]


class _Call:
    """The inputs of one call, made contiguous and kept alive, and their plan."""

    __slots__ = ("addresses", "dtype", "held", "lr", "params", "plan", "query", "support", "tasks")

    def __init__(self, args: Sequence[Any], form: int) -> None:
        params, _, support_x, support_y, query_x, query_y, support_mask, query_mask, lr, step_weights = args[:10]
        dtype = params[0].dtype
        self.dtype = dtype
        self.tasks, self.support = support_y.shape[0], support_y.shape[1]
        self.query = query_x[0].shape[1] if query_x else 0
        self.params, self.lr, self.held = params, lr, args[:10]
        self.plan = _plan(args, self.support, self.query, dtype, lr, form)
        ids = self.plan.ids
        reader = plain_tensors()
        found = None
        if reader is not None:
            kinds = dtype.itemsize * 8, args[13][0] == 1, args[14][0] == 1
            found = reader.inner_loop(
                params, support_x, support_y, query_x, query_y, support_mask, query_mask, lr, step_weights, *kinds, ids
            )
        if found is None:
            found = self._closely(args)
        self.addresses = (self.tasks, torch.get_num_threads(), *found)

    def _closely(self, args: Sequence[Any]) -> tuple[Any, ...]:
        """The addresses where some tensor needs a contiguous copy first, or has no memory."""
        params, _, support_x, support_y, query_x, query_y, support_mask, query_mask, lr, step_weights = args[:10]
        dtype = self.dtype
        types = [torch.int64 if args[at][0] == 1 else dtype for at in (13, 14)]
        self.params, at_params = addresses_of("params", params, dtype)
        self.lr, at_lr = addresses_of("lr", lr, dtype)
        xs, at_xs = _inputs("support_x", support_x, dtype, self.plan.ids)
        qs, at_qs = _inputs("query_x", query_x, dtype, self.plan.ids)
        sy, at_sy = _one("support_y", support_y, types[0])
        qy, at_qy = _one("query_y", query_y, types[1])
        sm, at_sm = _one("support_mask", support_mask, dtype)
        qm, at_qm = _one("query_mask", query_mask, dtype)
        weights, at_weights = _one("step_weights", step_weights, dtype)
        self.held = (xs, qs, sy, qy, sm, qm, weights)
        return at_params, at_xs, at_sy, at_qs, at_qy, at_sm, at_qm, at_lr, at_weights

    def run(self, *outputs: Any) -> None:
        engine = _engine()
        try:
            self.plan.run(*self.addresses, *outputs)
        except engine.BadLabel as error:
            raise _label_error(str(error)) from None
        except engine.BadId as error:
            is_query, _, task, sample, found, rows = map(int, str(error).split())
            name = "query_x (qx)" if is_query else "support_x (sx)"
            raise ValueError(id_message(name, found, rows, f" at task {task}, sample {sample}")) from None


def _label_error(text: str) -> ValueError:
    is_query, task, sample, label = text.split()
    name = "query_y" if int(is_query) else "support_y"
    return ValueError(
        f"{name}: expected class ids from 0 to the number of outputs less one (or -100, ignored), got {label} at task "
        f"{task}, sample {sample}. Relabel each task's classes as 0..ways-1, or widen the model's last layer"
    )


def _carries_loss(args: Sequence[Any]) -> bool:
    """Whether the forward pass goes on to the meta-gradient of each task's loss."""
    return bool(args[18]) and args[5] is not None and bool(args[4])


def inner_loop_carry_shapes(*args: Any, form: int = AUTO) -> list[tuple[tuple[int, ...], torch.dtype]]:
    """Shapes and dtypes of what `inner_loop_forward` leaves for `inner_loop_backward`; arithmetic on sizes only."""
    if not _carries_loss(args):
        return []
    support_x, query_x, needs, dtype = args[2], args[4], args[18], args[0][0].dtype
    tasks = support_x[0].shape[0]
    cols, per_task, *_ = _plan(args, 1, 1, dtype, args[8], form).info()
    shapes: list[tuple[tuple[int, ...], torch.dtype]] = [((tasks if per_task else 1, cols), dtype)]
    for bit, inputs in ((_NEED_SUPPORT_X, support_x), (_NEED_QUERY_X, query_x)):
        if needs & bit:
            shapes.append(((_differentiable(inputs),), dtype))
    return shapes


def _differentiable(inputs: Sequence[Tensor]) -> int:
    """Elements of the inputs that have a gradient: ids have none."""
    return sum(x.numel() for x in inputs if x.is_floating_point())


def _input_gradients(args: Sequence[Any], dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None]:
    """Room for the gradients of the inputs, all inputs of a set but ids in one flat tensor."""
    found = []
    for bit, inputs in ((_NEED_SUPPORT_X, args[2]), (_NEED_QUERY_X, args[4])):
        wanted = args[18] & bit
        found.append(torch.empty(_differentiable(inputs), dtype=dtype, device="cpu") if wanted else None)
    return found[0], found[1]


def inner_loop_forward(*args: Any, form: int = AUTO) -> tuple[Tensor, Tensor, Tensor, list[Tensor], list[Tensor]]:
    """The op's forward (arguments of `InnerLoopArgs`, positionally)."""
    call = _Call(args, form)
    dtype, tasks, steps, keep = call.dtype, call.tasks, args[12], args[17]
    out_size = _output_size(args[10])
    has_loss = args[5] is not None and bool(args[4])
    loss = torch.empty(tasks if has_loss else 0, dtype=dtype, device="cpu")
    output = torch.empty((tasks, call.query, out_size), dtype=dtype, device="cpu")
    support_losses = torch.empty((steps, tasks), dtype=dtype, device="cpu")
    kept: list[Tensor] = []
    if keep:
        lead = (tasks,) if keep == 1 else (steps + 1, tasks)
        shapes = [(*lead, *p.shape) for p, own in zip(args[0], args[1], strict=True) if own]
        kept = [torch.empty(shape, dtype=dtype, device="cpu") for shape in shapes]
    carry: list[Tensor] = []
    to_support = to_query = None
    differentiate = _carries_loss(args)
    if differentiate:
        cols, per_task, *_ = call.plan.info()
        make = torch.empty if tasks else torch.zeros
        to_support, to_query = _input_gradients(args, dtype)
        carry = [make((tasks if per_task else 1, cols), dtype=dtype, device="cpu")]
        carry += [t for t in (to_support, to_query) if t is not None]
    outputs = (_at(loss) if has_loss else 0, _at(output), _at(support_losses), _all_at(kept))
    into = (_at(carry[0]) if carry else 0, _at(to_support), _at(to_query))
    call.run(*outputs, differentiate, 0, 0, 0, [], *into)
    return loss, output, support_losses, kept, carry


def _output_size(program: Sequence[int]) -> int:
    at = 5 + program[1] + 3 * program[2] + 9 * program[4]
    return int(program[at + 5] * program[at + 6])


def inner_loop_backward(
    grad_loss: Tensor | None,
    grad_output: Tensor | None,
    grad_support_losses: Tensor | None,
    grad_adapted: Sequence[Tensor | None],
    *args_and_carry: Any,
    form: int = AUTO,
) -> tuple[Grads, Grads, Grads, Grads]:
    """The op's backward: scales what the forward carried, or runs again where other cotangents came in."""
    args, carry = args_and_carry[:-1], args_and_carry[-1]
    params, lr, needs = args[0], args[8], args[18]
    param_grads: Grads = [_room(p) for p in params] if needs & 1 else [None] * len(params)
    lr_grads: Grads = [_room(t) for t in lr] if needs & _NEED_LR else [None] * len(lr)
    if not needs:
        return param_grads, lr_grads, [None] * len(args[2]), [None] * len(args[4])
    only_loss = grad_output is None and grad_support_losses is None and not any(g is not None for g in grad_adapted)
    if (
        carry
        and only_loss
        and grad_loss is not None
        and _spread(args, carry[0], grad_loss, param_grads, lr_grads, form)
    ):
        rest = iter(carry[1:])
        to_support = _scaled(next(rest), args[2], grad_loss) if needs & _NEED_SUPPORT_X else None
        to_query = _scaled(next(rest), args[4], grad_loss) if needs & _NEED_QUERY_X else None
    else:
        cotangents = (grad_loss, grad_output, grad_support_losses, grad_adapted)
        to_support, to_query = _run_again(args, cotangents, param_grads, lr_grads, form)
    return param_grads, lr_grads, _split(to_support, args[2]), _split(to_query, args[4])


def _cotangent(t: Tensor | None, name: str) -> int:
    """Where a contiguous cotangent lies."""
    try:
        at = 0 if t is None else t.data_ptr()
    except RuntimeError:  # is_grads_batched=True
        at = 0
    if at < _LOW and t is not None:
        in_memory(name, t)
    return at


def _room(t: Tensor) -> Tensor:
    return torch.empty_like(t) if t.is_contiguous() else torch.empty_like(t, memory_format=torch.contiguous_format)


def _spread(args: Sequence[Any], carry: Tensor, scale: Tensor, params: Grads, lrs: Grads, form: int) -> bool:
    """Writes sum_t scale_t carry_t; False where only the tasks' sum was carried and the scales differ."""
    tasks, support = args[3].shape[:2]
    if tasks == 0:
        for grad in (*params, *lrs):
            if grad is not None:
                grad.zero_()
        return True
    plan = _plan(args, support, args[4][0].shape[1] if args[4] else 0, carry.dtype, args[8], form)
    into = (_all_at(params), _all_at(lrs), torch.get_num_threads())
    done: bool = plan.carry_to_grads(_cotangent(carry, "carry"), tasks, _cotangent(scale, "grad_loss"), 1, *into)
    return done


def _run_again(
    args: Sequence[Any],
    cotangents: tuple[Tensor | None, Tensor | None, Tensor | None, Sequence[Tensor | None]],
    param_grads: Grads,
    lr_grads: Grads,
    form: int,
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients for any cotangents, from a second run that knows them."""
    grad_loss, grad_output, grad_support_losses, grad_adapted = cotangents
    call = _Call(args, form)
    cols, per_task, *_ = call.plan.info()
    carry = torch.empty((call.tasks if per_task else 1, cols), dtype=call.dtype, device="cpu")
    scale = torch.zeros(call.tasks, dtype=call.dtype, device="cpu") if grad_loss is None else grad_loss
    to_support, to_query = _input_gradients(args, call.dtype)
    at_losses = _cotangent(scale, "grad_loss"), _cotangent(grad_output, "grad_output")
    at_adapted = [_cotangent(g, "grad_adapted") for g in grad_adapted]
    given = (*at_losses, _cotangent(grad_support_losses, "grad_support_losses"), at_adapted)
    call.run(0, 0, 0, [], True, *given, _at(carry), _at(to_support), _at(to_query))
    _spread(args, carry, torch.ones(call.tasks, dtype=call.dtype, device="cpu"), param_grads, lr_grads, form)
    return to_support, to_query


def _scaled(flat: Tensor, inputs: Sequence[Tensor], scale: Tensor) -> Tensor:
    """Each task's part of the inputs' gradients times its cotangent, in new memory."""
    out = torch.empty_like(flat)
    start = 0
    for x in inputs:
        if not x.is_floating_point():
            continue
        end = start + x.numel()
        shape = x.shape[0], math.prod(x.shape[1:])  # of no tasks too, where -1 could be anything
        torch.mul(flat[start:end].view(shape), scale[:, None], out=out[start:end].view(shape))
        start = end
    return out


def _split(flat: Tensor | None, inputs: Sequence[Tensor]) -> Grads:
    if flat is None:
        return [None] * len(inputs)
    if len(inputs) == 1 and inputs[0].is_floating_point():
        return [flat.view(inputs[0].shape)]
    parts = iter(flat.split([x.numel() for x in inputs if x.is_floating_point()]))
    return [next(parts).clone().view(x.shape) if x.is_floating_point() else None for x in inputs]
