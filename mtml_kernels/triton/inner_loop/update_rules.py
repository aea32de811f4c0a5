"""The rules' formulas for a block of elements, and the kernels of a step and of its adjoint.

sgd      b' = momentum b + (1 - dampening) g  (first step: b' = g)      d = b', nesterov: g + momentum b'
adam     m' = beta1 m + (1 - beta1) g     v' = beta2 v + (1 - beta2) g^2    d = B1 m' / (sqrt(B2 v' + root) + eps)
rmsprop  v' = beta2 v + (1 - beta2) g^2   a' = beta2 a + (1 - beta2) g (centered)
         q  = g / (sqrt(v' - a'^2 + root) + eps)                        d = q, momentum: b' = momentum b + q
theta' = theta - alpha d,     Bi = 1 / (1 - betai^t)

A quotient is 0 where its divisor is, and the derivative of sqrt 0 where that is 0.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mtml_kernels.schema.update import HYPERS, RULES
from mtml_kernels.triton.inner_loop.arithmetic import quotient, root
from mtml_kernels.triton.inner_loop.segments import address, chosen, place

__all__ = ["BY_BLOCK", "BY_ELEMENT", "adjoint_kernel", "rates_kernel", "rule_kernel"]

# What is left of the cotangents of rates: every term, or sums of blocks, which are all that one number for all needs.
BY_ELEMENT, BY_BLOCK = tl.constexpr(1), tl.constexpr(2)

SGD, ADAM = tl.constexpr(RULES.index("sgd")), tl.constexpr(RULES.index("adam"))
WEIGHT_DECAY, MOMENTUM_AT = tl.constexpr(HYPERS.index("weight_decay")), tl.constexpr(HYPERS.index("momentum"))
DAMPENING, BETA1 = tl.constexpr(HYPERS.index("dampening")), tl.constexpr(HYPERS.index("beta1"))
BETA2, EPS, EPS_ROOT = (tl.constexpr(HYPERS.index(name)) for name in ("beta2", "eps", "eps_root"))
COUNT = tl.constexpr(len(HYPERS))


@triton.jit
def _power(x, n):
    """x^n for n >= 0, by squares."""
    y = x * 0.0 + 1.0
    while n > 0:
        if n % 2 == 1:
            y = y * x
        x = x * x
        n = n // 2
    return y


@triton.jit
def _bias(beta, t, TYPE: tl.constexpr):
    """1 - beta, B = 1 / (1 - beta^t) and dB / dbeta = t beta^(t-1) B^2."""
    before = _power(beta, t - 1)
    b = 1.0 / (1.0 - before * beta)
    return (1.0 - beta).to(TYPE), b.to(TYPE), (t * before * b * b).to(TYPE)


@triton.jit
def _over(x, y):
    """x / y, and 0 where y is"""
    return tl.where(y == 0, 0.0, quotient(x, tl.where(y == 0, 1.0, y)))


@triton.jit
def _divisor(x, eps, eps_root):
    """(spread, divisor): sqrt(x + root), which is at least 0, and that plus eps."""
    x = x + eps_root
    spread = root(tl.where(x < 0, 0.0, x))  # NaN stays
    return spread, spread + eps


@triton.jit
def _number(hyper, at: tl.constexpr, hyper_p, TYPE: tl.constexpr):
    return tl.load(hyper + at * hyper_p).to(TYPE)


@triton.jit
def _read(
    tensors, STEPS: tl.constexpr, task, block, p, live, FIRSTS: tl.constexpr, TYPE: tl.constexpr
):  # fmt: skip
    return tl.load(address(tensors, STEPS, task, block, p, FIRSTS), mask=live, other=0.0).to(TYPE)


@triton.jit
def _direction(
    theta, g, s0, s1, s2, decay, momentum, damped, beta1, beta2, eps, eps_root, rest1, rest2, bias1, bias2,
    RULE: tl.constexpr, MOMENTUM: tl.constexpr, NESTEROV: tl.constexpr, DECOUPLED: tl.constexpr,
    CENTERED: tl.constexpr, DECAYED: tl.constexpr, FIRST: tl.constexpr,
):  # fmt: skip
    """g with its decay, d, the moments after the step, spread and divisor, and q; what a rule has not is g."""
    if DECAYED:
        if not DECOUPLED:
            g = g + theta * decay
    d, t0, t1, t2, spread, divisor, q = g, g, g, g, g, g, g
    if RULE == SGD:
        if MOMENTUM:
            if not FIRST:
                t0 = g * damped + s0 * momentum
            d = t0
            if NESTEROV:
                d = g + t0 * momentum
    elif RULE == ADAM:
        t0 = g * rest1 + s0 * beta1
        t1 = g * g * rest2 + s1 * beta2
        spread, divisor = _divisor(t1 * bias2, eps, eps_root)
        d = _over(t0 * bias1, divisor)
    else:
        t0 = g * g * rest2 + s0 * beta2
        x = t0
        if CENTERED:
            t1 = g * rest2 + s1 * beta2
            x = t0 - t1 * t1
        spread, divisor = _divisor(x, eps, eps_root)
        q = _over(g, divisor)
        d = q
        if MOMENTUM:
            if CENTERED:
                t2 = q + s2 * momentum
                d = t2
            else:
                t1 = q + s1 * momentum
                d = t1
    return g, d, t0, t1, t2, spread, divisor, q


@triton.jit(do_not_specialize=["t"])
def rule_kernel(
    theta, g,  # of each tensor [T, P]
    alpha,  # [1 or T, 1 or P]
    s0, s1, s2,  # [T, P]
    hyper,  # [8]
    after, t0, t1, t2,  # [T, P]
    hyper_p,
    t,  # the step's number, from 1 on
    STEPS: tl.constexpr,  # of theta .. s2 in their order
    SIZES: tl.constexpr, FIRSTS: tl.constexpr, BLOCKS: tl.constexpr, BLOCK: tl.constexpr, TYPE: tl.constexpr,
    HAS_S0: tl.constexpr, HAS_S1: tl.constexpr, HAS_S2: tl.constexpr,
    RULE: tl.constexpr, MOMENTUM: tl.constexpr, NESTEROV: tl.constexpr, DECOUPLED: tl.constexpr,
    CENTERED: tl.constexpr, DECAYED: tl.constexpr, FIRST: tl.constexpr,
):  # fmt: skip
    """after = theta - alpha d (DECOUPLED: - alpha decay theta), and the moments after the step, of several tensors."""
    task, block, p, P = place(SIZES, FIRSTS, BLOCKS, BLOCK)
    live = p < P
    decay = _number(hyper, WEIGHT_DECAY, hyper_p, TYPE)
    momentum = _number(hyper, MOMENTUM_AT, hyper_p, TYPE)
    damped = (1.0 - _number(hyper, DAMPENING, hyper_p, tl.float64)).to(TYPE)
    beta1, beta2 = _number(hyper, BETA1, hyper_p, tl.float64), _number(hyper, BETA2, hyper_p, tl.float64)
    eps, eps_root = _number(hyper, EPS, hyper_p, TYPE), _number(hyper, EPS_ROOT, hyper_p, TYPE)
    rest1, bias1, _ = _bias(beta1, t, TYPE)
    rest2, bias2, _ = _bias(beta2, t, TYPE)
    rate = _read(alpha, STEPS[2], task, block, p, live, FIRSTS, TYPE)
    start = _read(theta, STEPS[0], task, block, p, live, FIRSTS, TYPE)
    own = _read(g, STEPS[1], task, block, p, live, FIRSTS, TYPE)
    old0 = _read(s0, STEPS[3], task, block, p, live & HAS_S0, FIRSTS, TYPE)
    old1 = _read(s1, STEPS[4], task, block, p, live & HAS_S1, FIRSTS, TYPE)
    old2 = _read(s2, STEPS[5], task, block, p, live & HAS_S2, FIRSTS, TYPE)
    own, d, new0, new1, new2, _, _, _ = _direction(
        start, own, old0, old1, old2, decay, momentum, damped, beta1.to(TYPE), beta2.to(TYPE), eps, eps_root,
        rest1, rest2, bias1, bias2, RULE, MOMENTUM, NESTEROV, DECOUPLED, CENTERED, DECAYED, FIRST,
    )  # fmt: skip
    if DECAYED:
        if DECOUPLED:
            start = start - start * (rate * decay)
    at = task * P + p
    tl.store(chosen(after, block, FIRSTS) + at, start - rate * d, mask=live)
    if RULE != SGD or MOMENTUM:
        tl.store(chosen(t0, block, FIRSTS) + at, new0, mask=live)
    if RULE == ADAM or CENTERED or (RULE != SGD and MOMENTUM):
        tl.store(chosen(t1, block, FIRSTS) + at, new1, mask=live)
    if CENTERED and MOMENTUM:
        tl.store(chosen(t2, block, FIRSTS) + at, new2, mask=live)


@triton.jit
def _under(qbar, q, spread, divisor):
    """Of q = x / (sqrt(y + root) + eps): the cotangents of x and y, and of eps less its sign."""
    over = _over(qbar, divisor)
    away = over * q
    return over, _over(away, spread * -2.0), away


@triton.jit
def _sum(x):
    return tl.sum(x.to(tl.float64), 0)


@triton.jit(do_not_specialize=["t"])
def adjoint_kernel(
    theta, g,  # of each tensor [T, P]
    alpha,  # [1 or T, 1 or P]
    s0, s1, s2, lam, mu0, mu1, mu2,  # [T, P]
    hyper,  # [8]
    v, below, nu0, nu1, nu2,  # [T, P]
    rates,  # [T, P], or of all tensors [T, blocks]
    numbers,  # [T, blocks, 8], one for all tensors
    hyper_p,
    t,  # the step's number, from 1 on
    STEPS: tl.constexpr,  # of theta .. mu2 in their order
    SIZES: tl.constexpr, FIRSTS: tl.constexpr, BLOCKS: tl.constexpr, BLOCK: tl.constexpr, TYPE: tl.constexpr,
    HAS_S0: tl.constexpr, HAS_S1: tl.constexpr, HAS_S2: tl.constexpr, HAS_LAM: tl.constexpr,
    HAS_MU0: tl.constexpr, HAS_MU1: tl.constexpr, HAS_MU2: tl.constexpr,
    RULE: tl.constexpr, MOMENTUM: tl.constexpr, NESTEROV: tl.constexpr, DECOUPLED: tl.constexpr,
    CENTERED: tl.constexpr, DECAYED: tl.constexpr, FIRST: tl.constexpr,
    RATES: tl.constexpr, WANT_HYPER: tl.constexpr,
):  # fmt: skip
    """From cotangents lam of after and mu of the moments after the step, with xbar that of x and dbar = -alpha lam:

    v = gbar, below = lam + decay gbar (DECOUPLED: + decay dbar), nu: of the moments before, rates = -lam d
    (DECOUPLED: -lam (d + decay theta)) by RATES, numbers: sums of a block's terms of the numbers' cotangents.
    """
    task, block, p, P = place(SIZES, FIRSTS, BLOCKS, BLOCK)
    live = p < P
    decay = _number(hyper, WEIGHT_DECAY, hyper_p, TYPE)
    momentum = _number(hyper, MOMENTUM_AT, hyper_p, TYPE)
    damped = (1.0 - _number(hyper, DAMPENING, hyper_p, tl.float64)).to(TYPE)
    double1, double2 = _number(hyper, BETA1, hyper_p, tl.float64), _number(hyper, BETA2, hyper_p, tl.float64)
    eps, eps_root = _number(hyper, EPS, hyper_p, TYPE), _number(hyper, EPS_ROOT, hyper_p, TYPE)
    rest1, bias1, slope1 = _bias(double1, t, TYPE)
    rest2, bias2, slope2 = _bias(double2, t, TYPE)
    beta1, beta2 = double1.to(TYPE), double2.to(TYPE)
    rate = _read(alpha, STEPS[2], task, block, p, live, FIRSTS, TYPE)
    start = _read(theta, STEPS[0], task, block, p, live, FIRSTS, TYPE)
    own = _read(g, STEPS[1], task, block, p, live, FIRSTS, TYPE)
    old0 = _read(s0, STEPS[3], task, block, p, live & HAS_S0, FIRSTS, TYPE)
    old1 = _read(s1, STEPS[4], task, block, p, live & HAS_S1, FIRSTS, TYPE)
    old2 = _read(s2, STEPS[5], task, block, p, live & HAS_S2, FIRSTS, TYPE)
    down = _read(lam, STEPS[6], task, block, p, live & HAS_LAM, FIRSTS, TYPE)
    m0 = _read(mu0, STEPS[7], task, block, p, live & HAS_MU0, FIRSTS, TYPE)
    m1 = _read(mu1, STEPS[8], task, block, p, live & HAS_MU1, FIRSTS, TYPE)
    m2 = _read(mu2, STEPS[9], task, block, p, live & HAS_MU2, FIRSTS, TYPE)
    own, d, t0, t1, _t2, spread, divisor, q = _direction(
        start, own, old0, old1, old2, decay, momentum, damped, beta1, beta2, eps, eps_root, rest1, rest2, bias1, bias2,
        RULE, MOMENTUM, NESTEROV, DECOUPLED, CENTERED, DECAYED, FIRST,
    )  # fmt: skip
    dbar = -rate * down
    zero = tl.zeros([BLOCK], TYPE)
    n0, n1, n2 = zero, zero, zero  # of the moments before
    of_decay, of_momentum, of_damping, of_beta1, of_beta2, of_eps, of_root = zero, zero, zero, zero, zero, zero, zero
    gbar = dbar
    if RULE == SGD:
        if MOMENTUM:
            bbar = dbar + m0
            if NESTEROV:
                bbar = dbar * momentum + m0
                of_momentum = dbar * t0
            gbar = bbar
            if not FIRST:
                of_momentum += bbar * old0
                of_damping = -bbar * own
                n0 = bbar * momentum
                gbar = bbar * damped
            if NESTEROV:
                gbar += dbar
    elif RULE == ADAM:
        over, xbar, away = _under(dbar, d, spread, divisor)
        of_eps, of_root = -away, xbar
        mbar, vbar = over * bias1 + m0, xbar * bias2 + m1
        n0, n1 = mbar * beta1, vbar * beta2
        of_beta1 = mbar * (old0 - own) + over * t0 * slope1
        of_beta2 = vbar * (old1 - own * own) + xbar * t1 * slope2
        gbar = mbar * rest1 + own * (vbar * (2 * rest2))
    else:
        qbar = dbar
        if MOMENTUM:
            if CENTERED:
                qbar += m2
                n2 = qbar * momentum
                of_momentum = qbar * old2
            else:
                qbar += m1
                n1 = qbar * momentum
                of_momentum = qbar * old1
        over, xbar, away = _under(qbar, q, spread, divisor)
        of_eps, of_root = -away, xbar
        vbar = xbar + m0
        n0 = vbar * beta2
        of_beta2 = vbar * (old0 - own * own)
        gbar = over + own * (vbar * (2 * rest2))
        if CENTERED:
            abar = t1 * xbar * -2.0 + m1
            n1 = abar * beta2
            of_beta2 += abar * (old1 - own)
            gbar += abar * rest2
    at = task * P + p
    of_rate = _adjoint_results(
        start, down, d, dbar, gbar, decay, chosen(v, block, FIRSTS) + at, chosen(below, block, FIRSTS) + at, live,
        DECOUPLED, DECAYED,
    )  # fmt: skip
    if RATES == BY_ELEMENT:
        tl.store(chosen(rates, block, FIRSTS) + at, of_rate, mask=live)
    if RATES == BY_BLOCK:
        tl.store(rates[0] + task * BLOCKS + block, tl.sum(tl.where(live, of_rate, 0.0), 0))
    if RULE != SGD or MOMENTUM:
        tl.store(chosen(nu0, block, FIRSTS) + at, n0, mask=live)
    if RULE == ADAM or CENTERED or (RULE != SGD and MOMENTUM):
        tl.store(chosen(nu1, block, FIRSTS) + at, n1, mask=live)
    if CENTERED and MOMENTUM:
        tl.store(chosen(nu2, block, FIRSTS) + at, n2, mask=live)
    if WANT_HYPER:
        if DECAYED:
            of_decay = start * dbar if DECOUPLED else start * gbar
        to = numbers + (task * BLOCKS + block) * COUNT
        _store_numbers(to, of_decay, of_momentum, of_damping, of_beta1, of_beta2, of_eps, of_root)


@triton.jit
def _store_numbers(to, of_decay, of_momentum, of_damping, of_beta1, of_beta2, of_eps, of_root):
    """The sums of a block's terms, in the order of HYPERS; clip_norm has none."""
    tl.store(to, 0.0)
    tl.store(to + WEIGHT_DECAY, _sum(of_decay))
    tl.store(to + MOMENTUM_AT, _sum(of_momentum))
    tl.store(to + DAMPENING, _sum(of_damping))
    tl.store(to + BETA1, _sum(of_beta1))
    tl.store(to + BETA2, _sum(of_beta2))
    tl.store(to + EPS, _sum(of_eps))
    tl.store(to + EPS_ROOT, _sum(of_root))


@triton.jit
def _adjoint_results(
    theta, lam, d, dbar, gbar, decay, v, below, live, DECOUPLED: tl.constexpr, DECAYED: tl.constexpr
):  # fmt: skip
    """Stores v and below; the terms of the rate."""
    down, of_rate = lam, d
    if DECAYED:
        if DECOUPLED:
            down = lam + dbar * decay
            of_rate = d + theta * decay
        else:
            down = lam + gbar * decay
    tl.store(v, gbar, mask=live)
    tl.store(below, down, mask=live)
    return -of_rate * lam


@triton.jit
def rates_kernel(
    sums,  # [T, blocks]
    y,  # [tensors]
    tasks,
    FIRSTS: tl.constexpr, LASTS: tl.constexpr, BLOCKS: tl.constexpr, LANES: tl.constexpr, TYPE: tl.constexpr,
):  # fmt: skip
    """y = the sum over all tasks of a tensor's blocks, FIRSTS to LASTS"""
    tensor = tl.program_id(0)
    first, last = 0, 0
    for i in tl.static_range(len(FIRSTS)):
        first = tl.where(tensor == i, FIRSTS[i], first)
        last = tl.where(tensor == i, LASTS[i], last)
    own = last - first
    added = tl.zeros([LANES], TYPE)
    for start in range(0, tasks * own, LANES):
        at = (start + tl.arange(0, LANES)).to(tl.int64)
        added += tl.load(sums + at // own * BLOCKS + first + at % own, mask=at < tasks * own, other=0.0)
    tl.store(y + tensor, tl.sum(added, 0))
