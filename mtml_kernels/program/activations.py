"""The pointwise functions of the layer program: one entry each, which tracing, reference and tests range over."""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["Act", "Activation", "Constants"]

Constants = tuple[float, ...]


class Activation(NamedTuple):
    """What is known of one pointwise function.

    formula: its value from x and the node's constants c0 and c1 (1 and 0 where a node has none).
    methods: names of tensor methods that mean it, of the functions of torch with these names, and with a trailing _ of
        what overwrites its argument.
    functions, modules: other spellings, a module with its attributes that are options.
    options: the constants (none or two) that the options of these spellings mean; None where they mean another entry.
    inplace: these spellings take `inplace` after the options.
    overwriting: functions that overwrite their argument.
    frequency: c0 is a factor of x, into which a factor right before it goes (SIREN's w0).
    """

    formula: Callable[[Tensor, float, float], Tensor]
    methods: tuple[str, ...] = ()
    functions: tuple[Any, ...] = ()
    modules: Mapping[type[nn.Module], tuple[str, ...]] = MappingProxyType({})
    options: Callable[..., Constants | None] = lambda: ()
    inplace: bool = False
    overwriting: tuple[Any, ...] = ()
    frequency: bool = False


def _slope(negative_slope: float = 0.01) -> Constants:
    return float(negative_slope), 0.0


def _by_erf(approximate: str = "none") -> Constants | None:
    return None if approximate == "tanh" else ()


def _by_tanh(approximate: str = "none") -> Constants | None:
    return () if approximate == "tanh" else None


def _softplus(beta: float = 1.0, threshold: float = 20.0) -> Constants:
    return float(beta), float(threshold)


def _alpha(alpha: float = 1.0) -> Constants:
    return float(alpha), 0.0


def _unit() -> Constants:
    return 1.0, 0.0


class Act(enum.IntEnum):
    """Pointwise functions by their codes, which are those of `enum Act` in csrc/include/mtml/program.h."""

    info: Activation

    def __new__(cls, code: int, info: Any = None) -> Act:  # Act(code) has none
        member = int.__new__(cls, code)
        member._value_ = code
        member.info = info
        return member

    RELU = (
        0,
        Activation(
            lambda x, c0, c1: torch.relu(x),
            methods=("relu",),
            functions=(F.relu,),
            modules={nn.ReLU: ("inplace",)},
            inplace=True,
        ),
    )
    LEAKY_RELU = (  # c0 = slope
        1,
        Activation(
            lambda x, c0, c1: F.leaky_relu(x, c0),
            functions=(F.leaky_relu,),
            modules={nn.LeakyReLU: ("negative_slope", "inplace")},
            options=_slope,
            inplace=True,
            overwriting=(F.leaky_relu_,),
        ),
    )
    TANH = 2, Activation(lambda x, c0, c1: torch.tanh(x), methods=("tanh",), modules={nn.Tanh: ()})
    SIGMOID = (
        3,
        Activation(
            lambda x, c0, c1: torch.sigmoid(x),
            methods=("sigmoid",),
            functions=(torch.special.expit,),
            modules={nn.Sigmoid: ()},
        ),
    )
    GELU = (
        4,
        Activation(
            lambda x, c0, c1: F.gelu(x), functions=(F.gelu,), modules={nn.GELU: ("approximate",)}, options=_by_erf
        ),
    )
    GELU_TANH = (
        5,
        Activation(
            lambda x, c0, c1: F.gelu(x, approximate="tanh"),
            functions=(F.gelu,),
            modules={nn.GELU: ("approximate",)},
            options=_by_tanh,
        ),
    )
    SILU = (
        6,
        Activation(lambda x, c0, c1: F.silu(x), functions=(F.silu,), modules={nn.SiLU: ("inplace",)}, inplace=True),
    )
    SOFTPLUS = (  # c0 = beta, c1 = threshold
        7,
        Activation(
            lambda x, c0, c1: F.softplus(x, c0, c1),
            functions=(F.softplus,),
            modules={nn.Softplus: ("beta", "threshold")},
            options=_softplus,
        ),
    )
    SIN = (  # sin(c0 * x)
        8,
        Activation(lambda x, c0, c1: torch.sin(c0 * x), methods=("sin",), options=_unit, frequency=True),
    )
    COS = (  # cos(c0 * x)
        9,
        Activation(lambda x, c0, c1: torch.cos(c0 * x), methods=("cos",), options=_unit, frequency=True),
    )
    RSQRT = (  # 1 / sqrt(x + c0), of running variances
        10,
        Activation(lambda x, c0, c1: torch.rsqrt(x + c0), options=_unit),
    )
    ELU = (  # c0 = alpha
        11,
        Activation(
            lambda x, c0, c1: F.elu(x, c0),
            functions=(F.elu,),
            modules={nn.ELU: ("alpha", "inplace")},
            options=_alpha,
            inplace=True,
            overwriting=(F.elu_,),
        ),
    )
