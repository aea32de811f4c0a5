"""What csrc/include/mtml/cuda_mlp.h declares, for its entries to be called by address."""

from __future__ import annotations

import ctypes

__all__ = ["LAYERS", "TENSORS", "MlpCall", "MlpLaunch", "MlpLoss", "MlpShape"]

LAYERS = 4  # at most
TENSORS = 2 * LAYERS


class MlpLoss(ctypes.Structure):
    """A set's loss: weight times the sum of the losses of all elements."""

    _fields_ = (("kind", ctypes.c_int32), ("p0", ctypes.c_double), ("weight", ctypes.c_double))


class MlpCall(ctypes.Structure):
    """Sizes, options and addresses of a call."""

    _fields_ = (
        *((name, ctypes.c_int32) for name in ("tasks", "support", "query", "steps")),
        *((name, ctypes.c_int32) for name in ("first_order", "wants_gradient", "wants_rates", "act", "sets")),
        ("c0", ctypes.c_double),
        ("c1", ctypes.c_double),
        ("support_loss", MlpLoss),
        ("query_loss", MlpLoss),
        ("theta", ctypes.c_void_p * TENSORS),
        ("rates", ctypes.c_void_p * TENSORS),
        ("rate_stride", ctypes.c_int32 * TENSORS),
        ("rate_at", ctypes.c_int32 * TENSORS),
        ("n_rates", ctypes.c_int32),
        *((name, ctypes.c_void_p) for name in ("support_x", "support_y", "query_x", "query_y")),
        *((name, ctypes.c_void_p) for name in ("loss", "output", "support_losses", "parts", "history")),
    )


class MlpLaunch(ctypes.Structure):
    """Which kernel runs a call, and how."""

    _fields_ = tuple(
        (name, ctypes.c_int32) for name in ("dtype", "shape", "rows", "blocks", "threads", "back_threads", "overlaps")
    )


class MlpShape(ctypes.Structure):
    """A perceptron that has a kernel of its own."""

    _fields_ = (
        ("layers", ctypes.c_int32),
        ("widths", ctypes.c_int32 * (LAYERS + 1)),
        ("bent", ctypes.c_int32),
        ("rows", ctypes.c_int32 * 2),
        ("tile", ctypes.c_int32),
        ("terms", ctypes.c_int32),
    )
