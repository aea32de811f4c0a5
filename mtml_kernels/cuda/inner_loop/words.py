"""The words of a thread block's program, as csrc/cuda/inner_loop/program.h has them."""

from __future__ import annotations

import enum

__all__ = [
    "FIRST_TENSOR",
    "HEAD_WORDS",
    "MOST_TENSORS",
    "OPERAND_WORDS",
    "PHASE_WORDS",
    "PLAIN",
    "RING_BYTES",
    "SERIAL_SUM",
    "ScheduleOp",
]


class ScheduleOp(enum.IntEnum):
    """`enum ScheduleOp`."""

    MATMUL = 0
    ACT_FORWARD = 1
    ACT_BACKWARD = 2
    ACT_TWICE = 3
    ADDITION = 4
    MULTIPLICATION = 5
    TWO_PRODUCTS = 6
    COPY = 7
    GRADIENT_STEP = 8
    NORM_APPLY = 9
    NORM_BACK = 10
    NORM_TANGENT = 11
    NORM_TWICE = 12
    LOOK_UP = 13
    RULE_STEP = 14
    RULE_BACK = 15
    SUM_OF_PRODUCTS = 16
    MOMENTS = 17
    ADD_UP_BY_ID = 18
    CLIP_SCALE = 19
    CLIP_BACK = 20
    SOFTMAX_FORWARD = 21
    SOFTMAX_BACKWARD = 22
    SOFTMAX_TANGENT = 23
    SOFTMAX_TWICE = 24
    LOSS_FORWARD = 25
    LOSS_TANGENT = 26
    LOSS_DATA = 27
    SAMPLE_WEIGHTS = 28
    SAMPLE_WEIGHTS_BACK = 29


# What the kernel of most programs knows; others take the full one.
PLAIN = frozenset(
    {
        *range(ScheduleOp.MATMUL, ScheduleOp.NORM_APPLY),
        ScheduleOp.SUM_OF_PRODUCTS,
        ScheduleOp.LOSS_FORWARD,
        ScheduleOp.LOSS_TANGENT,
        ScheduleOp.SAMPLE_WEIGHTS,
    }
)

HEAD_WORDS = 15
OPERAND_WORDS = 7
PHASE_WORDS = 1024
SERIAL_SUM = 32  # products that one thread adds up; more are a warp's
RING_BYTES = 2 * 4 * PHASE_WORDS  # of shared memory: two phases of the program
FIRST_TENSOR = 2
MOST_TENSORS = 192
