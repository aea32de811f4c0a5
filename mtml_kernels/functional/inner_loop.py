"""`inner_loop`, the documented function."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mtml_kernels.checks import (
    check_batch,
    check_choice,
    check_class_ids,
    check_devices,
    check_dtypes,
    check_ids,
    check_steps,
    check_target,
    shown,
)
from mtml_kernels.functional.inner_loop_known import answer, remember
from mtml_kernels.losses import Loss, Opaque, resolve, unfused_target
from mtml_kernels.ops.inner_loop import BACKENDS, inner_loop_call
from mtml_kernels.ops.inner_loop_backends import FORMS
from mtml_kernels.ops.inner_loop_lane import is_open
from mtml_kernels.precision import cast, computed_in, float32_call, result_dtype
from mtml_kernels.program import Program
from mtml_kernels.rates import op_rates
from mtml_kernels.schema.inner_loop import KEEP_LAST, KEEP_NONE, KEEP_STEPS, STARTS, InnerLoopSpec
from mtml_kernels.schema.losses import IGNORED, LossSpec

__all__ = ["InnerLoopResult", "inner_loop"]

KEEP = {"none": KEEP_NONE, "last": KEEP_LAST, "steps": KEEP_STEPS}
_computed = computed_in(BACKENDS)
NAMES = ("x", "y", "query_x", "query_y", "mask", "query_mask")


class InnerLoopResult(NamedTuple):
    """What `inner_loop` returns.

    Attributes:
        loss: [T] query losses; [0] without query targets.
        output: [T, Q, *out] of the adapted models on the query inputs; [T, 0, *out] without them.
        support_losses: [K, T], before each step.
        params: {name: [T, *shape]} of the adapted parameters, [K+1, T, *shape] with keep="steps", {} with keep="none".
    """

    loss: Tensor
    output: Tensor
    support_losses: Tensor
    params: dict[str, Tensor]


def inner_loop(
    program: Program,
    params: Mapping[str, Tensor] | Sequence[Tensor],
    x: Tensor | Sequence[Tensor],
    y: Tensor,
    lr: Any,
    *,
    steps: int,
    loss: Loss,
    mask: Tensor | None = None,
    query_x: Tensor | Sequence[Tensor] | None = None,
    query_y: Tensor | None = None,
    query_mask: Tensor | None = None,
    query_loss: Loss | None = None,
    adapted: Sequence[str] | None = None,
    step_weights: Tensor | Sequence[float] | None = None,
    first_order: bool = False,
    keep: str = "last",
    start: Mapping[str, Tensor] | None = None,
    backend: str = "auto",
) -> InnerLoopResult:
    """K steps of gradient descent for every task, from the same start, as one operation.

    theta_0 = params; theta_{k+1} = theta_k - lr_k * grad L(theta_k; x, y), for each of T tasks. Differentiable once, to
    the params, the rates, the inputs, the masks and targets that are floating point; differentiating again raises and
    names the general path.

    Args:
        program: the model, from `mtml_kernels.program.trace`.
        params: the program's parameters, by name or in the order of `program.params`; [*shape], shared by all tasks.
        x: [T, S, ...], or one such tensor per input of the program; integer ids where embeddings read it.
        y: [T, S] class ids, or [T, S, *out] (for cross_entropy class probabilities).
        lr: a number; a scalar tensor; [K], one per step; or {name: rate}, each a scalar, [*shape], or per step with
            exactly 1 + ndim dimensions.
        steps: K.
        loss: a name, `LossSpec`, ``nn.*Loss`` or ``F.*`` function that is fused.
        mask: weights of the support samples [T, S]; a task's loss is sum(w l) / sum(w), and 0 where all w are 0.
        query_x, query_y, query_mask, query_loss: likewise for the query sets [T, Q, ...]; without query_y there are
            outputs and no losses. query_loss None: as `loss`.
        adapted: names of the parameters that change; None for all.
        step_weights: [K+1], of the query loss at theta_0 .. theta_K; None for theta_K alone.
        first_order: treat inner gradients as constants.
        keep: which adapted parameters to return: "last", "steps" (theta_0 .. theta_K) or "none".
        start: {name: [T, *shape]} of adapted parameters, where each task starts from its own; those that it does not
            name start from `params`. Differentiable.
        backend: "auto", "cpu", "triton" (CUDA tensors), "torch" or "reference".

    float16 and bfloat16 are how tensors are stored: where the backend does not take them, all K steps run on float32
    copies. Results come in the params' dtype. Under autocast float16, bfloat16 and float32 may be mixed, losses and
    outputs are float32, and adapted parameters have their params' dtypes.

    Raises:
        ValueError: shapes disagree, labels are out of range, rates are not finite or fewer than the steps, a name is
            unknown, or the loss is not fused.
        TypeError: a tensor has the wrong dtype, or an argument the wrong type.
        BackendUnavailable: `backend` names one that cannot run here.

    Example:
        >>> import torch
        >>> from mtml_kernels.functional import inner_loop
        >>> from mtml_kernels.program import trace
        >>> net = torch.nn.Linear(2, 1)
        >>> x, y = torch.randn(4, 8, 2), torch.randn(4, 8, 1)
        >>> params = dict(net.named_parameters())
        >>> result = inner_loop(trace(net, [(2,)]), params, x, y, 0.1, steps=3, loss="mse", query_x=x, query_y=y)
        >>> result.loss.shape, result.params["weight"].shape
        (torch.Size([4]), torch.Size([4, 1, 2]))

    Paper: Finn, Abbeel, Levine, "Model-Agnostic Meta-Learning for Fast Adaptation of Deep Networks", 2017.
    """
    sx = [x] if isinstance(x, Tensor) else list(x)
    qx = [] if query_x is None else [query_x] if isinstance(query_x, Tensor) else list(query_x)
    quick = step_weights is None and start is None and type(steps) is int and is_open()
    single = (y, query_y, mask, query_mask, None)
    told = (loss, query_loss, steps, adapted if adapted is None else tuple(adapted), bool(first_order), keep)
    known = answer(program, params, lr, (sx, qx), single, told, backend) if quick else None
    if known is not None:
        return _result(program, known[1], *known[0])
    given = {"params": params, "x": sx, "y": y, "query_x": qx, "query_y": query_y, "start": start}
    if float32_call(_computed, backend, like := _first(params), given):
        options: Any = cast(given, torch.float32) | {"query_x": cast(qx, torch.float32) or None}
        options |= {"steps": steps, "loss": loss, "query_loss": query_loss, "mask": mask, "query_mask": query_mask}
        options |= {"adapted": adapted, "step_weights": step_weights, "first_order": first_order, "keep": keep}
        return _narrowed(inner_loop(program, lr=lr, **options, backend=backend), program, params, result_dtype(like))
    check_choice("keep", keep, list(KEEP))
    steps = check_steps(steps)
    tensors = _parameters(program, params)
    specs = _losses(loss, loss if query_loss is None else query_loss)
    for name, inputs in (("x", sx), ("query_x", qx)):
        if name == "x" or inputs:
            _check_inputs(name, program, inputs, tensors[0])
    check_batch(tuple(sx), y, tuple(qx) if qx else None, query_y, mask, query_mask, steps, NAMES)
    like = tensors[0]
    resolved = BACKENDS.resolve(backend, like.device.type, like.dtype)
    chosen = resolved.name
    for name, spec, target in (("y", specs[0], y), ("query_y", specs[1], query_y)):
        if target is not None:
            _check_target(name, spec, target, program, like, chosen)
    names = [p.name for p in program.params]
    flags = _adapted(names, adapted)
    shapes = {n: t.shape for n, t, flag in zip(names, tensors, flags, strict=True) if flag}
    rates = op_rates(lr, shapes, steps, like.dtype, like.device, names)
    specs = specs[0].fitting(y), specs[1].fitting(query_y)
    axes = 0 if start is None else STARTS
    options = InnerLoopSpec.of(program, flags, specs, steps=steps, first_order=first_order, keep=KEEP[keep], axes=axes)
    if start is not None:
        tensors = _starts(start, dict(zip(names, tensors, strict=True)), shapes, y.shape[0])
    masks = [None if m is None else m.to(like.dtype) for m in (mask, query_mask)]
    weights = _weights(step_weights, steps, like)
    if quick:
        remember(program, tensors, lr, (sx, qx), single, told, resolved, options, rates, list(shapes))
    result = inner_loop_call(options, tensors, sx, y, qx, query_y, masks[0], masks[1], rates, weights, backend)
    found, output, support_losses, kept = result
    return _result(program, shapes, found, output, support_losses, *kept)


def _result(
    program: Program, names: Iterable[str], loss: Tensor, output: Tensor, support_losses: Tensor, *kept: Tensor
) -> InnerLoopResult:
    if len(program.output_shape) != 1:
        output = output.reshape(*output.shape[:2], *program.output_shape)
    return InnerLoopResult(loss, output, support_losses, dict(zip(names, kept, strict=False)))


def _first(params: Any) -> Any:
    """The tensor that gives the others their dtype, None where there is none."""
    values = params.values() if isinstance(params, Mapping) else params
    return next(iter(values), None) if isinstance(values, Iterable) else None


def _narrowed(found: InnerLoopResult, program: Program, params: Any, dtype: torch.dtype) -> InnerLoopResult:
    """Results of a call on float32 copies: adapted parameters in the dtypes of `params`, the others in `dtype`."""
    given = params if isinstance(params, Mapping) else dict(zip(program.names, params, strict=True))
    own = {name: t.to(given[name].dtype) for name, t in found.params.items()}
    return InnerLoopResult(found.loss.to(dtype), found.output.to(dtype), found.support_losses.to(dtype), own)


def _parameters(program: Program, params: Mapping[str, Tensor] | Sequence[Tensor]) -> list[Tensor]:
    """The program's parameters in its order, of its shapes and of one dtype and device."""
    if isinstance(params, Mapping):
        missing = [p.name for p in program.params if p.name not in params]
        if missing:
            raise ValueError(f"params: expected every parameter of the program, got none for {missing}")
        tensors = [params[p.name] for p in program.params]
    else:
        tensors = list(params)
        if len(tensors) != len(program.params):
            raise ValueError(
                f"params: expected {len(program.params)} tensors, as program.params lists them, got {len(tensors)}"
            )
    if not tensors:
        raise ValueError("program: expected parameters to adapt, got a program without any")
    for info, tensor in zip(program.params, tensors, strict=True):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"params[{info.name!r}]: expected a tensor, got {shown(tensor)}")
        if tuple(tensor.shape) != tuple(info.shape):
            raise ValueError(f"params[{info.name!r}]: expected {list(info.shape)}, got {list(tensor.shape)}")
    named = [(f"params[{p.name!r}]", t) for p, t in zip(program.params, tensors, strict=True)]
    check_devices(tensors[0].device, iter(named))
    check_dtypes(tensors[0].dtype, iter(named), "the dtype of the first parameter")
    return tensors


def _starts(
    start: Mapping[str, Tensor], tensors: Mapping[str, Tensor], adapted: Mapping[str, torch.Size], tasks: int
) -> list[Tensor]:
    """The program's parameters where every task starts: [T, *shape] of the adapted ones."""
    like = next(iter(tensors.values()))
    for name, own in start.items():
        label = f"start[{name!r}]"
        if name not in adapted:
            raise ValueError(f"start: expected names of adapted parameters, {', '.join(adapted)}; got {name!r}")
        if not isinstance(own, Tensor) or list(own.shape) != [tasks, *adapted[name]]:
            raise ValueError(f"{label}: expected [T, *shape] = {[tasks, *adapted[name]]}, got {shown(own)}")
        check_devices(like.device, iter([(label, own)]))
        check_dtypes(like.dtype, iter([(label, own)]), "the dtype of the parameters")
    return [
        t if name not in adapted else start[name] if name in start else t.expand(tasks, *t.shape)
        for name, t in tensors.items()
    ]


def _losses(*losses: Loss) -> tuple[LossSpec, LossSpec]:
    found = []
    for loss in losses:
        spec = resolve(loss)
        if isinstance(spec, Opaque):
            raise ValueError(
                f"loss: expected one that is fused, got {spec.reason}; mtml.MAML takes any callable (general path)"
            )
        found.append(spec)
    return found[0], found[1]


def _check_inputs(name: str, program: Program, inputs: list[Tensor], like: Tensor) -> None:
    if len(inputs) != len(program.inputs):
        raise ValueError(f"{name}: expected {len(program.inputs)} inputs, as traced, got {len(inputs)}")
    for info, tensor in zip(program.inputs, inputs, strict=True):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: expected a tensor for input {info.name!r}, got {shown(tensor)}")
        if tuple(tensor.shape[2:]) != tuple(info.shape):
            raise ValueError(
                f"{name}: expected [T, N, *{list(info.shape)}] for input {info.name!r}, as traced; "
                f"got {list(tensor.shape)}"
            )
    check_devices(like.device, iter([(name, tensor) for tensor in inputs]))
    for info, tensor in zip(program.inputs, inputs, strict=True):
        if info.ids:
            check_ids(name, tensor)
        else:
            check_dtypes(like.dtype, iter([(name, tensor)]), "the dtype of the parameters")


def _check_target(name: str, spec: LossSpec, target: Any, program: Program, like: Tensor, backend: str) -> None:
    check_target(name, spec.kind, target, (*target.shape[:2], *program.output_shape))
    reason = unfused_target(spec, program.output_shape, target, tuple(target.shape[2:]))
    if reason is not None:
        raise ValueError(f"{name}: expected a target that is fused, got {reason}; mtml.MAML takes any (general path)")
    check_devices(like.device, iter([(name, target)]))
    if target.is_floating_point():
        check_dtypes(like.dtype, iter([(name, target)]), f"the dtype of the parameters, for loss {spec.kind!r}")
    elif backend not in FORMS:  # the compiled engine looks at the labels itself
        check_class_ids(name, target, program.output_shape[-1], IGNORED)


def _adapted(names: list[str], adapted: Sequence[str] | None) -> list[bool]:
    if adapted is None:
        return [True] * len(names)
    unknown = [name for name in adapted if name not in names]
    if unknown or not adapted:
        raise ValueError(f"adapted: expected names among {names}, got {list(unknown or adapted)}")
    return [name in adapted for name in names]


def _weights(weights: Tensor | Sequence[float] | None, steps: int, like: Tensor) -> Tensor | None:
    if weights is None:
        return None
    tensor = torch.as_tensor(weights, dtype=like.dtype, device=like.device)
    if tuple(tensor.shape) != (steps + 1,):
        raise ValueError(f"step_weights: expected [K+1] = [{steps + 1}] weights, got {list(tensor.shape)}")
    return tensor
