"""Warnings that come once for a model: what falls back and why, and statistics that nothing ever updated."""

from __future__ import annotations

import re
import sys
import warnings
from weakref import WeakKeyDictionary

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from mtml_kernels.errors import FallbackWarning

__all__ = ["warn_of_fallback", "warn_of_statistics"]

_SIZES = re.compile(r"\d+(?:(?:, | x |x)\d+)*,?")
_STATISTICS = "statistics"
_said: WeakKeyDictionary[nn.Module, set[str]] = WeakKeyDictionary()


def _caller_level() -> int:
    """The stacklevel of the first frame outside this package and the engine: the line that the user wrote."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").split(".")[0] in ("mtml", "mtml_kernels"):
        frame, level = frame.f_back, level + 1
    return level


def _kind(reason: str) -> str:
    """A reason without its sizes, which differ from call to call; its place, which a layer's number names, stays."""
    place, colon, rest = reason.partition(": ")
    return place + colon + _SIZES.sub("#", rest)


def warn_of_fallback(model: nn.Module, mode: str, reasons: str) -> None:
    """Once for each kind of reason: sizes, and which form is faster, differ from one batch to the next."""
    kinds, said = set(map(_kind, reasons.split("; "))), _said.setdefault(model, set())
    if kinds <= said:
        return
    said |= kinds
    warnings.warn(
        f"general path ({mode}): {reasons}. It is exact but slower than the fused engine; backend='general' "
        "chooses it silently, and explain() shows every layer.",
        FallbackWarning,
        stacklevel=_caller_level(),
    )


def warn_of_statistics(model: nn.Module, mode: str) -> None:
    """Once, where batch normalisation divides by a variance that is 1 because no forward has ever updated it."""
    if mode not in ("module", "running") or _STATISTICS in _said.get(model, ()):
        return
    fresh = [name for name, m in model.named_modules() if isinstance(m, _BatchNorm) and _never_updated(m, mode)]
    if not fresh:
        return
    _said.setdefault(model, set()).add(_STATISTICS)
    more = f" and {len(fresh) - 1} more" if len(fresh) > 1 else ""
    warnings.warn(
        f"batch_norm={mode!r}: layer {fresh[0]!r}{more} normalises by running statistics that were never updated "
        "(mean 0, variance 1). Inner loops update them with batch_norm='track' alone; batch_norm='batch' takes the "
        "statistics of each batch, in eval mode too",
        UserWarning,
        stacklevel=_caller_level(),
    )


def _never_updated(layer: _BatchNorm, mode: str) -> bool:
    mean, var, count = layer.running_mean, layer.running_var, layer.num_batches_tracked
    if mean is None or var is None or mean.is_meta or (layer.training and mode == "module"):
        return False
    # statistics of a checkpoint that has no count, or set by hand, count as updated
    return (count is None or not count) and not mean.any() and bool((var == 1).all())
