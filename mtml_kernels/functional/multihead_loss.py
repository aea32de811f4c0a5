"""The documented functions of the multi-head losses: tensors in, tensors out, everything checked."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.compiler import is_compiling

from mtml_kernels.losses.head_checks import check_head, column, same_length
from mtml_kernels.ops.multihead_loss import multihead_loss_call
from mtml_kernels.ops.multihead_loss_autograd import gradients_at
from mtml_kernels.ops.multihead_loss_backends import BACKENDS, check_labels, reference_call, resolve
from mtml_kernels.precision import cast, computed_in, float32_call, result_dtype
from mtml_kernels.registry import REFERENCE, Backend
from mtml_kernels.schema.losses import HeadLoss
from mtml_kernels.schema.multihead_loss import HeadsCall, HeadTensors, Plain, make_call
from mtml_kernels.transforms import is_forward_mode, tracked

__all__ = ["multihead_loss", "multihead_loss_and_gradients"]

Kinds = str | HeadLoss | Sequence[str | HeadLoss]
Weights = Sequence[Tensor | None] | Tensor | None

_calls: dict[Any, HeadsCall] = {}
_MAX_CALLS = 512
_computed = computed_in(BACKENDS)


def multihead_loss(
    logits: Sequence[Tensor] | Tensor,
    targets: Sequence[Tensor] | Tensor,
    kinds: Kinds = "cross_entropy",
    *,
    sample_weights: Weights = None,
    class_weights: Weights = None,
    pos_weights: Weights = None,
    backend: str = "auto",
) -> Tensor:
    """The losses of several heads, of any kinds and sizes, as one operation whose gradient is made in the same pass.

    Differentiable any number of times by the logits, in forward mode and under torch.func's transforms in any mixture
    too, and under torch.compile once (any number of times where a transform is compiled). Forward mode, and transforms
    that are compiled, run PyTorch's operations. What each kind computes is in `HeadLoss`; definitions are in
    `mtml_kernels.reference.multihead_loss`.

    Args:
        logits: one tensor a head, shapes as in `HeadLoss`; or one tensor [H, ...], a stack of H equal heads.
        targets: one tensor a head (class ids, or values); a stack [H, ...] where the logits are one.
        kinds: a name or `HeadLoss` for all heads, or one for each.
        sample_weights: a tensor or None for each head: [N], or one a row ([N, ...] without the classes); a stack
            [H, ...] where the logits are one, and so are the next two.
        class_weights: a tensor [C] or None for each head, cross_entropy only.
        pos_weights: a tensor that broadcasts to a sample's shape or None for each head, bce_with_logits only.
        backend: "auto", "cpu", "triton" (CUDA tensors) or "reference".

    float16 and bfloat16 are computed in float32 (`mtml_kernels.precision`): losses come in the logits' dtype, under
    autocast in float32, which mixes dtypes.

    Returns:
        [H]. A head whose rows all count for nothing has loss 0 and gradient 0; where weights add up to no finite
        number, its loss is NaN.

    Raises:
        ValueError: shapes or counts disagree, a class id is out of range (on "triton", where an error would have to
            wait for the device, the head's loss is NaN instead), or a target or weight requires grad.
        TypeError: a tensor has the wrong dtype, or an argument the wrong type.
        BackendUnavailable: `backend` names one that cannot run here.

    Example:
        >>> import torch
        >>> from mtml_kernels import HeadLoss, multihead_loss
        >>> logits = [torch.randn(8, 10, requires_grad=True), torch.randn(8, 3, requires_grad=True)]
        >>> targets = [torch.randint(10, (8,)), torch.randn(8, 3)]
        >>> losses = multihead_loss(logits, targets, [HeadLoss("cross_entropy", label_smoothing=0.1), "mse"])
        >>> losses.sum().backward()
        >>> losses.shape, logits[0].grad.shape
        (torch.Size([2]), torch.Size([8, 10]))

    Paper: Kendall, Gal, Cipolla, "Multi-Task Learning Using Uncertainty to Weigh Losses for Scene Geometry and
    Semantics", 2018 (what such losses are for).
    """
    if float32_call(_computed, backend, first := _first(logits), logits, targets):
        given = cast((logits, targets), torch.float32)
        weights: Any = {"sample_weights": sample_weights, "class_weights": class_weights, "pos_weights": pos_weights}
        return multihead_loss(*given, kinds, **weights, backend=backend).to(result_dtype(first))
    found = _prepare(backend, logits, targets, kinds, sample_weights, class_weights, pos_weights)
    if found is None:
        return torch.zeros(0)
    call, tensors, chosen, plain = found
    if chosen.name == REFERENCE:  # PyTorch differentiates it, by the targets and weights too
        check_labels(call, tensors)
        return reference_call(call, tensors)
    if plain is None:
        _refuse_gradients(call, tensors)
    return multihead_loss_call(call, tensors, chosen, plain)


def multihead_loss_and_gradients(
    logits: Sequence[Tensor] | Tensor,
    targets: Sequence[Tensor] | Tensor,
    kinds: Kinds = "cross_entropy",
    *,
    sample_weights: Weights = None,
    class_weights: Weights = None,
    pos_weights: Weights = None,
    backend: str = "auto",
) -> tuple[Tensor, list[Tensor]]:
    """The losses [H] and the gradient of each head's own loss at its logits, in one pass and without autograd.

    Arguments and errors as in `multihead_loss`. What comes back requires no grad, and is a constant to torch.func's
    grad and jvp and to forward_ad, as `x.detach()` is; it may be computed under vmap. The gradients are the heads'
    own, before any weighting, as methods that balance tasks by their gradients need them.

    Example:
        >>> import torch
        >>> from mtml_kernels.functional.multihead_loss import multihead_loss_and_gradients
        >>> logits, targets = [torch.zeros(1, 2)], [torch.zeros(1, dtype=torch.long)]
        >>> multihead_loss_and_gradients(logits, targets)
        (tensor([0.6931]), [tensor([[-0.5000,  0.5000]])])

    Paper: Sener, Koltun, "Multi-Task Learning as Multi-Objective Optimization", 2018 (a use of the gradients).
    """
    if float32_call(_computed, backend, first := _first(logits), logits, targets):
        given = cast((logits, targets), torch.float32)
        weights: Any = {"sample_weights": sample_weights, "class_weights": class_weights, "pos_weights": pos_weights}
        losses, gradients = multihead_loss_and_gradients(*given, kinds, **weights, backend=backend)
        own = [logits] if isinstance(logits, Tensor) else logits
        pairs = zip(gradients, own, strict=True)
        return losses.to(result_dtype(first)), [g.to(z.dtype) for g, z in pairs]
    found = _prepare(backend, logits, targets, kinds, sample_weights, class_weights, pos_weights)
    if found is None:
        return torch.zeros(0), []
    call, tensors, chosen, _ = found
    with torch.no_grad():
        if torch._C._are_functorch_transforms_active() or is_forward_mode():
            constants = HeadTensors.of([t if t is None else t.detach() for t in tensors.flat()])
            ones = constants.logits[0].new_ones(call.total)
            losses = multihead_loss_call(call, constants, chosen)
            return losses, list(gradients_at(call, chosen, ones, constants))
        losses, gradients = chosen.forward(call, tensors, True)
    return losses, list(gradients)


def _first(logits: Any) -> Any:
    """The tensor that gives the others their dtype, None where there is none."""
    return logits if isinstance(logits, Tensor) else logits[0] if isinstance(logits, list | tuple) and logits else None


def _refuse_gradients(call: HeadsCall, tensors: HeadTensors) -> None:
    _, *given = tensors if call.weighted else tensors.unweighted().values()
    transformed = torch._C._are_functorch_transforms_active() and not is_compiling()
    asks = tracked if transformed else operator.attrgetter("requires_grad")
    if not torch.is_grad_enabled() or not any(t is not None and asks(t) for c in given for t in c):
        return
    for name, values in tensors._asdict().items():
        for i, t in enumerate(values if name != "logits" else ()):
            if t is not None and asks(t):
                raise ValueError(
                    f"{name}[{i}]: expected a tensor that requires no grad (only the logits get one); detach it, or "
                    "pass backend='reference', which PyTorch differentiates by every tensor"
                )


class _Prepared(NamedTuple):
    call: HeadsCall
    tensors: HeadTensors
    backend: Backend
    plain: Plain | None  # what the backend's fast lane has read of the tensors


def _prepare(
    backend: str, logits: Sequence[Tensor] | Tensor, targets: Sequence[Tensor] | Tensor, kinds: Kinds, *weights: Weights
) -> _Prepared | None:
    """The checked call and the backend that runs it; None where there are no heads."""
    stacked = isinstance(logits, Tensor)
    zs = [logits] if isinstance(logits, Tensor) else list(logits)
    ys: list[Any] = [targets] if stacked else list(targets)
    heads = len(zs)
    same_length("targets", ys, heads)
    if heads == 0:
        return None
    columns = [_column(n, w, heads, stacked) for n, w in zip(_WEIGHTS, weights, strict=True)]
    traced = is_compiling()
    chosen = _backend(backend, zs[0])
    lane = chosen.fast_lane if chosen is not None and columns == _NO_WEIGHTS and not traced else None
    plain = None if lane is None else lane.read(zs, ys)
    form = plain.form if plain is not None else None if traced else _form(zs, ys, columns)
    key = form and (form, stacked, kinds if isinstance(kinds, str | HeadLoss) else tuple(kinds))
    none = [None] * heads
    tensors = HeadTensors(zs, ys, *[none if c is None else c for c in columns])
    call = None if key is None else _calls.get(key)  # a graph that read the table would be made anew as it grows
    if call is None:
        call = _checked(stacked, kinds, tensors)
        if key is not None:
            if len(_calls) >= _MAX_CALLS:
                _calls.clear()
            _calls[key] = call
    if plain is None and (call.weighted or any(y.dtype not in (torch.int64, zs[0].dtype) for y in ys)):
        tensors = _ready(tensors, stacked)
    if chosen is None:
        chosen = resolve(backend, zs[0].device.type, zs[0].dtype)
    return _Prepared(call, tensors, chosen, plain)


def _backend(backend: str, like: Any) -> Backend | None:
    """The backend that runs these heads; None where the checks will say what is wrong with them."""
    if not isinstance(like, Tensor) or not like.is_floating_point():
        return None
    # is_cpu, because devices are objects made when asked for
    return resolve(backend, "cpu" if like.is_cpu else like.device.type, like.dtype)


def _column(name: str, weights: Any, heads: int, stacked: bool) -> list[Any] | None:
    """Weights of one kind, one entry a head; None where there are none."""
    if weights is None or stacked:
        return weights if weights is None else [weights]
    found = column(name, weights, heads)
    return None if all(w is None for w in found) else found


def _checked(stacked: bool, kinds: Kinds, tensors: HeadTensors) -> HeadsCall:
    heads, like = len(tensors.logits), tensors.logits[0]
    specs = [HeadLoss.of(kinds)] * heads if isinstance(kinds, str | HeadLoss) else [HeadLoss.of(k) for k in kinds]
    same_length("kinds", specs, heads)
    for i, (spec, *head) in enumerate(zip(specs, *tensors, strict=True)):
        check_head("" if stacked else f"[{i}]", spec, head, like, int(stacked))
    return make_call(specs, [stacked] * heads, _ready(tensors, stacked))


def _form(zs: list[Any], ys: list[Any], columns: list[Any]) -> Any:
    """What the checks of a call depend on; None where something is no tensor (they will say so)."""
    try:
        weights = [None if c is None else tuple([t if t is None else (t.shape, t.device) for t in c]) for c in columns]
        # is_cpu, because devices are objects made when asked for, which takes longer than all the rest
        return (
            tuple(map(_looks, zs)),
            tuple(map(_looks, ys)),
            None if zs[0].is_cpu else tuple([t.device for t in zs + ys]),
            *weights,
        )
    except (AttributeError, TypeError):
        return None


_looks = operator.attrgetter("shape", "dtype", "is_cpu")
_WEIGHTS = ("sample_weights", "class_weights", "pos_weights")
_NO_WEIGHTS = [None] * len(_WEIGHTS)


def _ready(tensors: HeadTensors, stacked: bool) -> HeadTensors:
    """Class ids as int64, weights in the logits' dtype and pos_weights of a sample's shape."""
    dtype = tensors.logits[0].dtype
    columns = (tensors.sample_weights, tensors.class_weights, tensors.pos_weights)
    own, classes, given = ([t if t is None else t.to(dtype) for t in c] for c in columns)
    pos = [
        p if p is None else p.expand(z.shape[1:]) if not stacked else _stack_of_samples(p, z)
        for p, z in zip(given, tensors.logits, strict=True)
    ]
    ids = [y if y.is_floating_point() else y.long() for y in tensors.targets]
    return HeadTensors(tensors.logits, ids, own, classes, pos)


def _stack_of_samples(pos: Tensor, logits: Tensor) -> Tensor:
    """pos_weights [H, *what broadcasts to a sample] as [H, *sample]."""
    sample = logits.shape[2:]
    filled = pos.reshape(pos.shape[0], *(1,) * (len(sample) - pos.ndim + 1), *pos.shape[1:])
    return filled.expand(pos.shape[0], *sample)
