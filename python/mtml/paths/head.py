"""ANIL's path: one pass of the trunk, and the steps of a linear head as one operation."""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor, nn

from mtml.inner_lr import InnerLR
from mtml.paths.batch import Batch
from mtml.paths.explain import Explanation, Subject, loss_names
from mtml.paths.features import TrunkFeatures
from mtml.paths.path import Options, Outcome, in_our_words
from mtml.paths.trunk import TrunkOnce
from mtml.wrappers import is_sharded, refuse_sharded
from mtml_kernels.checks import (
    Sizes,
    check_batch,
    check_devices,
    check_dtypes,
    check_steps,
    check_target,
    leaves,
    shown,
    widened,
)
from mtml_kernels.functional.head_forms import gram_is_cheaper
from mtml_kernels.functional.head_inner_loop import head_inner_loop
from mtml_kernels.losses import KINDS, Loss, LossSpec, Opaque, resolve
from mtml_kernels.ops.head_inner_loop import BACKENDS, backend_for
from mtml_kernels.precision import casts, computed_in, mixes

__all__ = ["HeadFinder", "HeadPath", "fused_loss", "head_rate"]

_computed = computed_in(BACKENDS)


class HeadFinder:
    """Finds an ANIL's path, which is the same for all calls. Like `PathCache` it is no part of the module's state."""

    def __init__(self, owner: Any) -> None:
        self.owner = owner
        self.shortcuts: dict[Hashable, Any] = {}  # there are none: a call is a trunk's pass and a head's
        self.trunk = TrunkFeatures(owner)

    def __reduce__(self) -> tuple[Any, ...]:
        return HeadFinder, (None,)

    def __deepcopy__(self, memo: dict[int, Any]) -> HeadFinder:
        return HeadFinder(None)

    def find(self, batch: Batch, steps: int, first_order: bool, keep: int) -> HeadPath:
        """The path, after the checks that need no features.

        Raises ValueError for what a loop over a head alone does not have.
        """
        if first_order or keep == 2 or batch.weights is not None or batch.extras is not None:
            name = "first_order" if first_order else "keep_steps" if keep == 2 else "step_weights"
            if batch.extras is not None:
                name = "per_step, query_steps and start"
            raise ValueError(f"{name}: ANIL has none; use mtml.MAML(model, params='head.*'), which takes it")
        if is_sharded(self.owner.head.weight):
            refuse_sharded("head", self.owner.head)
        check_batch(*batch.parts(), check_steps(steps))
        return HeadPath(self.owner, Options(steps, False, keep), self.trunk)

    def explain(self, batch: Batch) -> Explanation:
        """How such calls run, and why."""
        owner = self.owner
        sizes = check_batch(*batch.parts(), owner.steps)
        weight, adapted = owner.head.weight, ["head.weight", "head.bias"][: 1 if owner.head.bias is None else 2]
        node = {"node": 0, "op": "linear", "path": "head", "params": adapted, "shape": (weight.shape[0],)}
        subject = Subject([], [node], *loss_names(owner.loss, owner.query_loss), owner.batch_norm)
        found = HeadPath(owner, Options(owner.steps, False, 0), self.trunk).explain(subject, sizes)
        return dataclasses.replace(found, trunk=found.trunk + self.trunk.how(owner, batch.sx))


class HeadPath:
    """One pass of the trunk and one call of `mtml_kernels.head_inner_loop`, with an ANIL's options as they stand."""

    kind = "head"
    notice: tuple[str, str] | None = None

    def __init__(self, anil: Any, options: Options, trunk: TrunkFeatures) -> None:
        self.anil, self.options, self.trunk = anil, options, trunk

    def __call__(self, batch: Batch) -> Outcome:
        """loss [T], output [T, Q, C], support_losses [K, T], and the head's weight [T, C, D] and bias [T, C]."""
        anil, steps = self.anil, self.options.steps
        head = anil.head
        support, query = self.trunk(anil, batch.sx, batch.qx)
        try:
            found = head_inner_loop(
                support,
                widened(batch.sy),
                query,
                head.weight,
                head.bias,
                head_rate(anil.lr, head, steps),
                steps=steps,
                loss=anil.loss,
                query_labels=widened(batch.qy),
                query_loss=anil.query_loss,
                support_mask=batch.support_mask,
                query_mask=batch.query_mask,
                weight_decay=anil.weight_decay,
                proximal=anil.proximal,
                adapted=self.options.keep == 1,
                backend=anil.backend,
            )
        except (TypeError, ValueError) as error:
            self._check_targets(batch, support, query)
            raise in_our_words(error) from None
        own = {"head.weight": found.weight, "head.bias": found.bias}
        adapted = {name: tensor for name, tensor in own.items() if tensor is not None}
        return Outcome(found.loss, found.logits, found.support_losses, adapted)

    def shaped(self, output: Any) -> Any:
        """The logits [T, Q, C] as they are."""
        return output

    def explain(self, subject: Subject, sizes: Sizes) -> Explanation:
        head, name = self.anil.head.weight, self.anil.backend
        dtype = torch.float32 if casts(head) and mixes(head.dtype) else _computed(name, head.device.type, head.dtype)
        backend = backend_for(name, torch.empty_like(head, dtype=dtype), sizes.support)
        form, why = self._form(sizes, backend)
        return Explanation(
            path=self.kind,
            kernel=f"{backend}, {form} form",
            reason=why,
            reasons=[],
            nodes=subject.nodes,
            trunk=TrunkOnce.trunk,
            low_rank=0,
            adapted=list(subject.nodes[0]["params"]),
            steps=self.options.steps,
            first_order=False,
            loss=subject.loss,
            query_loss=subject.query_loss,
            batch_norm=subject.batch_norm,
        )

    def _form(self, sizes: Sizes, backend: str) -> tuple[str, str]:
        """Which form the head's loop takes, and why: as `head_inner_loop` chooses."""
        if self.anil.weight_decay or self.anil.proximal:
            return "Gram", "decay and proximal terms are in the Gram form"
        if backend == "triton":
            return "Gram", "it is the form that runs on a GPU"
        classes, features = self.anil.head.weight.shape
        shape = f"{sizes.support} support samples of {features} features"
        if gram_is_cheaper(sizes.support, sizes.query, features, classes, self.options.steps):
            return "Gram", f"cheaper at {shape}, {self.options.steps} steps"
        return "weight", f"per-task weights are cheaper at {shape}"

    def _check_targets(self, batch: Batch, support: Tensor, query: Tensor) -> None:
        """Raise where targets do not fit, by the names that they have here."""
        weight, anil = self.anil.head.weight, self.anil
        losses = (anil.loss, anil.loss if anil.query_loss is None else anil.query_loss)
        sets = (("sy", batch.sy, support), ("qy", batch.qy, query))
        for (name, y, features), loss in zip(sets, losses, strict=True):
            if y is None:
                continue
            kind = fused_loss(loss).kind
            check_devices(weight.device, leaves(name, y))
            check_target(name, kind, y, (*features.shape[:2], weight.shape[0]))
            if kind != "cross_entropy":
                check_dtypes(weight.dtype, leaves(name, y), f"the model's dtype, for loss {kind!r}")
            elif y.is_floating_point():
                raise ValueError(
                    f"{name}: expected class ids [T, N], got probabilities {list(y.shape)}; use mtml.MAML(head, ...) "
                    "on features that require grad, which takes them, or .argmax(2)"
                )


def head_rate(lr: Any, head: nn.Linear, steps: int) -> Any:
    """The rate in a form that `head_inner_loop` takes: for both tensors, or (weight's, bias's).

    Raises ValueError where rates are missing, are fewer than the steps, or differ from element to element.
    """
    if isinstance(lr, InnerLR) and lr.steps is not None and lr.steps < steps:
        raise ValueError(f"lr: expected at least steps={steps} rates, got InnerLR(steps={lr.steps})")
    table: Any = lr.as_dict() if isinstance(lr, InnerLR) else lr
    if isinstance(table, float | int) or not hasattr(table, "items"):
        return table
    names = ["weight"] if head.bias is None else ["weight", "bias"]
    missing = [name for name in names if name not in table]
    if missing:
        raise ValueError(f"lr: expected rates for {names}, got none for {missing}")
    pair = [_flat(name, table[name]) for name in names]
    return pair[0] if len(pair) == 1 else tuple(pair)


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


def fused_loss(loss: Loss) -> LossSpec:
    """The loss as the engine knows it. Raises ValueError where it does not."""
    spec = resolve(loss)
    if isinstance(spec, Opaque):
        raise ValueError(
            f"loss: expected one of {', '.join(KINDS)} or its nn or F form, got {spec.reason}; for any callable use "
            "mtml.MAML(head, ...) on features that require grad"
        )
    return spec
