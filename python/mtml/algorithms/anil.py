"""ANIL: the trunk runs once, and only a linear head is adapted to each task."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from mtml.adapted import Adapted
from mtml.algorithms.base import Loss, MetaLearner
from mtml.inner_lr import InnerLR
from mtml.paths.features import BATCH_NORMS, fold, rows_of
from mtml.paths.head import HeadFinder, fused_loss, head_rate
from mtml.paths.path import Outcome, Path
from mtml.wrappers import refuse_data_parallel, refuse_sharded
from mtml_kernels.checks import check_choice, check_finite, shown
from mtml_kernels.general import GeneralPlan

__all__ = ["ANIL", "AdaptedHead"]

BACKENDS = ("auto", "cpu", "triton", "cuda", "reference")
Rate = float | Tensor | tuple[Any, Any] | Mapping[str, Any] | InnerLR


class ANIL(MetaLearner):
    """Almost no inner loop: features from a trunk shared by all tasks, and a linear head adapted to each.

    The trunk sees the support and query samples of all tasks once, folded into one batch [T*S + T*Q, ...]; the head's K
    steps then run as one operation (`mtml_kernels.head_inner_loop`), in the Gram matrix of each task's support features
    where that is cheaper. Gradients are exact, second order included, and reach the trunk through both sets.

    Batch normalisation in train mode therefore takes its statistics over all tasks and both sets, and updates running
    statistics once a call; in eval mode each sample stands alone, as in `MAML`. ``batch_norm="task"`` takes those of
    each task's samples, of both sets together, as loops over tasks do (learn2learn's); for statistics of each set by
    itself use `mtml.MAML` with ``params="head.*"``. On a CPU convolutions run in the fused engine wherever that
    computes the same (`explain` says): with "task", and where no sample's features depend on the others.

    Args:
        features: the trunk, x [N, ...] -> [N, D] (further dimensions are flattened).
        head: an ``nn.Linear`` of D inputs; trainable where its parameters require grad.
        lr: the head's inner learning rate: a number; a scalar tensor; [K] per step; [1, C] or [K, C] per class; a pair
            of such, or {"weight": ..., "bias": ...}; or an `InnerLR` of the head, per "all" or "tensor".
        steps: K.
        loss, query_loss: "cross_entropy", "mse", "bce_with_logits", "huber" or "l1", or the ``nn.*Loss`` or ``F.*``.
        batch_norm: what the trunk's batch statistics are taken over: "module", all samples of a call; "task", those of
            a task, and running statistics stay as they are.
        weight_decay, proximal: weight_decay * theta, and proximal * (theta - theta_0), are added to inner gradients.
        backend: "auto", "cpu", "triton" (on a GPU; see `mtml_kernels.head_inner_loop`) or "reference".

    Raises:
        TypeError: the head is no ``nn.Linear``, or an argument or tensor has the wrong type.
        ValueError: rates, shapes, labels or losses that do not fit; the message names the way out.
        BackendUnavailable: the backend asked for by name cannot run here.

    Example:
        >>> import torch, mtml
        >>> trunk = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.ReLU())
        >>> anil = mtml.ANIL(trunk, torch.nn.Linear(32, 5), lr=0.1, steps=10)
        >>> x, y = torch.randn(4, 10, 8), torch.randint(5, (4, 10))
        >>> loss = anil.meta_loss(x, y, x, y)
        >>> loss.mean().backward()
        >>> loss.shape, trunk[0].weight.grad.shape
        (torch.Size([4]), torch.Size([32, 8]))

    Paper: Raghu, Raghu, Bengio, Vinyals, "Rapid Learning or Feature Reuse? Towards Understanding the Effectiveness of
    MAML", 2020.
    """

    def __init__(
        self,
        features: nn.Module,
        head: nn.Linear,
        lr: Rate,
        *,
        steps: int = 1,
        loss: Loss = "cross_entropy",
        query_loss: Loss | None = None,
        batch_norm: str = "module",
        weight_decay: float = 0.0,
        proximal: float = 0.0,
        backend: str = "auto",
    ) -> None:
        super().__init__(steps=steps, loss=loss, query_loss=query_loss, backend=backend, backends=BACKENDS)
        if not isinstance(features, nn.Module):
            raise TypeError(f"features: expected an nn.Module, got {shown(features)}")
        refuse_data_parallel("features", features)
        if isinstance(head, nn.Module):
            refuse_sharded("head", head)
        if type(head) is not nn.Linear:
            raise TypeError(
                f"head: expected an nn.Linear, got {type(head).__name__}; for any other head use mtml.MAML(head, ...) "
                "on features that require grad"
            )
        for given in (loss,) if query_loss is None else (loss, query_loss):
            fused_loss(given)
        check_choice("batch_norm", batch_norm, BATCH_NORMS)
        check_finite("weight_decay", weight_decay)
        check_finite("proximal", proximal)
        self.features, self.head, self.lr, self.batch_norm = features, head, lr, batch_norm
        self.weight_decay, self.proximal = float(weight_decay), float(proximal)
        head_rate(lr, head, self.steps)  # raises where it does not fit
        self._paths = HeadFinder(self)

    def forward(self, x: Any) -> Tensor:
        """The head as it is before adaptation, on the trunk's features: [N, ...] -> [N, C]."""
        logits: Tensor = self.head(rows_of(self.features, x))
        return logits

    def features_of_tasks(self, x: Any) -> Tensor:
        """The trunk's features [T, N, D] of samples x [T, N, ...], by the module's `batch_norm`."""
        paths = self._paths if self._paths.owner is self else self._own_paths()
        assert isinstance(paths, HeadFinder)
        return paths.trunk(self, x)[0]

    def _adapted(self, path: Path, result: Outcome, keep_steps: bool, taken: int) -> AdaptedHead:
        loss = self.loss if self.query_loss is None else self.query_loss
        plan = GeneralPlan("vmap", "", "module")
        return AdaptedHead(self, result.adapted, result.support_losses, loss, keep_steps, plan)


class AdaptedHead(Adapted):
    """What `ANIL.adapt_tasks` returns: an `Adapted` whose tasks share the trunk (`features`), which runs once."""

    def __call__(self, x: Any, step: int = -1) -> Tensor:
        """Each task's head on its own inputs: x [T, N, ...] (or a tuple or dict of such) -> [T, N, C]."""
        self._check_tasks("x", x)
        params = self.params_at(step)
        model = self.model
        assert isinstance(model.features, nn.Module)
        features = model.features_of_tasks(x) if isinstance(model, ANIL) else fold(model.features, x)
        logits = features @ params["head.weight"].mT
        return logits + params["head.bias"][:, None] if "head.bias" in params else logits
