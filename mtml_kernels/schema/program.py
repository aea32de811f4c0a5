"""The layout of encoded programs: what can be read of their integers without decoding them (see `program`)."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["HEADER_INTS", "NODE_INTS", "PARAM_INTS", "output_size"]

HEADER_INTS = 5  # version, inputs, params, nodes, output value
PARAM_INTS = 3  # layout, rows, cols
NODE_INTS = 9  # op, a, b, weight, bias, rows, features, batched, const

_ROWS, _FEATURES = 5, 6  # positions within a node


def output_size(program: Sequence[int]) -> int:
    """Elements per sample of the program's output: rows * features of its output node."""
    _, n_inputs, n_params, _, output = program[:HEADER_INTS]
    node = HEADER_INTS + n_inputs + PARAM_INTS * n_params + NODE_INTS * output
    return program[node + _ROWS] * program[node + _FEATURES]
