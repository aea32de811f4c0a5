"""What every differentiable optimiser shares: settings and state of one of torch.optim, and a step on a loss."""

from __future__ import annotations

import abc
import copy
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mtml.compat.higher.patch import FunctionalModule
from mtml.compat.higher.utils import copied, recursive_map
from mtml.compat.rate import number
from mtml.gradients import recorded_gradients
from mtml_kernels.checks import shown
from mtml_kernels.transforms import refuse_transforms

__all__ = ["DifferentiableOptimizer", "Override", "override_groups"]

Override = Mapping[str, Any]
GradCallback = Callable[[Sequence[Tensor | None]], Sequence[Tensor | None]]


def override_groups(override: Override, groups: Sequence[dict[str, Any]], known: bool) -> None:
    """Put an override's values into groups of parameters.

    Raises:
        ValueError: as many values as neither one nor one a group; with `known`, a setting that the groups have not.
    """
    for name, values in override.items():
        values = recursive_map(values, number)
        if isinstance(values, int | float) or (isinstance(values, Tensor) and values.ndim == 0):
            values = [values]
        if len(values) not in (1, len(groups)):
            raise ValueError(
                f"override[{name!r}]: expected one value, or one for each of {len(groups)} groups of parameters, "
                f"got {len(values)}"
            )
        for i, group in enumerate(groups):
            if known and name not in group:
                settings = ", ".join(key for key in group if key != "params")
                raise ValueError(f"override: expected settings among {settings}, got {name!r}")
            group[name] = values[0] if len(values) == 1 else values[i]


class DifferentiableOptimizer(abc.ABC):
    """An optimiser whose steps autograd can differentiate, of settings and state of one of torch.optim.

    A class for another optimiser has `_update`, which puts new tensors into the groups' ``"params"``, by the gradients
    it is given and by `self.state[group][position]`, a dict; `register_optim` makes it known.

    Args:
        other: the optimiser; its settings and state are copied as they are now.
        reference_params: the model's parameters, in the order of `params` of `step` and of the patched model's.
        fmodel: a patched model, whose weights a step takes and replaces.
        device: where the state is to be.
        override: {setting: [value]} or {setting: [one for each group of parameters]} in the place of the optimiser's,
            also a number or a scalar tensor; tensors may require grad, or be computed from ones that do.
        grad_callback: all gradients, in the order of the parameters and None where there is none -> the same, clipped
            for example.
        track_higher_grads: False: a step's results are leaves, and nothing is kept.

    Raises:
        ValueError: `other` has parameters that are not among reference_params; an override of no setting.

    Example:
        >>> import torch, mtml.compat.higher as higher
        >>> net = torch.nn.Linear(2, 1)
        >>> fnet = higher.monkeypatch(net)
        >>> rate = torch.tensor(0.1, requires_grad=True)
        >>> opt = higher.get_diff_optim(torch.optim.SGD(net.parameters(), 1.0), net.parameters(), fnet,
        ...                             override={"lr": [rate]})
        >>> _ = opt.step(fnet(torch.ones(4, 2)).square().mean())
        >>> fnet(torch.ones(4, 2)).square().mean().backward()
        >>> rate.grad.shape
        torch.Size([])
    """

    settings_known = False  # is an override of a setting that the groups have not an error?

    def __init__(
        self,
        other: torch.optim.Optimizer,
        reference_params: Iterable[Tensor],
        fmodel: FunctionalModule | None = None,
        device: torch.device | None = None,
        override: Override | None = None,
        grad_callback: GradCallback | None = None,
        track_higher_grads: bool = True,
        **kwargs: Any,
    ) -> None:
        index = {id(p): i for i, p in enumerate(reference_params)}
        self.param_groups: list[dict[str, Any]] = []
        self.state: list[defaultdict[int, Any]] = []
        self._group_to_param_list: list[list[int]] = []
        for group in other.param_groups:
            params = group["params"]
            if not all(id(p) in index for p in params):
                raise ValueError(
                    "reference_params: expected the parameters that the optimiser has, among others; this optimiser "
                    "has some of another model: make it of model.parameters()"
                )
            self._group_to_param_list.append([index[id(p)] for p in params])
            settings = {name: recursive_map(v, _own) for name, v in group.items() if name != "params"}
            self.param_groups.append({"params": [None] * len(params), **settings})
            self.state.append(defaultdict(dict, _states(other, params, device)))
        if override is not None:
            override_groups(override, self.param_groups, self.settings_known)
        self._grad_callback, self._fmodel, self._track_higher_grads = grad_callback, fmodel, track_higher_grads

    def step(
        self,
        loss: Tensor,
        params: Iterable[Tensor] | None = None,
        override: Override | None = None,
        grad_callback: GradCallback | None = None,
        **kwargs: Any,
    ) -> list[Tensor]:
        """In place of `zero_grad`, `backward` and `step`: the parameters after a step on the loss, which the patched
        model, if there is one, takes over.

        Args:
            loss: a scalar, computed from the parameters.
            params: the parameters; None: the patched model's.
            override: as of the class, from this step on.
            grad_callback: as of the class, for this step.

        Raises:
            TypeError, ValueError: a loss that is no scalar tensor; no params where no patched model has any.
            RuntimeError: the loss does not require grad; or the call is within a transform of torch.func.
        """
        if override is not None:
            override_groups(override, self.param_groups, self.settings_known)
        theta = self._present(params)
        callback = self._grad_callback if grad_callback is None else grad_callback
        grads = self._gradients(loss, theta)
        if callback is not None:
            grads = list(callback(grads))
            if len(grads) != len(theta):
                raise ValueError(f"grad_callback: expected {len(theta)} gradients, as it was given, got {len(grads)}")
        groups = self._group_to_param_list
        moved = self.advance([[theta[i] for i in own] for own in groups], [[grads[i] for i in own] for own in groups])
        after = list(theta)
        for places, own in zip(groups, moved, strict=True):
            for i, p in zip(places, own, strict=True):
                after[i] = p if self._track_higher_grads else p.detach().requires_grad_(theta[i].requires_grad)
        if self._fmodel is not None:
            self._fmodel.update_params(after)
        return after

    def advance(
        self, params: Sequence[Sequence[Tensor | None]], grads: Sequence[Sequence[Tensor | None]]
    ) -> list[list[Tensor]]:
        """The groups' parameters after a step by given gradients; where there is no gradient they stay."""
        for group, own in zip(self.param_groups, params, strict=True):
            group["params"] = list(own)
        self._update([list(own) for own in grads])
        return [group["params"] for group in self.param_groups]

    def _present(self, params: Iterable[Tensor] | None) -> list[Tensor]:
        if params is not None:
            return list(params)
        present = None if self._fmodel is None else self._fmodel.fast_params
        if present is None:
            raise ValueError("params: expected the parameters that the loss was computed from, since no fmodel has any")
        return present

    def _gradients(self, loss: Tensor, theta: Sequence[Tensor]) -> list[Tensor | None]:
        refuse_transforms("step", "meta_loss, which takes a batch of tasks")
        if not isinstance(loss, Tensor):
            raise TypeError(f"loss: expected a scalar tensor, got {shown(loss)}")
        if loss.numel() != 1:
            raise ValueError(f"loss: expected one number, got {list(loss.shape)}; take its mean")
        if not loss.requires_grad:
            raise RuntimeError("loss: it does not require grad; compute it from fmodel, outside torch.no_grad()")
        wanted = [i for i, p in enumerate(theta) if p.requires_grad]
        grads: list[Tensor | None] = [None] * len(theta)
        if not wanted:
            return grads
        asked = [theta[i] for i in wanted]
        if self._track_higher_grads:
            found = recorded_gradients(loss, asked)
        else:
            found = torch.autograd.grad(loss, asked, allow_unused=True)
        for i, grad in zip(wanted, found, strict=True):
            grads[i] = grad
        if all(grad is None for grad in found):
            warnings.warn(
                "loss: it depends on none of the patched model's latest weights, so this step changes nothing; compute "
                "it from fmodel, after the step before",
                UserWarning,
                stacklevel=3,
            )
        return grads

    @abc.abstractmethod
    def _update(self, grouped_grads: list[list[Tensor | None]], **kwargs: Any) -> None:
        """Replace the tensors in the groups' ``"params"``; the gradients come group by group."""


def _own(value: Any) -> Any:
    """A setting of one's own; a tensor to learn stays what it is."""
    value = number(value)
    if isinstance(value, bool | int | float | None):
        return value
    return value if isinstance(value, Tensor) and value.requires_grad else copy.deepcopy(value)


def _states(
    other: torch.optim.Optimizer, params: Sequence[Tensor], device: torch.device | None
) -> dict[int, dict[str, Any]]:
    def own(value: Any) -> Any:
        return copied(value, device) if isinstance(value, Tensor) else value

    return {i: recursive_map(dict(other.state[p]), own) for i, p in enumerate(params) if p in other.state}
