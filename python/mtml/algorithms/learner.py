"""Learners whose inner loop changes tensors of a model: what MAML and its relatives are made of."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypedDict

import torch
from torch import Tensor, nn

from mtml.adapted import Adapted
from mtml.algorithms.base import Loss, MetaLearner
from mtml.algorithms.curvature import Point, long_rate
from mtml.inner_lr import InnerLR
from mtml.params import ParamsArg, adaptable, select
from mtml.paths.batch import Batch, unpacked
from mtml.paths.cache import PathCache
from mtml.paths.path import Outcome, Path
from mtml.wrappers import refuse_data_parallel
from mtml_kernels.batch_norm import check_batch_norm, per_step_batch_norm
from mtml_kernels.checks import check_finite, shown
from mtml_kernels.functional.hvp import follows, recordable
from mtml_kernels.general import GeneralPlan
from mtml_kernels.losses import resolve
from mtml_kernels.precision import first_floating

__all__ = ["BACKENDS", "LearnerOptions", "ModelLearner", "Rate"]

OF_CUDA = ("cuda", "cuda:tf32", "cuda:tf32x3")
BACKENDS = ("auto", "cpu", "cpu:weights", "cpu:low_rank", "torch", "triton", *OF_CUDA, "reference", "general")

Rate = float | Tensor | Mapping[str, Any] | InnerLR


class LearnerOptions(TypedDict, total=False):
    """Keyword arguments of `MAML`, which says what they mean, as its relatives take them."""

    allow_unused: bool
    steps: int
    loss: Loss
    query_loss: Loss | None
    batch_norm: str
    backend: str
    update: Callable[..., Any] | None


class ModelLearner(MetaLearner):
    """Adapts tensors of any model by K gradient steps on every path that fits it; arguments and errors as of `MAML`."""

    def __init__(
        self,
        model: nn.Module,
        lr: Rate,
        first_order: bool = False,
        allow_unused: bool = False,
        *,
        steps: int = 1,
        loss: Loss = "cross_entropy",
        query_loss: Loss | None = None,
        params: ParamsArg = None,
        batch_norm: str = "module",
        backend: str = "auto",
        update: Callable[..., Any] | None = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model: expected an nn.Module, got {shown(model)}")
        refuse_data_parallel("model", model)
        super().__init__(steps=steps, loss=loss, query_loss=query_loss, backend=backend, backends=BACKENDS)
        if batch_norm == "per_step":
            model = per_step_batch_norm(model, self.steps)
        check_batch_norm(model, batch_norm)
        resolve(loss)  # raises for what is no loss at all
        if query_loss is not None:
            resolve(query_loss)
        if update is not None and not callable(update):
            raise TypeError(f"update: expected a callable or None, got {shown(update)}")
        if params is not None:
            select(model, params)
        _check_rate(lr)
        self.module = model
        self.lr = lr
        self.first_order, self.allow_unused = first_order, allow_unused
        self.params, self.batch_norm, self.update = params, batch_norm, update
        self._long: tuple[tuple[Any, ...], ModelLearner] | None = None
        self._paths = PathCache(self)

    def hvp(
        self,
        sx: Any,
        sy: Any = None,
        vectors: Mapping[str, Tensor] | None = None,
        *,
        support_mask: Tensor | None = None,
        start: Adapted | Mapping[str, Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """Hessian-vector products of every task's support loss, H_t v_t: {name: [T, *shape]}, in one pass for all.

        H_t is the second derivative of task t's support loss by the adapted tensors that `vectors` names. By
        forward-over-reverse where the model is fused, else by differentiating twice.

        Args:
            sx, sy, support_mask: as of `adapt_tasks`, a support set a task; a TaskBatch may take their place.
            vectors: {name: [T, *shape]} of adapted tensors; those that it does not name count as zero.
            start: the point of every task, as of `adapt_tasks`; None: the model's own tensors. Parameters that exist
                once per step are read at the first.

        Raises:
            ValueError: names or shapes that do not fit.
            RuntimeError: from differentiating the products, where the model is fused: they are differentiable (any
                number of times) with ``backend="general"``.

        Example:
            >>> import torch, mtml
            >>> maml = mtml.MAML(torch.nn.Linear(2, 1), lr=0.1, loss="mse")
            >>> x, y = torch.randn(4, 8, 2), torch.randn(4, 8, 1)
            >>> found = maml.hvp(x, y, {"weight": torch.ones(4, 1, 2), "bias": torch.zeros(4, 1)})
            >>> torch.allclose(found["weight"], 2 * (x.sum(2, keepdim=True) * x).mean(1, keepdim=True), atol=1e-5)
            True

        Paper: Kemaev et al. 2025 (arXiv:2505.00793) for the order of differentiation.
        """
        if sy is None:
            sx, sy, _, _, support_mask, _ = unpacked(sx, sy, None, None, support_mask, None, self, adapting=True)
        if not isinstance(vectors, Mapping):
            raise TypeError(f"vectors: expected {{name: [T, *shape]}}, got {shown(vectors)}")
        extras = self._extras(False, False, start)
        recording = follows(sx, sy, support_mask, extras.start or {}, vectors, list(self.module.parameters()))
        with torch.inference_mode(False), torch.enable_grad():
            sx, sy, support_mask, vectors = recordable((sx, sy, support_mask, dict(vectors)))
            given = self._everywhere(len(Batch(sx, sy)), recordable(dict(extras.start or {})))
            given = {n: t if recording and t.requires_grad else t.detach().requires_grad_() for n, t in given.items()}
            point = Point(self._long_step(), (sx, sy, support_mask), given)
            return point.hvp(vectors, create_graph=recording)

    def _everywhere(self, tasks: int, start: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The point where every task stands, {name: [T, *shape]}: `start`, and the model's own where it names none."""
        own = adaptable(self.module)
        expanded = {name: own[name].expand(tasks, *own[name].shape) for name in select(self.module, self.params)}
        return expanded | dict(start)

    def _long_step(self) -> ModelLearner:
        """The learner that takes the step of a `Point`."""
        own = adaptable(self.module)
        dtype = first_floating(own[name] for name in select(self.module, self.params)).dtype
        # layers per step were replaced already, and a derivative is no reason to move running statistics
        mode = "module" if self.batch_norm in ("per_step", "track") else self.batch_norm
        losses = self.loss, self.query_loss
        options = (self.module, dtype, self.allow_unused, *losses, self.params, mode, self.backend)
        if self._long is None or any(a is not b for a, b in zip(self._long[0], options, strict=True)):
            given: dict[str, Any] = {"loss": self.loss, "query_loss": self.query_loss, "params": self.params}
            given |= {"batch_norm": mode, "backend": self.backend, "allow_unused": self.allow_unused}
            self._long = options, ModelLearner(self.module, long_rate(dtype), **given)
        return self._long[1]

    def _adapted(self, path: Path, result: Outcome, keep_steps: bool, taken: int) -> Adapted:
        # layers of the fused engine batch well, the rest runs as it was adapted
        plan = getattr(path, "plan", None) or GeneralPlan("vmap", "", self.batch_norm)
        loss = self.loss if self.query_loss is None else self.query_loss
        state = None if result.moments is None else {"step": taken, **result.moments}
        return Adapted(self.module, result.adapted, result.support_losses, loss, keep_steps, plan, state)

    def extra_repr(self) -> str:
        lr = self.lr if isinstance(self.lr, float | int) else type(self.lr).__name__
        return f"lr={lr}, steps={self.steps}, first_order={self.first_order}, backend={self.backend!r}"


def _check_rate(lr: Any) -> None:
    """Raise for what can be no learning rate of any model; whether it fits this one is known at the first call."""
    if isinstance(lr, InnerLR):
        return
    items = lr.items() if hasattr(lr, "items") else [(None, lr)]
    for name, rate in items:
        check_finite("lr" if name is None else f"lr[{name!r}]", rate)
