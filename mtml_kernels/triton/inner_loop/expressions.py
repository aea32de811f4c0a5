"""The pointwise parts of a schedule as Triton expressions of the names of their operands, None for an absent one.

The formulas are those of schedule.kernels, where an absent operand is zero, but for a weight, which is one.
"""

from __future__ import annotations

from collections.abc import Callable

from mtml_kernels.schedule.call import Part
from mtml_kernels.schedule.kernels import BENT

__all__ = ["EXPRESSIONS"]

Name = str | None
Expression = Callable[..., tuple[Name, ...]]  # (part, *names) -> one for each result


def plus(*terms: Name) -> Name:
    """Their sum; None where all are absent."""
    there = [term for term in terms if term is not None]
    return f"({' + '.join(there)})" if there else None


def times(*factors: Name) -> Name:
    """Their product; None, which is zero, where one is absent."""
    return None if None in factors else f"({' * '.join(map(str, factors))})"


def minus(a: Name, *others: Name) -> Name:
    """a less the others."""
    less = [f" - {other}" for other in others if other is not None]
    return a if not less else f"({a or '0.0'}{''.join(less)})"


def weighed(x: Name, w: Name) -> Name:
    """w x"""
    return x if w is None else times(w, x)


def _activation(part: Part) -> str:
    kind, c0, c1 = part.constants
    return f"{int(kind)}, {float(c0)!r}, {float(c1)!r}"


def _forward(part: Part, x: str) -> tuple[Name, ...]:
    return (f"value({x}, {_activation(part)})",)


def _backward(part: Part, d: str, ref: str) -> tuple[Name, ...]:
    return (f"pulled({d}, {ref}, {_activation(part)})",)


def _back_tangent(part: Part, d: Name, dt: Name, ref: str, xt: Name) -> tuple[Name, ...]:
    straight = None if dt is None else f"pulled({dt}, {ref}, {_activation(part)})"
    if part.constants[0] not in BENT:
        return (straight,)
    return (plus(straight, times(d, xt, f"bend({ref}, {_activation(part)})")),)


def _apply(part: Part, x: str, mean: Name, rstd: str, w: Name, b: Name) -> tuple[Name, ...]:
    xhat = times(minus(x, mean), rstd)
    return xhat, plus(weighed(xhat, w), b)


def _back(part: Part, d: str, xhat: str, rstd: str, u1: Name, u2: Name, w: Name) -> tuple[Name, ...]:
    return (times(rstd, _centred(weighed(d, w), xhat, u1, u2)),)


def _centred(e: Name, xhat: str, u1: Name, u2: Name) -> Name:
    """e - u1 - xhat u2"""
    return minus(e, u1, times(xhat, u2))


def _tangent(
    part: Part, xt: Name, xhat: str, rstd: str, mt: Name, q: Name, w: Name, wt: Name, bt: Name
) -> tuple[Name, ...]:
    xhat_t = None if xt is None else times(rstd, minus(xt, mt, times(xhat, q)))
    return xhat_t, plus(weighed(xhat_t, w), times(wt, xhat), bt)


def _norm_back_tangent(
    part: Part, d: Name, dt: Name, xhat: str, xhat_t: Name, rstd: str, q: Name, u1: Name, u2: Name, u1t: Name,
    u2t: Name, w: Name, wt: Name,
) -> tuple[Name, ...]:  # fmt: skip
    et = plus(weighed(dt, w) if dt else None, times(wt, d))
    inner = minus(et, u1t, times(xhat_t, u2), times(xhat, u2t))
    first = _centred(weighed(d, w) if d else None, xhat, u1, u2)
    return (times(rstd, minus(inner, times(q, rstd, first))),)


EXPRESSIONS: dict[str, Expression] = {
    "act.forward": _forward,
    "act.backward": _backward,
    "act.tangent": _backward,
    "act.back_tangent": _back_tangent,
    "norm.apply": _apply,
    "norm.back": _back,
    "norm.tangent": _tangent,
    "norm.back_tangent": _norm_back_tangent,
    "add.forward": lambda part, a, b: (plus(a, b),),
    "accumulate": lambda part, a, b: (plus(a, b),),
    "mul.forward": lambda part, a, b: (times(a, b),),
    "mul.tangent": lambda part, a, at, b, bt: (plus(times(at, b), times(a, bt)),),
    "affine.forward": lambda part, x: (f"affine({x}, {part.constants[-2]!r}, {part.constants[-1]!r})",),
    "scale": lambda part, x, s: (times(x, s),),
    "update.step": lambda part, theta, g, alpha: (minus(theta, times(alpha, g)),),
    "update.direction": lambda part, lam, alpha: (f"-({alpha} * {lam})",),
}
