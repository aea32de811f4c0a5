"""ANIL: the trunk runs once, and only a linear head is adapted to each task."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from mtml.adapted import Adapted
from mtml.algorithms.maml import MetaOutput
from mtml.inner_lr import InnerLR
from mtml.paths.cache import unpacked
from mtml.paths.explain import Explanation
from mtml.paths.fused import in_our_words
from mtml_kernels.checks import (
    check_batch,
    check_choice,
    check_devices,
    check_dtypes,
    check_finite,
    check_steps,
    check_target,
    leaves,
    shown,
    widened,
)
from mtml_kernels.functional.head_forms import gram_is_cheaper
from mtml_kernels.functional.head_inner_loop import HeadResult, head_inner_loop
from mtml_kernels.general import GeneralPlan
from mtml_kernels.losses import KINDS, LossSpec, Opaque, resolve
from mtml_kernels.ops.head_inner_loop import backend_for

__all__ = ["ANIL", "AdaptedHead"]

BACKENDS = ("auto", "cpu", "triton", "cuda", "reference")
Loss = str | Callable[..., Tensor]
Rate = float | Tensor | tuple[Any, Any] | Mapping[str, Any] | InnerLR


class ANIL(nn.Module):
    """Almost no inner loop: features from a trunk shared by all tasks, and a linear head adapted to each.

    The trunk sees the support and query samples of all tasks once, folded into one batch [T*S + T*Q, ...]; the head's K
    steps then run as one operation (`mtml_kernels.head_inner_loop`), in the Gram matrix of each task's support features
    where that is cheaper. Gradients are exact, second order included, and reach the trunk through both sets.

    Batch normalisation in train mode therefore takes its statistics over all tasks and both sets, and updates running
    statistics once a call; in eval mode each sample stands alone, as in `MAML`. For statistics of each task's own sets
    use `mtml.MAML` with ``params="head.*"``.

    Args:
        features: the trunk, x [N, ...] -> [N, D] (further dimensions are flattened).
        head: an ``nn.Linear`` of D inputs; trainable where its parameters require grad.
        lr: the head's inner learning rate: a number; a scalar tensor; [K] per step; [1, C] or [K, C] per class; a pair
            of such, or {"weight": ..., "bias": ...}; or an `InnerLR` of the head, per "all" or "tensor".
        steps: K.
        loss, query_loss: "cross_entropy", "mse", "bce_with_logits", "huber" or "l1", or the ``nn.*Loss`` or ``F.*``.
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
        weight_decay: float = 0.0,
        proximal: float = 0.0,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        if not isinstance(features, nn.Module):
            raise TypeError(f"features: expected an nn.Module, got {shown(features)}")
        if type(head) is not nn.Linear:
            raise TypeError(
                f"head: expected an nn.Linear, got {type(head).__name__}; for any other head use mtml.MAML(head, ...) "
                "on features that require grad"
            )
        check_choice("backend", backend, BACKENDS)
        for given in (loss,) if query_loss is None else (loss, query_loss):
            _fused(given)
        check_finite("weight_decay", weight_decay)
        check_finite("proximal", proximal)
        self.features, self.head, self.lr = features, head, lr
        self.steps, self.loss, self.query_loss = check_steps(steps), loss, query_loss
        self.weight_decay, self.proximal, self.backend = float(weight_decay), float(proximal), backend
        self._rate(self.steps)

    def meta_forward(
        self,
        sx: Any,
        sy: Any = None,
        qx: Any = None,
        qy: Any = None,
        *,
        steps: int | None = None,
        support_mask: Tensor | None = None,
        query_mask: Tensor | None = None,
    ) -> MetaOutput:
        """Adapt the head to every support set and judge the results on the query sets; arguments as `MAML`'s.

        Returns:
            loss [T] (not averaged), output [T, Q, C] after the last step, support_losses [K, T].
        """
        if sy is None or qx is None or qy is None:
            sx, sy, qx, qy, support_mask, query_mask = unpacked(sx, sy, qx, qy, support_mask, query_mask)
        steps = self.steps if steps is None else check_steps(steps)
        check_batch(sx, sy, qx, qy, support_mask, query_mask, steps)
        support, query = self._both(sx, qx)
        result = self._run(support, sy, query, qy, steps, support_mask, query_mask, adapted=False)
        return MetaOutput(result.loss, result.logits, result.support_losses)

    def meta_loss(
        self,
        sx: Any,
        sy: Any = None,
        qx: Any = None,
        qy: Any = None,
        *,
        steps: int | None = None,
        support_mask: Tensor | None = None,
        query_mask: Tensor | None = None,
    ) -> Tensor:
        """The query loss of every task [T]."""
        masks = {"support_mask": support_mask, "query_mask": query_mask}
        return self.meta_forward(sx, sy, qx, qy, steps=steps, **masks).loss

    def adapt_tasks(
        self, sx: Any, sy: Any = None, *, steps: int | None = None, support_mask: Tensor | None = None
    ) -> AdaptedHead:
        """Adapt the head to every support set and return the adapted heads, differentiable back to everything."""
        if sy is None:
            sx, sy, _, _, support_mask, _ = unpacked(sx, sy, None, None, support_mask, None, adapting=True)
        steps = self.steps if steps is None else check_steps(steps)
        check_batch(sx, sy, None, None, support_mask, None, steps)
        support = self._fold(sx)
        none = support[:, :0]
        result = self._run(support, sy, none, None, steps, support_mask, None, adapted=True)
        assert result.weight is not None
        own = {"head.weight": result.weight} | ({} if result.bias is None else {"head.bias": result.bias})
        loss = self.loss if self.query_loss is None else self.query_loss
        return AdaptedHead(self, own, result.support_losses, loss, False, GeneralPlan("vmap", "", "module"))

    def explain(self, sx: Any, sy: Any = None, qx: Any = None, qy: Any = None) -> Explanation:
        """Print and return how such a call runs: in which form, on which backend, and why."""
        if sy is None:
            sx, sy, qx, qy, _, _ = unpacked(sx, sy, qx, qy, None, None, adapting=True)
        sizes = check_batch(sx, sy, qx, qy, None, None, self.steps)
        weight = self.head.weight
        backend = backend_for(self.backend, weight, sizes.support)
        form, why = self._form(sizes.support, sizes.query, backend)
        name = self.loss if isinstance(self.loss, str) else getattr(self.loss, "__name__", type(self.loss).__name__)
        adapted = ["head.weight", "head.bias"][: 1 if self.head.bias is None else 2]
        node: dict[str, Any] = {
            "node": 0,
            "op": "linear",
            "path": "head",
            "params": adapted,
            "shape": (weight.shape[0],),
        }
        content: dict[str, Any] = {"path": "head", "kernel": f"{backend}, {form} form", "reason": why, "reasons": []}
        content |= {"nodes": [node], "adapted": adapted, "steps": self.steps, "first_order": False}
        content |= {"loss": name, "query_loss": name, "batch_norm": "module"}
        content["trunk"] = "it runs once over both sets"
        explanation = Explanation(content)
        print(explanation)
        return explanation

    def forward(self, x: Any) -> Tensor:
        """The head as it is before adaptation, on the trunk's features: [N, ...] -> [N, C]."""
        logits: Tensor = self.head(_call(self.features, x).flatten(1))
        return logits

    # --- parts --------------------------------------------------------------------------------------------------------

    def _both(self, sx: Any, qx: Any) -> tuple[Tensor, Tensor]:
        """Features [T, S, D] and [T, Q, D] of one pass of the trunk over both sets."""
        lead = [pytree.tree_leaves(x)[0].shape[:2] for x in (sx, qx)]
        cut = lead[0].numel()
        both = pytree.tree_map(lambda s, q: torch.cat((s.flatten(0, 1), q.flatten(0, 1))), sx, qx)
        rows = _call(self.features, both).flatten(1)
        return rows[:cut].unflatten(0, lead[0]), rows[cut:].unflatten(0, lead[1])

    def _fold(self, x: Any) -> Tensor:
        """Features [T, N, D] of one set."""
        lead = pytree.tree_leaves(x)[0].shape[:2]
        return _call(self.features, pytree.tree_map(lambda t: t.flatten(0, 1), x)).flatten(1).unflatten(0, lead)

    def _run(
        self,
        support: Tensor,
        sy: Tensor,
        query: Tensor,
        qy: Tensor | None,
        steps: int,
        support_mask: Tensor | None,
        query_mask: Tensor | None,
        adapted: bool,
    ) -> HeadResult:
        try:
            return head_inner_loop(
                support,
                widened(sy),
                query,
                self.head.weight,
                self.head.bias,
                self._rate(steps),
                steps=steps,
                loss=self.loss,
                query_labels=widened(qy),
                query_loss=self.query_loss,
                support_mask=support_mask,
                query_mask=query_mask,
                weight_decay=self.weight_decay,
                proximal=self.proximal,
                adapted=adapted,
                backend=self.backend,
            )
        except (TypeError, ValueError) as error:
            self._check_targets(support, sy, query, qy)
            raise in_our_words(error) from None

    def _check_targets(self, support: Tensor, sy: Any, query: Tensor, qy: Any) -> None:
        """Raise where targets do not fit, by the names that they have here."""
        weight, losses = self.head.weight, (self.loss, self.loss if self.query_loss is None else self.query_loss)
        for name, loss, features, y in zip(("sy", "qy"), losses, (support, query), (sy, qy), strict=True):
            if y is None:
                continue
            kind = _fused(loss).kind
            check_devices(weight.device, leaves(name, y))
            check_target(name, kind, y, (*features.shape[:2], weight.shape[0]))
            if kind != "cross_entropy":
                check_dtypes(weight.dtype, leaves(name, y), f"the model's dtype, for loss {kind!r}")
            elif y.is_floating_point():
                raise ValueError(
                    f"{name}: expected class ids [T, N], got probabilities {list(y.shape)}; use mtml.MAML(head, ...) "
                    "on features that require grad, which takes them, or .argmax(2)"
                )

    def _rate(self, steps: int) -> Any:
        """The rate in a form that `head_inner_loop` takes."""
        if isinstance(self.lr, InnerLR) and self.lr.steps is not None and self.lr.steps < steps:
            raise ValueError(f"lr: expected at least steps={steps} rates, got InnerLR(steps={self.lr.steps})")
        table: Any = self.lr.as_dict() if isinstance(self.lr, InnerLR) else self.lr
        if not hasattr(table, "items"):
            return table
        names = ["weight"] if self.head.bias is None else ["weight", "bias"]
        missing = [name for name in names if name not in table]
        if missing:
            raise ValueError(f"lr: expected rates for {names}, got none for {missing}")
        pair = [_flat(name, table[name]) for name in names]
        return pair[0] if len(pair) == 1 else tuple(pair)

    def _form(self, support: int, query: int, backend: str) -> tuple[str, str]:
        if self.weight_decay or self.proximal:
            return "Gram", "decay and proximal terms are in the Gram form"
        if backend == "triton":
            return "Gram", "it is the form that runs on a GPU"
        classes, features = self.head.weight.shape
        if gram_is_cheaper(support, query, features, classes, self.steps):
            return "Gram", f"cheaper at {support} support samples of {features} features, {self.steps} steps"
        return "weight", f"per-task weights are cheaper at {support} support samples of {features} features"


def _call(features: nn.Module, x: Any) -> Tensor:
    """The trunk on a tensor, or on a tuple (several arguments) or dict (keyword arguments) of such."""
    args, named = ((), x) if isinstance(x, Mapping) else (x if isinstance(x, list | tuple) else (x,), {})
    found = features(*args, **named)
    if not isinstance(found, Tensor) or found.ndim < 2:
        raise TypeError(f"features: expected the trunk to return a tensor [N, D], got {shown(found)}")
    return found


def _flat(name: str, rate: Any) -> Any:
    """A rate per tensor as `InnerLR` and `MAML` write it, [K, 1, ...], as [K]; rates per element are refused."""
    if not isinstance(rate, Tensor) or rate.ndim < 2:
        return rate
    if rate.numel() == rate.shape[0]:
        return rate.reshape(-1)
    raise ValueError(
        f"lr[{name!r}]: expected one rate, or one per step, got {shown(rate)}; rates per element need a weight for "
        "every task: mtml.MetaSGD(head) on features that require grad"
    )


def _fused(loss: Loss) -> LossSpec:
    spec = resolve(loss)
    if isinstance(spec, Opaque):
        raise ValueError(
            f"loss: expected one of {', '.join(KINDS)} or its nn or F form, got {spec.reason}; for any callable use "
            "mtml.MAML(head, ...) on features that require grad"
        )
    return spec


class AdaptedHead(Adapted):
    """What `ANIL.adapt_tasks` returns: an `Adapted` whose tasks share the trunk, which runs once."""

    def __call__(self, x: Any, step: int = -1) -> Tensor:
        """Each task's head on its own inputs: x [T, N, ...] (or a tuple or dict of such) -> [T, N, C]."""
        self._check_tasks("x", x)
        params = self.params_at(step)
        assert isinstance(self.model, ANIL)
        logits = self.model._fold(x) @ params["head.weight"].mT
        return logits + params["head.bias"][:, None] if "head.bias" in params else logits

    def detach(self) -> AdaptedHead:
        """The same values without their history."""
        tensors = {name: t.detach() for name, t in self._tensors.items()}
        losses = self.support_losses.detach()
        return AdaptedHead(self.model, tensors, losses, self._loss, self.keep_steps, self._plan)
