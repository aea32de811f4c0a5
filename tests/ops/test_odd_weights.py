"""Weights that no loss expects: infinite, NaN, negative, of sum 0, too large to add up. Engine and reference agree.

What is finite is equal; what is not finite is so in both (an infinity of one may be the NaN of the other, where PyTorch
subtracts infinities on the way). In float32 the engine adds in double precision: where the reference's sum overflows,
what is finite is as in float64.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from cases.head_inner_loop import make_head_case
from cases.inner_loop import Case, make_case
from cases.multihead_loss import Head, evaluate
from torch import Tensor

from mtml_kernels import HeadLoss, linear_multihead_loss
from mtml_kernels.losses import HEAD_KINDS, KINDS, LossSpec
from mtml_kernels.ops import linear_multihead_loss as linear_op

INF, NAN = math.inf, math.nan
ODD = {
    "inf": [1, INF, 2, 1],
    "minus inf": [1, -INF, 1, 0.5],
    "both": [INF, 1, -INF, 1],
    "inf beside 0": [0, INF, 0, 1],
    "nan": [1, 1, NAN, 1],
    "nan beside 0": [NAN, 0, 0, 0],
    "negative": [-1, 2, 0.5, 1],
    "sum 0": [1, -1, 2, -2],
    "all 0": [0, 0, 0, 0],
    "overflow": [0.5, 0.5, 0.5, 0.5],  # of the largest number
    "tiny": [1e-30, 2e-30, 1e-30, 3e-30],
}
every_weight = pytest.mark.parametrize("name", ODD)
both_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
# the engine's kernels are templates: one type shows what both do
once = pytest.mark.parametrize(
    ("name", "dtype"), [(n, torch.float64) for n in ODD if n != "overflow"] + [("overflow", torch.float32)]
)
both_reductions = pytest.mark.parametrize("reduction", ["mean", "sum"])


def odd(name: str, dtype: torch.dtype) -> Tensor:
    return torch.tensor(ODD[name], dtype=dtype) * (torch.finfo(dtype).max if name == "overflow" else 1)


def check(name: str, dtype: torch.dtype, run: Callable[[str, torch.dtype], Sequence[Tensor]]) -> None:
    """`run(backend, dtype)`: results with the weights of `dtype`, computed in another."""
    overflows = name == "overflow"
    if overflows and dtype == torch.float64:
        return
    found, expected = run("cpu", dtype), run("reference", dtype)
    for a, b in zip(found, run("reference", torch.float64) if overflows else expected, strict=True):
        finite = a.isfinite()
        assert overflows or torch.equal(finite, b.isfinite()), (a, b)
        tolerance = 1e-4 if dtype == torch.float32 else 1e-9
        size = float(b[finite].abs().max().clamp(min=1)) if finite.any() else 1.0
        torch.testing.assert_close(a[finite], b[finite], rtol=tolerance, atol=tolerance * size, check_dtype=False)


def cast(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, list):
        return [cast(v, dtype) for v in value]
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


def moved(case: Case, dtype: torch.dtype) -> Case:
    return dataclasses.replace(case, **{f.name: cast(getattr(case, f.name), dtype) for f in dataclasses.fields(case)})


def head(kind: str, shape: tuple[int, ...], reduction: str, dtype: torch.dtype) -> Head:
    g = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(shape, generator=g, dtype=torch.float64)
    spec = HeadLoss(kind, reduction, label_smoothing=0.1 if kind == "cross_entropy" and len(shape) > 2 else 0.0)
    if kind == "cross_entropy":
        target = torch.randint(min(4, shape[1]), (shape[0], *shape[2:]), generator=g)
    elif kind == "gaussian_nll":
        target = torch.randn(*shape[:-1], shape[-1] // 2, generator=g, dtype=torch.float64)
    else:
        target = torch.rand(shape, generator=g, dtype=torch.float64).softmax(1)
    return Head(spec, logits, target).to(dtype)


SHAPES = [(4, 6), (4, 200), (4, 4, 6)]  # tiles of rows, long rows, pixels


@every_weight
@both_dtypes
@both_reductions
def test_sample_weights_of_every_kind(name: str, dtype: torch.dtype, reduction: str) -> None:
    for kind in HEAD_KINDS:
        for shape in SHAPES:
            one = dataclasses.replace(head(kind, shape, reduction, dtype), sample_weights=odd(name, dtype))
            check(name, dtype, lambda backend, to, one=one: evaluate([one.to(to)], backend))  # type: ignore[misc]


@every_weight
@both_dtypes
@both_reductions
def test_class_weights_and_pos_weights(name: str, dtype: torch.dtype, reduction: str) -> None:
    for shape in SHAPES:
        by_class, pos = torch.ones(shape[1], dtype=dtype), torch.ones(shape[1:], dtype=dtype)
        by_class[:4] = pos.view(-1)[:4] = odd(name, dtype)
        for one in (
            dataclasses.replace(head("cross_entropy", shape, reduction, dtype), class_weights=by_class),
            dataclasses.replace(head("bce_with_logits", shape, reduction, dtype), pos_weights=pos),
        ):
            check(name, dtype, lambda backend, to, one=one: evaluate([one.to(to)], backend))  # type: ignore[misc]


def test_an_infinite_weight_is_no_zero() -> None:
    """The negative control: 0 for the loss and 0 for its gradient was the answer."""
    for kind in HEAD_KINDS:
        for shape in SHAPES:
            one = dataclasses.replace(
                head(kind, shape, "mean", torch.float64), sample_weights=odd("inf", torch.float64)
            )
            loss, gradient = evaluate([one], "cpu")
            assert loss.isnan().all() and gradient[1].isnan().any() and not gradient[0].any()


@every_weight
@both_dtypes
@pytest.mark.parametrize("large", [False, True])
def test_linear_heads(name: str, dtype: torch.dtype, large: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if large:
        monkeypatch.setattr(linear_op, "LARGE", 0)
    g = torch.Generator().manual_seed(0)
    x, w = (torch.randn(*size, generator=g, dtype=torch.float64).to(dtype) for size in ((4, 3), (6, 3)))
    weights = odd(name, dtype)
    for kind in HEAD_KINDS:
        target = head(kind, (4, 6), "mean", dtype).target

        def run(backend: str, to: torch.dtype, kind: str = kind, target: Tensor = target) -> list[Tensor]:
            leaves = [x.to(to).clone().requires_grad_(), w.to(to).clone().requires_grad_()]
            y = target.to(to) if target.is_floating_point() else target
            options: dict[str, Any] = {"sample_weights": [weights.to(to)], "backend": backend}
            loss = linear_multihead_loss(leaves[0], [leaves[1]], None, [y], kind, **options)
            return [loss.detach(), torch.autograd.grad(loss.sum(), leaves)[0]]

        check(name, dtype, run)


@once
@both_reductions
@pytest.mark.parametrize("which", ["support_mask", "query_mask"])
def test_masks_of_the_inner_loop(name: str, dtype: torch.dtype, reduction: str, which: str) -> None:
    weights = odd(name, dtype)
    # the gradient of l1 at a NaN is NaN in the engine; PyTorch's is 0
    for kind in KINDS if which == "query_mask" else [k for k in KINDS if k != "l1"]:

        def run(backend: str, to: torch.dtype, kind: str = kind) -> list[Tensor]:
            case = make_case(masks=True, loss=LossSpec(kind, reduction), support=4, query=4, keep=1, dtype=dtype)
            getattr(case, which)[0] = weights
            case = moved(case, to).requiring_grad()
            loss, output, support_losses, adapted = case.call(backend)
            gradients = torch.autograd.grad(loss.sum(), case.params)
            return [t.detach() for t in (loss, output, support_losses, *adapted, *gradients)]

        check(name, dtype, run)


@once
def test_step_weights_of_the_inner_loop(name: str, dtype: torch.dtype) -> None:
    weights = odd(name, dtype)

    def run(backend: str, to: torch.dtype) -> list[Tensor]:
        case = make_case(step_weights=True, steps=3, dtype=dtype)
        case.step_weights = weights
        case = moved(case, to).requiring_grad()
        loss = case.call(backend)[0]
        return [loss.detach(), *torch.autograd.grad(loss.sum(), case.params)]

    check(name, dtype, run)


@once
@both_reductions
@pytest.mark.parametrize("which", ["support_mask", "query_mask"])
def test_masks_of_the_head_inner_loop(name: str, dtype: torch.dtype, reduction: str, which: str) -> None:
    weights = odd(name, dtype)
    for kind in ("mse", "bce_with_logits", "cross_entropy"):

        def run(backend: str, to: torch.dtype, kind: str = kind) -> list[Tensor]:
            case = make_head_case(masks=True, loss=LossSpec(kind, reduction), support=4, query=4, dtype=dtype)
            getattr(case.args, which)[0] = weights
            case = case.replace(**{n: cast(t, to) for n, t in case.args._asdict().items()}).requiring_grad()
            outputs = case.call(backend)
            found = [*outputs, *torch.autograd.grad(outputs[0].sum(), case.tensors())]
            # infinite weights of a sum: where infinities meet on the way, only the losses are bound to show it
            return [t.detach() for t in (found if reduction == "mean" else [outputs[0], outputs[2]])]

        check(name, dtype, run)
