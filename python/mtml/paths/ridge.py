"""R2D2's path: the trunk once over all samples, and a ridge regression a task in closed form."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mtml.paths.batch import Batch
from mtml.paths.explain import Explanation, Subject, loss_names
from mtml.paths.features import features_of
from mtml.paths.judge import check_targets, task_losses
from mtml.paths.path import Options, Outcome
from mtml.paths.trunk import TrunkOnce
from mtml_kernels.checks import Sizes, check_batch, widened
from mtml_kernels.losses import IGNORED, LossSpec, Opaque, resolve
from mtml_kernels.losses.task import TaskLoss
from mtml_kernels.precision import cast, plainly, result_dtype

__all__ = ["RidgeFinder", "RidgePath", "ridge"]


def ridge(x: Tensor, y: Tensor, weights: Tensor, strength: Tensor) -> Tensor:
    """W [T, D, O], the minimum of sum_s w_s |x_s W - y_s|^2 + strength |W|^2 of every task.

    x [T, S, D], y [T, S, O], weights [T, S]. With fewer samples than features by the identity of Woodbury, W = X^T (D X
    X^T + strength I)^-1 D Y: a system of S in place of D unknowns.
    """
    samples, features = x.shape[1:]
    eye = strength * torch.eye(min(samples, features), dtype=x.dtype, device=x.device)
    weighted, target = weights[..., None] * x, weights[..., None] * y
    if samples < features:
        return x.mT @ torch.linalg.solve(weighted @ x.mT + eye, target)
    return torch.linalg.solve(x.mT @ weighted + eye, x.mT @ target)


class RidgeFinder:
    """Finds an R2D2's path, which is the same for all calls. Like `PathCache` it is no part of the module's state."""

    def __init__(self, owner: Any) -> None:
        self.owner = owner
        self.shortcuts: dict[Hashable, Any] = {}  # there are none: the trunk runs in PyTorch

    def __reduce__(self) -> tuple[Any, ...]:
        return RidgeFinder, (None,)

    def __deepcopy__(self, memo: dict[int, Any]) -> RidgeFinder:
        return RidgeFinder(None)

    def find(self, batch: Batch, steps: int, first_order: bool, keep: int) -> RidgePath:
        """The path, after the checks that need no features.

        Raises ValueError for what a closed form does not have.
        """
        given = {"steps": steps != 1, "first_order": first_order, "keep_steps": keep == 2}
        given |= {"step_weights": batch.weights is not None, "per_step, query_steps, start": batch.extras is not None}
        for name, there in given.items():
            if there:
                raise ValueError(f"{name}: R2D2 has none, its solution is in closed form; use mtml.ANIL or mtml.MAML")
        check_batch(*batch.parts(), 0)
        return RidgePath(self.owner, Options(0, False, keep))

    def explain(self, batch: Batch) -> Explanation:
        """How such calls run, and why."""
        owner = self.owner
        sizes = check_batch(*batch.parts(), 0)
        node = {"node": 0, "op": "ridge", "path": "head", "params": ["head.weight", "head.bias"]}
        subject = Subject([], [node | {"shape": (owner.outputs,)}], *loss_names(owner.loss, owner.query_loss), "module")
        return RidgePath(owner, Options(0, False, 0)).explain(subject, sizes)


class RidgePath:
    """One pass of the trunk and one solution of all tasks' regressions, with an R2D2's options as they stand."""

    kind = "ridge"
    notice: tuple[str, str] | None = None

    def __init__(self, owner: Any, options: Options) -> None:
        self.owner, self.options = owner, options

    def __call__(self, batch: Batch) -> Outcome:
        """loss [T], output [T, Q, O], no support losses [0, T]; the heads' weight [T, O, D] and bias [T, O].

        Features in half precision are solved for in float32: PyTorch has no solver for less.
        """
        features = features_of(self.owner.features, batch.sx, batch.qx)
        support, query = cast(features, torch.float32)
        with plainly(support):
            found = self._solved(batch if support.dtype is features[0].dtype else batch.in_float32(), support, query)
        dtype, kind = result_dtype(features[0]), self.owner.log_strength.dtype
        if features[0].dtype is support.dtype is kind:
            return found
        adapted = {name: t.to(kind) for name, t in found.adapted.items()}
        return Outcome(found.loss.to(dtype), found.output.to(dtype), found.support_losses.to(dtype), adapted)

    def _solved(self, batch: Batch, support: Tensor, query: Tensor) -> Outcome:
        """The same of the features of both sets."""
        owner, loss = self.owner, resolve(self.owner.loss)
        tasks = support.shape[0]
        y, weights = self._targets(batch, loss, support)
        weight = owner.scale * ridge(support, y, weights, cast(owner.log_strength, torch.float32).exp()).mT  # [T, O, D]
        bias = owner.shift.expand(tasks, owner.outputs)
        adapted = {"head.weight": weight, "head.bias": bias} if self.options.keep else {}
        output, found = query @ weight.mT + bias[:, None], support.new_zeros(0)
        if batch.qx is not None:
            query_loss = loss if owner.query_loss is None else resolve(owner.query_loss)
            check_targets("qy", query_loss, output, batch.qy)
            found = task_losses(TaskLoss(query_loss), output, widened(batch.qy), batch.query_mask, tasks)
        return Outcome(found, output, support.new_zeros(0, tasks), adapted)

    def shaped(self, output: Any) -> Any:
        """The predictions [T, Q, O] as they are."""
        return output

    def explain(self, subject: Subject, sizes: Sizes) -> Explanation:
        return Explanation(
            path=self.kind,
            kernel="torch.linalg.solve",
            reason=f"a closed form: {sizes.support} support samples, systems of the smaller of samples and features",
            reasons=[],
            nodes=subject.nodes,
            trunk=TrunkOnce.trunk,
            low_rank=0,
            adapted=list(subject.nodes[0]["params"]),
            steps=0,
            first_order=False,
            loss=subject.loss,
            query_loss=subject.query_loss,
            batch_norm=subject.batch_norm,
        )

    def _targets(self, batch: Batch, loss: LossSpec | Opaque, support: Tensor) -> tuple[Tensor, Tensor]:
        """What the regression fits [T, S, O], class ids as one-hot vectors; and the samples' weights [T, S]."""
        sy, outputs = batch.sy, self.owner.outputs
        lead = support.shape[:2]
        weights = support.new_ones(lead) if batch.support_mask is None else batch.support_mask.to(support.dtype)
        check_targets("sy", loss, weights[..., None].expand(*lead, outputs), sy)  # only its shape counts
        if sy.is_floating_point():
            return sy, weights
        ids = widened(sy)
        counted = ids != IGNORED
        return F.one_hot(ids.where(counted, 0), outputs).to(support.dtype), weights * counted
