"""Calls of a fused model like one before: by the backend's fast lane, with nothing asked that their form tells.

The form of a call (shapes, dtypes, devices, what requires grad, of the data and of what the model brings) is read in
one native call, and with the steps, their order and the state of the model it says which path runs. Every other call
goes the long way, by `PathCache.find`; so does what the engine cannot read as it stands.
"""

from __future__ import annotations

from operator import is_
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mtml.paths.batch import Batch
from mtml.paths.fused import Fused
from mtml.paths.path import in_our_words
from mtml_kernels.ops.inner_loop import BACKENDS, lane_of
from mtml_kernels.ops.inner_loop_lane import Lane, is_open, run
from mtml_kernels.registry import Backend
from mtml_kernels.schema.inner_loop import InnerLoopArgs

if TYPE_CHECKING:
    from mtml.paths.finder import PathFinder

__all__ = ["Shortcut", "remember"]

FORMS = 64  # of a model's state, steps and order
_UNKNOWN: tuple[Any, None] = None, None


class Shortcut:
    """The calls of one state of a model, so many steps and one order, that read the same tensors of it."""

    __slots__ = ("backend", "finder", "lanes", "name", "params", "rates", "read")

    def __init__(self, finder: PathFinder, path: Fused, backend: Backend) -> None:
        self.finder, self.name, self.backend, self.read = finder, path.backend, backend, backend.fast_lane.read
        self.params, self.rates = path.params, path.rates
        self.lanes: dict[bytes, tuple[Fused, Lane]] = {}

    def serves(self, path: Fused, backend: Backend) -> bool:
        """Whether calls of a path read what these do."""
        same = len(path.params) == len(self.params) and all(map(is_, path.params, self.params))
        return same and path.rates.factor == self.rates.factor and backend is self.backend

    def learn(self, path: Fused, batch: Batch) -> None:
        """Calls like this one run by its path."""
        lr, sx, qx, sy, qy = self.rates(), [batch.sx], [batch.qx], batch.sy, batch.qy
        plain = self.read(self.params, lr, sx, qx, (), (), sy, qy, None, None, None)
        if plain is None:
            return
        a = InnerLoopArgs(self.params, lr, sx, qx, [], [], sy, qy, None, None, None, path.spec, 0)
        lane = lane_of(self.backend, a, plain[0])
        if lane is not None:
            if len(self.lanes) >= FORMS:
                self.lanes.clear()
            self.lanes[plain[0]] = path, lane

    def __call__(self, sx: Any, sy: Any, qx: Any, qy: Any) -> tuple[Tensor, Tensor, Tensor] | None:
        """Loss, output and support losses; None for a call that is to go the long way."""
        finder = self.finder
        if (
            finder.left == 1  # then the model is traced again
            or torch._C._is_any_autocast_enabled()
            or BACKENDS.named(self.name) is not self.backend
            or not finder.fresh()
        ):
            return None
        lr = self.rates.constant
        if lr is None:
            lr = self.rates()
        plain = self.read(self.params, lr, [sx], [qx], (), (), sy, qy, None, None, None)
        path, lane = _UNKNOWN if plain is None else self.lanes.get(plain[0], _UNKNOWN)
        if lane is None:
            return None
        finder.left -= 1
        try:
            found = run(lane, plain[1], (*self.params, *lr, sx, qx, sy, qy, None, None, None))
        except (TypeError, ValueError) as error:
            raise in_our_words(error) from None
        loss, output, support_losses = found
        return loss, path.shaped(output), support_losses


def remember(finder: PathFinder, path: Fused, batch: Batch, steps: Any, first_order: Any) -> None:
    """Calls like this one, of a plain path, run at once from now on if nothing but tensors tells them from others."""
    beyond = batch.extras, batch.weights, batch.support_mask, batch.query_mask
    if any(part is not None for part in beyond) or batch.qx is None or path.float32:
        return
    if not is_open() or torch._C._is_any_autocast_enabled():
        return
    backend = BACKENDS.named(path.backend)
    if backend.fast_lane is None:
        return
    key = steps, first_order, torch.is_grad_enabled()
    shortcut = finder.shortcuts.get(key)
    if shortcut is None or not shortcut.serves(path, backend):
        shortcut = finder.shortcuts[key] = Shortcut(finder, path, backend)
    shortcut.learn(path, batch)
