"""A workload as FlashInfer-Bench's data set spells it: a definition, its workloads, and the tensors they name.

The schema is that of flashinfer-ai/flashinfer-bench, read at 40e6ca7 (2026-04-30): sizes of shapes are named axes,
fixed ("const") or given by each workload ("var"); an input is random, a scalar, or a tensor in a .safetensors file
below the root; the reference is Python text with a function ``run``.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

DTYPES = {torch.float32: "float32", torch.int64: "int64"}
Json = dict[str, Any]


@dataclass
class Definition:
    """What is computed. ``axes``: their sizes, or None where it is each workload's, and what they mean."""

    name: str
    op_type: str
    description: str
    reference: str
    axes: dict[str, tuple[int | None, str]] = field(default_factory=dict)
    inputs: dict[str, Json] = field(default_factory=dict)
    outputs: dict[str, Json] = field(default_factory=dict)

    def size(self, value: int) -> str:
        """The axis of a size that the network fixes."""
        name = f"size_{value}"
        self.axes.setdefault(name, (value, f"a size of the network: {value}"))
        return name

    def variable(self, name: str, description: str) -> str:
        """An axis whose size each workload gives."""
        self.axes.setdefault(name, (None, description))
        return name

    def to_json(self) -> Json:
        """As it is written to definitions/OP_TYPE/NAME.json."""
        axes: Json = {}
        for name, (value, description) in self.axes.items():
            kind: Json = {"type": "var"} if value is None else {"type": "const", "value": value}
            axes[name] = {**kind, "description": description}
        return {
            "name": self.name,
            "op_type": self.op_type,
            "description": self.description,
            "tags": ["source:mtml-kernels"],
            "axes": axes,
            "inputs": self.inputs,
            "outputs": self.outputs,
            "reference": self.reference,
        }


def tensor(shape: list[str], dtype: torch.dtype, description: str) -> Json:
    """The specification of a tensor whose axes have these names."""
    return {"shape": shape, "dtype": DTYPES[dtype], "description": description}


def scalar(description: str) -> Json:
    """The specification of a number."""
    return {"shape": None, "dtype": "float32", "description": description}


@dataclass(frozen=True)
class Sized:
    """One workload of a definition: sizes of its variable axes, and its inputs. ``held``: those that are dumped."""

    axes: Mapping[str, int]
    scalars: Mapping[str, float]
    held: Mapping[str, Tensor]

    def blob(self, d: Definition) -> str:
        """Where the tensors are, below the root."""
        sizes = "_".join(f"{name}{size}" for name, size in self.axes.items())
        return f"blob/workloads/{d.op_type}/{d.name}/{sizes}.safetensors"

    def to_json(self, d: Definition) -> Json:
        """A line of workloads/OP_TYPE/NAME.jsonl; equal workloads have equal identifiers."""
        where = self.blob(d)
        identity = uuid.uuid5(uuid.NAMESPACE_URL, f"mtml-kernels/{d.name}/{sorted(self.axes.items())}")
        return {
            "definition": d.name,
            "workload": {
                "uuid": str(identity),
                "axes": dict(self.axes),
                "inputs": {name: self._input(name, where) for name in d.inputs},
            },
            "solution": None,
            "evaluation": None,
        }

    def _input(self, name: str, where: str) -> Json:
        if name in self.scalars:
            return {"type": "scalar", "value": self.scalars[name]}
        if name in self.held:
            return {"type": "safetensors", "path": where, "tensor_key": name}
        return {"type": "random"}


Exported = tuple[Definition, list[Sized]]
Exports = Iterator[Exported]
