"""The kernels of a schedule: their operands by role, their results, their formulas. Every provider implements these.

A kernel is called as ``kernel(part, *operands)`` with None for an absent operand and returns one tensor per result
(None where `part.wants` says that it is not wanted). Shapes are those of `call.Plane`: x, y, z and their cotangents d
and tangents xt, yt, dt are [T, N, rows, features] = [T, N, R, F]; w, b, their gradients dw, db and tangents wt, bt are
[T, rows, cols]; T may be 1 (shared by all tasks), N may be 1 (no samples), and operands broadcast against each other as
in PyTorch. Operands may have any strides. An absent tangent is zero, and so is an absent cotangent d beside a dt.

With planes of half precision (bfloat16, float16) sums are taken in float32: w, b, moments, statistics, losses, weights
of samples and all gradients of parameters are float32 (a shared w may still be half, as the caller gave it).

For a node y = f(x, w) with parameters w, d the cotangent of y, and t marking tangents along (xt, wt):

    forward        y                          tangent        yt = D f (x, w) [xt, wt]
    backward       dx, dw = (D f)^T d         back_tangent   dxt, dwt = (D f)^T dt + (D (D f)^T [xt, wt]) d
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from mtml_kernels.program.activations import Act
from mtml_kernels.schema.update import UpdateSpec

__all__ = [
    "BENT",
    "FROM_OUTPUT",
    "KERNELS",
    "Activation",
    "Blank",
    "Convolution",
    "Kernel",
    "Linear",
    "Loss",
    "Normalisation",
    "Pooling",
    "Rule",
    "Shape",
    "Span",
    "Table",
]


# --- constants: what a part is told beside its operands ---------------------------------------------------------------


class Linear(NamedTuple):
    """y = x W^T + b with w stored [O, I], or, `turned`, y = x W + b with w stored [I, O] (w: [T or 1, rows, cols]).

    `over_tasks`: gradients of the parameters are summed over all tasks: dw [1, rows, cols], db [1, 1, O].
    """

    turned: bool
    over_tasks: bool


class Convolution(NamedTuple):
    """`window`: the node's 13 constants (program.layers.window). w: [T or 1, O, C / groups * kh * kw], b: [., 1, O]."""

    window: tuple[float, ...]
    over_tasks: bool


class Normalisation(NamedTuple):
    """kind, eps, groups as in program.layers.norm. Of w and b one row is read, and written of their gradients, the
    others of which are 0: `row`, of `rows` (0 of 1 but for parameters that exist once a step).
    """

    kind: int
    eps: float
    groups: int
    row: int
    rows: int
    over_tasks: bool


class Pooling(NamedTuple):
    """kind of program.layers.pool, and the node's 13 constants."""

    kind: int
    window: tuple[float, ...]


class Activation(NamedTuple):
    """kind of program.activations.Act, and the node's constants."""

    kind: int
    c0: float
    c1: float


class Table(NamedTuple):
    """An embedding: `padding` (the id without a gradient, or -1), `rows` of the table."""

    padding: int
    rows: int
    over_tasks: bool


class Shape(NamedTuple):
    """The shape of the result."""

    shape: tuple[int, ...]


class Blank(NamedTuple):
    """The shape and dtype of a result that is made of nothing."""

    shape: tuple[int, ...]
    dtype: torch.dtype


class Span(NamedTuple):
    """Features [start, stop) of `features`."""

    start: int
    stop: int
    features: int


class Loss(NamedTuple):
    """A loss as `LossSpec.encode` has it: kind and p0; its reduction is "mean" unless `total`.

    Of a sample, the loss is the mean over its elements (the sum where `total`; cross-entropy has one). The loss of a
    task is sum_n c_n l_n, with c [T, N] from `weights.forward`, or 1 / N (1 where `total`) where c is absent.
    `dtype`: of c where it is made of class ids alone.
    """

    kind: int
    p0: float
    total: bool
    dtype: torch.dtype = torch.float32


class Rule(NamedTuple):
    """An update rule and how many steps it has taken before this one."""

    spec: UpdateSpec
    step: int


# Activations whose derivatives are taken from y; the others need x. `ref` is that one.
FROM_OUTPUT = frozenset({Act.RELU, Act.TANH, Act.SIGMOID})
# Those with a second derivative; for the others back_tangent is backward of dt.
BENT = frozenset(Act) - {Act.RELU, Act.LEAKY_RELU}


# --- the table --------------------------------------------------------------------------------------------------------


class Kernel(NamedTuple):
    """A role with a star is that of as many planes as there are tensors: those of one role follow each other.

    `kind` decides what fits into one launch (`grouping`): a product of matrices or convolution, a reduction over
    rows or samples, a function of rows, a pointwise one, or nothing at all (another view of the same memory).
    """

    reads: tuple[str, ...]
    writes: tuple[str, ...]
    kind: str
    formula: str

    def tensors(self, reads: int) -> int:
        """Of how many tensors a part with so many operands is; 0 where no role has a star."""
        starred = sum(role.endswith("*") for role in self.reads)
        return (reads - len(self.reads) + starred) // starred if starred else 0


def _rows(kind: str, *lines: tuple[str, str, str, str]) -> dict[str, Kernel]:
    return {
        name: Kernel(tuple(reads.split()), tuple(writes.split()), kind, formula)
        for name, reads, writes, formula in lines
    }


_PRODUCTS: Sequence[tuple[str, str, str, str]] = (
    ("forward", "x w b", "y", "y = x W^T + b"),
    ("backward", "d x w", "dx dw db", "dx = d W; dw = d^T x; db = sum d"),
    ("tangent", "x xt w wt bt", "yt", "yt = xt W^T + x Wt^T + bt"),
    ("back_tangent", "d dt x xt w wt", "dxt dwt dbt", "dxt = dt W + d Wt; dwt = dt^T x + d^T xt; dbt = sum dt"),
)

KERNELS: dict[str, Kernel] = {
    **_rows("product", *((f"linear.{name}", *rest) for name, *rest in _PRODUCTS)),  # type: ignore[arg-type]
    **_rows("product", *((f"conv.{name}", *rest) for name, *rest in _PRODUCTS)),  # type: ignore[arg-type]
    # m: the mean over what the kind normalises together (UNIT: the sum, and 0 where the length is below eps);
    # mean and rstd are [T, 1, 1, F] (BATCH), [T, N, 1, groups] (GROUP) or [T, N, R, 1]; RMS and UNIT know no mean, and
    # in their formulas u1 = mt = 0. rstd = (m (x - mean)^2 + eps)^(-1/2); UNIT: 1 / max(length, eps).
    # e = w d, et = w dt + wt d (w absent: 1).
    **_rows(
        "reduce",
        ("norm.stats", "x", "mean rstd", "mean = m x; rstd"),
        ("norm.sums", "d xhat rstd w", "u1 u2 dw db", "u1 = m e; u2 = m (e xhat); dw = sum d xhat; db = sum d"),
        ("norm.stats_tangent", "xt xhat rstd", "mt q", "mt = m xt; q = m (xhat xt)"),
        (
            "norm.sums_tangent",
            "d dt xhat xhat_t rstd w wt",
            "u1t u2t dwt dbt",
            "u1t = m et; u2t = m (et xhat + e xhat_t); dwt = sum (dt xhat + d xhat_t); dbt = sum dt",
        ),
    ),
    **_rows(
        "point",
        ("norm.apply", "x mean rstd w b", "xhat y", "xhat = (x - mean) rstd; y = w xhat + b (not wanted: y is xhat)"),
        ("norm.back", "d xhat rstd u1 u2 w", "dx", "dx = rstd (e - u1 - xhat u2)"),
        (
            "norm.tangent",
            "xt xhat rstd mt q w wt bt",
            "xhat_t yt",
            "xhat_t = rstd (xt - mt - xhat q); yt = w xhat_t + wt xhat + bt (xt absent: xhat_t is too)",
        ),
        (
            "norm.back_tangent",
            "d dt xhat xhat_t rstd q u1 u2 u1t u2t w wt",
            "dxt",
            "dxt = rstd (et - u1t - xhat_t u2 - xhat u2t) - q rstd (rstd (e - u1 - xhat u2))",
        ),
        ("act.forward", "x", "y", "y = f(x)"),
        ("act.backward", "d ref", "dx", "dx = d f'"),
        ("act.tangent", "xt ref", "yt", "yt = xt f'"),
        ("act.back_tangent", "d dt ref xt", "dxt", "dxt = dt f' + d xt f'' (d, xt absent: dt f')"),
        ("add.forward", "a b", "y", "y = a + b, broadcast"),
        ("mul.forward", "a b", "y", "y = a b, broadcast"),
        ("mul.tangent", "a at b bt", "yt", "yt = at b + a bt"),
        ("affine.forward", "x", "y", "y = c0 x + c1"),
        (
            "cat.forward",
            "a b",
            "y",
            "features of a, then those of b; the Shape is of what is absent: zeros",
        ),
        ("slice.forward", "x", "y", "features [start, stop)"),
        ("slice.backward", "d", "dx", "zeros but for features [start, stop)"),
        ("pool.forward", "x", "y index", "index: of a maximum, whatever backward and tangent of the provider need"),
        ("pool.backward", "d index", "dx", "(also of dt)"),
        ("pool.tangent", "xt index", "yt", "linear, along the index"),
        ("scale", "x s", "y", "y = x s with s [T], or [] for all"),
        ("accumulate", "a b", "y", "y = a + b, in place of a, which nobody reads afterwards"),
        ("update.step", "theta g alpha", "after", "after = theta - alpha g"),
        ("update.direction", "lam alpha", "v", "v = -alpha lam"),
        (
            "update.rule",
            "theta* g* alpha* s0* s1* s2* hyper",
            "after* t0* t1* t2*",
            "one step of the rule, of all tensors; s: moments before, t: after (zeros where absent)",
        ),
        (
            "update.adjoint",
            "theta* g* alpha* s0* s1* s2* lam* mu0* mu1* mu2* hyper",
            "v* below* nu0* nu1* nu2* dalpha* dhyper",
            "cotangents (lam, mu) of (after, t) to v of g, below of theta, nu of s, dalpha like alpha, dhyper [8]",
        ),
    ),
    **_rows(
        "rows",
        ("softmax.forward", "x", "y", "over features; the constant is the kind of program.layers.softmax"),
        ("softmax.backward", "d y", "dx", "softmax: y (d - <d, y>); log_softmax: d - exp(y) sum d"),
        ("softmax.tangent", "xt y", "yt", "softmax: y (xt - <y, xt>); log_softmax: xt - <exp(y), xt>"),
        ("softmax.back_tangent", "d dt y yt", "dxt", "the tangent of backward"),
        ("weights.forward", "mask target", "c total", "c = w / total (0 where total is 0), or w for a sum of losses"),
        ("loss.forward", "z target c", "each d", "each [T, N] = l_n; d = c dl/dz"),
        ("loss.tangent", "z zt target c seed", "dt", "dt = c (d2l zt + seed_t dl/dz)"),
        (
            "loss.data",
            "z zt target c seed",
            "dtarget dc",
            "dtarget = c (seed dl/dy + d2l/dydz zt); dc [T, N] = seed l_n + <dl/dz, zt>; zt absent: 0, seed absent: 0",
        ),
    ),
    **_rows(
        "reduce",
        ("mul.backward", "d dt b bt", "da", "da = dt b + d bt, summed to the Shape"),
        ("reduce", "x", "y", "summed to the Shape, over whatever was broadcast"),
        ("embedding.forward", "ids w", "y", "rows of w; ids [T, N, rows]"),
        ("embedding.tangent", "ids wt", "yt", "rows of wt, 0 for `padding`, whose row is read but has no derivative"),
        ("embedding.backward", "d ids", "dw", "d added up by id, none to `padding`"),
        (
            "weights.backward",
            "dc c total target",
            "dmask",
            "dmask = counts (dc - sum c dc) / total (0 where total is), or counts dc for a sum",
        ),
        ("loss.sum", "each c", "y", "y [T] = sum_n c_n each_n"),
        ("update.clip", "hyper g*", "scale y*", "scale [T] = min(1, m / (|g_t| + 1e-6)), NaN stays; y = scale g"),
        ("update.unclip", "hyper scale h* g*", "v* dhyper", "of the cotangents h of scale g, those of g"),
        ("update.rate", "g lam", "dalpha", "-sum g lam to the Shape of the rate, [] or [1, rows, cols]"),
        ("tasks.sum", "x", "y", "summed over tasks"),
    ),
    **_rows(
        "free",
        ("view", "x", "y", "the same elements in the Shape"),
        ("transpose", "x", "y", "rows and features change places"),
        ("expand", "x", "y", "broadcast to the Shape"),
        ("stack", "x*", "y", "along a new first dimension"),
        ("zeros", "like", "y", "zeros of the Blank's shape and dtype, on the device of `like`"),
    ),
}
