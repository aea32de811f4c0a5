"""K steps of a linear head on given features for every task, in one launch, in the Gram matrix of the support features.

No weight of a task [T, C, D] is formed. Products of the features go to cuBLAS, before the launch and after it; up to 8
classes and S + C = 32 they are launches of `features.py`, one before and two after, which add up dW as a share for
every task: C D numbers beside the (S + Q) D of its features. Samples are rows and classes columns; F_s [S, D], F_q
[Q, D] are the features of a task, W [C, D] and bias the head's start, 1 a row or column of ones, m = decay + proximal,
and w, y, l, predictions, curvature those of `losses.py`.

Before:   gram = F_s F_s^T [S, S];  zs = F_s W^T [S, C];  cross = F_q F_s^T [Q, S];  zq = F_q W^T [Q, C]

Forward, in the launch, from a = b = 0 and u = v = 1:
    z = u zs + v bias - gram a - 1 1^T b
    p = predictions(z);  r = w (p - y);  losses[k] = sum w l
    a <- (1 - alpha m) a + alpha r;  u <- (1 - alpha m) u + alpha proximal;  b and v likewise with beta
    logits = u zq + v bias - cross a - 1 1^T b;  loss = sum w l of the query set
so that a task's weight is u W - a^T F_s and its bias v bias - b^T 1. Without decay u = v = 1.
SHIFT says where the bias is. NONE: nowhere. APART, its rates are its own: as above. SHARED, the rates are the weight's:
b = a and v = u, and so z = u (zs + 1 bias) - (gram + 1 1^T) a, with cross and zq likewise, and no b.

Backward, in the same launch, seed the cotangent of the task's loss, grad_a and grad_b those of a and b:
    dq = seed w (p - y) + grad_logits, of the query set [Q, C]
    da = grad_a - cross^T dq;  db = grad_b - 1 1^T dq;  du = 1^T (dq zq);  dv = bias 1^T dq;  dbias = v 1^T dq
    for k = K-1 ... 0, with the a, b, u, v, p, r of that step:
        x = alpha da + beta db;  dz = w curvature(p, x) + grad_losses[k] r
        dalpha[k] = 1^T (da (r - m a)) + du (proximal - m u);  dbeta[k] = 1^T (db (r - m b)) + dv (proximal - m v)
        da <- (1 - alpha m) da - gram dz;  db <- (1 - beta m) db - 1 1^T dz;  dgram -= dz a^T;  dzs += u dz
        du <- (1 - alpha m) du + 1^T (dz zs);  dv <- (1 - beta m) dv + bias 1^T dz;  dbias += v 1^T dz
    (SHARED: x = alpha da, and dbias = u 1^T dq + 1^T dzs)

After, with dcross = -dq a^T [Q, S] and all tasks summed for what they share:
    dF_s = (dgram + dgram^T) F_s + dzs W + dcross^T F_q;  dF_q = (dq u) W + dcross F_s
    dW = sum dzs^T F_s + (dq u)^T F_q;  dbias, drates: sums

The forward goes all the way back with seed 1, while the task is on chip. Its carry, [dgram + dgram^T, dzs, -a] of
[S, S + 2 C], dq, u, dbias and drates, is linear in seed but for a and u: the backward scales it, and launches again,
from the products on, only where other cotangents than the loss's come in. Sums have a fixed order: equal calls give
equal bits. In the launches a task's bits do not depend on the tasks beside it; cuBLAS may take another kernel for more
of them, and computes in TF32 where PyTorch is told to (torch.set_float32_matmul_precision); the launches never do.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mtml_kernels.schema.head_inner_loop import (
    NEEDS_RATES,
    Cotangents,
    HeadArgs,
    HeadOutputs,
    carry_size,
    parse_options,
)
from mtml_kernels.triton.device import on
from mtml_kernels.triton.head_inner_loop.features import chain_kernel, products_kernel, sums_kernel
from mtml_kernels.triton.head_inner_loop.kernel import head_kernel
from mtml_kernels.triton.head_inner_loop.policy import NARROW, WIDTH, Launch, launch_of
from mtml_kernels.triton.head_inner_loop.steps import APART, NONE, SHARED

__all__ = ["backward", "forward"]

TYPES = {torch.float32: tl.float32, torch.float64: tl.float64}


def forward(a: HeadArgs) -> HeadOutputs:
    """The op's forward, and its carry where `needs` asks for gradients.

    Raises:
        ValueError: S or C does not fit on chip (`launch_of`).
    """
    tasks, support, _ = a.support.shape
    groups, steps, classes = a.rates.shape
    new = a.weight.new_empty
    outputs = (
        new(tasks if a.has_loss else 0),
        new((tasks, a.query.shape[1], classes)),
        new((steps, tasks)),
        new((tasks, groups, classes, support)),
    )
    carry = new((tasks, carry_size(a)) if a.needs and a.has_loss else 0)
    _launch(a, outputs, carry, (None, None, None, None))
    return (*outputs, carry)


def backward(cotangents: Cotangents, a: HeadArgs, carry: Tensor) -> list[Tensor | None]:
    """The five gradients, None where `needs` does not ask: scales the carry, or makes another where it must."""
    scale, *others = cotangents
    if scale is None or not carry.numel() or any(c is not None for c in others):
        if all(c is None for c in cotangents):
            pairs = zip(a.differentiable, a.asks(), strict=True)
            return [torch.zeros_like(t) if asked and t is not None else None for t, asked in pairs]
        carry, scale = a.weight.new_empty((len(a.support), carry_size(a))), None
        _launch(a, None, carry, cotangents)
    return _chain(a, carry, scale)


def _launch(a: HeadArgs, outputs: tuple[Tensor, ...] | None, carry: Tensor, cotangents: Cotangents) -> None:
    """Writes outputs (None: nowhere) and, where it has elements, the carry, for these cotangents or for loss.sum()."""
    tasks, support, _ = a.support.shape
    query = a.query.shape[1]
    groups, steps, classes = a.rates.shape
    dtype = a.weight.dtype
    launch = launch_of(support, classes, dtype.itemsize)
    if a.bias is None and groups == 2:
        raise ValueError(f"rates: expected [1, K, C] where there is no bias, got {list(a.rates.shape)}")
    if not tasks:
        return
    options, going_back = parse_options(a.options), carry.numel() > 0
    with _full_precision(a), on(a.weight.device):
        products = _products(a, launch)
        history = (1 + groups) * support * classes + groups * classes
        optional = (a.query_labels, a.support_mask, a.query_mask)
        unused = products[0]  # stands where there is no tensor: never read
        y, qy, sm, qm = (unused if t is None else t.contiguous() for t in (a.labels, *optional))
        grads = [unused if c is None else c.contiguous() for c in cotangents]
        grad_loss, grad_logits, grad_losses, grad_coefficients = cotangents
        shift = NONE if a.bias is None else SHARED if groups == 1 else APART
        head_kernel[(tasks,)](
            *products,
            unused if a.bias is None else a.bias.contiguous(),
            a.rates.contiguous(),
            y,
            qy,
            sm,
            qm,
            *grads,
            *(outputs or (unused,) * 4),
            a.weight.new_empty((tasks, steps + 1, history) if going_back or not launch.on_chip else 0),
            carry,
            tasks,
            support,
            query,
            classes,
            steps,
            carry_size(a),
            *(t.stride(0) for t in products),
            *(t.stride(1) for t in products[2:]),
            *_numbers(a.options),
            TYPE=TYPES[dtype],
            KIND=options.support_loss.encode()[0],
            MEAN=options.support_loss.reduction == "mean",
            MASKED=a.support_mask is not None,
            QUERY_KIND=options.query_loss.encode()[0],
            QUERY_MEAN=options.query_loss.reduction == "mean",
            QUERY_MASKED=a.query_mask is not None,
            TARGETS=a.has_loss,
            SHIFT=shift,
            DECAYS=options.decay != 0,
            OUTPUTS=outputs is not None,
            CARRY=going_back,
            OWN_LOSS=all(c is None for c in cotangents),
            HAS_GRAD_LOSS=grad_loss is not None and a.has_loss,  # else the loss is [0]
            HAS_GRAD_LOGITS=grad_logits is not None,
            HAS_GRAD_LOSSES=grad_losses is not None,
            HAS_GRAD_COEFFICIENTS=grad_coefficients is not None,
            RATES=bool(a.needs & NEEDS_RATES),
            ON_CHIP=launch.on_chip,
            SP=launch.support,
            CP=launch.classes,
            BLOCK=launch.block,
            num_warps=launch.warps,
            num_stages=1,
            enable_fp_fusion=False,
        )


def _full_precision(a: HeadArgs) -> Any:
    """No autocast: it would make half precision of the products."""
    return torch.autocast(a.weight.device.type, enabled=False)


def _products(a: HeadArgs, launch: Launch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """gram, zs, cross, zq of every task; rows of gram and of cross are equally far apart, those of zs and of zq too."""
    if launch.narrow and a.support.shape[1] + a.query.shape[1]:
        return _narrow_products(a)
    rows = a.support.mT
    return a.support @ rows, a.support @ a.weight.T, a.query @ rows, a.query @ a.weight.T


def _narrow_products(a: HeadArgs) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`_products` by one launch (`features.py`), as parts of one matrix."""
    (tasks, support, features), classes = a.support.shape, a.weight.shape[0]
    query, columns = a.query.shape[1], WIDTH if support + classes > WIDTH // 2 else WIDTH // 2
    rows = 64 * WIDTH // (columns * a.weight.dtype.itemsize)  # of which a thread holds 512 bytes
    every = a.weight.new_empty((tasks, support + query, support + classes))
    sx, qx = _rows(a.support), _rows(a.query)
    products_kernel[(tasks * -(-(support + query) // rows),)](
        sx,
        qx,
        a.weight.contiguous(),
        every,
        support,
        query,
        classes,
        features,
        sx.stride(0),
        qx.stride(0),
        TYPE=TYPES[a.weight.dtype],
        ROWS=rows,
        COLS=columns,
        LANES=32,
        num_warps=4,
        num_stages=1,
        enable_fp_fusion=True,
    )
    above, below = every.split((support, query), 1)
    return (*above.split((support, classes), 2), *below.split((support, classes), 2))


@functools.lru_cache(maxsize=256)
def _numbers(options: str) -> list[float]:
    """Label smoothing of both losses, decay, proximal: each rounded to float32, and what that leaves of it."""
    o = parse_options(options)
    numbers = (o.support_loss.label_smoothing, o.query_loss.label_smoothing, o.decay, o.proximal)
    high = torch.tensor(numbers, dtype=torch.float32).tolist()
    return [part for n, h in zip(numbers, high, strict=True) for part in (h, n - h)]


def _chain(a: HeadArgs, carry: Tensor, scale: Tensor | None) -> list[Tensor | None]:
    """The gradients that `needs` asks for, of a carry and the cotangent [T] of the loss that it is multiplied by."""
    tasks, support, _ = a.support.shape
    launch = launch_of(support, a.weight.shape[0], a.weight.dtype.itemsize)
    if launch.narrow and tasks and a.weight.numel():
        return _narrow_chain(a, carry, scale, launch)
    query, classes = a.query.shape[1], a.weight.shape[0]
    matrices, dq, u, dbias, drates = carry.split(_sizes(a), 1)
    dgram, dzs, minus_a = matrices.view(tasks, support, support + 2 * classes).split((support, classes, classes), 2)
    dq = dq.view(tasks, query, classes)
    if scale is not None:
        dgram, dzs, dq = (scale[:, None, None] * t for t in (dgram, dzs, dq))
        dbias, drates = (scale[:, None] * t for t in (dbias, drates))
    own = dq * u[:, None]  # what reaches W through u
    with _full_precision(a), on(a.weight.device):
        dcross = dq @ minus_a.mT
        gradients = (
            lambda: (dzs @ a.weight).baddbmm_(dgram, a.support).baddbmm_(dcross.mT, a.query),
            lambda: (own @ a.weight).baddbmm_(dcross, a.support),
            lambda: _over_tasks(dzs, a.support) + _over_tasks(own, a.query),
            lambda: dbias.sum(0),
            lambda: drates.sum(0).view(a.rates.shape),
        )
        return [make() if asked else None for make, asked in zip(gradients, a.asks(), strict=True)]


def _narrow_chain(a: HeadArgs, carry: Tensor, scale: Tensor | None, launch: Launch) -> list[Tensor | None]:
    """`_chain` by two launches (`features.py`)."""
    (tasks, support, features), classes = a.support.shape, a.weight.shape[0]
    asked, new = a.asks(), a.weight.new_empty
    results = [new(t.shape) if one and t is not None else None for one, t in zip(asked, a.differentiable, strict=True)]
    dsupport, dquery, *summed = results
    rest = classes + (a.rates.numel() if asked[4] else 0)
    own = [a.weight.numel() if asked[2] else 0, rest if any(asked[3:]) else 0]
    shares, columns, sums = new((tasks, sum(own))), 256 // a.weight.dtype.itemsize, 128
    sx, qx = _rows(a.support), _rows(a.query)
    with on(a.weight.device):
        chain_kernel[(tasks * -(-features // columns),)](
            sx,
            qx,
            a.weight.contiguous(),
            carry,
            carry if scale is None else scale.contiguous(),
            carry if dsupport is None else dsupport,
            carry if dquery is None else dquery,
            shares,
            support,
            a.query.shape[1],
            features,
            sx.stride(0),
            qx.stride(0),
            carry.shape[1],
            sum(own),
            own[1],
            C=classes,
            TYPE=TYPES[a.weight.dtype],
            SCALED=scale is not None,
            OF_SUPPORT=asked[0],
            OF_QUERY=asked[1],
            OF_WEIGHT=asked[2],
            SP=launch.support,
            CP=NARROW,
            COLS=columns,
            BLOCK=8,
            REST=triton.next_power_of_2(rest),
            num_warps=1,
            num_stages=1,
            enable_fp_fusion=True,
        )
        if shares.numel():
            sums_kernel[(-(-shares.shape[1] // sums),)](
                shares,
                *(shares if t is None else t for t in summed),
                tasks,
                *shares.shape[1:],
                own[0],
                classes,
                OF_BIAS=asked[3],
                OF_RATES=asked[4],
                TYPE=TYPES[a.weight.dtype],
                ROWS=16,
                COLS=sums,
                num_warps=4,
                num_stages=1,
                enable_fp_fusion=False,
            )
    return results


def _rows(features: Tensor) -> Tensor:
    """[T, N, D] whose rows lie one after the other; tasks may be apart."""
    _, _, size = features.shape
    return features if features.stride()[1:] == (size, 1) else features.contiguous()


def _over_tasks(left: Tensor, features: Tensor) -> Tensor:
    """The sum over tasks of left^T features, [C, D]: one product over the samples of all."""
    return left.flatten(0, 1).T @ features.flatten(0, 1)


def _sizes(a: HeadArgs) -> list[int]:
    """Elements of the parts of a carry: the three matrices, dq, u, dbias, drates."""
    support, query, classes = a.support.shape[1], a.query.shape[1], a.weight.shape[0]
    return [support * (support + 2 * classes), query * classes, classes, classes, a.rates.numel()]
