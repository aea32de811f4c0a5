"""MAML one task after another in plain PyTorch: what every path of the library is compared with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

Rate = Callable[[str, int], Any]


class Oracle(NamedTuple):
    """loss [T], output [T, Q, ...], support_losses [K, T], trajectory: K+1 dicts of [T, *shape]."""

    loss: Tensor
    output: Tensor
    support_losses: Tensor
    trajectory: list[dict[str, Tensor]]


def weighted(loss_fn: Callable[..., Tensor], output: Tensor, target: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None:
        return loss_fn(output, target)
    each = torch.stack([loss_fn(output[n : n + 1], target[n : n + 1]) for n in range(len(target))])
    return (mask * each).sum() / mask.sum() if mask.sum() > 0 else 0.0 * each.sum()


def oracle(
    model: nn.Module,
    batch: tuple[Any, ...],
    loss_fn: Callable[..., Tensor],
    rate: Rate | float,
    steps: int,
    names: list[str] | None = None,
    *,
    first_order: bool = False,
    masks: tuple[Tensor | None, Tensor | None] = (None, None),
    step_weights: list[float] | None = None,
) -> Oracle:
    sx, sy, qx, qy = batch
    tensors = dict(model.named_buffers()) | dict(model.named_parameters())
    names = [n for n, p in model.named_parameters() if p.requires_grad] if names is None else names
    at = rate if callable(rate) else lambda name, k: rate
    weights = [0.0] * steps + [1.0] if step_weights is None else step_weights
    rows: list[tuple[Tensor, Tensor, list[Tensor], list[dict[str, Tensor]]]] = []
    for t in range(len(sy)):
        fast = {n: tensors[n] if tensors[n].requires_grad else tensors[n].detach().requires_grad_() for n in names}
        path, support, total = [fast], [], torch.zeros((), dtype=torch.float64)
        for k in range(steps + 1):
            output = plain_call(model, fast, _call(qx, t))
            if weights[k]:
                query_mask = None if masks[1] is None else masks[1][t]
                total = total + weights[k] * weighted(loss_fn, output, qy[t], query_mask)
            if k == steps:
                break
            support_mask = None if masks[0] is None else masks[0][t]
            loss = weighted(loss_fn, plain_call(model, fast, _call(sx, t)), sy[t], support_mask)
            grads = torch.autograd.grad(loss, list(fast.values()), create_graph=True, materialize_grads=True)
            grads = tuple(g.detach() for g in grads) if first_order else grads
            fast = {n: p - at(n, k) * g for (n, p), g in zip(fast.items(), grads, strict=True)}
            support.append(loss)
            path.append(fast)
        rows.append((total, output, support, path))
    losses = [torch.stack(row[2]) if row[2] else torch.zeros(0, dtype=torch.float64) for row in rows]
    return Oracle(
        torch.stack([row[0] for row in rows]),
        torch.stack([row[1] for row in rows]),
        torch.stack(losses, 1),
        [{n: torch.stack([row[3][k][n] for row in rows]) for n in names} for k in range(steps + 1)],
    )


def plain_call(model: nn.Module, tensors: Mapping[str, Tensor], args: tuple[Any, ...]) -> Any:
    """model(*args) with tensors in place of its own wherever it holds them (functional_call breaks shared modules)."""
    own = dict(model.named_buffers()) | dict(model.named_parameters())
    tables: list[dict[str, Any]] = [t for m in model.modules() for t in (m._parameters, m._buffers)]
    saved = [dict(table) for table in tables]
    new = {id(own[name]): tensor for name, tensor in tensors.items()}
    try:
        for table in tables:
            table.update({name: new.get(id(value), value) for name, value in table.items()})
        return model(*args)
    finally:
        for table, before in zip(tables, saved, strict=True):
            table.update(before)


def _call(x: Any, t: int) -> Any:
    if isinstance(x, Mapping):
        return tuple(value[t] for value in x.values())
    return tuple(value[t] for value in x) if isinstance(x, tuple) else (x[t],)


def mlp(*sizes: int, activation: type[nn.Module] = nn.Tanh) -> nn.Sequential:
    layers: list[nn.Module] = []
    for i, (a, b) in enumerate(pairwise(sizes)):
        layers += [nn.Linear(a, b)] + ([activation()] if i < len(sizes) - 2 else [])
    return nn.Sequential(*layers).double()


def regression(
    tasks: int = 3, support: int = 5, query: int = 4, inputs: int = 3, outputs: int = 2
) -> tuple[Tensor, ...]:
    shapes = ((support, inputs), (support, outputs), (query, inputs), (query, outputs))
    return tuple(torch.randn(tasks, *shape, dtype=torch.float64) for shape in shapes)


def classification(
    tasks: int = 3, support: int = 5, query: int = 4, inputs: int = 3, classes: int = 4
) -> tuple[Tensor, ...]:
    sx, _, qx, _ = regression(tasks, support, query, inputs)
    return sx, torch.randint(classes, (tasks, support)), qx, torch.randint(classes, (tasks, query))


def assert_same(actual: Any, expected: Any, **tolerance: float) -> None:
    """Equal to rounding in float64 (None where nothing depends on a tensor counts as zero)."""
    if isinstance(actual, tuple | list):
        assert len(actual) == len(expected)
        for a, b in zip(actual, expected, strict=True):
            assert_same(a, b, **tolerance)
        return
    if actual is None or expected is None:
        for value in (actual, expected):
            assert value is None or not value.any()
        return
    torch.testing.assert_close(actual, expected, **({"rtol": 1e-9, "atol": 1e-11} | tolerance))


def gradients(loss: Tensor, tensors: list[Tensor]) -> tuple[Tensor | None, ...]:
    """Of a fixed, uneven combination of the tasks' losses: a mix-up of tasks shows."""
    weights = torch.linspace(0.5, 1.5, loss.numel(), dtype=loss.dtype).reshape(loss.shape)
    return torch.autograd.grad((weights * loss).sum(), tensors, allow_unused=True, retain_graph=True)
