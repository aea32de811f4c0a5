"""The one line for the batched engine: a script's model and inner optimiser, and all tasks of a batch at once."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any, Unpack
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from mtml import inner
from mtml.algorithms.base import Loss, StepOptions
from mtml.algorithms.maml import MAML
from mtml.compat.follow import follow
from mtml.compat.higher.optim import diff_optim_type
from mtml.compat.higher.optimizer import DifferentiableOptimizer, Override, override_groups
from mtml.compat.higher.rules import (
    DifferentiableAdam,
    DifferentiableAdamW,
    DifferentiableRMSprop,
    DifferentiableSGD,
)
from mtml.compat.higher.utils import recursive_map
from mtml.compat.rate import number
from mtml_kernels.checks import shown

__all__ = ["meta_loss"]

Group = dict[str, Any]
# What the engine has too, unless another form of it has been registered.
ENGINE = (DifferentiableSGD, DifferentiableAdam, DifferentiableAdamW, DifferentiableRMSprop)

# An entry holds the model and not the optimiser: it goes when the optimiser does.
_learners: WeakKeyDictionary[torch.optim.Optimizer, MAML] = WeakKeyDictionary()


def meta_loss(
    model: nn.Module,
    opt: torch.optim.Optimizer,
    sx: Any,
    sy: Any = None,
    qx: Any = None,
    qy: Any = None,
    *,
    steps: int = 1,
    loss: Loss = "cross_entropy",
    query_loss: Loss | None = None,
    override: Override | None = None,
    backend: str = "auto",
    **options: Unpack[StepOptions],
) -> Tensor:
    """The query loss of every task [T] after `steps` steps of the optimiser on its support set, by `mtml.MAML`.

    It is what the loop over tasks computes with ``innerloop_ctx(model, opt, copy_initial_weights=False)``, with the
    same gradients, to the override's tensors too, and without the graph of all steps. SGD, Adam, AdamW and RMSprop run
    fused where their groups of parameters differ in their rates alone and have no state yet; other optimisers,
    registered ones too, run on the general path, which a `FallbackWarning` says.

    Args:
        model: the model, as it is; gradients arrive in its parameters.
        opt: the inner optimiser over its parameters, or over some: those are adapted. It does not change. What is kept
            between calls is kept as long as the optimiser is: make it once, not for every batch.
        sx, sy, qx, qy: support and query sets, [T, S, ...] and [T, Q, ...], or a `TaskBatch`.
        steps, loss, query_loss, backend: as of `mtml.MAML`.
        override: as of `innerloop_ctx`, also a scalar tensor.
        options: as of `mtml.MAML.meta_loss`, such as `first_order` and masks.

    Raises:
        ValueError: an optimiser of no known type, or over parameters that are not the model's; and as `mtml.MAML`.

    Example:
        >>> import torch, mtml.compat.higher as higher
        >>> net = torch.nn.Sequential(torch.nn.Linear(1, 16), torch.nn.ReLU(), torch.nn.Linear(16, 1))
        >>> opt = torch.optim.SGD(net.parameters(), lr=0.01)
        >>> x, y = torch.randn(4, 10, 1), torch.randn(4, 10, 1)
        >>> higher.meta_loss(net, opt, x, y, x, y, steps=5, loss="mse").mean().backward()
    """
    if not isinstance(opt, torch.optim.Optimizer):
        raise TypeError(f"opt: expected an optimiser of torch.optim over the model's parameters, got {shown(opt)}")
    kind = diff_optim_type(type(opt))
    groups = [_settings(group) for group in opt.param_groups]
    names = _names(model, groups)
    override_groups(override or {}, groups, kind.settings_known)
    adapted = [
        n
        for own, g in zip(names, groups, strict=True)
        for n, p in zip(own, g["params"], strict=True)
        if p.requires_grad
    ]
    fusable = kind in ENGINE and _fusable(opt, groups)
    learner = _learner(model, opt, adapted, fusable)
    if fusable:
        follow(learner, lr=_rates(names, groups), update=_rule(learner.update, kind, groups[0]))
    else:
        follow(learner, lr=1.0, update=_general(learner.update, kind, opt, names, override))
    follow(learner, loss=loss, query_loss=query_loss, backend=backend)
    return learner.meta_loss(sx, sy, qx, qy, steps=steps, **options)


def _settings(group: Group) -> Group:
    return {name: value if name == "params" else recursive_map(value, number) for name, value in group.items()}


def _names(model: nn.Module, groups: list[Group]) -> list[list[str]]:
    """The names of each group's parameters."""
    known = {id(p): name for name, p in model.named_parameters()}
    for group in groups:
        if not all(id(p) in known for p in group["params"]):
            raise ValueError("opt: expected an optimiser over the model's parameters, got some of another model")
    return [[known[id(p)] for p in group["params"]] for group in groups]


def _learner(model: nn.Module, opt: torch.optim.Optimizer, names: list[str], fusable: bool) -> MAML:
    found = _learners.get(opt)
    fits = found is not None and found.module is model and found.params == names
    if found is None or not fits or isinstance(found.update, _GeneralRule) is fusable:
        found = _learners[opt] = MAML(model, 1.0, allow_unused=True, params=names)
    return found


def _fusable(opt: torch.optim.Optimizer, groups: list[Group]) -> bool:
    """Whether the engine has this rule, with one set of numbers, from its first step on."""
    first = groups[0]
    if any(group.get("maximize") or group.get("amsgrad") for group in groups):
        return False
    if any(value is not None for state in opt.state.values() for value in state.values()):
        return False
    varied = ("params", "lr", "initial_lr")
    shared = [name for name in first if name not in varied and not name.startswith("_")]
    if any(not _same(group.get(name), first[name]) for group in groups[1:] for name in shared):
        return False
    return all(value.ndim == 0 for group in groups for value in _tensors(group))


def _tensors(group: Group) -> list[Tensor]:
    values = [v for name, v in group.items() if name not in ("params", "betas")] + [*group.get("betas", ())]
    return [value for value in values if isinstance(value, Tensor)]


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, tuple) and isinstance(b, tuple):
        return len(a) == len(b) and all(map(_same, a, b))
    return a is b or (not (isinstance(a, Tensor) or isinstance(b, Tensor)) and bool(a == b))


def _rates(names: list[list[str]], groups: list[Group]) -> float | Tensor | dict[str, Any]:
    first = groups[0]["lr"]
    if isinstance(first, nn.Parameter) or any(not _same(group["lr"], first) for group in groups):
        return {name: group["lr"] for own, group in zip(names, groups, strict=True) for name in own}
    return first


def _rule(present: Any, kind: type, group: Group) -> inner.Rule | None:
    """The engine's form of the optimiser: the present one where its numbers are the same; None for plain descent."""
    new = _engine_rule(kind, group)
    if isinstance(present, inner.Rule) and present.spec == new.spec:
        old, numbers = present.numbers(), new.numbers()
        if all(_same(old[name], value) for name, value in numbers.items()):
            return present
    return None if new.plain else new


def _engine_rule(kind: type, group: Group) -> inner.Rule:
    decay = group["weight_decay"]
    if kind is DifferentiableSGD:
        momentum, dampening, nesterov = group["momentum"], group["dampening"], bool(group["nesterov"])
        return inner.SGD(momentum, dampening, nesterov, decay)
    if kind is DifferentiableRMSprop:
        return inner.RMSprop(group["alpha"], group["eps"], group["momentum"], bool(group["centered"]), decay)
    adam = inner.AdamW if kind is DifferentiableAdamW or group.get("decoupled_weight_decay") else inner.Adam
    return adam(group["betas"], group["eps"], weight_decay=decay)


def _general(
    present: Any, kind: type, opt: torch.optim.Optimizer, names: list[list[str]], override: Override | None
) -> _GeneralRule:
    if isinstance(present, _GeneralRule) and (present.kind, present.names) == (kind, names):
        present.override = override
        return present
    return _GeneralRule(kind, opt, names, override)


class _GeneralRule:
    """Any differentiable optimiser as an update rule of MAML: what it carries from step to step is itself."""

    def __init__(
        self,
        kind: type[DifferentiableOptimizer],
        opt: torch.optim.Optimizer,
        names: list[list[str]],
        override: Override | None,
    ) -> None:
        self.kind, self.names, self.override = kind, names, override
        self.opt = weakref.ref(opt)

    def __call__(
        self,
        params: Mapping[str, Tensor],
        grads: Mapping[str, Tensor],
        lr: Mapping[str, Tensor],
        step: int,
        state: DifferentiableOptimizer | None = None,
    ) -> tuple[dict[str, Tensor], DifferentiableOptimizer]:
        if state is None:
            opt = self.opt()
            assert opt is not None, "the learner goes with its optimiser"
            state = self.kind(opt, [p for g in opt.param_groups for p in g["params"]], override=self.override)
        moved = state.advance(*([[of.get(name) for name in own] for own in self.names] for of in (params, grads)))
        after = [(n, p) for own, new in zip(self.names, moved, strict=True) for n, p in zip(own, new, strict=True)]
        return {name: p for name, p in after if name in params}, state
