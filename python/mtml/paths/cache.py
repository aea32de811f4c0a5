"""From a call's arguments to the prepared path that runs it: the host time of every meta-step is spent here."""

from __future__ import annotations

import functools
from collections.abc import Hashable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mtml.notices import warn_of_fallback, warn_of_statistics
from mtml.paths.contents import Contents, package_of
from mtml.paths.planner import Batch, Options, Path, Planner
from mtml.paths.watch import structure
from mtml_kernels.checks import check_initialised, check_steps, shown
from mtml_kernels.losses.task import takes
from mtml_kernels.neutral import uncompiled
from mtml_kernels.transforms import is_forward_mode

__all__ = ["PathCache", "Six", "unpacked", "weights_list"]

STATES = 8  # of a model (train and eval, say) whose paths are kept
CALLS = 64  # signatures per state

Six = tuple[Any, Any, Any, Any, Tensor | None, Tensor | None]


def signature(value: Any) -> Hashable:
    """What of an input decides how it is run: shapes, dtypes, devices, whether it requires grad."""
    if isinstance(value, Tensor):
        return value.shape, value.dtype, value.device, value.requires_grad
    if value is None:
        return None
    if isinstance(value, Mapping):
        return tuple((name, signature(item)) for name, item in value.items())
    if isinstance(value, list | tuple):
        return tuple(map(signature, value))
    return "other", id(type(value))  # nothing that runs: the checks say what is wrong with it


class PathCache:
    """The prepared paths of one MAML. It is no part of the module's state: copies and pickles start an empty one."""

    def __init__(self, owner: Any) -> None:
        self.owner = owner
        self.now: Planner | None = None
        self.states: dict[Hashable, Planner] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        return PathCache, (None,)

    def __deepcopy__(self, memo: dict[int, Any]) -> PathCache:
        return PathCache(None)

    def find(
        self,
        sx: Any,
        sy: Any,
        qx: Any,
        qy: Any,
        support_mask: Tensor | None,
        query_mask: Tensor | None,
        step_weights: Any,
        steps: int | None,
        first_order: bool | None,
        keep: int,
        quiet: bool = False,
    ) -> tuple[Path, Any]:
        """How to run this call, and its step weights in the form that both paths take."""
        planner = self.now
        if planner is None or not planner.fresh():
            planner = uncompiled(self.planner)
        planner.left -= 1
        if planner.left == 0:
            uncompiled(planner.verify)
        own = self.owner.__dict__
        if steps is None:
            steps = own["steps"]
        if first_order is None:
            first_order = own["first_order"]
        key = (
            signature(sx),
            signature(sy),
            signature(qx),
            signature(qy),
            None if support_mask is None else signature(support_mask),
            None if query_mask is None else signature(query_mask),
            None if step_weights is None else _weights_signature(step_weights),
            steps,
            first_order,
            keep,
            torch.is_grad_enabled(),
            torch._C._are_functorch_transforms_active() or is_forward_mode(),
            torch._C._len_torch_dispatch_stack(),
            torch._C._is_any_autocast_enabled() and planner.autocast(),
        )
        path = planner.calls.get(key)
        weights = None
        if path is None or step_weights is not None:
            weights = weights_list(step_weights, check_steps(steps))
        if path is None:
            batch = Batch(sx, sy, qx, qy, support_mask, query_mask, weights)
            path = planner.prepare(batch, Options(check_steps(steps), bool(first_order), keep))
            if len(planner.calls) >= CALLS:
                planner.calls.pop(list(planner.calls)[0], None)  # noqa: RUF015 - other threads may add to it meanwhile
            if not torch._C._len_torch_dispatch_stack():  # a path made under FakeTensorMode, say, holds its tensors
                planner.calls[key] = path
            warn_of_statistics(self.owner.module, planner.batch_norm)
        if path.notice is not None and not quiet:
            (mode, reasons), path.notice = path.notice, None
            warn_of_fallback(self.owner.module, mode, reasons)
        return path, weights

    def planner(self) -> Planner:
        """The planner of the module as it stands."""
        maml = self.owner
        check_initialised(maml.module)
        options = _options(maml)
        words = (maml.batch_norm, maml.backend, maml.allow_unused)
        key = (structure(maml.module), tuple(options.tokens), words)
        planner = self.states.pop(key, None)
        if planner is None:
            planner = Planner(maml)
            while len(self.states) >= STATES:
                self.states.pop(next(iter(self.states)))
        planner.observe(maml, options)
        self.states[key] = self.now = planner
        return planner


def _options(maml: Any) -> Contents:
    """What a MAML was given beside its model; where that was read in advance it is looked into, for it may be changed
    in place. Callables run live: what they hold is their own affair, and may change at every call.
    """
    options = Contents(versions=False)  # tensors among them are read at every call
    options.visit(maml.lr)
    options.visit(maml.params)
    for loss in (maml.loss, maml.query_loss):
        if isinstance(loss, nn.Module) and package_of(type(loss)) == "torch":
            options.visit(loss.__dict__)
        if isinstance(loss, str | functools.partial):
            options.visit(loss)
    live = (maml.loss, maml.query_loss, maml.update)
    options.tokens += [None if given is None or isinstance(given, str) else id(given) for given in live]
    return options.settle()


def _weights_signature(weights: Any) -> Hashable:
    return signature(weights) if isinstance(weights, Tensor) else "numbers"


def weights_list(weights: Any, steps: int) -> Any:
    """Step weights as K+1 numbers, or as a tensor [K+1] where they require grad or lie on another device.

    Raises ValueError unless there are K or K+1 of them, TypeError for what is no sequence of numbers.
    """
    if weights is None:
        return None
    if isinstance(weights, Tensor):
        if weights.ndim != 1:
            raise ValueError(f"step_weights: expected [K] or [K+1] numbers, got {shown(weights)}")
        numbers: Any = weights if weights.requires_grad or weights.device.type != "cpu" else weights.tolist()
    else:
        try:
            numbers = [float(w) for w in weights]
        except TypeError as error:
            raise TypeError(f"step_weights: expected numbers or a tensor, got {shown(weights)}") from error
    count = len(numbers)
    if count == steps + 1:
        return numbers
    if count == steps and steps > 0:
        return torch.cat([numbers.new_zeros(1), numbers]) if isinstance(numbers, Tensor) else [0.0, *numbers]
    raise ValueError(
        f"step_weights: expected {steps} weights (after each step) or {steps + 1} (before adaptation, then after each "
        f"step) for steps={steps}, got {count}"
    )


def unpacked(
    sx: Any,
    sy: Any,
    qx: Any,
    qy: Any,
    support_mask: Any,
    query_mask: Any,
    adapting: bool = False,
    losses: tuple[Any, Any] = (None, None),
) -> Six:
    """The six parts of a batch, given one by one or as one TaskBatch (or an equal tuple) in the place of sx.

    `losses` of the support and the query set may do without targets, where they take the output alone.
    Raises TypeError where parts are missing or given twice.
    """
    if not _is_batch(sx, sy, qx):
        _check_parts(sx, sy, qx, qy, adapting, losses)
        return sx, sy, qx, qy, support_mask, query_mask
    named = hasattr(sx, "sx")
    parts = tuple(getattr(sx, n, None) for n in Batch._fields[:6]) if named else tuple(sx)
    tasks = not named and any(hasattr(part, "sx") for part in parts)
    if tasks or not (2 if adapting else 4) <= len(parts) <= 6 or parts[0] is None:
        raise TypeError(
            "sx: expected a batch (sx, sy, qx, qy, support_mask=None, query_mask=None) where sy is not given, got "
            f"{len(parts)} parts; inputs of several arguments need their targets beside them, and tasks that stand one "
            "by one become a batch by mtml.tasks.collate(tasks), padded with support_mask and query_mask"
        )
    if qx is not None or qy is not None:
        raise TypeError("qx, qy: expected none of them beside a batch that holds them")
    found = [*parts, *(None,) * (6 - len(parts))]
    _check_parts(found[0], found[1], found[2], found[3], adapting, losses)
    for index, (name, mask) in enumerate((("support_mask", support_mask), ("query_mask", query_mask)), 4):
        if mask is not None and found[index] is not None:
            raise TypeError(f"{name}: given both in the batch and as an argument; pass one of them")
        found[index] = found[index] if mask is None else mask
    return found[0], found[1], found[2], found[3], found[4], found[5]


def _is_batch(sx: Any, sy: Any, qx: Any) -> bool:
    """Whether sx stands for a whole batch: a TaskBatch, or where nothing is beside it a tuple."""
    if sy is not None or isinstance(sx, Tensor | Mapping):
        return False
    return hasattr(sx, "sx") or (qx is None and isinstance(sx, list | tuple))


def _check_parts(sx: Any, sy: Any, qx: Any, qy: Any, adapting: bool, losses: tuple[Any, Any]) -> None:
    """Raise TypeError where a set, or its targets, are missing and needed."""
    way_out = "; a loss of the output alone, loss(output), goes without"
    if sy is None and not takes(losses[0], 1):
        raise TypeError(
            f"sy: expected targets beside sx, or one TaskBatch in place of both; got sx = {shown(sx)}{way_out}"
        )
    if not adapting and (qx is None or (qy is None and not takes(losses[1], 1))):
        raise TypeError(
            "qx, qy: expected the query sets beside sx, sy (or one TaskBatch); use adapt_tasks without them"
            + ("" if qx is None else way_out)
        )
