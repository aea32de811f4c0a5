"""One to three faults in a call's arguments."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.testing._internal.two_tensor import TwoTensor

from mtml_kernels.losses import KINDS
from mtml_kernels.program import Op
from mtml_kernels.schema.inner_loop import ARGUMENTS

INTS = [-(2**63), -(2**31), -100, -2, -1, 0, 1, 2, 3, 4, 7, 16, 17, 100, 1000, 2**20, 2**31 - 1, 2**31, 2**40, 2**62]
AT = {argument.split()[-1]: i for i, argument in enumerate(ARGUMENTS.split(", "))}  # of inner_loop
FLOATS = [0.0, -1.0, 1.0, 0.5, 2.0, 3.0, -0.0, 1e300, -1e300, 1e10, float("nan"), float("inf"), float("-inf")]
MOST_STEPS = 256  # of a call that may be right: a million of them take minutes, and memory bounds what is beyond


def copied(value: Any) -> Any:
    """The arguments with tensors and lists of their own: a mutation stays in its call."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    return [copied(v) for v in value] if isinstance(value, list) else value


def _freed(rng: random.Random, t: Tensor) -> Tensor:
    if rng.random() < 0.5 and t.ndim and t.shape[0] > 1:
        t = torch.cat([t, t])[1 : 1 + t.shape[0]]
    t = t.clone() if rng.random() < 0.5 else t
    t.untyped_storage().resize_(0 if rng.random() < 0.5 else t.untyped_storage().nbytes() // 2)
    return t


def _values(rng: random.Random, t: Tensor) -> Tensor:
    if t.numel() == 0:
        return t
    at = rng.randrange(t.numel())
    flat = t.contiguous().flatten().clone()
    flat[at] = rng.choice(FLOATS if t.is_floating_point() else [-1, -100, 2, 10**6, -(2**63), 2**63 - 1])
    return flat.reshape(t.shape)


def _shape(rng: random.Random, t: Tensor) -> Tensor:
    if t.ndim == 0:
        return t.reshape(1)
    dim, n = rng.randrange(t.ndim), t.shape[rng.randrange(t.ndim)]
    changes: list[Callable[[], Tensor]] = [
        lambda: t.narrow(dim, 0, max(t.shape[dim] - 1, 0)),
        lambda: t.narrow(dim, 0, 0),
        lambda: torch.cat([t, t], dim),
        lambda: t.flatten(),
        lambda: t.unsqueeze(dim),
        lambda: t.transpose(0, -1),
        lambda: t.select(dim, 0) if t.shape[dim] else t,
        lambda: t.new_zeros(rng.choice([n, 1, 3]), *t.shape[1:]),
    ]
    return rng.choice(changes)()


def _memory(rng: random.Random, t: Tensor) -> Any:
    changes: list[Callable[[], Any]] = [
        lambda: _freed(rng, t),
        lambda: t.to("meta"),
        lambda: TwoTensor(t, t),
        lambda: torch._efficientzerotensor(t.shape, dtype=t.dtype),
        lambda: t.to_sparse(),
        lambda: t.expand(2, *t.shape)[0] if t.ndim else t,
        lambda: torch.stack([t, t], -1)[..., 0],
        lambda: t.to(rng.choice([torch.float16, torch.float32, torch.int64, torch.bool, torch.complex64])),
        lambda: None,
    ]
    return rng.choice(changes)()


def _is_whole(t: Tensor) -> bool:
    if type(t) is not Tensor or t.device.type != "cpu" or t.layout is not torch.strided or t._is_zerotensor():
        return False
    last = sum((n - 1) * stride for n, stride in zip(t.shape, t.stride(), strict=True) if t.numel())
    return t.untyped_storage().nbytes() >= (t.storage_offset() + last + 1) * t.itemsize or t.numel() == 0


def _tensor(rng: random.Random, t: Tensor) -> Any:
    if not _is_whole(t) or t.dtype not in (torch.float64, torch.int64):  # the work of another fault
        return t
    return rng.choice([_values, _shape, _shape, _memory])(rng, t)


def _list(rng: random.Random, values: list[Any]) -> list[Any]:
    values = list(values)
    if not values:
        return [rng.choice([0, 1])]  # PyTorch itself crashes as it shows a freed tensor that it expected no tensor for
    at = rng.randrange(len(values))
    kind = rng.random()
    if kind < 0.1:
        del values[at]
    elif kind < 0.2:
        values.insert(at, values[rng.randrange(len(values))])
    elif kind < 0.25:
        return []
    elif kind < 0.4:
        other = rng.randrange(len(values))
        values[at], values[other] = values[other], values[at]
    else:
        values[at] = mutated(rng, values[at])
    return values


def mutated(rng: random.Random, value: Any) -> Any:
    """Another value, often of the same type."""
    if isinstance(value, Tensor):
        return _tensor(rng, value)
    if isinstance(value, list):
        return _list(rng, value)
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return rng.choice([value + rng.choice([-1, 1, 2]), rng.choice(INTS), 2 * value])
    if isinstance(value, float):
        return rng.choice([value + 1, -value, rng.choice(FLOATS)])
    if isinstance(value, str):
        at = rng.randrange(len(value) + 1)
        return rng.choice([value[:at], value[:at] + rng.choice("0159 ;,.e-x") + value[at + 1 :], "cpu:low_rank", ""])
    return rng.choice([torch.ones(2, 3, dtype=torch.float64), None, torch.zeros(3, dtype=torch.int64)])


def faults(rng: random.Random, name: str, args: list[Any]) -> list[Any]:
    """The arguments with one to three of them changed; of half of the programs the tensors are made anew to fit."""
    args = copied(args)
    start = {"inner_loop": 0, "inner_loop_backward": 5}.get(name)
    if start is not None and rng.random() < 0.6:
        for _ in range(rng.choice([1, 1, 2, 3])):
            at = start + rng.choice([*4 * [AT["program"]], AT["consts"]])
            args[at] = mutated(rng, args[at]) if args[at] else args[at]
        if rng.random() < 0.7:
            _fit(rng, args, start)
        return args
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        at = rng.randrange(len(args))
        args[at] = mutated(rng, args[at])
    if name.startswith("task_conv2d"):
        args = [_padded(arg) for arg in args]
    at = 0 if start is None else start + AT["steps"]
    if start is not None and isinstance(args[at], int) and MOST_STEPS < args[at] <= 2**20:
        args[at] = MOST_STEPS
    return args


def _padded(arg: Any) -> Any:
    """A window's numbers, less those that are right but make images of millions of pixels."""
    if not isinstance(arg, list):
        return arg
    return [MOST_STEPS if isinstance(n, int) and MOST_STEPS < n < 2**31 else n for n in arg]


def _fit(rng: random.Random, args: list[Any], start: int) -> None:
    """Tensors for a changed program, where its numbers can be followed: so that faults within get past the door."""
    program, params, xs, qs = (args[start + AT[name]] for name in ("program", "params", "support_x", "query_x"))
    if len(program) < 5 or not (0 < program[1] < 9 and 0 < program[2] < 99 and 0 <= program[4] < program[3] < 99):
        return
    inputs, at = program[5 : 5 + program[1]], 5 + program[1]
    shapes = [program[at + 3 * i + 1 : at + 3 * i + 3] for i in range(program[2])]
    node = at + 3 * program[2] + 9 * program[4]
    out = program[node + 5 : node + 7]
    if len(out) < 2 or not all(len(s) == 2 and min(s) > 0 and s[0] * s[1] < 1e5 for s in [*shapes, out]):
        return
    if not all(0 < size < 1e4 for size in inputs):
        return
    double = {"dtype": torch.float64}
    nodes = [program[i : i + 2] for i in range(at + 3 * program[2], len(program), 9)]
    ids = {node[1] for node in nodes if node[0] == Op.EMBEDDING}

    def drawn(i: int, *shape: int) -> Tensor:
        return torch.randint(5, shape) if i in ids else torch.randn(*shape, **double)

    lead, queries = args[start + 3].shape[:2], qs[0].shape[1] if qs else 0
    args[start] = [
        params[i] if i < len(params) and params[i].numel() == s[0] * s[1] else torch.randn(s, **double)
        for i, s in enumerate(shapes)
    ]
    args[start + 2] = [
        xs[i] if i < len(xs) and xs[i].shape[2:].numel() == n else drawn(i, *lead, n) for i, n in enumerate(inputs)
    ]
    if qs:
        args[start + 4] = [drawn(i, lead[0], queries, n) for i, n in enumerate(inputs)]
    for which, samples in (("support", lead[1]), ("query", queries)):
        y_at, loss = AT[f"{which}_y"], args[start + AT[f"{which}_loss"]]
        y = args[start + y_at]
        if y is not None and loss and loss[0] != KINDS.index("cross_entropy"):
            args[start + y_at] = torch.randn(lead[0], samples, out[0] * out[1], **double)
