"""The layer program: a module as a list of operations over matrices, which a fused kernel executes.

`trace` writes one; `encoding` says what it looks like, `layers` what it may contain, `execution` what it computes.
"""

from mtml_kernels.program.activations import Act
from mtml_kernels.program.encoding import (
    HEADER_INTS,
    LAYOUT_CONV,
    LAYOUT_IN_OUT,
    LAYOUT_LINEAR,
    LAYOUT_ROWS,
    LAYOUT_STEPS,
    NODE_INTS,
    PARAM_INTS,
    VERSION,
    Encoded,
    InputInfo,
    Node,
    ParamInfo,
    Program,
    Shape,
    constants_of,
    decode,
    op_name,
)
from mtml_kernels.program.execution import run_program
from mtml_kernels.program.guards import SIDE_EFFECTS
from mtml_kernels.program.layers.norm import Norm
from mtml_kernels.program.layers.pool import Pool
from mtml_kernels.program.obstacles import Unfusable
from mtml_kernels.program.ops import OPS, Op, OpInfo
from mtml_kernels.program.split import Parts, once_is_dearer, split_head
from mtml_kernels.program.tracer import trace

__all__ = [
    "HEADER_INTS",
    "LAYOUT_CONV",
    "LAYOUT_IN_OUT",
    "LAYOUT_LINEAR",
    "LAYOUT_ROWS",
    "LAYOUT_STEPS",
    "NODE_INTS",
    "OPS",
    "PARAM_INTS",
    "SIDE_EFFECTS",
    "VERSION",
    "Act",
    "Encoded",
    "InputInfo",
    "Node",
    "Norm",
    "Op",
    "OpInfo",
    "ParamInfo",
    "Parts",
    "Pool",
    "Program",
    "Shape",
    "Unfusable",
    "constants_of",
    "decode",
    "once_is_dearer",
    "op_name",
    "run_program",
    "split_head",
    "trace",
]
