"""Where a program starts: inputs and parameters. The builder makes their nodes, where something reads them."""

from __future__ import annotations

from torch import Tensor

from mtml_kernels.program.ops import Given, Op, OpInfo, operation

__all__: list[str] = []


def _input(given: Given) -> Tensor:
    return given.operands[0].reshape(given.shape)


def _param(given: Given) -> Tensor:
    assert given.weight is not None
    return given.weight.reshape(given.shape)


operation(OpInfo(Op.INPUT, "input", _input, operands=0, reads_input=True))
operation(OpInfo(Op.PARAM, "param", _param, operands=0))
