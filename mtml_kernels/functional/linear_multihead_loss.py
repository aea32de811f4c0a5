"""The documented functions of linear heads: features and weights in, losses out, everything checked."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.compiler import is_compiling

from mtml_kernels.checks import shown
from mtml_kernels.functional.multihead_loss import Kinds, multihead_loss, multihead_loss_and_gradients
from mtml_kernels.losses.head_checks import check_head, column, same_length
from mtml_kernels.ops.linear_multihead_loss import FUSED, LinearCall, linear_multihead_loss_call
from mtml_kernels.ops.multihead_loss_backends import BACKENDS, resolve
from mtml_kernels.precision import cast, computed_in, float32_call, plainly, result_dtype
from mtml_kernels.schema.linear_multihead_loss import LinearHead
from mtml_kernels.schema.losses import HeadLoss
from mtml_kernels.transforms import is_forward_mode

__all__ = ["linear_multihead_gram", "linear_multihead_loss"]

Weights = Sequence[Tensor | None] | None

_computed = computed_in(BACKENDS)


def linear_multihead_loss(
    features: Tensor | Sequence[Tensor],
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None] | None,
    targets: Sequence[Tensor],
    kinds: Kinds = "cross_entropy",
    *,
    sample_weights: Weights = None,
    class_weights: Weights = None,
    pos_weights: Weights = None,
    backend: str = "auto",
) -> Tensor:
    """The losses of several linear heads: ``multihead_loss`` of ``F.linear(features, weight, bias)``, as one operation.

    Heads whose logits are large (above 32 MB) never hold them: rows are worked on in blocks, and their gradients at
    features, weight and bias are made in the same pass, for the head's own loss, and multiplied by its cotangent in
    backward, whatever those of the other heads are. Smaller heads keep the gradients at their logits until then. A
    second backward pass makes a large head's gradients again. Differentiable any number of times; second derivatives
    hold the logits. Under torch.func's transforms and torch.compile it is the two steps named above, and the logits are
    held.

    On CUDA tensors ("triton") a block has 1024 rows, or as many as there are in 64 MB of logits; gradients are summed
    over blocks in float32 whatever the dtype, and nothing waits for the device.

    float16 and bfloat16 as of `multihead_loss`. Autocast rounds nothing here; under it features may be of half
    precision, as its trunks give them, beside float32 weights.

    Args:
        features: [..., N, D], shared by all heads, or one such tensor for each.
        weights: [C, D] for each head, as nn.Linear's.
        biases: [C] or None for each head, or None.
        targets: class ids [..., N], or values [..., N, C] ([..., N, C / 2] for gaussian_nll), for each head.
        kinds, backend: as in `multihead_loss`; the classes are the logits' last dimension whatever class_dim says.
        sample_weights: for each head None, or weights whose shape begins that of the rows [..., N].
        class_weights, pos_weights: for each head None or [C].

    Returns:
        [H]

    Raises:
        ValueError, TypeError, BackendUnavailable: as `multihead_loss`.

    Example:
        >>> import torch
        >>> from mtml_kernels import linear_multihead_loss
        >>> trunk, features = torch.nn.Linear(4, 16), torch.randn(8, 4)
        >>> heads = [torch.nn.Linear(16, 10), torch.nn.Linear(16, 3)]
        >>> targets = [torch.randint(10, (8,)), torch.randn(8, 3)]
        >>> weights, biases = [h.weight for h in heads], [h.bias for h in heads]
        >>> losses = linear_multihead_loss(trunk(features), weights, biases, targets, ["cross_entropy", "mse"])
        >>> losses.sum().backward()
        >>> losses.shape, heads[0].weight.grad.shape
        (torch.Size([2]), torch.Size([10, 16]))

    Paper: Wijmans et al., "Cut Your Losses in Large-Vocabulary Language Models", 2025 (losses without their logits).
    """
    if float32_call(_computed, backend, first := _first(features), features, weights, biases, targets):
        given = cast((features, weights, biases, targets), torch.float32)
        more: Any = {"sample_weights": sample_weights, "class_weights": class_weights, "pos_weights": pos_weights}
        return linear_multihead_loss(*given, kinds, **more, backend=backend).to(result_dtype(first))
    xs, specs, columns = _prepare(features, weights, biases, targets, kinds, sample_weights, class_weights, pos_weights)
    if not xs:
        return torch.zeros(0)
    like = xs[0]
    chosen = resolve(backend, like.device.type, like.dtype)
    transformed = torch._C._are_functorch_transforms_active() or is_forward_mode()
    tracing = is_compiling() or torch._C._len_torch_dispatch_stack()
    empty = any(t.numel() == 0 for t in (*xs, *columns[0]))
    if chosen.name not in FUSED or transformed or tracing or empty:
        with plainly(like):
            logits = [F.linear(x, w, b) for x, w, b in zip(xs, *columns[:2], strict=True)]
        weighted = dict(zip(("sample_weights", "class_weights", "pos_weights"), columns[3:], strict=True))
        return multihead_loss(logits, columns[2], specs, backend=chosen.name, **weighted)
    _refuse_gradients(columns[2:])
    return linear_multihead_loss_call(_flattened(xs, specs, columns, chosen.name))


def linear_multihead_gram(
    features: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None] | None,
    targets: Sequence[Tensor],
    kinds: Kinds = "cross_entropy",
    *,
    sample_weights: Weights = None,
    class_weights: Weights = None,
    pos_weights: Weights = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """The losses [H] of linear heads, and the inner products [H, H] of their gradients at the shared features.

    What methods that balance tasks by their gradients (MGDA, PCGrad, CAGrad) need, without a backward pass a head: the
    gradients at the logits come with the losses. Arguments as in `linear_multihead_loss`, features [..., N, D] shared.
    What comes back requires no grad, and is a constant to torch.func's grad and jvp, as `x.detach()` is.

    Example:
        >>> import torch
        >>> from mtml_kernels import linear_multihead_gram
        >>> features, weights = torch.randn(8, 16), [torch.randn(10, 16), torch.randn(3, 16)]
        >>> targets = [torch.randint(10, (8,)), torch.randint(3, (8,))]
        >>> losses, gram = linear_multihead_gram(features, weights, None, targets)
        >>> gram.shape
        torch.Size([2, 2])

    Paper: Sener, Koltun, "Multi-Task Learning as Multi-Objective Optimization", 2018.
    """
    if not isinstance(features, Tensor):
        raise TypeError(f"features: expected one tensor, which all heads share, got {shown(features)}")
    if float32_call(_computed, backend, features, features, weights, biases, targets):
        copies = cast((features, weights, biases, targets), torch.float32)
        more: Any = {"sample_weights": sample_weights, "class_weights": class_weights, "pos_weights": pos_weights}
        losses, products = linear_multihead_gram(*copies, kinds, **more, backend=backend)
        return losses.to(result_dtype(features)), products.to(result_dtype(features))
    given = (weights, biases, targets, kinds, sample_weights, class_weights, pos_weights)
    xs, specs, columns = _prepare(features, *given)
    if not xs:
        return torch.zeros(0), torch.zeros(0, 0)
    with torch.no_grad(), plainly(features):
        x, ws = features.detach(), [w.detach() for w in columns[0]]  # tangents too are dropped by all or by none
        logits = [F.linear(x, w, b if b is None else b.detach()) for w, b in zip(ws, columns[1], strict=True)]
        weighted = dict(zip(("sample_weights", "class_weights", "pos_weights"), columns[3:], strict=True))
        losses, at_logits = multihead_loss_and_gradients(logits, columns[2], specs, backend=backend, **weighted)
        rows = torch.stack([(g @ w).flatten() for g, w in zip(at_logits, ws, strict=True)])  # [H, N D]
        return losses, rows @ rows.t()


def _first(features: Any) -> Any:
    """The tensor that gives the others their dtype, None where there is none."""
    return features if isinstance(features, Tensor) or not isinstance(features, list | tuple) else (*features, None)[0]


def _refuse_gradients(columns: Sequence[Sequence[Tensor | None]]) -> None:
    names = ("targets", "sample_weights", "class_weights", "pos_weights")
    for name, values in zip(names, columns, strict=True):
        for i, t in enumerate(values):
            if t is not None and t.requires_grad and torch.is_grad_enabled():
                raise ValueError(
                    f"{name}[{i}]: expected a tensor that requires no grad (features, weights and biases get one); "
                    "detach it, or pass backend='reference', which PyTorch differentiates by every tensor"
                )


def _prepare(
    features: Tensor | Sequence[Tensor],
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None] | None,
    targets: Sequence[Tensor],
    kinds: Kinds,
    *options: Weights,
) -> tuple[list[Tensor], list[HeadLoss], list[list[Any]]]:
    """Features and loss of every head, and the columns weights, biases, targets, sample, class and pos weights."""
    ws = list(weights)
    n = len(ws)
    shared = isinstance(features, Tensor)
    xs: list[Any] = [features] * n if shared else list(features)
    ys = list(targets)
    for name, values in (("features", xs), ("targets", ys)):
        same_length(name, values, n)
    names = ("sample_weights", "class_weights", "pos_weights")
    columns = [ws, column("biases", biases, n), ys]
    columns += [column(name, values, n) for name, values in zip(names, options, strict=True)]
    key = None if is_compiling() else _key(kinds, xs, columns)
    specs = None if key is None else _specs.get(key)  # a graph that read the table would be made anew as it grows
    if specs is None:
        specs = _checked(kinds, xs, columns, shared)
        if key is not None:
            if len(_specs) >= _MAX_SPECS:
                _specs.clear()
            _specs[key] = specs
    return xs, specs, columns


_specs: dict[Any, list[HeadLoss]] = {}  # of calls whose checks have passed, by what the checks look at
_MAX_SPECS = 512


def _key(kinds: Kinds, xs: list[Any], columns: list[list[Any]]) -> Any:
    """What the checks of a call depend on; None where something is no tensor (they will say so)."""
    try:
        forms = [tuple([t if t is None else (t.shape, t.dtype, t.device) for t in c]) for c in (xs, *columns)]
    except AttributeError:
        return None
    return kinds if isinstance(kinds, str | HeadLoss) else tuple(kinds), *forms


def _checked(kinds: Kinds, xs: list[Any], columns: list[list[Any]], shared: bool) -> list[HeadLoss]:
    """The heads' losses, whose classes are the last dimension, after every check."""
    n = len(xs)
    specs = [HeadLoss.of(kinds)] * n if isinstance(kinds, str | HeadLoss) else [HeadLoss.of(k) for k in kinds]
    same_length("kinds", specs, n)
    specs = [s if s.class_dim == -1 else dataclasses.replace(s, class_dim=-1) for s in specs]
    for i, (x, spec, *head) in enumerate(zip(xs, specs, *columns, strict=True)):
        _check_linear("" if shared else f"[{i}]", f"[{i}]", x, head[0], head[1], xs[0])
        logits = x.new_empty(()).expand(*x.shape[:-1], head[0].shape[0])
        check_head(f"[{i}]", spec, [logits, *head[2:]], xs[0])
        if head[5] is not None and head[5].ndim > 1:
            raise ValueError(f"pos_weights[{i}]: expected [C] = [{head[0].shape[0]}], got {list(head[5].shape)}")
    return specs


def _check_linear(at_x: str, at: str, x: Any, weight: Any, bias: Any, like: Any) -> None:
    named = [(f"features{at_x}", x), (f"weights{at}", weight)]
    for name, t in named if bias is None else [*named, (f"biases{at}", bias)]:
        if not isinstance(t, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {shown(t)}")
        if t.dtype != like.dtype:
            raise TypeError(f"{name}: expected {like.dtype}, as the first features, got {t.dtype}; use .to()")
        if t.device != like.device:
            raise ValueError(f"{name}: expected the first features' device {like.device}, got {t.device}; use .to()")
    if x.ndim < 2:
        raise ValueError(f"features{at_x}: expected [..., N, D], got {list(x.shape)}")
    if weight.ndim != 2 or weight.shape[1] != x.shape[-1]:
        raise ValueError(f"weights{at}: expected [C, D] with D = {x.shape[-1]}, got {list(weight.shape)}")
    if bias is not None and tuple(bias.shape) != (weight.shape[0],):
        raise ValueError(f"biases{at}: expected [C] = [{weight.shape[0]}], got {list(bias.shape)}")


def _flattened(xs: list[Tensor], specs: list[HeadLoss], columns: list[list[Any]], backend: str) -> LinearCall:
    """All rows in one dimension, every features tensor once."""
    places: dict[int, int] = {}
    features: list[Tensor] = []
    of, heads = [], []
    for i, (x, spec, w, b, y, own, classes, pos) in enumerate(zip(xs, specs, *columns, strict=True)):
        lead = x.shape[:-1]
        rows = math.prod(lead)
        if id(x) not in places:
            places[id(x)] = len(features)
            features.append(x if x.ndim == 2 else x.reshape(rows, x.shape[-1]))
        of.append(places[id(x)])
        if own is not None:  # one a row
            own = own.to(x.dtype).reshape(*own.shape, *(1,) * (len(lead) - own.ndim)).expand(lead).reshape(rows)
        ids = spec.kind == "cross_entropy" and not y.is_floating_point()
        target = y if len(lead) == 1 else y.reshape(rows, *y.shape[len(lead) :])
        target = target.long() if ids else target
        classes = classes if classes is None else classes.to(x.dtype)
        pos = pos if pos is None else pos.to(x.dtype).expand(w.shape[0])
        heads.append(LinearHead(i, spec, w, b, target, own, classes, pos))
    return LinearCall(features, of, heads, backend)
