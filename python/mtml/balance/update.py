"""One balanced backward pass: shared tensors get sum_h w_h g_h, the heads' own parameters the losses' plain sum."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mtml.balance.affinity import gram_of
from mtml.balance.gradients import Losses, Shared, gradients
from mtml.balance.methods import METHODS, Array
from mtml.balance.remembering import REMEMBERING, Remembering
from mtml_kernels.checks import check_choice
from mtml_kernels.precision import plainly

__all__ = ["BalanceResult", "backward"]


class BalanceResult(NamedTuple):
    """weights [H] of the update, 0 for losses without gradient, and the gradients' inner products gram [H, H]."""

    weights: Tensor
    gram: Tensor


def backward(
    losses: Losses,
    *,
    method: str | Callable[..., Array] = "pcgrad",
    shared: Shared = None,
    **options: Any,
) -> BalanceResult:
    """In place of ``loss.backward()``: add a balanced gradient to every ``.grad``.

    Shared tensors get sum_h w_h g_h with the method's weights; every other parameter behind the losses, the heads' own,
    gets the gradient of the losses' plain sum. A loss whose gradient is 0 (an absent head) takes no part. Gradients
    that are not finite make the shared update NaN, as a plain backward pass would.

    Args:
        losses: as for `gram`. Of what `MultiHead.loss` gives, the heads' own losses count, not the weighted total.
        method: "pcgrad", "mgda", "cagrad", "imtl_g", "upgrad", "aligned_mtl", "dualproj", "config", "nash", "fairgrad",
            or a function from the Gram matrix [H, H] (NumPy, float64) to weights [H]. Those that remember are objects,
            one for a whole training: `GradVac`, `MoDo`.
        shared: as for `gram`. Parameters: exact, H backward passes. Features: the Gram matrix is taken there, and the
            trunk gets one pass with the balanced gradient of the features; for the trunk's parameters this is an
            approximation (Sener, Koltun 2018: an upper bound of MGDA's norm).
        options: the method's own, e.g. ``generator=`` (pcgrad), ``c=`` (cagrad), ``alpha=`` (fairgrad).

    Raises:
        ValueError, TypeError: an unknown method or option; losses or shared tensors as for `gram`, or shared tensors
            that depend on each other.
        ImportError: mgda, cagrad, upgrad, dualproj without scipy.
        RuntimeError: a `MoDo` that has seen no batches; fairgrad far from alpha = 1 for lengths of many sizes.

    Example:
        >>> import torch
        >>> x = torch.tensor([3.0, 1.0], requires_grad=True)
        >>> backward([x[0] + x[1], x[1] - 2 * x[0]], method="mgda", shared=[x]).weights
        tensor([0.6667, 0.3333], dtype=torch.float64)
        >>> x.grad
        tensor([0., 1.])

    Papers: those of the methods, see `mtml.balance.methods`.
    """
    solve = _method(method, options)
    found = gradients(losses, shared, with_own=True)
    products = gram_of(found.rows)
    weights = torch.from_numpy(_weights(products.cpu().numpy(), solve, options)).to(products.device)
    with plainly(products):  # autocast would round the update to half precision
        updates = [torch.tensordot(weights.to(rows), rows, 1) for rows in found.rows]
    own = [(leaf, g) for leaf, g in zip(found.own, found.own_grads, strict=True) if g is not None]
    # from the leaves themselves, too: PyTorch accumulates, and runs the hooks
    torch.autograd.backward([*found.shared, *(leaf for leaf, _ in own)], [*updates, *(g for _, g in own)])
    return BalanceResult(weights, products)


def _method(method: str | Callable[..., Array], options: dict[str, Any]) -> Callable[..., Array]:
    if isinstance(method, Remembering) and options:
        name = type(method).__name__
        raise TypeError(f"{next(iter(options))}: expected no options beside a {name}, which takes them when it is made")
    if callable(method):
        return method
    if isinstance(method, str) and method in REMEMBERING:
        raise ValueError(
            f"method: expected an object that remembers from call to call, mtml.balance.{REMEMBERING[method]}(H) for H "
            f"losses, got {method!r}; make it once, before training"
        )
    check_choice(
        "method", method, tuple(METHODS), ", GradVac(H), MoDo(H) or a function from the Gram matrix to weights"
    )
    known = [name for name in inspect.signature(METHODS[method]).parameters if name != "gram"]
    for name in options:
        if name not in known:
            raise TypeError(
                f"{name}: expected options of {method!r} ({', '.join(known) or 'it has none'}), got {name}="
            )
    return METHODS[method]


def _weights(gram: Array, solve: Callable[..., Array], options: dict[str, Any]) -> Array:
    """The method's weights for the losses that have a gradient, 0 for the others; NaN where one is not finite."""
    if not np.isfinite(gram).all():
        return np.full(len(gram), np.nan)
    if isinstance(solve, Remembering):
        return solve.weigh(gram)
    weights = np.zeros(len(gram))
    active = np.flatnonzero(np.diagonal(gram) > 0)
    if len(active):
        weights[active] = solve(gram[np.ix_(active, active)], **options)
    return weights
