"""A recognised inner loop as a call of `mtml.MAML`, which runs all tasks in the engine."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

from mtml.algorithms.maml import MAML
from mtml.mapped.arguments import Arguments
from mtml.mapped.rates import rates_of
from mtml.mapped.recognise import InnerLoop, Unknown
from mtml.paths.batch import Batch
from mtml.paths.cache import PathCache
from mtml.paths.explain import Explanation
from mtml_kernels.losses import in_words

__all__ = ["FusedLoop"]


class FusedLoop:
    """Calls like the one that was recorded, by the engine.

    Args:
        loop: what the recording is. row: the leaves of the recorded task. given: those of its call. known: ids of the
            tensors that stand under names which the function reads.

    Raises:
        Unknown: the engine has no such inner loop.
    """

    def __init__(self, loop: InnerLoop, row: Sequence[Any], given: Arguments, known: Collection[int]) -> None:
        self.loop, self.names = loop, list(loop.rates[0])
        self.row = row  # held: leaves are known by their ids
        self.at = {id(leaf): index for index, leaf in enumerate(row) if isinstance(leaf, Tensor)}
        own = dict(loop.model.named_buffers(remove_duplicate=False))
        own |= dict(loop.model.named_parameters(remove_duplicate=False))
        self.own, self.tensors = {id(t) for t in own.values()}, list(own.values())
        if self._hooked():
            raise Unknown("a tensor of its module has a hook, which sees inner gradients too")
        shared = [
            (index, leaf) for index, leaf in enumerate(row) if isinstance(leaf, Tensor) and not given.mapped[index]
        ]
        self.pinned = [(index, leaf) for index, leaf in shared if id(leaf) in self.own or id(leaf) in known]
        self.twins = [(i, j) for i, leaf in shared for j, other in shared if i < j and leaf is other]
        reads = [t for rates in loop.rates for rate in rates.values() for t in rate.reads]
        if any(id(t) in self.at and given.mapped[self.at[id(t)]] for t in reads):
            raise Unknown("its rates differ from task to task")
        used = [*pytree.tree_leaves((loop.start, loop.sx, loop.sy, loop.qx, loop.qy)), *reads]
        self.fixed = {id(t): t for t in used if id(t) not in self.at}
        if not self.own.union(known).issuperset(self.fixed):
            raise Unknown("it uses a tensor that stands under no name that it reads")
        self.shapes = {name: own[name].shape for name in self.names}
        self.moving = any(not rate.itself for rates in loop.rates for rate in rates.values() if rate.reads)
        self.moving |= any(id(t) in self.at for t in reads)
        self.maml = MAML(
            loop.model,
            self._rates(given),
            steps=len(loop.rates),
            loss=loop.loss,  # type: ignore[arg-type]  # a LossSpec, which `resolve` knows
            query_loss=loop.query_loss,  # type: ignore[arg-type]
            params=self.names,
            first_order=loop.first_order,
            allow_unused=True,
        )

    def holds(self, given: Arguments) -> bool:
        """Whether a call gives tensors that are one, or that have a name too, where the recorded one did; and no tensor
        has got a hook.
        """
        same = all(given.leaves[index] is tensor for index, tensor in self.pinned)
        return same and all(given.leaves[i] is given.leaves[j] for i, j in self.twins) and not self._hooked()

    def _hooked(self) -> bool:
        return any(t._backward_hooks for t in self.tensors)

    def live(self) -> frozenset[int]:
        """The ids of tensors that are read at every call."""
        return frozenset({*self.own, *self.fixed})

    def __call__(self, given: Arguments) -> Tensor:
        """The query losses [T]."""
        if self.moving:
            self.maml.lr = self._rates(given)
        start = {name: self._of_tasks(t, given) for name, t in self.loop.start.items()}
        losses = self.maml.meta_loss(*self._data(given), start=start or None)
        return losses if self.loop.scale == 1.0 else self.loop.scale * losses

    def explain(self, given: Arguments) -> Explanation:
        """How MAML runs it."""
        return PathCache(self.maml).explain(Batch(*self._data(given)))

    def __str__(self) -> str:
        loop = self.loop
        words = [in_words(spec) for spec in (loop.loss, loop.query_loss)]
        words[1] = words[1] if loop.scale == 1.0 else f"{loop.scale:g} x {words[1]}"
        losses = words[0] if words[0] == words[1] else f"{words[0]} (query: {words[1]})"
        count, order = len(loop.rates), "first order" if loop.first_order else "exact second order"
        return (
            f"gradient descent of {type(loop.model).__name__}, {count} {'step' if count == 1 else 'steps'}, {order}, "
            f"loss {losses}, adapts {len(self.names)} {'tensor' if len(self.names) == 1 else 'tensors'}"
        )

    def _rates(self, given: Arguments) -> Any:
        return rates_of(self.loop.rates, self.shapes, self.loop.factor, lambda t: self._now(t, given))

    def _now(self, tensor: Tensor, given: Arguments) -> Tensor:
        """What stands for a tensor of the recorded run in another call."""
        index = self.at.get(id(tensor))
        return tensor if index is None else given.leaves[index]

    def _of_tasks(self, tensor: Tensor, given: Arguments) -> Tensor:
        """The same for all tasks, [T, ...]."""
        index, now = self.at.get(id(tensor)), self._now(tensor, given)
        return now if index is not None and given.mapped[index] else now.expand(given.tasks, *now.shape)

    def _data(self, given: Arguments) -> tuple[Any, ...]:
        parts = (self.loop.sx, self.loop.sy, self.loop.qx, self.loop.qy)
        return tuple(
            self._of_tasks(part, given)
            if isinstance(part, Tensor)
            else pytree.tree_map(lambda t: self._of_tasks(t, given), part)
            for part in parts
        )
