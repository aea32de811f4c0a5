"""The two forms of `head_inner_loop`: what each costs, the rates both take, and the one that keeps weights."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from mtml_kernels.checks import check_finite, shown
from mtml_kernels.program import Program, trace
from mtml_kernels.rates import number_as_rates
from mtml_kernels.schema.head_inner_loop import HeadArgs, HeadOptions

__all__ = ["gram_is_cheaper", "head_rates", "weight_form"]


def gram_is_cheaper(support: int, query: int, features: int, classes: int, steps: int) -> bool:
    """The cost model: multiply-adds of one task's loss and gradients, features included, in both forms.

    With S, Q samples, D features, C classes, K steps. Gram: the Gram matrix and its gradient's product (2 S S D), six
    products of S x C x D (F_s W^T, A F_s and their transposes), three of Q x C x D; three of S x S x C a step. Weight:
    forward, dW and their four tangents, S x C x D each, a step, and three products of Q x C x D. A product of few
    columns runs at a fraction of the speed of one whose columns fill vectors, and weights are read again in every step:
    `WEIGHT_COST`.
    """
    gram = (2 * support * support + 6 * support * classes + 3 * query * classes) * features
    gram += 3 * steps * support * support * classes
    weight = (6 * steps * support + 3 * query) * classes * features
    return gram <= weight * (WEIGHT_COST_NARROW if classes <= 32 else WEIGHT_COST)


# A multiply-add in weight space against one in the Gram form. With these the faster form is chosen for all 18 shapes of
# S 5-400, Q 50-300, D 16-1600, C 5-100, K 1-10 (one by one they would be 1.0-5.8 and 0.8-1.0).
WEIGHT_COST_NARROW, WEIGHT_COST = 2.3, 0.9


def _rate_table(name: str, rate: Any, steps: int, weight: Tensor) -> Tensor:
    """A rate in any of its forms as [K, C]."""
    classes = weight.shape[0]
    if not isinstance(rate, Tensor):
        return number_as_rates(name, rate, (steps, classes), weight.dtype, weight.device)
    check_finite(name, rate)
    rate = rate.to(weight.device, weight.dtype)
    if rate.ndim > 2 or (rate.ndim == 2 and rate.shape[1] not in (1, classes)):
        raise ValueError(
            f"{name}: expected a scalar, [K] or [1 or K, C] = [.., {classes}], got {shown(rate)}; rates per element "
            "need a weight for every task: mtml.MAML(head, {'weight': [C, D], 'bias': [C]}) or mtml.MetaSGD(head)"
        )
    rate = rate.reshape(-1, 1) if rate.ndim < 2 else rate
    single = rate.shape[0] == 1
    if not single and rate.shape[0] < steps:
        raise ValueError(f"{name}: expected at least steps={steps} rates, got {rate.shape[0]}; pass a scalar for all")
    return (rate if single else rate[:steps]).expand(steps, classes)


def head_rates(lr: Any, steps: int, weight: Tensor, has_bias: bool) -> Tensor:
    """The op's rates [1 or 2, K, C], differentiable to `lr`: one group where weight and bias share them."""
    if not isinstance(lr, tuple | list):
        return _rate_table("lr", lr, steps, weight)[None]
    if len(lr) != 2:
        raise ValueError(f"lr: expected one rate, or a pair for the weight and the bias, got {len(lr)}")
    tables = [_rate_table(f"lr[{i}]", rate, steps, weight) for i, rate in enumerate(lr)]
    return torch.stack(tables if has_bias else tables[:1])


@functools.lru_cache(maxsize=64)
def _linear_program(features: int, classes: int, bias: bool) -> Program:
    return trace(nn.Linear(features, classes, bias=bias, device="meta"), [(features,)])


def weight_form(
    a: HeadArgs, options: HeadOptions, adapted: bool, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """The engine's inner loop over a program of one linear layer; results as `HeadResult`.

    Raises ValueError for what that loop does not have: weight decay and the proximal term.
    """
    from mtml_kernels.functional.inner_loop import inner_loop  # which imports this package's head in turn

    if options.decay or options.proximal:
        raise ValueError("form: 'weight' has no weight_decay and no proximal term; pass form='gram' or 'auto'")
    classes, features = a.weight.shape
    steps = a.rates.shape[1]
    params = {"weight": a.weight} if a.bias is None else {"weight": a.weight, "bias": a.bias}
    table: dict[str, Tensor] = {}
    for name, rate in zip(params, (a.rates[0], a.rates[-1]), strict=False):
        table[name] = rate[:, :, None].expand(steps, classes, features) if name == "weight" else rate
    has_query = a.query.shape[1] > 0
    result = inner_loop(
        _linear_program(features, classes, a.bias is not None),
        params,
        a.support,
        a.labels,
        table if steps else 0.0,
        steps=steps,
        loss=options.support_loss,
        mask=a.support_mask,
        query_x=a.query if has_query else None,
        query_y=a.query_labels if has_query else None,
        query_mask=a.query_mask if has_query and a.query_labels is not None else None,
        query_loss=options.query_loss,
        keep="last" if adapted else "none",
        backend=backend,
    )
    own = result.params
    return result.loss, result.output, result.support_losses, own.get("weight"), own.get("bias")
