"""Runs a layer program in plain PyTorch, node by node: what its encoding means."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from mtml_kernels.batch_norm import step_row
from mtml_kernels.program.encoding import LAYOUT_IN_OUT, LAYOUT_STEPS, Node, constants_of, decode
from mtml_kernels.program.ops import OPS, Given

__all__ = ["run_program"]


def run_program(
    program: Sequence[int],
    consts: Sequence[float],
    params: Sequence[Tensor],
    inputs: Sequence[Tensor],
    step: int | None = None,
    query: bool = False,
) -> Tensor:
    """Execute an encoded layer program.

    Args:
        program, consts: the encoding (`Program.ints`, `Program.consts`).
        params: one tensor per program parameter, of any shape with the parameter's elements.
        inputs: one tensor [N, *] per program input: all samples of one set, over which batch statistics are taken; of
            an embedding integer ids, which PyTorch checks.
        step, query: k at theta_k, and whether the set is a query set; None outside the inner loop. They choose the row
            of parameters that exist once per step (`mtml_kernels.batch_norm.step_row`).

    Returns:
        [N, elements of one sample's output].

    Raises:
        ValueError: another version of the encoding, a list that contradicts its header, or an unknown operation.

    Example:
        >>> from mtml_kernels.program import run_program, trace
        >>> net = torch.nn.Linear(3, 2)
        >>> p, x = trace(net, [(3,)]), torch.randn(5, 3)
        >>> bool(torch.allclose(run_program(p.ints, p.consts, list(net.parameters()), [x]), net(x)))
        True
    """
    encoded = decode(tuple(program))
    n = inputs[0].shape[0]
    matrices = [_matrix(*each, step, query) for each in zip(params, encoded.params, strict=True)]
    values: list[Tensor] = []
    for node in encoded.nodes:
        values.append(_value(node, consts, matrices, inputs, values))
    return values[encoded.output].reshape(n, encoded.output_size)


def _matrix(param: Tensor, form: tuple[int, int, int], step: int | None, query: bool) -> Tensor:
    """The parameter as [rows, cols]; of one with a row for every step that row, [1, cols]."""
    layout, rows, cols = form
    if layout == LAYOUT_IN_OUT:
        return param.reshape(cols, rows).T
    matrix = param.reshape(rows, cols)
    return matrix[step_row(rows, step, query)].reshape(1, cols) if layout == LAYOUT_STEPS else matrix


def _value(
    node: Node, consts: Sequence[float], matrices: Sequence[Tensor], inputs: Sequence[Tensor], values: Sequence[Tensor]
) -> Tensor:
    """The value of one node: [N, rows, features] when batched, [rows, features] otherwise, so that broadcasting is
    PyTorch's own.
    """
    if node.op not in OPS:
        raise ValueError(f"program: expected an operation from 0 to {max(OPS)}, got {node.op}; trace the module again")
    info = OPS[node.op]
    given = Given(
        operands=(inputs[node.a],) if info.reads_input else [values[i] for i in node.operands()],
        kind=node.b,
        weight=matrices[node.weight] if node.weight >= 0 else None,
        bias=matrices[node.bias] if node.bias >= 0 else None,
        constants=constants_of(node, consts),
        shape=(inputs[0].shape[0], node.rows, node.features) if node.batched else (node.rows, node.features),
    )
    return info.compute(given)
