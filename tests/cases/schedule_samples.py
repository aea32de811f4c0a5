"""Operands of every kernel of the schedule, by which providers are run as a whole."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mtml_kernels.program.activations import Act
from mtml_kernels.program.layers.norm import Norm
from mtml_kernels.schedule.kernels import (
    FROM_OUTPUT,
    Activation,
    Blank,
    Convolution,
    Linear,
    Loss,
    Normalisation,
    Pooling,
    Rule,
    Shape,
    Span,
    Table,
)
from mtml_kernels.schema.losses import KINDS, SOFT
from mtml_kernels.schema.update import UpdateSpec

T, N, R, F = 2, 3, 4, 6
WINDOW = (2.0, 2.0, 2.0, 2.0, 3.0, 3.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0)  # an image of R = 2 x 2 points, 3x3, padded
POOL = (2.0, 2.0, 1.0, 1.0, 2.0, 2.0, 2.0, 2.0, 0.0, 0.0, 1.0, 1.0, 0.0)


class Sample(NamedTuple):
    name: str
    constants: Any
    operands: Sequence[Tensor | None]
    wants: Sequence[bool] | None = None


def samples(dtype: torch.dtype) -> list[Sample]:
    """Of every kernel, with planes of this type."""
    wide = torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype
    x, d, xt, dt = (torch.randn(T, N, R, F).to(dtype) for _ in range(4))
    found = [*_products(x, d, xt, dt, wide), *_norms(x, d, xt, dt, wide), *_pointwise(x, d, xt, dt)]
    found += [*_moves(x, d, xt, dt, wide), *_losses(x, xt, wide), *_updates(wide)]
    return [*found, Sample("tasks.sum", None, [torch.randn(T, 4, 5, dtype=wide)])]


def _products(x: Tensor, d: Tensor, xt: Tensor, dt: Tensor, wide: torch.dtype) -> list[Sample]:
    found = []
    for tasks, over in ((T, False), (1, False), (1, True)):
        for family, constants, cols in (
            ("linear", Linear(False, over), F),
            ("linear", Linear(True, over), F),
            ("conv", Convolution(WINDOW, over), F * 9),
        ):
            w, wt = (torch.randn(tasks, F, cols, dtype=wide) for _ in range(2))
            b = torch.randn(tasks, 1, F, dtype=wide)
            found += [
                Sample(f"{family}.forward", constants, [x, w, b]),
                Sample(f"{family}.backward", constants, [d, x, w]),
                Sample(f"{family}.tangent", constants, [x, xt, w, wt, b]),
                Sample(f"{family}.back_tangent", constants, [d, dt, x, xt, w, wt]),
            ]
    return found


def _norms(x: Tensor, d: Tensor, xt: Tensor, dt: Tensor, wide: torch.dtype) -> list[Sample]:
    found = []
    w, b, wt, bt = (torch.randn(T, 1, F, dtype=wide) for _ in range(4))
    for kind in Norm:
        given = Normalisation(int(kind), 1e-3, 3, 0, 1, False)
        some = {Norm.BATCH: x[:, :1, :1], Norm.GROUP: x[:, :, :1, :3]}.get(kind, x[..., :1]).to(wide).abs()
        mean = None if kind in (Norm.RMS, Norm.UNIT) else some
        centred = mean is not None
        found += [
            Sample("norm.stats", given, [x], (centred, True)),
            Sample("norm.sums", given, [d, x, some, w], (centred, True, True, True)),
            Sample("norm.stats_tangent", given, [xt, x, some], (centred, True)),
            Sample("norm.sums_tangent", given, [d, dt, x, xt, some, w, wt], (centred, True, True, True)),
            Sample("norm.apply", given, [x, mean, some, w, b]),
            Sample("norm.back", given, [d, x, some, mean, some, w]),
            Sample("norm.tangent", given, [xt, x, some, mean, some, w, wt, bt]),
            Sample("norm.back_tangent", given, [d, dt, x, xt, some, some, mean, some, mean, some, w, wt]),
        ]
    return found


def _pointwise(x: Tensor, d: Tensor, xt: Tensor, dt: Tensor) -> list[Sample]:
    found = []
    for kind in Act:
        given = Activation(int(kind), 9.0 if kind == Act.RSQRT else 0.5, 2.0)
        ref = kind.info.formula(x, given.c0, given.c1) if kind in FROM_OUTPUT else x
        found += [
            Sample("act.forward", given, [x]),
            Sample("act.backward", given, [d, ref]),
            Sample("act.tangent", given, [xt, ref]),
            Sample("act.back_tangent", given, [d, dt, ref, xt]),
        ]
    for softmax in (0, 1):
        y = x.softmax(-1) if softmax == 0 else x.log_softmax(-1)
        found += [
            Sample("softmax.forward", softmax, [x]),
            Sample("softmax.backward", softmax, [d, y]),
            Sample("softmax.tangent", softmax, [xt, y]),
            Sample("softmax.back_tangent", softmax, [d, dt, y, xt]),
        ]
    index = torch.zeros(T, N, 1, F, dtype=torch.long)
    for kind, window in ((0, POOL), (1, POOL), (2, POOL), (2, (*POOL[:2], 2.0, 1.0, *POOL[4:]))):
        given, at, rows = Pooling(kind, window), index if kind == 0 else None, int(window[2])
        found += [
            Sample("pool.forward", given, [x], (True, kind == 0)),
            Sample("pool.backward", given, [d[:, :, :rows], at]),
            Sample("pool.tangent", given, [xt, at]),
        ]
    return found


def _moves(x: Tensor, d: Tensor, xt: Tensor, dt: Tensor, wide: torch.dtype) -> list[Sample]:
    ids, table = torch.randint(0, 5, (T, N, R)), torch.randn(T, 5, F, dtype=x.dtype)
    row = torch.randn(T, 1, 1, F, dtype=wide)
    return [
        Sample("add.forward", None, [x, row]),
        Sample("accumulate", None, [x, xt]),
        Sample("mul.forward", None, [x, row]),
        Sample("mul.tangent", None, [x, xt, row, row]),
        Sample("mul.backward", Shape((T, N, R, F)), [d, dt, row, row]),
        Sample("affine.forward", (2.0, 1.0), [x]),
        Sample("cat.forward", Shape((T, N, R, 2)), [x, None]),
        Sample("slice.forward", Span(1, 3, F), [x]),
        Sample("slice.backward", Span(1, 3, F), [d[..., 1:3]]),
        Sample("scale", None, [x, torch.randn(T, dtype=wide)]),
        Sample("reduce", Shape((T, N, 1, F)), [x.to(wide)]),
        Sample("view", Shape((T, N, 1, R * F)), [x]),
        Sample("transpose", None, [x]),
        Sample("expand", Shape((T, N, R, F)), [x[:, :1]]),
        Sample("stack", None, [x, xt]),
        Sample("zeros", Blank((2, 3), x.dtype), [x]),
        Sample("embedding.forward", Table(1, 5, False), [ids, table]),
        Sample("embedding.tangent", Table(1, 5, False), [ids, table]),
        Sample("embedding.backward", Table(1, 5, False), [d, ids]),
        Sample("embedding.backward", Table(1, 5, True), [d, ids]),
    ]


def _losses(z: Tensor, zt: Tensor, wide: torch.dtype) -> list[Sample]:
    found = []
    c, seed = torch.rand(T, N, dtype=wide), torch.randn(T, dtype=wide)
    ids = torch.randint(0, F, (T, N))
    for kind in (*range(len(KINDS)), SOFT):
        given = Loss(kind, 0.5, False, wide)
        classes = kind in (KINDS.index("cross_entropy"), SOFT)
        at, moved = (z[:, :, :1], zt[:, :, :1]) if classes else (z, zt)
        target = ids if classes and kind != SOFT else torch.rand(at.shape).to(z.dtype)
        found += [
            Sample("loss.forward", given, [at, target, c]),
            Sample("loss.tangent", given, [at, moved, target, c, seed]),
            Sample("loss.data", given, [at, moved, target, c, seed], (target is not ids, True)),
        ]
    return [
        *found,
        Sample("loss.sum", given, [c, c]),
        Sample("weights.forward", given, [None, ids]),
        Sample("weights.forward", given, [c.to(z.dtype), ids]),
        Sample("weights.backward", given, [c, c, seed, ids]),
    ]


def _updates(wide: torch.dtype) -> list[Sample]:
    theta, g, lam, *s = (torch.rand(T, 4, 5, dtype=wide) for _ in range(6))
    found = []
    hyper, scale = torch.rand(8, dtype=torch.float64), torch.rand(T, dtype=wide)
    for alpha in (torch.rand((), dtype=wide), torch.rand(1, 4, 5, dtype=wide)):
        rate = Shape(tuple(alpha.shape))
        for spec in (
            UpdateSpec("sgd", momentum=True, nesterov=True, decayed=True),
            UpdateSpec("adam", decoupled=True, decayed=True),
            UpdateSpec("rmsprop", momentum=True, centered=True),
        ):
            given, kept = Rule(spec, 1), [i < len(spec.moments) for i in range(3)]
            before = [plane if there else None for plane, there in zip(s, kept, strict=True)]
            found += [
                Sample("update.rule", given, [theta, g, alpha, *before, hyper], (True, *kept)),
                Sample(
                    "update.adjoint",
                    given,
                    [theta, g, alpha, *before, lam, *before, hyper],
                    (True, True, *kept, True, True),
                ),
            ]
        found += [
            Sample("update.step", None, [theta, g, alpha]),
            Sample("update.direction", None, [lam, alpha]),
            Sample("update.rate", rate, [g, lam]),
        ]
    return [
        *found,
        Sample("update.clip", None, [hyper, g, lam], (True,) * 3),
        Sample("update.unclip", 2, [hyper, scale, g, lam, lam, g], (True,) * 3),
    ]
