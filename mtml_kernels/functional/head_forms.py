"""The two forms of `head_inner_loop`: what each costs, the rates both take, and the one that keeps weights."""

from __future__ import annotations

import types
from typing import Any

import torch
from torch import Tensor, nn

from mtml_kernels.checks import check_finite, shown
from mtml_kernels.ops.inner_loop import inner_loop_call
from mtml_kernels.program import trace
from mtml_kernels.rates import number_as_rates
from mtml_kernels.schema.head_inner_loop import HeadArgs, HeadOptions, parse_options
from mtml_kernels.schema.inner_loop import KEEP_LAST, KEEP_NONE, InnerLoopSpec

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


_specs = types.SimpleNamespace()  # by names, which are constants to torch.compile
_names: dict[tuple[Any, ...], str] = {}


def _spec_name(options: str, features: int, classes: int, bias: bool, steps: int, keep: int) -> str:
    """The name in `_specs` of the engine's loop over one linear layer."""
    key = (options, features, classes, bias, steps, keep)
    if key not in _names:
        program = trace(nn.Linear(features, classes, bias=bias, device="meta"), [(features,)])
        parsed = parse_options(options)
        losses = (parsed.support_loss, parsed.query_loss)
        name = f"spec_{len(_names)}"
        setattr(_specs, name, InnerLoopSpec.of(program, [True, True][: 1 + bias], losses, steps=steps, keep=keep))
        _names[key] = name
    return _names[key]


_spec_name._dynamo_marked_constant = True  # type: ignore[attr-defined]  # as in `resolved_name_in`


def weight_form(
    a: HeadArgs, options: HeadOptions, adapted: bool, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """The engine's inner loop over a program of one linear layer, of checked arguments; results as `HeadResult`.

    Raises ValueError for what that loop does not have: weight decay and the proximal term.
    """
    if options.decay or options.proximal:
        raise ValueError("form: 'weight' has no weight_decay and no proximal term; pass form='gram' or 'auto'")
    (classes, features), steps = a.weight.shape, a.rates.shape[1]
    name = _spec_name(a.options, features, classes, a.bias is not None, steps, KEEP_LAST if adapted else KEEP_NONE)
    params = [a.weight] if a.bias is None else [a.weight, a.bias]
    rates = [a.rates[0][:, :, None].expand(steps, classes, features), a.rates[-1]][: len(params)]
    query = [a.query] if a.query.shape[1] else []
    result = inner_loop_call(
        getattr(_specs, name),
        params,
        [a.support],
        a.labels,
        query,
        a.query_labels if query else None,
        a.support_mask,
        a.query_mask if query and a.has_loss else None,
        rates if steps else [a.weight.new_zeros(1)],
        None,
        backend,
    )
    loss, output, support_losses, own = result
    weight, bias = [*own, None, None][:2]
    return loss, output, support_losses, weight, bias
