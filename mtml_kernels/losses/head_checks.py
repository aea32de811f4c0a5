"""Checks of what the multi-head losses are given, head by head."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from mtml_kernels.checks import shown
from mtml_kernels.schema.losses import HeadLoss, rows_shape

__all__ = ["check_head", "column", "same_length"]


def same_length(name: str, values: Sequence[Any], heads: int) -> None:
    """Raise ValueError where a list does not have one entry a head."""
    if len(values) != heads:
        raise ValueError(f"{name}: expected one entry for each of {heads} heads, got {len(values)}")


def column(name: str, values: Any, heads: int) -> list[Any]:
    """A list with one entry a head, of a sequence or of None."""
    if values is None:
        return [None] * heads
    if isinstance(values, Tensor) or not isinstance(values, Sequence):
        raise TypeError(
            f"{name}: expected a list with one entry a head (None where there is none), got {shown(values)}"
        )
    same_length(name, values, heads)
    return list(values)


def _expect_shape(name: str, tensor: Tensor, expected: Sequence[int], why: str) -> None:
    if tuple(tensor.shape) != tuple(expected):
        raise ValueError(f"{name}: expected {list(expected)} ({why}), got {list(tensor.shape)}")


def _check_target(name: str, spec: HeadLoss, shape: tuple[int, ...], rows: tuple[int, ...], target: Tensor) -> None:
    if spec.info.ids and not target.is_floating_point():
        if target.is_complex() or str(target.dtype) == "torch.bool":
            raise TypeError(f"{name}: expected integer class ids or probabilities, got {shown(target)}; use .long()")
        _expect_shape(name, target, rows, "one class id a row: the logits' shape without the classes")
        return
    if not target.is_floating_point():
        raise TypeError(f"{name}: expected floating-point targets for {spec.kind!r}, got {shown(target)}; use .float()")
    if spec.info.ids and tuple(target.shape) == rows != shape:
        raise TypeError(f"{name}: expected integer class ids of this shape, got {shown(target)}; use .long()")
    pairs = spec.info.outputs == 2
    expected = (*shape[:-1], shape[-1] // 2) if pairs else shape
    _expect_shape(name, target, expected, "half the logits' outputs" if pairs else "as the logits")


def _check_weights(at: str, spec: HeadLoss, shape: tuple[int, ...], rows: tuple[int, ...], weights: list[Any]) -> None:
    own, classes, pos = weights
    if own is not None and (own.ndim == 0 or tuple(own.shape) != rows[: own.ndim]):
        what = f"[N] or one a row, {list(rows)}" if spec.info.classes else f"[N] = {list(rows)}"
        raise ValueError(f"sample_weights{at}: expected {what}, got {list(own.shape)}")
    if classes is not None:
        if spec.info.weights != "class_weights":
            raise ValueError(f"class_weights{at}: expected None for {spec.kind!r}: only cross_entropy has them")
        _expect_shape(f"class_weights{at}", classes, (shape[spec.class_dim],), "[C], one a class")
    if pos is not None:
        if spec.info.weights != "pos_weights":
            raise ValueError(f"pos_weights{at}: expected None for {spec.kind!r}: only bce_with_logits has them")
        try:
            fits = pos.expand(shape[1:]).shape == shape[1:]
        except RuntimeError:
            fits = False
        if not fits:
            raise ValueError(f"pos_weights{at}: expected what broadcasts to {list(shape[1:])}, got {list(pos.shape)}")


def check_head(at: str, spec: HeadLoss, head: Sequence[Any], like: Tensor, lead: int = 0) -> None:
    """One head's logits, target and weights (sample, class, pos); `lead` leading dimensions are a stack's.

    Raises:
        TypeError: something is no tensor or of the wrong dtype.
        ValueError: shapes or devices disagree, or a weight is given that this kind has not.
    """
    names = [f"{n}{at}" for n in ("logits", "targets", "sample_weights", "class_weights", "pos_weights")]
    for i, (name, t) in enumerate(zip(names, head, strict=True)):
        if t is None and i > 1:
            continue
        if not isinstance(t, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {shown(t)}")
        if t.device != like.device:
            raise ValueError(f"{name}: expected the first head's device {like.device}, got {t.device}; use .to()")
        if lead and t.shape[:1] != head[0].shape[:1]:
            raise ValueError(f"{name}: expected {head[0].shape[0]} equal heads first, got {list(t.shape)}")
    logits, target = head[:2]
    if logits.dtype != like.dtype:
        raise TypeError(f"{names[0]}: expected {like.dtype}, as the first head, got {logits.dtype}; use .to()")
    shape = tuple(logits.shape[lead:])
    least = spec.info.outputs
    if len(shape) < least or (spec.info.classes and spec.class_dim == 1 and len(shape) < 2):
        raise ValueError(f"{names[0]}: expected logits of {spec.kind!r} (see HeadLoss), got shape {list(logits.shape)}")
    if shape and shape[-1] % spec.info.outputs:
        raise ValueError(f"{names[0]}: expected [..., 2 O], means and log variances, got {list(logits.shape)}")
    rows = tuple(rows_shape(spec, logits.new_empty(()).expand(shape)))
    inner: list[Any] = [t if t is None else t.new_empty(()).expand(t.shape[lead:]) for t in head[1:]]
    _check_target(names[1], spec, shape, rows, inner[0])
    if target.is_floating_point() and target.dtype != logits.dtype:
        raise TypeError(f"{names[1]}: expected {logits.dtype}, as the logits, got {target.dtype}; use .to()")
    _check_weights(at, spec, shape, rows, inner[1:])
