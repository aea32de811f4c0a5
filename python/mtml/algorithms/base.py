"""What all algorithms that learn where an inner loop starts have in common: the calls on batches of tasks.

A new algorithm is one file: a `MetaLearner` whose constructor takes its options and ends with a finder of paths
(`mtml.paths.cache.PathCache` for any model), and which overrides what it does differently.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypedDict, Unpack

from torch import Tensor, nn

from mtml.adapted import Adapted
from mtml.paths.batch import Batch, Extras, Parts, unpacked, weights_list
from mtml.paths.cache import at_once
from mtml.paths.explain import Explanation
from mtml.paths.path import Finder, Outcome, Path
from mtml_kernels.checks import check_choice, check_steps, shown

__all__ = ["CallOptions", "Loss", "MetaLearner", "MetaOutput", "StepOptions", "TaskOptions"]

Loss = str | Callable[..., Tensor]


class MetaOutput(NamedTuple):
    """One meta-step: loss [T], output [T, Q, ...] of the adapted models, support_losses [K, T] before each step."""

    loss: Tensor
    output: Any
    support_losses: Tensor


class TaskOptions(TypedDict, total=False):
    """The keyword arguments of `MetaLearner.meta_forward` on the tasks and their steps; it says what they mean."""

    support_mask: Tensor | None
    query_mask: Tensor | None
    step_weights: Sequence[float] | Tensor | None
    per_step: bool
    query_steps: bool
    start: Adapted | Mapping[str, Tensor] | None


class StepOptions(TaskOptions, total=False):
    """Those, and the order of the inner gradients: what a function that names `steps` itself takes beside."""

    first_order: bool | None


class CallOptions(StepOptions, total=False):
    """All keyword arguments of `MetaLearner.meta_forward`."""

    steps: int | None


class MetaLearner(nn.Module, abc.ABC):
    """Batches of tasks in, meta-losses and adapted models out.

    Args:
        steps, loss, query_loss, backend: as of the algorithm.
        backends: the names allowed for `backend`.

    A subclass's constructor ends by setting ``self._paths``, the finder of its calls' paths.
    """

    first_order: bool = False
    _paths: Finder

    def __init__(
        self, *, steps: int, loss: Loss, query_loss: Loss | None, backend: str, backends: Sequence[str]
    ) -> None:
        super().__init__()
        check_choice("backend", backend, backends)
        self.steps, self.backend = check_steps(steps), backend
        self.loss, self.query_loss = loss, query_loss

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy looks after itself."""
        super().__setstate__(state)
        self._own_paths()

    def meta_forward(
        self,
        sx: Any,
        sy: Any = None,
        qx: Any = None,
        qy: Any = None,
        *,
        steps: int | None = None,
        first_order: bool | None = None,
        support_mask: Tensor | None = None,
        query_mask: Tensor | None = None,
        step_weights: Sequence[float] | Tensor | None = None,
        per_step: bool = False,
        query_steps: bool = False,
        start: Adapted | Mapping[str, Tensor] | None = None,
    ) -> MetaOutput:
        """Adapt to every support set and judge the results on the query sets.

        Args:
            sx, sy, qx, qy: a batch of tasks, or a TaskBatch alone; targets as the losses take them.
            steps, first_order: instead of the module's own. ANIL has no first order.
            support_mask, query_mask: weights of the samples [T, S], [T, Q]: a task's loss is sum(w l) / sum(w), and 0
                where all its weights are 0.
            step_weights: loss = sum_k w_k L_q(theta_k): [K] for the parameters after each step (the multi-step loss of
                MAML++), or [K+1] with those before adaptation first. None: those after the last step alone. Not for
                ANIL.
            per_step: there is a support set for every step: sx [T, K, S, ...], sy [T, K, S, ...], support_mask
                [T, K, S]. Not for ANIL.
            query_steps: judge the query sets at theta_0 .. theta_K: loss and output come as [K+1, T, ...], each of them
                differentiable. Not for ANIL.
            start: where each task starts, {name: [T, *shape]} for adapted tensors (those that are not named start from
                the model's own), or an `Adapted`, with the state of the update rule if it has one. Differentiable. Not
                for ANIL.

        Returns:
            loss [T] (not averaged), output [T, Q, ...] after the last step, support_losses [K, T].
        """
        if sy is None or qx is None or qy is None:
            sx, sy, qx, qy, support_mask, query_mask = unpacked(sx, sy, qx, qy, support_mask, query_mask, self)
        if steps is None:
            steps = self.steps
        if first_order is None:
            first_order = self.first_order
        paths = self._paths if self._paths.owner is self else self._own_paths()
        plain = step_weights is None and support_mask is None and query_mask is None and start is None
        if plain and not (per_step or query_steps):
            found = at_once(paths, sx, sy, qx, qy, steps, first_order)
            if found is not None:
                return MetaOutput(*found)
        weights = None if step_weights is None else weights_list(step_weights, check_steps(steps))
        extras = None
        if per_step or query_steps or start is not None:
            extras = self._extras(per_step, query_steps, start)
            if query_steps and weights is not None:
                raise ValueError("step_weights: expected None with query_steps=True, which returns every step's loss")
        batch = Batch(sx, sy, qx, qy, support_mask, query_mask, weights, extras)
        path = paths.find(batch, steps, first_order, 0)
        result = path(batch)
        return MetaOutput(result.loss, path.shaped(result.output), result.support_losses)

    def meta_loss(
        self, sx: Any, sy: Any = None, qx: Any = None, qy: Any = None, **options: Unpack[CallOptions]
    ) -> Tensor:
        """The query loss of every task [T]: `meta_forward`, with its arguments, for when nothing else is needed."""
        return self.meta_forward(sx, sy, qx, qy, **options).loss

    def adapt_tasks(
        self,
        sx: Any,
        sy: Any = None,
        *,
        steps: int | None = None,
        first_order: bool | None = None,
        support_mask: Tensor | None = None,
        keep_steps: bool = False,
        per_step: bool = False,
        start: Adapted | Mapping[str, Tensor] | None = None,
    ) -> Adapted:
        """Adapt to every support set and return the adapted models (`Adapted`), differentiable back to everything.

        Args:
            sx, sy: the support sets, or a TaskBatch alone. A tuple alone is a batch (sx, sy): several inputs without
                targets go in as a dict, or as (inputs, None).
            keep_steps: keep the parameters before and after every step, not only the last. Not for ANIL.
            per_step, start: as of `meta_forward`; the result of one call is the start of another that goes on from it.
        """
        if sy is None:
            sx, sy, _, _, support_mask, _ = unpacked(sx, sy, None, None, support_mask, None, self, adapting=True)
        steps = self.steps if steps is None else steps
        first_order = self.first_order if first_order is None else first_order
        extras = self._extras(per_step, False, start) if per_step or start is not None else None
        batch = Batch(sx, sy, support_mask=support_mask, extras=extras)
        paths = self._paths if self._paths.owner is self else self._own_paths()
        path = paths.find(batch, steps, first_order, 2 if keep_steps else 1)
        return self._adapted(path, path(batch), keep_steps, steps + (0 if extras is None else extras.taken))

    def explain(self, sx: Any, sy: Any = None, qx: Any = None, qy: Any = None) -> Explanation:
        """Print and return how calls with such data run: path, kernel, why, and every layer."""
        parts: Parts = (sx, sy, qx, qy, None, None)
        if sy is None:
            parts = unpacked(sx, sy, qx, qy, None, None, self, adapting=True)
        paths = self._paths if self._paths.owner is self else self._own_paths()
        explanation = paths.explain(Batch(*parts))
        print(explanation)
        return explanation

    @abc.abstractmethod
    def _adapted(self, path: Path, result: Outcome, keep_steps: bool, taken: int) -> Adapted:
        """The adapted models of a path's outcome; `taken`: steps of the update rule until then."""

    def _extras(self, per_step: bool, query_steps: bool, start: Adapted | Mapping[str, Tensor] | None) -> Extras:
        """What a call has beyond plain MAML."""
        if start is None or isinstance(start, Mapping):
            return Extras(per_step, query_steps, start)
        if not isinstance(start, Adapted):
            raise TypeError(f"start: expected {{name: [T, *shape]}} or an Adapted, got {shown(start)}")
        state = dict(start.state or {})
        taken = state.pop("step", 0)
        return Extras(per_step, query_steps, start.params, state or None, taken)

    def _own_paths(self) -> Finder:
        """A copy of a learner looks after itself."""
        paths: Finder = type(self._paths)(self)  # type: ignore[call-arg]  # every finder is made from its owner
        self.__dict__["_paths"] = paths
        return paths
