"""ProtoMAML: each task's head starts from the prototypes of its classes."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any, Unpack

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtml.adapted import Adapted
from mtml.algorithms.base import CallOptions, MetaOutput
from mtml.algorithms.learner import LearnerOptions, ModelLearner, Rate
from mtml.params import ParamsArg, select
from mtml.paths.batch import unpacked
from mtml.paths.judge import check_targets
from mtml.wrappers import refuse_data_parallel
from mtml_kernels.checks import shown, widened
from mtml_kernels.general import GeneralPlan
from mtml_kernels.losses import IGNORED, resolve
from mtml_kernels.precision import cast, plainly

__all__ = ["ProtoMAML"]


class ProtoMAML(ModelLearner):
    """MAML whose linear head starts, in every task, as a prototypical network's classifier.

        c_k = sum_{s: y_s = k} w_s f(x_s) / sum_{s: y_s = k} w_s       the prototype of class k, w the support mask
        head.weight_k = 2 c_k,    head.bias_k = -|c_k|^2               so that logits are |f(x)|^2 - |f(x) - c_k|^2
        then K gradient steps on trunk and head, as MAML

    Tasks may thus have classes in any order without a head that knows one. Gradients are exact to second order, through
    the prototypes too. The steps of all tasks are one fused call, from each task's own start.

    Args:
        features: the trunk, x [N, ...] -> [N, D].
        head: an ``nn.Linear`` of D inputs with a bias; its own values are never read, and get no gradient.
        lr, first_order, params and the keyword arguments: as of `MAML`, of the model ``features``, ``head``; `params`
            may leave out tensors of the trunk. With first_order d theta_K / d theta_0 = I, and theta_0, which the
            prototypes are part of, is still differentiated.

    Raises:
        ValueError: a class without a support sample in some task; params without the head; else as `MAML`.
        TypeError: targets that are no class ids; a head that is no ``nn.Linear`` with a bias; else as `MAML`.

    Example:
        >>> import torch, mtml
        >>> trunk = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.ReLU())
        >>> learner = mtml.ProtoMAML(trunk, torch.nn.Linear(32, 5), lr=0.05, steps=3)
        >>> x, y = torch.randn(4, 10, 8), torch.arange(10).remainder(5).expand(4, 10)
        >>> learner.meta_loss(x, y, x, y).mean().backward()

    Paper: Triantafillou et al., "Meta-Dataset: A Dataset of Datasets for Learning to Learn from Few Examples", 2020
    (arXiv:1903.03096).
    """

    def __init__(
        self,
        features: nn.Module,
        head: nn.Linear,
        lr: Rate,
        first_order: bool = False,
        *,
        params: ParamsArg = None,
        **options: Unpack[LearnerOptions],
    ) -> None:
        if not isinstance(features, nn.Module):
            raise TypeError(f"features: expected an nn.Module, got {shown(features)}")
        refuse_data_parallel("features", features)
        if type(head) is not nn.Linear or head.bias is None:
            raise TypeError(f"head: expected an nn.Linear with a bias, got {shown(head)}")
        model = nn.Sequential(OrderedDict(features=features, head=head))
        super().__init__(model, lr, first_order, params=params, **options)
        missing = {"head.weight", "head.bias"} - set(select(model, params))
        if missing:
            raise ValueError(f"params: expected the head among the adapted tensors, missing {sorted(missing)}")

    def meta_forward(
        self, sx: Any, sy: Any = None, qx: Any = None, qy: Any = None, **options: Unpack[CallOptions]
    ) -> MetaOutput:
        """As `MAML.meta_forward`, less per_step and start."""
        masks = options.pop("support_mask", None), options.pop("query_mask", None)
        sx, sy, qx, qy, support_mask, query_mask = unpacked(sx, sy, qx, qy, *masks, self)
        _refuse(options.pop("per_step", False), options.pop("start", None))
        options |= {"support_mask": support_mask, "query_mask": query_mask}
        options["start"] = self.prototypes(sx, sy, support_mask)
        return super().meta_forward(sx, sy, qx, qy, **options)

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
        """As `MAML.adapt_tasks`, less per_step and start."""
        if sy is None:
            sx, sy, _, _, support_mask, _ = unpacked(sx, sy, None, None, support_mask, None, self, adapting=True)
        _refuse(per_step, start)
        own = self.prototypes(sx, sy, support_mask)
        options: dict[str, Any] = {"steps": steps, "first_order": first_order, "keep_steps": keep_steps}
        return super().adapt_tasks(sx, sy, support_mask=support_mask, start=own, **options)

    def prototypes(self, sx: Any, sy: Tensor, support_mask: Tensor | None = None) -> dict[str, Tensor]:
        """Where every task's head starts: {"head.weight": [T, C, D], "head.bias": [T, C]}, differentiable."""
        x = cast(self._features(sx, sy), torch.float32)  # [T, S, D]
        head = self.module.head
        assert isinstance(head, nn.Linear)
        classes = head.out_features
        if not isinstance(sy, Tensor) or sy.is_floating_point():
            raise TypeError(f"sy: expected class ids [T, S], which have prototypes, got {shown(sy)}")
        check_targets("sy", resolve("cross_entropy"), x[..., :1].expand(*x.shape[:2], classes), sy)
        counted = sy != IGNORED
        weights = F.one_hot(widened(sy).where(counted, 0), classes).to(x.dtype) * counted[..., None]  # [T, S, C]
        if support_mask is not None:
            weights = weights * support_mask.to(x.dtype)[..., None]
        total = weights.sum(1)  # [T, C]
        empty = (total == 0).nonzero()
        if len(empty):
            task, kind = empty[0].tolist()
            raise ValueError(
                f"sy: expected samples of all {classes} classes in every support set, got none of class {kind} in task "
                f"{task}; make a head of as many classes as the tasks have"
            )
        with plainly(x):
            centres = weights.mT @ x / total[..., None]  # [T, C, D]
        dtype = head.weight.dtype
        return {"head.weight": (2.0 * centres).to(dtype), "head.bias": -centres.square().sum(2).to(dtype)}

    def _features(self, sx: Any, sy: Tensor) -> Tensor:
        """The trunk at theta, on each task's samples by themselves, as the inner loop runs it."""
        trunk = self.module.features
        assert isinstance(trunk, nn.Module)
        mode = "module" if self.batch_norm == "track" else self.batch_norm  # the inner loop tracks this pass
        plan, none = GeneralPlan("vmap", "", mode), torch.zeros(0, len(sy))
        found = Adapted(trunk, {}, none, self.loss, False, plan)(sx)
        if not isinstance(found, Tensor) or found.ndim != 3:
            raise TypeError(f"features: expected the trunk to return a tensor [N, D] a task, got {shown(found)} of all")
        return found


def _refuse(per_step: bool, start: Any) -> None:
    if per_step or start is not None:
        name = "per_step" if per_step else "start"
        raise ValueError(f"{name}: ProtoMAML starts from the prototypes of one support set; use mtml.MAML(start=...)")
