"""Pointwise functions, all of them in the table `activations.Act`; and dropout, which is none outside training."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtml_kernels.program.activations import Act
from mtml_kernels.program.builder import Builder
from mtml_kernels.program.obstacles import Cannot
from mtml_kernels.program.ops import Given, Op, OpInfo, operation
from mtml_kernels.program.values import tensor
from mtml_kernels.program.vocabulary import Handler, Weights, function, in_place, layer, layer_of, written

__all__: list[str] = []


def _compute(given: Given) -> Tensor:
    c0, c1 = given.constants or (1.0, 0.0)
    return Act(given.kind).info.formula(given.operands[0], c0, c1)


operation(OpInfo(Op.ACT, "act", _compute, constants=2, label=lambda kind, constants: Act(kind).name.lower()))


def _handler(kinds: Sequence[Act]) -> Handler:
    """Of a function that means one of these, as its options say."""
    options = inspect.signature(kinds[0].info.options).parameters
    free = inspect.Parameter.POSITIONAL_OR_KEYWORD
    names = [inspect.Parameter(name, free) for name in ("b", "input")] + list(options.values())
    if kinds[0].info.inplace:
        names.append(inspect.Parameter("inplace", free, default=False))
    signature = inspect.Signature(names)

    def call(*args: Any, **named: Any) -> Any:
        bound = signature.bind(*args, **named)
        bound.apply_defaults()
        given = bound.arguments
        for kind in kinds:
            constants = kind.info.options(**{name: given[name] for name in options})
            if constants is not None:
                return written(given["b"].act(kind, tensor(given["input"]), constants), given.get("inplace", False))
        raise Cannot(f"{kinds[0].name.lower()} with these options is not fused")

    call.__signature__ = signature  # type: ignore[attr-defined]  # the tracer checks arguments against it
    return call


def _register() -> None:
    spelled: dict[Any, list[Act]] = {}
    for kind in Act:
        for spelling in (*kind.info.functions, *kind.info.modules, *kind.info.methods, *kind.info.overwriting):
            spelled.setdefault(spelling, []).append(kind)
    for spelling, kinds in spelled.items():
        handler, info = _handler(kinds), kinds[0].info
        if spelling in info.modules:
            layer_of(handler, " ".join(info.modules[spelling]), spelling)
        elif isinstance(spelling, str):
            function(overwriting=spelling)(handler)
        else:
            function(spelling)(in_place(handler) if spelling in info.overwriting else handler)


_register()


@function(F.prelu, methods="prelu")
def _prelu(b: Builder, input: Any, weight: Any) -> Any:
    """relu(x) + w (x - relu(x)): exact, at 0 with PyTorch's slope w."""
    x, w = tensor(input), tensor(weight)
    above = b.act(Act.RELU, x, ())
    below = b.elementwise(Op.ADD, x, b.affine(above, -1.0, 0.0))
    slope = w if w.elements == 1 else b.per_channel(w, x)
    return b.elementwise(Op.ADD, above, b.elementwise(Op.MUL, slope, below))


@layer(nn.PReLU)
def _prelu_layer(b: Builder, m: Any, weights: Weights, input: Any) -> Any:
    return _prelu(b, input, weights(m.weight))


@function(F.selu)
def _selu(b: Builder, input: Any, inplace: bool = False) -> Any:
    """ELU with PyTorch's constants."""
    alpha, scale = 1.6732632423543772848170429916717, 1.0507009873554804934193349852946
    return written(b.affine(b.act(Act.ELU, tensor(input), (alpha, 0.0)), scale, 0.0), inplace)


@function(F.logsigmoid)
def _log_sigmoid(b: Builder, input: Any) -> Any:
    """-softplus(-x), which is x itself to rounding where it counts as linear."""
    return b.affine(b.act(Act.SOFTPLUS, b.affine(tensor(input), -1.0, 0.0), (1.0, 40.0)), -1.0, 0.0)


layer_of(_selu, "inplace", nn.SELU)
layer_of(_log_sigmoid, "", nn.LogSigmoid)


@function(
    F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout
)  # fmt: skip
def _dropout(b: Builder, input: Any, p: float = 0.5, training: bool = True, inplace: bool = False) -> Any:
    if training and p > 0:
        raise Cannot(f"dropout with p={p} is active in training mode; call eval() or set p=0")
    return tensor(input)


@function(torch.dropout)
def _torch_dropout(b: Builder, input: Any, p: float, train: bool) -> Any:
    return _dropout(b, input, p, train)


layer_of(
    _dropout, "p training",
    nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout,
)  # fmt: skip
