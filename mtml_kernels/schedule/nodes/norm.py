"""Normalisations: two calls each way, of which the first sums and the second applies (formulas: kernels.py)."""

from __future__ import annotations

from mtml_kernels.program.layers.norm import Norm
from mtml_kernels.program.ops import Op
from mtml_kernels.schedule.call import ABSENT
from mtml_kernels.schedule.draft import Dims
from mtml_kernels.schedule.kernels import Normalisation
from mtml_kernels.schedule.passes import Along, NodeRule, Pass, Pull, node_rule

__all__: list[str] = []

_HAS_MEAN = (Norm.BATCH, Norm.GROUP, Norm.LAYER)


def _constants(p: Pass, i: int, over_tasks: bool) -> Normalisation:
    eps, groups = p.constants(i)
    first = next((param for param in (p.node(i).weight, p.node(i).bias) if param >= 0), -1)
    rows = p.draft.shape(p.theta[first])[1] if first >= 0 else 1
    return Normalisation(p.node(i).b, eps, int(groups), p.rows.get(first, 0), rows, over_tasks)


def _statistic(p: Pass, i: int) -> Dims:
    """The shape of a mean."""
    node = p.node(i)
    if node.b == Norm.BATCH:
        return p.tasks, 1, 1, node.features
    if node.b == Norm.GROUP:
        return p.tasks, p.samples, 1, int(p.constants(i)[1])
    return p.tasks, p.samples, node.rows, 1


def _forward(p: Pass, i: int) -> int:
    x, w, b, shape, constants = p.values[p.node(i).a], p.weight(i), p.bias(i), p.shape(i), _constants(p, i, False)
    one, wide = _statistic(p, i), p.draft.wide
    has_mean = p.node(i).b in _HAS_MEAN
    shapes = [one if has_mean else None, one]
    mean, rstd = p.draft.emit("norm.stats", (x,), shapes, f"statistics of node {i}", constants, [wide, wide])
    affine = w != ABSENT or b != ABSENT
    shapes_of_value = [shape, shape if affine else None]
    xhat, y = p.draft.emit("norm.apply", (x, mean, rstd, w, b), shapes_of_value, f"value of node {i}", constants)
    p.kept[i] = xhat, rstd
    return y if affine else xhat


def _tangent(p: Pass, i: int, along: Along) -> int:
    node = p.node(i)
    xt, (xhat, rstd) = along.values[node.a], p.kept[i]
    wt, bt = (along.directions[param] if param >= 0 else ABSENT for param in (node.weight, node.bias))
    if xt == wt == bt == ABSENT:
        return ABSENT
    constants, one, wide = _constants(p, i, False), _statistic(p, i), p.draft.wide
    mt = q = ABSENT
    if xt != ABSENT:
        shapes = [one if node.b in _HAS_MEAN else None, one]
        mt, q = p.draft.emit("norm.stats_tangent", (xt, xhat, rstd), shapes, f"of node {i}", constants, [wide, wide])
    affine = p.weight(i) != ABSENT or bt != ABSENT
    reads = (xt, xhat, rstd, mt, q, p.weight(i), wt, bt)
    shapes = [p.shape(i) if xt != ABSENT else None, p.shape(i) if affine else None]
    xhat_t, yt = p.draft.emit("norm.tangent", reads, shapes, f"tangent of node {i}", constants)
    along.kept[i] = xhat_t, q
    return yt if affine else xhat_t


def _pull(pull: Pull) -> list[int]:
    p, i = pull.on, pull.i
    xt = pull.tangent(p.node(i).a)
    wt = pull.direction(p.node(i).weight)
    return _plain(pull) if xt == wt == ABSENT else _along(pull, wt)


def _gradients(pull: Pull, over: bool) -> tuple[list[Dims | None], list[bool]]:
    """Shapes of the sums and of the parameters' gradients."""
    p, i = pull.on, pull.i
    of_w, of_b, _ = pull.of_params()
    lead, rows, features = 1 if over else p.tasks, _constants(p, i, over).rows, p.node(i).features
    own = (lead, rows, features)
    one = _statistic(p, i) if pull.wanted[0] else None
    first = one if p.node(i).b in _HAS_MEAN else None
    return [first, one, own if of_w else None, own if of_b else None], [of_w, of_b]


def _plain(pull: Pull) -> list[int]:
    p, i, d = pull.on, pull.i, pull.dt
    (xhat, rstd), w, over = p.kept[i], p.weight(i), pull.of_params()[2]
    constants, wide = _constants(p, i, over), p.draft.wide
    shapes, _ = _gradients(pull, over)
    u1 = u2 = ABSENT
    if any(shape is not None for shape in shapes):
        reads = (d, xhat, rstd, w)
        u1, u2, dw, db = p.draft.emit("norm.sums", reads, shapes, f"sums of node {i}", constants, [wide] * 4)
        pull.hand_over(dw, db)
    if not pull.wanted[0]:
        return [ABSENT]
    if pull.keep:
        p.sums[i] = u1, u2
    return [p.draft.one("norm.back", (d, xhat, rstd, u1, u2, w), p.shape(i), f"gradient of node {i}", constants)]


def _along(pull: Pull, wt: int) -> list[int]:
    p, i, d, dt = pull.on, pull.i, pull.d, pull.dt
    assert pull.along is not None
    (xhat, rstd), w, over = p.kept[i], p.weight(i), pull.of_params()[2]
    xhat_t, q = pull.along.kept.get(i, (ABSENT, ABSENT))
    constants, wide = _constants(p, i, over), p.draft.wide
    shapes, _ = _gradients(pull, over)
    u1t = u2t = ABSENT
    if any(shape is not None for shape in shapes):
        reads = (d, dt, xhat, xhat_t, rstd, w, wt)
        u1t, u2t, dw, db = p.draft.emit("norm.sums_tangent", reads, shapes, f"sums of node {i}", constants, [wide] * 4)
        pull.hand_over(dw, db)
    if not pull.wanted[0]:
        return [ABSENT]
    u1, u2 = p.sums.get(i, (ABSENT, ABSENT))
    operands = (d, dt, xhat, xhat_t, rstd, q, u1, u2, u1t, u2t, w, wt)
    return [p.draft.one("norm.back_tangent", operands, p.shape(i), f"along V, of node {i}", constants)]


node_rule(Op.NORM, NodeRule(_forward, _tangent, _pull))
