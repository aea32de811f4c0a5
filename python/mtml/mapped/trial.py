"""Whether two ways to run the same tasks agree, in results and gradients, and how long each takes."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from mtml.mapped.arguments import Arguments

__all__ = ["difference", "perturbed", "seconds"]

Run = Callable[[], Any]

# relative to the largest value; of float32 what second derivatives of sums in another order may differ by
_TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-3}
_ROUNDS = 2


def difference(one: Any, other: Any) -> str | None:
    """How two results [T, ...] differ, in value or in gradients of whatever both are made of; None where they agree."""
    firsts, seconds = pytree.tree_leaves(one), pytree.tree_leaves(other)
    if pytree.tree_structure(one) != pytree.tree_structure(other):
        return "its results have another form"
    for a, b in zip(firsts, seconds, strict=True):
        if a.shape != b.shape or a.dtype != b.dtype:
            return f"its results are {b.dtype} {list(b.shape)} and not {a.dtype} {list(a.shape)}"
    if not _close(firsts, seconds):
        return "its results differ"
    leaves = _leaves([*firsts, *seconds])
    try:
        gradients = _gradients(firsts, leaves), _gradients(seconds, leaves)
    except RuntimeError as error:  # of an operation without a derivative, which nobody may have wanted
        return f"its gradients cannot be compared ({str(error).splitlines()[0][:160]})"
    return None if _close(*gradients) else "its gradients differ"


def _close(expected: Sequence[Tensor], found: Sequence[Tensor]) -> bool:
    """Whether tensors agree, relative to the largest number in all of them: a gradient may be 0 but for roundings."""
    sizes = [float(t.detach().abs().nan_to_num(posinf=0.0).amax()) for t in expected if t.numel() and _real(t)]
    largest = max(sizes, default=0.0)
    return all(_near(a.detach(), b.detach(), largest) for a, b in zip(expected, found, strict=True))


def _near(a: Tensor, b: Tensor, largest: float) -> bool:
    if not _real(a):
        return torch.equal(a, b)
    narrow = a.dtype not in _TOLERANCES or torch._C._is_any_autocast_enabled()
    tolerance = (5e-2 if narrow else _TOLERANCES[a.dtype]) * largest + torch.finfo(a.dtype).tiny
    return torch.allclose(a, b, rtol=0.0, atol=tolerance, equal_nan=True)


def _real(t: Tensor) -> bool:
    return t.is_floating_point()


def _leaves(results: Sequence[Tensor]) -> list[Tensor]:
    """The tensors that results are differentiable to and that nothing made."""
    found: dict[int, Tensor] = {}
    waiting = [t.grad_fn for t in results if t.grad_fn is not None]
    seen = set(waiting)
    while waiting:
        node = waiting.pop()
        if hasattr(node, "variable"):
            found[id(node.variable)] = node.variable
        for next_node, _ in node.next_functions:
            if next_node is not None and next_node not in seen:
                seen.add(next_node)
                waiting.append(next_node)
    return list(found.values())


def _gradients(results: Sequence[Tensor], leaves: Sequence[Tensor]) -> list[Tensor]:
    """Of a random combination of the results."""
    generator = torch.Generator().manual_seed(0)
    total = None
    for result in results:
        weights = torch.randn(result.shape, generator=generator, dtype=torch.float64)
        if result.requires_grad:
            term = (result * weights.to(result)).sum()
            total = term if total is None else total + term
    if total is None or not leaves:
        return [torch.zeros_like(t) for t in leaves]
    return list(torch.autograd.grad(total, leaves, retain_graph=True, allow_unused=True, materialize_grads=True))


def perturbed(given: Arguments) -> Arguments:
    """The same tasks with other numbers in their floating-point tensors."""
    generator = torch.Generator().manual_seed(0)

    def other(tensor: Tensor) -> Tensor:
        noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64).to(tensor.device, tensor.dtype)
        return tensor.detach().add(noise, alpha=0.3).requires_grad_(tensor.requires_grad)

    pairs = zip(given.leaves, given.mapped, strict=True)
    leaves = [other(leaf) if own and leaf.is_floating_point() else leaf for leaf, own in pairs]
    return given._replace(leaves=tuple(leaves))


def seconds(runs: Sequence[Run]) -> list[float]:
    """The shortest time of each, forward and, where it can be, backward; they take turns."""
    best = [float("inf")] * len(runs)
    for _ in range(_ROUNDS):
        for at, run in enumerate(runs):
            start = time.perf_counter()
            results = pytree.tree_leaves(run())
            _gradients(results, _leaves(results))
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            best[at] = min(best[at], time.perf_counter() - start)
    return best
