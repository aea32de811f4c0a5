"""What the tests of the building blocks share: calls with gradients, and every transform beside PyTorch's own way."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Op = Callable[..., Any]


def cotangent(y: Tensor, seed: int = 1) -> Tensor:
    """Numbers of a tensor's shape that do not depend on its dtype."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(y.shape, dtype=torch.float64, generator=generator).to(y.dtype)


def with_gradients(op: Op, tensors: Sequence[Tensor], **options: Any) -> list[Tensor]:
    """The results, and the gradients at all tensors."""
    leaves = [t.detach().requires_grad_() for t in tensors]
    results = op(*leaves, **options)
    outputs = [results] if isinstance(results, Tensor) else list(results)
    cotangents = [cotangent(y, i) for i, y in enumerate(outputs)]
    grads = torch.autograd.grad(outputs, leaves, cotangents, allow_unused=True)
    found = [torch.zeros_like(t) if g is None else g for t, g in zip(leaves, grads, strict=True)]
    return [*(y.detach() for y in outputs), *found]


def error(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The largest difference relative to the largest element of its tensor."""
    pairs = [(f.double(), e.double()) for f, e in zip(found, expected, strict=True) if e.numel()]
    return max((float((f - e).abs().max() / e.abs().max().clamp(min=1e-30)) for f, e in pairs), default=0.0)


def second_order(op: Op, tensors: Sequence[Tensor]) -> list[Tensor]:
    """Gradients of a function of the gradients, at all tensors."""
    leaves = [t.detach().requires_grad_() for t in tensors]
    results = op(*leaves)
    outputs = [results] if isinstance(results, Tensor) else list(results)
    total = sum(((y * cotangent(y, i)).sum() for i, y in enumerate(outputs)), start=torch.zeros(()).double())
    grads = torch.autograd.grad(total, leaves, create_graph=True, allow_unused=True)
    again = sum(((g * cotangent(g, i)).sum() for i, g in enumerate(grads) if g is not None), start=total)
    found = torch.autograd.grad(again, leaves, allow_unused=True)
    return [torch.zeros_like(t) if g is None else g for t, g in zip(leaves, found, strict=True)]


def _scalar(op: Op) -> Op:
    def total(*tensors: Tensor) -> Tensor:
        results = op(*tensors)
        return sum(((y * y).sum() for y in ([results] if isinstance(results, Tensor) else results)), torch.zeros(()))

    return total


def _everywhere(tensors: Sequence[Tensor]) -> tuple[int, ...]:
    return tuple(range(len(tensors)))


TRANSFORMS: dict[str, Callable[[Op, Sequence[Tensor]], Any]] = {
    "grad": lambda op, ts: torch.func.grad(_scalar(op), _everywhere(ts))(*ts),
    "vjp": lambda op, ts: torch.func.vjp(_scalar(op), *ts)[1](torch.ones(()).to(ts[0].dtype)),
    "jvp": lambda op, ts: torch.func.jvp(op, tuple(ts), tuple(cotangent(t) for t in ts)),
    "jacrev": lambda op, ts: torch.func.jacrev(op)(*ts),
    "jvp of grad": lambda op, ts: torch.func.jvp(
        torch.func.grad(_scalar(op), _everywhere(ts)), tuple(ts), tuple(cotangent(t) for t in ts)
    ),
    "grad of grad": lambda op, ts: torch.func.grad(
        lambda *a: _scalar(torch.func.grad(_scalar(op), _everywhere(ts)))(*a), _everywhere(ts)
    )(*ts),
    "vmap": lambda op, ts: torch.func.vmap(op)(*(torch.stack([t, 2 * t, t / 2]) for t in ts)),
    "vmap of some": lambda op, ts: torch.func.vmap(lambda a: op(a, *ts[1:]), in_dims=1)(
        torch.stack([ts[0], -ts[0]], 1)
    ),
    "vmap of others": lambda op, ts: torch.func.vmap(lambda *a: op(ts[0], *a))(
        *(torch.stack([t, 2 * t]) for t in ts[1:])
    ),
    "vmap of grad": lambda op, ts: torch.func.vmap(torch.func.grad(_scalar(op), _everywhere(ts)))(
        *(torch.stack([t, 2 * t]) for t in ts)
    ),
    "vmap of grad of others": lambda op, ts: torch.func.vmap(
        torch.func.grad(_scalar(op), _everywhere(ts)), in_dims=(0, *(None for _ in ts[1:]))
    )(torch.stack([ts[0], 2 * ts[0]]), *ts[1:]),
    "grad of vmap": lambda op, ts: torch.func.grad(lambda *a: _scalar(torch.func.vmap(op))(*a), _everywhere(ts))(
        *(torch.stack([t, 2 * t]) for t in ts)
    ),
}
