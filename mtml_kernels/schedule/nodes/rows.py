"""Softmax over features, and poolings of images."""

from __future__ import annotations

import torch

from mtml_kernels.program.layers.pool import Pool
from mtml_kernels.program.layers.softmax import SOFTMAX
from mtml_kernels.program.ops import Op
from mtml_kernels.schedule.call import ABSENT
from mtml_kernels.schedule.kernels import Pooling
from mtml_kernels.schedule.passes import Along, NodeRule, Pass, Pull, node_rule

__all__: list[str] = []


def _softmax_forward(p: Pass, i: int) -> int:
    x = p.values[p.node(i).a]
    return p.draft.one("softmax.forward", (x,), p.shape(i, p.lead(x)), f"value of node {i}", p.node(i).b)


def _softmax_tangent(p: Pass, i: int, along: Along) -> int:
    xt, y = along.values[p.node(i).a], p.values[i]
    if xt == ABSENT:
        return ABSENT
    return p.draft.one("softmax.tangent", (xt, y), p.shape(i, p.lead(xt, y)), f"tangent of node {i}", p.node(i).b)


def _softmax_pull(pull: Pull) -> list[int]:
    p, i = pull.on, pull.i
    y, yt, d = p.values[i], pull.tangent(i), pull.d
    shape = p.shape(i, p.lead(pull.dt, y, yt, d))
    if yt == ABSENT or d == ABSENT:
        return [p.draft.one("softmax.backward", (pull.dt, y), shape, f"gradient of node {i}", p.node(i).b)]
    return [p.draft.one("softmax.back_tangent", (d, pull.dt, y, yt), shape, f"along V, of node {i}", p.node(i).b)]


def _pooling(p: Pass, i: int) -> Pooling:
    return Pooling(p.node(i).b, p.constants(i))


def _pool_forward(p: Pass, i: int) -> int:
    x, shape = p.values[p.node(i).a], p.shape(i)
    shapes = [shape, shape if p.node(i).b == Pool.MAX else None]
    dtypes = [p.draft.dtype, torch.int64]
    y, index = p.draft.emit("pool.forward", (x,), shapes, f"value of node {i}", _pooling(p, i), dtypes)
    p.kept[i] = (index,)
    return y


def _pool_tangent(p: Pass, i: int, along: Along) -> int:
    xt, (index,) = along.values[p.node(i).a], p.kept[i]
    if xt == ABSENT:
        return ABSENT
    return p.draft.one("pool.tangent", (xt, index), p.shape(i), f"tangent of node {i}", _pooling(p, i))


def _pool_pull(pull: Pull) -> list[int]:
    p, i = pull.on, pull.i
    (index,) = p.kept[i]
    return [
        p.draft.one("pool.backward", (pull.dt, index), p.shape(p.node(i).a), f"gradient of node {i}", _pooling(p, i))
    ]


node_rule(SOFTMAX, NodeRule(_softmax_forward, _softmax_tangent, _softmax_pull))
node_rule(Op.POOL, NodeRule(_pool_forward, _pool_tangent, _pool_pull))
