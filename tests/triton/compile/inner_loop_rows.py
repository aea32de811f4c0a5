"""Compiles the kernels of rows and sums of the inner loop for GPUs that need not be there, as multihead_loss.py does.

The launchers run on tensors without memory, and what they would have launched is compiled: with pointers and sizes that
are known to be divisible by 16 where those are, and sizes of 1 as constants.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from launches import Recorded, needs, recorded
from torch import Tensor

from mtml_kernels.program.layers.norm import Norm
from mtml_kernels.program.layers.pool import Pool
from mtml_kernels.schedule.kernels import Loss, Normalisation, Pooling, Rule, Shape, Table
from mtml_kernels.schema.update import UpdateSpec
from mtml_kernels.triton.inner_loop.clipping import CLIPPING
from mtml_kernels.triton.inner_loop.embedding import EMBEDDING
from mtml_kernels.triton.inner_loop.losses import LOSSES
from mtml_kernels.triton.inner_loop.norm_sums import NORM_SUMS
from mtml_kernels.triton.inner_loop.segments import MOST
from mtml_kernels.triton.inner_loop.softmax import SOFTMAX
from mtml_kernels.triton.inner_loop.sums import SUMS
from mtml_kernels.triton.inner_loop.updates import UPDATES

sys.path.append(str(Path(__file__).resolve().parents[2]))  # tests/cases
from cases.schedule_kernels import part_of
from cases.triton_parts import LAUNCHED

KERNELS: dict[str, Any] = NORM_SUMS | SOFTMAX | LOSSES | SUMS | UPDATES | CLIPPING | LAUNCHED | EMBEDDING
Case = tuple[str, Any, Sequence[Tensor | None], Sequence[bool] | None]
T = 32


def plane(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def norms() -> Iterator[Case]:
    """Batches of 75 images and of 5 vectors, in every type; the other kinds; sizes that nothing divides."""
    batches = [(75, 196, 64, dtype) for dtype in (torch.float32, torch.bfloat16, torch.float64)]
    found = [(Norm.BATCH, *batch) for batch in (*batches, (5, 1, 64, torch.float32), (3, 7, 5, torch.float32))]
    found += [(kind, 75, 196, 64, torch.float32) for kind in (Norm.GROUP, Norm.LAYER, Norm.UNIT)]
    for kind, samples, rows, features, dtype in found:
        given, centred = Normalisation(int(kind), 1e-5, 4, 0, 1, False), kind != Norm.UNIT
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        x, w = plane(T, samples, rows, features, dtype=dtype), plane(T, 1, features, dtype=wide)
        rstd, wants = plane(T, samples, rows, 1), (centred, True, True, True)
        yield "norm.stats", given, [x], (centred, True)
        if kind == Norm.BATCH and dtype == torch.float32 and samples > 3:
            yield "norm.sums", given, [x, x, rstd, w], wants
        yield "norm.sums_tangent", given, [x, x, x, x, rstd, w, w], wants


def losses() -> Iterator[Case]:
    c, seed, ids = plane(T, 75), plane(T), plane(T, 75, dtype=torch.int64)
    for kind, elements in ((1, 5), (1, 64), (5, 20), (0, 1), (2, 64), (3, 64)):
        z, given = plane(T, 75, 1, elements), Loss(kind, 0.1, False)
        y = ids if kind == 1 else z
        yield "loss.forward", given, [z, y, c], None
        if elements in (5, 20):
            yield "loss.tangent", given, [z, z, y, c, seed], None
        if kind == 5:
            yield "loss.data", given, [z, z, y, c, seed], None
    yield "weights.forward", Loss(1, 0.0, False), [c, ids], None
    yield "weights.backward", Loss(1, 0.0, False), [c, c, seed, ids], None
    yield "loss.sum", Loss(1, 0.0, False), [c, c], None


def rows() -> Iterator[Case]:
    x = plane(T, 75, 1, 64)
    for kind in (0, 1):
        yield "softmax.forward", kind, [x], None
        yield "softmax.back_tangent", kind, [x, x, x, x], None
    yield "softmax.forward", 0, [plane(4, 8, 1, 32000)], None
    yield "reduce", Shape((T, 5, 1, 64)), [plane(T, 5, 196, 64)], None
    yield "mul.backward", Shape((T, 5, 196, 1)), [plane(T, 5, 196, 64)] * 4, None
    yield "tasks.sum", None, [plane(T, 64, 576)], None
    ids, table = plane(T, 75, 8, dtype=torch.int64), plane(T, 100, 64)
    yield "embedding.tangent", Table(1, 100, False), [ids, table], None
    yield "embedding.backward", Table(1, 100, False), [plane(T, 75, 8, 64), ids], None


def updates() -> Iterator[Case]:
    p, hyper, bias = plane(T, 64, 576), plane(8, dtype=torch.float64), plane(T, 1, 5)
    yield "update.step", None, [plane(1, 64, 576), p, plane()], None
    yield "update.direction", None, [p, plane()], None
    yield "update.rate", Shape(()), [p, p], None
    yield "update.clip", None, [hyper, p, bias], (True,) * 3
    yield "update.unclip", 2, [hyper, plane(T), p, bias, p, bias], (True,) * 3
    for spec in (
        UpdateSpec("sgd", momentum=True, nesterov=True, decayed=True),
        UpdateSpec("adam", decoupled=True, decayed=True),
        UpdateSpec("rmsprop", momentum=True, centered=True, decayed=True),
    ):
        many = [p, bias] * (MOST // 2 if spec.rule == "adam" else 1)
        slots = len(spec.moments)
        s: list[Tensor | None] = [*many * slots, *[None] * (len(many) * (3 - slots))]
        kept, alphas = [t is not None for t in s], [plane()] * len(many)
        if spec.momentum:  # rates by element, whose terms are not summed in the launch
            alphas[:2] = plane(1, 64, 576), plane(1, 1, 5)
        own = (True,) * len(many)
        yield "update.rule", Rule(spec, 3), [*many, *many, *alphas, *s, hyper], (*own, *kept)
        wants = (*own, *own, *kept, *own, True)
        yield "update.adjoint", Rule(spec, 3), [*many, *many, *alphas, *s, *many, *s, hyper], wants


def pools() -> Iterator[Case]:
    image, half = plane(T, 75, 784, 64), plane(T, 75, 196, 64)
    for kind in (Pool.MAX, Pool.AVG):
        given = Pooling(int(kind), (28.0, 28.0, 14.0, 14.0, 2.0, 2.0, 2.0, 2.0, 0.0, 0.0, 1.0, 1.0, 0.0))
        index = plane(T, 75, 196, 64, dtype=torch.int64) if kind == Pool.MAX else None
        yield "pool.forward", given, [image], (True, kind == Pool.MAX)
        yield "pool.backward", given, [half, index], None
        yield "pool.tangent", given, [image, index], None
    given = Pooling(int(Pool.ADAPTIVE_AVG), (5.0, 5.0, 1.0, 1.0, 5.0, 5.0, 1.0, 1.0, 0.0, 0.0, 1.0, 1.0, 0.0))
    yield "pool.forward", given, [plane(T, 75, 25, 64)], (True, False)
    yield "pool.backward", given, [plane(T, 75, 1, 64), None], None


def launches() -> list[Recorded]:
    """Of all cases, those whose code differs."""
    with recorded() as found:
        for name, constants, operands, wants in (*norms(), *losses(), *rows(), *updates(), *pools()):
            KERNELS[name](part_of(name, constants, operands, wants), *operands)
    return list({launch.key(): launch for launch in found}.values())


if __name__ == "__main__":
    every = launches()
    print(json.dumps({name: [needs(launch, int(name)) for launch in every] for name in sys.argv[1:]}))
