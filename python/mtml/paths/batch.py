"""The data of one call: read at the door in whatever form it came, and from there on one record."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.compiler import is_compiling, is_dynamo_compiling
from torch.utils import _pytree as pytree

from mtml.tasks.task_batch import TaskBatch
from mtml_kernels.checks import NAMES, leaves, shown
from mtml_kernels.losses.task import takes
from mtml_kernels.precision import cast
from mtml_kernels.schema.inner_loop import PER_STEP, QUERY_STEPS, STARTS, TASKS_APART

__all__ = ["Batch", "Extras", "Parts", "check_parts", "signature", "unpacked", "weights_list"]

Parts = tuple[Any, Any, Any, Any, Tensor | None, Tensor | None]


class Losses(Protocol):
    """What has losses: a learner."""

    loss: Any
    query_loss: Any


class Extras(NamedTuple):
    """What a call has beyond plain MAML.

    per_step: the support sets are [T, K, S, ...], a set for every step. query_steps: the query sets are judged at
    theta_0 .. theta_K. start: {name: [T, *shape]}, where each task starts. moments: the update rule's, {moment: {name:
    [T, *shape]}}, after `taken` steps. apart: the loss and its gradients come a task.
    """

    per_step: bool = False
    query_steps: bool = False
    start: Mapping[str, Tensor] | None = None
    moments: Mapping[str, Mapping[str, Tensor]] | None = None
    taken: int = 0
    apart: bool = False

    @property
    def axes(self) -> int:
        """The same as bits, as the engine takes them."""
        return (
            (PER_STEP if self.per_step else 0)
            | (QUERY_STEPS if self.query_steps else 0)
            | (STARTS if self.start is not None else 0)
            | (TASKS_APART if self.apart else 0)
        )

    @property
    def signature(self) -> Hashable:
        """What of it decides how a call is run."""
        return self.axes, self.taken, signature(self.start), signature(self.moments)


class Batch:
    """T tasks and what weighs them; it knows its `signature`.

    sx [T, S, ...] and qx [T, Q, ...] are a tensor, or a tuple or dict of such; sy [T, S, ...], qy [T, Q, ...];
    support_mask [T, S], query_mask [T, Q]; weights: numbers or a tensor [K+1] over theta_0 .. theta_K. Whatever a call
    goes without is None.
    """

    __slots__ = ("extras", "query_mask", "qx", "qy", "signature", "support_mask", "sx", "sy", "weights")

    def __init__(
        self,
        sx: Any,
        sy: Any,
        qx: Any = None,
        qy: Any = None,
        support_mask: Tensor | None = None,
        query_mask: Tensor | None = None,
        weights: Any = None,
        extras: Extras | None = None,
    ) -> None:
        self.extras = extras
        self.sx, self.sy, self.qx, self.qy = sx, sy, qx, qy
        self.support_mask, self.query_mask, self.weights = support_mask, query_mask, weights
        # made of every call: spelt out for tensors, since a call of `signature` costs as much again as what it reads
        # (and torch.compile knows no attrgetter)
        self.signature: Hashable = (
            (sx.shape, sx.dtype, sx.device, sx.requires_grad) if isinstance(sx, Tensor) else signature(sx),
            (sy.shape, sy.dtype, sy.device, sy.requires_grad) if isinstance(sy, Tensor) else signature(sy),
            (qx.shape, qx.dtype, qx.device, qx.requires_grad) if isinstance(qx, Tensor) else signature(qx),
            (qy.shape, qy.dtype, qy.device, qy.requires_grad) if isinstance(qy, Tensor) else signature(qy),
            None if support_mask is None else signature(support_mask),
            None if query_mask is None else signature(query_mask),
            None if weights is None else signature(weights) if isinstance(weights, Tensor) else "numbers",
            None if extras is None else extras.signature,
        )

    def over(self, sx: Any, qx: Any) -> Batch:
        """The same targets, masks and weights with other inputs, such as features in place of images."""
        return Batch(sx, self.sy, qx, self.qy, self.support_mask, self.query_mask, self.weights, self.extras)

    def floats(self) -> list[Tensor]:
        """All floating-point tensors: of the parts, and where tasks start."""
        extras = self.extras
        found = pytree.tree_leaves((self.parts(), () if extras is None else (extras.start, extras.moments)))
        return [t for t in found if isinstance(t, Tensor) and t.is_floating_point()]

    def in_float32(self) -> Batch:
        """The same with float32 copies of what is in half precision."""
        extras = self.extras
        parts, weights, start, moments = cast(
            (self.parts(), self.weights, *((None, None) if extras is None else (extras.start, extras.moments))),
            torch.float32,
        )
        return Batch(*parts, weights, extras and extras._replace(start=start, moments=moments))

    def first_step(self) -> Batch:
        """The support sets of one step in the place of all, by which shapes are checked and models are traced."""
        if self.extras is None or not self.extras.per_step:
            return self
        sx, sy, mask = pytree.tree_map_only(Tensor, lambda t: t[:, 0], (self.sx, self.sy, self.support_mask))
        return Batch(sx, sy, self.qx, self.qy, mask, self.query_mask, self.weights, self.extras)

    def parts(self) -> Parts:
        """Everything but the weights of the steps, in the order of `NAMES`."""
        return self.sx, self.sy, self.qx, self.qy, self.support_mask, self.query_mask

    def given(self) -> dict[str, Any]:
        """The parts that there are, by name."""
        return {name: value for name, value in zip(NAMES, self.parts(), strict=True) if value is not None}

    @property
    def tasks(self) -> int:
        """T, which a graph may know by a symbol."""
        return next(iter(leaves("sx", self.sx)))[1].shape[0]

    def __len__(self) -> int:
        """T, as a number."""
        return self.tasks

    def tensors(self) -> list[tuple[str, Tensor]]:
        """Every tensor of the parts with its name."""
        return [pair for name, value in self.given().items() for pair in leaves(name, value)]


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


def weights_list(weights: Any, steps: int) -> Any:
    """Step weights as K+1 numbers, or as a tensor [K+1] where they require grad, lie on another device or are traced.

    Raises ValueError unless there are K or K+1 of them, or where a number that lies here is not finite; TypeError for
    what is no sequence of numbers.
    """
    if isinstance(weights, Tensor):
        if weights.ndim != 1:
            raise ValueError(f"step_weights: expected [K] or [K+1] numbers, got {shown(weights)}")
        stays = weights.requires_grad or weights.device.type != "cpu" or is_compiling()
        numbers: Any = weights if stays else weights.tolist()
    else:
        try:
            numbers = [float(w) for w in weights]
        except (TypeError, ValueError) as error:
            raise TypeError(f"step_weights: expected numbers or a tensor, got {shown(weights)}") from error
    if not isinstance(numbers, Tensor) and not all(-math.inf < w < math.inf for w in numbers):
        raise ValueError(f"step_weights: expected finite numbers, got {numbers}")
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
    losses: Losses,
    adapting: bool = False,
) -> Parts:
    """The six parts of a batch, given one by one or as one TaskBatch (or an equal tuple) in the place of sx.

    `losses` are those of a learner: targets may be missing where a loss takes the output alone.
    Raises TypeError where parts are missing or given twice.
    """
    alone = sy is qx is qy is support_mask is query_mask is None
    if alone and isinstance(sx, TaskBatch) and not (sx.sx is None or sx.sy is None or sx.qx is None or sx.qy is None):
        return sx  # the common form, which costs no more than this look
    if sy is not None or not _holds_parts(sx, qx):
        check_parts(sx, sy, qx, qy, adapting, losses)
        return sx, sy, qx, qy, support_mask, query_mask
    named = hasattr(sx, "sx")
    parts = tuple(getattr(sx, name, None) for name in NAMES) if named else tuple(sx)
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
    check_parts(found[0], found[1], found[2], found[3], adapting, losses)
    for index, (name, mask) in enumerate((("support_mask", support_mask), ("query_mask", query_mask)), 4):
        if mask is not None and found[index] is not None:
            raise TypeError(f"{name}: given both in the batch and as an argument; pass one of them")
        found[index] = found[index] if mask is None else mask
    return found[0], found[1], found[2], found[3], found[4], found[5]


def _holds_parts(sx: Any, qx: Any) -> bool:
    """Whether sx stands for a whole batch: a TaskBatch, or where nothing is beside it a tuple."""
    if isinstance(sx, Tensor | Mapping):
        return False
    return hasattr(sx, "sx") or (qx is None and isinstance(sx, list | tuple))


def check_parts(sx: Any, sy: Any, qx: Any, qy: Any, adapting: bool, losses: Losses) -> None:
    """Raise TypeError where a set, or its targets, are missing and needed."""
    if is_dynamo_compiling() and (callable(losses.loss) or callable(losses.query_loss)):
        return  # a traced function cannot ask for a signature: where the path is found this is called again
    way_out = "; a loss of the output alone, loss(output), goes without"
    if sy is None and not takes(losses.loss, 1):
        raise TypeError(
            f"sy: expected targets beside sx, or one TaskBatch in place of both; got sx = {shown(sx)}{way_out}"
        )
    if adapting or (qx is not None and qy is not None):
        return
    query_loss = losses.loss if losses.query_loss is None else losses.query_loss
    if qx is None or not takes(query_loss, 1):
        raise TypeError(
            "qx, qy: expected the query sets beside sx, sy (or one TaskBatch); use adapt_tasks without them"
            + ("" if qx is None else way_out)
        )
