"""Names of types, as the original has them; trees are not checked further."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution
from torch.futures import Future

from mtml.compat.torchopt.base import (
    ChainedGradientTransformation,
    EmptyState,
    GradientTransformation,
    UninitializedState,
)

__all__ = [
    "ChainedGradientTransformation",
    "Device",
    "Distribution",
    "EmptyState",
    "Future",
    "GradientTransformation",
    "ListOfOptionalTensors",
    "ListOfTensors",
    "ModuleTensorContainers",
    "Numeric",
    "OptState",
    "OptionalTensor",
    "OptionalTensorOrOptionalTensors",
    "OptionalTensorTree",
    "Params",
    "PyTree",
    "Scalar",
    "ScalarOrSchedule",
    "Schedule",
    "SequenceOfOptionalTensors",
    "SequenceOfTensors",
    "Size",
    "Tensor",
    "TensorContainer",
    "TensorOrTensors",
    "TensorTree",
    "TupleOfOptionalTensors",
    "TupleOfTensors",
    "UninitializedState",
    "Updates",
]

PyTree = Any
TensorTree = OptionalTensorTree = Params = Updates = OptState = Any
Device = torch.device | str | int
Size = torch.Size
Scalar = float | int | bool
Numeric = Tensor | float | int | bool
Schedule = Callable[[Any], Any]
ScalarOrSchedule = float | Tensor | Schedule
OptionalTensor = Tensor | None
ListOfTensors = list[Tensor]
TupleOfTensors = tuple[Tensor, ...]
SequenceOfTensors = Sequence[Tensor]
TensorOrTensors = Tensor | Sequence[Tensor]
ListOfOptionalTensors = list[Tensor | None]
TupleOfOptionalTensors = tuple[Tensor | None, ...]
SequenceOfOptionalTensors = Sequence[Tensor | None]
OptionalTensorOrOptionalTensors = Tensor | None | Sequence[Tensor | None]
TensorContainer = dict[str, Tensor | None]
ModuleTensorContainers = tuple[TensorContainer, ...]
