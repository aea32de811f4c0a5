"""The per-task loop: a differentiable copy of a module for one task, adapted by one gradient step at a time.

It is the loop that learn2learn made common. A copy shares everything with its original but the parameters, which are
tensors computed from the original's: gradients through the copy arrive in the original's `.grad`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mtml.gradients import recorded_gradients
from mtml.inner_lr import InnerLR
from mtml.params import aliases, by_first_name
from mtml_kernels.general.twin import twin
from mtml_kernels.rates import op_rates, rate_at
from mtml_kernels.recurrent import relink
from mtml_kernels.transforms import refuse_transforms

__all__ = [
    "Held",
    "clone_module",
    "descend",
    "inner_gradients",
    "replace_tensors",
    "shallow",
    "step_rates",
]


def clone_module(
    module: nn.Module, adapted: frozenset[str] = frozenset(), done: dict[int, Tensor] | None = None
) -> nn.Module:
    """A copy whose parameters are differentiable clones of the module's; buffers are shared.

    Args:
        adapted: names of buffers and frozen parameters that will be adapted: the copy gets its own, which require grad.
        done: {id of a tensor: its clone} of other modules that share tensors with this one; it is added to.

    Example:
        >>> import torch
        >>> from mtml.clone import clone_module
        >>> net = torch.nn.Linear(2, 1)
        >>> clone_module(net)(torch.ones(1, 2)).sum().backward()
        >>> net.weight.grad
        tensor([[1., 1.]])
    """
    named = {id(t): name for name, t in (*module.named_buffers(), *module.named_parameters())} if adapted else {}
    clones: dict[int, Tensor] = {} if done is None else done

    def of(tensor: Tensor, is_parameter: bool) -> Tensor:
        found = clones.get(id(tensor))
        if found is None:
            found = clones[id(tensor)] = _copied(tensor, is_parameter, named.get(id(tensor)) in adapted)
        return found

    return twin(module, of)


def _copied(tensor: Tensor, is_parameter: bool, adapted: bool) -> Tensor:
    if adapted and not tensor.requires_grad:
        return tensor.detach().clone().requires_grad_()
    return tensor.clone() if is_parameter or tensor.requires_grad else tensor


class Held:
    """The tensors that a module holds now, each once, and where: read anew for every step, as users change clones.

    Args:
        buffers: those too, after a module's parameters.

    `tensors` come in the order of ``module.parameters()``.
    """

    def __init__(self, module: nn.Module, buffers: bool = False) -> None:
        self.module = module
        self.tensors: list[Tensor] = []
        self._slots: list[list[tuple[Any, str]]] = []
        self._recurrent: list[nn.Module] = []
        places: dict[int, list[tuple[Any, str]]] = {}
        seen: set[int] = set()
        left = [module]
        while left:
            part = left.pop()
            if id(part) in seen:
                continue
            seen.add(id(part))
            self._add(part._parameters, places)
            if buffers:
                self._add(part._buffers, places)
            if isinstance(part, nn.RNNBase):
                self._recurrent.append(part)
            if part._modules:
                left.extend(child for child in reversed(part._modules.values()) if child is not None)

    def _add(self, holder: Any, places: dict[int, list[tuple[Any, str]]]) -> None:
        for name, tensor in holder.items():
            if tensor is None:
                continue
            slots = places.get(id(tensor))
            if slots is None:
                slots = places[id(tensor)] = []
                self.tensors.append(tensor)
                self._slots.append(slots)
            slots.append((holder, name))

    def names(self) -> list[str]:
        """Of `tensors`."""
        by_id = {id(t): n for n, t in (*self.module.named_buffers(), *self.module.named_parameters())}
        return [by_id[id(tensor)] for tensor in self.tensors]

    def replace(self, new: Iterable[Tensor | None]) -> None:
        """Put these in the place of `tensors`, wherever the module holds them; None leaves one as it is."""
        for slots, tensor in zip(self._slots, new, strict=True):
            if tensor is not None:
                for holder, name in slots:
                    holder[name] = tensor
        for part in self._recurrent:
            relink(part)


def replace_tensors(module: nn.Module, new: Mapping[int, Tensor]) -> None:
    """Put ``new[id(tensor)]`` wherever the module holds that tensor."""
    held = Held(module, buffers=True)
    held.replace([new.get(id(tensor)) for tensor in held.tensors])


def inner_gradients(
    loss: Tensor,
    tensors: Sequence[Tensor],
    names: Callable[[], Sequence[str]],
    *,
    create_graph: bool,
    retain_graph: bool | None = None,
    allow_unused: bool,
    allow_nograd: bool,
) -> list[Tensor | None]:
    """Gradients of a task's loss for one inner step, for each tensor; None where there is none and that is allowed.

    Args:
        names: gives the tensors' names, for errors.
        create_graph, retain_graph: as of ``torch.autograd.grad``.

    Raises:
        TypeError, ValueError: the loss is no scalar tensor.
        RuntimeError: a tensor requires no grad, or the loss does not depend on it, and that is not allowed; or the call
            is within a transform of torch.func.
    """
    refuse_transforms("adapt", "meta_loss or adapt_tasks, which take one task too and run in every transform")
    if not isinstance(loss, Tensor):
        raise TypeError(f"loss: expected a scalar tensor, got {type(loss).__name__}")
    if loss.numel() != 1:
        raise ValueError(f"loss: expected one number for the task, got {list(loss.shape)}; take its mean")
    wanted = [tensor for tensor in tensors if tensor.requires_grad]
    if len(wanted) < len(tensors) and not allow_nograd:
        frozen = [name for name, t in zip(names(), tensors, strict=True) if not t.requires_grad]
        raise RuntimeError(
            f"adapt: these parameters do not require grad: {_listed(frozen)}; pass allow_nograd=True to leave them as "
            "they are, or call requires_grad_() on them"
        )
    if not loss.requires_grad:
        raise RuntimeError("adapt: the loss does not require grad; compute it from this clone, outside torch.no_grad()")
    retain = create_graph if retain_graph is None else retain_graph
    if create_graph and wanted:
        grads = recorded_gradients(loss, wanted, retain_graph=retain)
    else:
        grads = torch.autograd.grad(loss, wanted, retain_graph=retain, allow_unused=True)
    found: list[Tensor | None] = list(grads)
    if len(wanted) < len(tensors):
        left = iter(grads)
        found = [next(left) if tensor.requires_grad else None for tensor in tensors]
    if not allow_unused and any(grad is None for grad in grads):
        triples = zip(names(), tensors, found, strict=True)
        unused = [name for name, tensor, grad in triples if grad is None and tensor.requires_grad]
        raise RuntimeError(
            f"adapt: the loss does not depend on these parameters: {_listed(unused)}; pass allow_unused=True to leave "
            "them as they are, or compute the loss from this clone"
        )
    return found


def _listed(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names[:5])) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def descend(tensors: Sequence[Tensor], grads: Sequence[Tensor | None], lr: float) -> list[Tensor | None]:
    """tensor - lr * grad of each, in one operation of autograd; None where there is no gradient."""
    return [
        None if g is None else torch.add(t, g, alpha=-lr)  # two operations make two nodes to run backward through
        for t, g in zip(tensors, grads, strict=True)
    ]


def step_rates(lr: Any, module: nn.Module, tensors: Mapping[str, Tensor], step: int) -> dict[str, Tensor]:
    """The rate of each of these tensors at an inner step, from a rate in any form that `mtml.MAML` takes.

    Raises ValueError, TypeError: as `mtml_kernels.rates.op_rates`.
    """
    rates: Any = lr.as_dict() if isinstance(lr, InnerLR) else lr
    if hasattr(rates, "items"):
        rates = by_first_name(rates, aliases(module))
    like = next(iter(tensors.values()))
    shapes = {name: t.shape for name, t in tensors.items()}
    known = list(rates) if isinstance(rates, Mapping) else []  # in the loop a tensor may have a rate and no gradient
    table = op_rates(rates, shapes, step + 1, like.dtype, like.device, known)
    return {name: rate_at(table, i, step) for i, name in enumerate(tensors)}


def shallow(wrapper: nn.Module, settings: Mapping[str, Any], **modules: nn.Module) -> Any:
    """The wrapper (a MAML) around other modules; everything else, its learning rates included, is shared.

    Args:
        settings: what a `clone` was given: they take the place of the wrapper's own, where they are not None.

    What is kept of the wrapper's calls on batches is not the copy's.
    """
    again = type(wrapper).__new__(type(wrapper))
    again.__dict__.update(wrapper.__dict__)
    again.__dict__["_parameters"] = dict(wrapper._parameters)
    again.__dict__["_buffers"] = dict(wrapper._buffers)
    again.__dict__["_modules"] = {**wrapper._modules, **modules}
    again.__dict__.update({name: value for name, value in settings.items() if value is not None})
    again.__dict__.pop("_engine", None)
    return again
