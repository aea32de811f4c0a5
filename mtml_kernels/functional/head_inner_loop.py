"""`head_inner_loop`, the documented function."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from mtml_kernels.checks import (
    check_choice,
    check_class_ids,
    check_devices,
    check_dtypes,
    check_finite,
    check_steps,
    shown,
)
from mtml_kernels.functional.head_forms import gram_is_cheaper, head_rates, weight_form
from mtml_kernels.losses import KINDS as LOSSES
from mtml_kernels.losses import Loss, Opaque, resolve
from mtml_kernels.ops.head_inner_loop import BACKENDS, backend_for, head_inner_loop_call
from mtml_kernels.precision import cast, computed_in, float32_call, plainly, result_dtype
from mtml_kernels.reference.head_inner_loop import KINDS, scales
from mtml_kernels.schema.head_inner_loop import HeadArgs, HeadOptions, encode_options
from mtml_kernels.schema.losses import IGNORED, LossSpec

__all__ = ["HeadResult", "head_inner_loop"]

_computed = computed_in(BACKENDS)
FORMS = ("auto", "gram", "weight")
LOOK_AT_LABELS = ("cpu", "triton")  # one raises, the other makes NaN of a task with a wrong label and waits for nothing


class HeadResult(NamedTuple):
    """What `head_inner_loop` returns.

    Attributes:
        loss: [T] query losses; [0] without query labels.
        logits: [T, Q, C] of the adapted heads on the query features.
        support_losses: [K, T], before each step.
        weight: [T, C, D] of the adapted heads, None unless adapted=True.
        bias: [T, C], likewise, and None where there is none.
    """

    loss: Tensor
    logits: Tensor
    support_losses: Tensor
    weight: Tensor | None
    bias: Tensor | None


def head_inner_loop(
    features_support: Tensor,
    labels: Tensor,
    features_query: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lr: Any,
    *,
    steps: int,
    loss: Loss = "cross_entropy",
    query_labels: Tensor | None = None,
    query_loss: Loss | None = None,
    support_mask: Tensor | None = None,
    query_mask: Tensor | None = None,
    weight_decay: float = 0.0,
    proximal: float = 0.0,
    adapted: bool = False,
    form: str = "auto",
    backend: str = "auto",
) -> HeadResult:
    """K steps of gradient descent of a linear head on given features, for every task, as one operation.

    Exact in either form. "gram": S samples change a weight by a matrix of rank S at most, so the loop runs in the
    Gram matrix of the support features and no task has a weight of its own: 100 steps cost little more than one.
    "weight": the engine's loop over weights. "auto" takes the one that a cost model finds cheaper. Differentiable
    once, to the features, the weight, the bias and the rates.

    Args:
        features_support: [T, S, D].
        labels: [T, S] class ids (-100: ignored), or values [T, S, C].
        features_query: [T, Q, D]; Q may be 0.
        query_labels: as `labels`, or None for logits alone.
        weight, bias: [C, D], and [C] or None: where every task starts.
        lr: a number; a scalar tensor; [K], one per step; [1, C] or [K, C], one per class; or a pair of such for the
            weight and the bias.
        steps: K.
        loss, query_loss: "cross_entropy", "mse" or "bce_with_logits", or the ``nn.*Loss`` or ``F.*`` of that name
            (form "weight" also takes huber and l1). query_loss None: as `loss`.
        support_mask, query_mask: [T, S] and [T, Q], weights of the samples; a loss is sum(w l) / sum(w), or 0.
        weight_decay: adds weight_decay * theta to every inner gradient, of the weight and of the bias.
        proximal: adds proximal * (theta - theta_0), the pull of iMAML's regulariser back to the start.
        adapted: return the adapted weights (T x C x D elements, which nothing else here allocates).
        form: "auto", "gram" or "weight".
        backend: "auto", "cpu", "triton" (CUDA tensors; the Gram form, S x C up to 4096) or "reference".

    float16 and bfloat16 are how tensors are stored: where the backend does not take them, all K steps run on float32
    copies, and results come in the weight's dtype. Under autocast the features may be of half precision beside a
    float32 head; loss and logits are float32 then.

    Raises:
        ValueError: shapes disagree, labels are out of range (on "triton", where an error would have to wait for the
            device, that task's results are NaN), rates are not finite, do not fit or are fewer than the
            steps, a loss is not fused, or form="weight" is asked for decay or proximal terms.
        TypeError: an argument or a tensor of the wrong type.
        BackendUnavailable: `backend` names one that cannot run here.

    Example:
        >>> import torch
        >>> from mtml_kernels import head_inner_loop
        >>> features, labels = torch.randn(4, 10, 64), torch.randint(5, (4, 10))
        >>> weight, bias = torch.zeros(5, 64, requires_grad=True), torch.zeros(5, requires_grad=True)
        >>> result = head_inner_loop(features, labels, features, weight, bias, 0.1, steps=10, query_labels=labels)
        >>> result.loss.mean().backward()
        >>> result.logits.shape, weight.grad.shape
        (torch.Size([4, 10, 5]), torch.Size([5, 64]))

    Paper: Raghu, Raghu, Bengio, Vinyals, "Rapid Learning or Feature Reuse? Towards Understanding the Effectiveness of
    MAML", 2020 (ANIL); Rajeswaran, Finn, Kakade, Levine, "Meta-Learning with Implicit Gradients", 2019 (proximal term).
    """
    given = (features_support, labels, features_query, weight, bias)
    if float32_call(_computed, backend, weight, given, query_labels):
        options: Any = {"steps": steps, "loss": loss, "query_loss": query_loss, "query_mask": query_mask}
        options |= {"query_labels": cast(query_labels, torch.float32), "support_mask": support_mask}
        options |= {"weight_decay": weight_decay, "proximal": proximal, "adapted": adapted, "form": form}
        found = head_inner_loop(*cast(given, torch.float32), lr, **options, backend=backend)
        return _narrowed(found, weight, bias)
    check_choice("form", form, FORMS)
    steps = check_steps(steps)
    specs = _specs(loss, loss if query_loss is None else query_loss)
    _check_tensors(features_support, features_query, weight, bias)
    tasks, support, features = features_support.shape
    if support == 0 and steps:
        raise ValueError("features_support: expected at least one sample per task, got S = 0; pass steps=0")
    _check_set("labels", specs[0], labels, features_support, support_mask, "support_mask", weight)
    if query_labels is not None:
        _check_set("query_labels", specs[1], query_labels, features_query, query_mask, "query_mask", weight)
    for name, value in (("weight_decay", weight_decay), ("proximal", proximal)):
        check_finite(name, value)
    rates = head_rates(lr, steps, weight, bias is not None)
    options = HeadOptions(*specs, float(weight_decay), float(proximal))
    masks = [None if m is None else m.to(weight.dtype) for m in (support_mask, query_mask)]
    sizes = (support, features_query.shape[1], features, weight.shape[0], steps)
    tensors = (features_support, features_query, weight, bias, rates, labels, query_labels, *masks)
    args = HeadArgs._make((*tensors, encode_options(options), 0))
    chosen = backend if form == "weight" and tasks else backend_for(backend, weight, support)
    if tasks and _form(form, options, sizes, chosen) == "weight":
        _check_labels(args, options)
        return HeadResult(*weight_form(args, options, adapted, backend))
    _check_gram(options)
    if chosen not in LOOK_AT_LABELS:
        _check_labels(args, options)
    losses, logits, support_losses, coefficients = head_inner_loop_call(args, chosen)
    own = _adapted(args, options, coefficients) if adapted else (None, None)
    return HeadResult(losses, logits, support_losses, *own)


def _narrowed(found: HeadResult, weight: Tensor, bias: Tensor | None) -> HeadResult:
    """Results of a call on float32 copies in the dtypes that they are to have."""
    dtype, w, b = result_dtype(weight), found.weight, found.bias
    w, b = w if w is None else w.to(weight.dtype), b if b is None or bias is None else b.to(bias.dtype)
    return HeadResult(found.loss.to(dtype), found.logits.to(dtype), found.support_losses.to(dtype), w, b)


def _form(form: str, options: HeadOptions, sizes: tuple[int, int, int, int, int], backend: str) -> str:
    """Which form runs; a function of one task's shape, never of how many there are."""
    if form != "auto":
        return form
    if options.decay or options.proximal:
        return "gram"
    known = all(spec.kind in KINDS for spec in (options.support_loss, options.query_loss))
    return "gram" if known and (backend == "triton" or gram_is_cheaper(*sizes)) else "weight"  # a GPU has no other


def _check_gram(options: HeadOptions) -> None:
    for spec in (options.support_loss, options.query_loss):
        if spec.kind not in KINDS:
            raise ValueError(
                f"loss: expected one of {', '.join(KINDS)} in the Gram form, got {spec.kind!r}; pass form='weight', "
                "without weight_decay and proximal"
            )


def _adapted(a: HeadArgs, options: HeadOptions, coefficients: Tensor) -> tuple[Tensor, Tensor | None]:
    """weight [T, C, D] and bias [T, C] from the coefficients [T, 1 or 2, C, S], in PyTorch operations."""
    weight, bias = a.weight, a.bias
    if options.decay:
        u, v = scales(a.rates, options.decay, options.proximal)
        weight, bias = u[-1][:, None] * weight, None if bias is None else v[-1] * bias
    with plainly(weight):
        own = weight - coefficients[:, 0] @ a.support
    return own, None if bias is None else bias - coefficients[:, -1].sum(-1)


_NAMED = {kind: LossSpec(kind) for kind in LOSSES}


def _specs(*losses: Loss) -> tuple[LossSpec, LossSpec]:
    found = []
    for loss in losses:
        spec = _NAMED[loss] if isinstance(loss, str) and loss in _NAMED else resolve(loss)
        if isinstance(spec, Opaque):
            raise ValueError(f"loss: expected one that is fused, got {spec.reason}; mtml.MAML(head) takes any callable")
        found.append(spec)
    return found[0], found[1]


def _check_tensors(support: Tensor, query: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    named = [("features_support", support, 3), ("features_query", query, 3), ("weight", weight, 2)]
    named += [] if bias is None else [("bias", bias, 1)]
    for name, tensor, dims in named:
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {shown(tensor)}")
        if tensor.ndim != dims:
            raise ValueError(f"{name}: expected {dims} dimensions, got {list(tensor.shape)}")
    check_devices(weight.device, iter([(name, tensor) for name, tensor, _ in named]))
    check_dtypes(weight.dtype, iter([(name, tensor) for name, tensor, _ in named]), "the dtype of the weight")
    classes, features = weight.shape
    if query.shape[0] != support.shape[0] or query.shape[2] != support.shape[2]:
        raise ValueError(
            f"features_query: expected [T, Q, D] with T = {support.shape[0]} and D = {support.shape[2]} as "
            f"features_support, got {list(query.shape)}"
        )
    if support.shape[2] != features:
        raise ValueError(f"weight: expected [C, D] with D = {support.shape[2]} features, got {list(weight.shape)}")
    if bias is not None and len(bias) != classes:
        raise ValueError(f"bias: expected [C] = [{classes}], got {list(bias.shape)}")


def _check_set(
    name: str, spec: LossSpec, target: Any, features: Tensor, mask: Tensor | None, mask_name: str, weight: Tensor
) -> None:
    if not isinstance(target, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {shown(target)}")
    lead = tuple(features.shape[:2])
    ids = spec.kind == "cross_entropy"
    expected = lead if ids else (*lead, weight.shape[0])
    if tuple(target.shape) != expected:
        raise ValueError(f"{name}: expected {list(expected)} for loss {spec.kind!r}, got {list(target.shape)}")
    if ids and target.dtype != torch.int64:
        raise TypeError(f"{name}: expected int64 class ids for cross_entropy, got {shown(target)}; use .long()")
    if not ids:
        check_dtypes(weight.dtype, iter([(name, target)]), f"the dtype of the weight, for loss {spec.kind!r}")
    check_devices(weight.device, iter([(name, target)]))
    if mask is None:
        return
    if not isinstance(mask, Tensor) or tuple(mask.shape) != lead:
        raise ValueError(f"{mask_name}: expected a tensor {list(lead)} or None, got {shown(mask)}")
    check_devices(weight.device, iter([(mask_name, mask)]))


def _check_labels(a: HeadArgs, options: HeadOptions) -> None:
    sets = (("labels", a.labels), ("query_labels", a.query_labels))
    for spec, (name, target) in zip((options.support_loss, options.query_loss), sets, strict=True):
        if spec.kind == "cross_entropy" and target is not None:
            check_class_ids(name, target, a.weight.shape[0], IGNORED)
