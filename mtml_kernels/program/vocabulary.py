"""The tables of what the layer program knows: which functions, methods, attributes and layers mean which handler.

A handler takes the builder and the call's arguments under PyTorch's names; it returns a Value, a plain Python object
(a size), or raises Cannot with the reason. A layer's handler takes the builder, the module, a function that gives the
value of one of its parameters, and the module's arguments. The files in `layers` fill the tables by these decorators.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
from torch import nn

from mtml_kernels.program.builder import Builder
from mtml_kernels.program.values import Value, tensor

__all__ = [
    "ATTRIBUTES",
    "FUNCTIONS",
    "LAYERS",
    "METHODS",
    "REASONS",
    "Handler",
    "InPlace",
    "Weights",
    "attribute",
    "function",
    "in_place",
    "layer",
    "layer_of",
    "written",
]

Handler = Callable[..., Any]
Weights = Callable[[Any], Value]
H = TypeVar("H", bound=Handler)

FUNCTIONS: dict[Any, Handler] = {}
METHODS: dict[str, Handler] = {}
ATTRIBUTES: dict[str, Handler] = {}
LAYERS: dict[type[nn.Module], Handler] = {}  # by exact type


class InPlace(NamedTuple):
    """A result that overwrites the operation's first tensor."""

    value: Value


def written(value: Value, inplace: bool) -> Value | InPlace:
    """The result of a function with `inplace`."""
    return InPlace(value) if inplace else value


def in_place(handler: Handler) -> Handler:
    """The handler of the variant that overwrites its first tensor."""

    @functools.wraps(handler)  # the tracer checks arguments against the signature
    def overwrite(*args: Any, **kwargs: Any) -> InPlace:
        return InPlace(tensor(handler(*args, **kwargs)))

    return overwrite


def function(
    *functions: Any, methods: str = "", only_methods: str = "", overwriting: str = "", assigning: Any = None
) -> Callable[[H], H]:
    """Registers a handler of functions and of tensor methods.

    Args:
        methods: names, each of a method and, where torch has it, of a function of torch.
        only_methods: names of methods for which torch's function of that name, if any, means something else.
        overwriting: more `methods`, which have a variant with a trailing _ that overwrites the tensor.
        assigning: an operator that overwrites its first operand.
    """

    def register(handler: H) -> H:
        FUNCTIONS.update(dict.fromkeys(functions, handler))
        METHODS.update(dict.fromkeys(only_methods.split(), handler))
        for name in (*methods.split(), *overwriting.split()):
            _both(name, handler)
        for name in overwriting.split():
            _both(f"{name}_", in_place(handler))
        if assigning is not None:
            FUNCTIONS[assigning] = in_place(handler)
        return handler

    return register


def _both(name: str, handler: Handler) -> None:
    METHODS[name] = handler
    if hasattr(torch, name):
        FUNCTIONS[getattr(torch, name)] = handler


def attribute(*names: str) -> Callable[[H], H]:
    """Registers a handler of tensor attributes."""

    def register(handler: H) -> H:
        ATTRIBUTES.update(dict.fromkeys(names, handler))
        return handler

    return register


def layer(*types: type[nn.Module]) -> Callable[[H], H]:
    """Registers a handler (builder, module, weights, input) of layers."""

    def register(handler: H) -> H:
        LAYERS.update(dict.fromkeys(types, handler))
        return handler

    return register


def layer_of(handler: Handler, attributes: str, *types: type[nn.Module]) -> None:
    """Registers layers that are a function of their input and of some of their attributes."""
    names = attributes.split()

    @layer(*types)
    def call(b: Builder, m: Any, weights: Weights, input: Any) -> Any:
        return handler(b, input, *(getattr(m, name) for name in names))


_MIXES = "it reduces over dimensions, possibly over the samples of the batch"
REASONS = {
    **dict.fromkeys(("sum", "var", "std", "prod", "max", "min", "norm", "logsumexp", "amax", "amin"), _MIXES),
    "detach": "it hides a part of the gradient",
    "data": "reading .data hides a part of the gradient",
    "item": "a value of a tensor steers the Python code",
    "bernoulli": "it is random",
    "rand_like": "it is random",
    "randn_like": "it is random",
}
