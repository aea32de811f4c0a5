"""States of modules and optimizers: taken before a task, given back after it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mtml.compat.torchopt import pytree
from mtml.compat.torchopt.containers import Container, copied, held, parts
from mtml.compat.torchopt.optim.meta.base import MetaOptimizer
from mtml_kernels.general.twin import twin
from mtml_kernels.recurrent import relink

__all__ = [
    "ModuleState",
    "extract_state_dict",
    "module_clone",
    "module_detach_",
    "recover_state_dict",
    "stop_gradient",
]

_MODES = {mode: mode for mode in ("reference", "copy", "deepcopy")}
_MODES |= {"ref": "reference", "clone": "copy", "deepclone": "deepcopy"}
Device = torch.device | str | int


class ModuleState(NamedTuple):
    """Tensors of a module, in the order of its submodules."""

    params: tuple[Container, ...]
    buffers: tuple[Container, ...]
    visual_contents: dict[Any, Any] | None = None
    detach_buffers: bool = False


def _deep(tensor: Tensor, device: torch.device | None) -> Tensor:
    """A copy outside the graph; a parameter of a parameter."""
    new = tensor.detach().clone()
    new = new if device is None else new.to(device)
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(new, requires_grad=tensor.requires_grad)
    return new.requires_grad_(tensor.requires_grad)


def _replica(by: str, device: Device | None) -> Callable[[Tensor], Tensor]:
    """What makes a tensor's copy; of a tensor that it saw before the same one, so that what is shared stays shared."""
    if by not in _MODES:
        raise ValueError(f"by: expected one of {', '.join(_MODES)}, got {by!r}")
    mode, target = _MODES[by], None if device is None else torch.device(device)
    seen: dict[int, tuple[Tensor, Tensor]] = {}  # with the original, lest another takes its id

    def of(tensor: Tensor) -> Tensor:
        if id(tensor) not in seen:
            seen[id(tensor)] = tensor, made(tensor)
        return seen[id(tensor)][1]

    def made(tensor: Tensor) -> Tensor:
        if mode == "deepcopy":
            return _deep(tensor, target)
        new = tensor.clone() if mode == "copy" else tensor
        return new if target is None else new.to(target)

    return of


def extract_state_dict(
    target: nn.Module | MetaOptimizer,
    *,
    by: str = "reference",
    device: Device | None = None,
    with_buffers: bool = True,
    detach_buffers: bool = False,
    enable_visual: bool = False,
    visual_prefix: str = "",
) -> Any:
    """The tensors of a module, or the states of an optimizer, for `recover_state_dict`.

    Args:
        target: a module or a MetaOptimizer.
        by: "reference" (or "ref"): the tensors themselves; "copy" ("clone"): differentiable copies, which gradients
            flow back through; "deepcopy" ("deepclone"): copies outside the graph.
        device: where the tensors are to be.
        with_buffers: a module's buffers too.
        detach_buffers: copies of the buffers, and copies again when they are recovered: running statistics that a
            task changes in place are then those from before it.

    Raises:
        TypeError: another target.
        ValueError: an unknown `by`; or enable_visual, which the original has for drawings of graphs.

    Example:
        >>> import torch
        >>> net = torch.nn.Linear(2, 1)
        >>> state = extract_state_dict(net)
        >>> state.params[0]["weight"] is net.weight
        True
    """
    if enable_visual or visual_prefix:
        raise ValueError("enable_visual: expected False: graphs are not drawn here; torchviz draws them")
    of = _replica(by, device)
    if isinstance(target, MetaOptimizer):
        return pytree.tree_map(lambda t: of(t) if isinstance(t, Tensor) else t, target.state_dict())
    if not isinstance(target, nn.Module):
        raise _unexpected(target)
    params, buffers = held(parts(target))
    of_buffer = _replica("deepcopy", device) if detach_buffers else of
    kept = tuple(copied(each, of_buffer) for each in buffers) if with_buffers else ()
    return ModuleState(tuple(copied(each, of) for each in params), kept, None, detach_buffers)


def recover_state_dict(target: nn.Module | MetaOptimizer, state: Any) -> None:
    """Put what `extract_state_dict` gave back: the tensors themselves, nothing is written into those that are there.

    Raises:
        TypeError: another target.
        ValueError: the state is that of another module or optimizer.
    """
    if isinstance(target, MetaOptimizer):
        target.load_state_dict(state)
        return
    if not isinstance(target, nn.Module):
        raise _unexpected(target)
    if not isinstance(state, tuple) or len(state) != len(ModuleState._fields):
        raise TypeError(f"state: expected what extract_state_dict gives of a module, got {type(state).__name__}")
    params, buffers, _, detached = state
    if detached:
        of = _replica("deepcopy", None)
        buffers = tuple(copied(each, of) for each in buffers)
    every = parts(target)
    here = held(every)
    _fill("parameters", here[0], params)
    if buffers:
        _fill("buffers", here[1], buffers)
    for part in every:
        relink(part)


def _fill(what: str, here: Sequence[Container], there: Sequence[Container]) -> None:
    fits = len(here) == len(there) and all(set(b) <= set(a) for a, b in zip(here, there, strict=False))
    if not fits:
        raise ValueError(
            f"state: expected {what} of this module, {[sorted(a) for a in here]}, got {[sorted(b) for b in there]}"
        )
    for container, tensors in zip(here, there, strict=True):
        container.update(tensors)


def module_clone(
    target: Any, *, by: str = "reference", detach_buffers: bool = False, device: Device | None = None
) -> Any:
    """A module again with the tensors that `by` says (as in `extract_state_dict`); or a MetaOptimizer, or a tree.

    The clone of a MetaOptimizer steps the same module, with a state of its own, and parameters that are added to one
    are not the other's. What is no tensor in a tree stays.

    Example:
        >>> import torch
        >>> net = torch.nn.Linear(2, 1)
        >>> module_clone(net, by="copy")(torch.ones(1, 2)).sum().backward()
        >>> net.weight.grad
        tensor([[1., 1.]])
    """
    of = _replica(by, device)
    if isinstance(target, nn.Module):
        of_buffer = _replica("deepcopy", device) if detach_buffers else of
        return twin(target, lambda tensor, is_parameter: of(tensor) if is_parameter else of_buffer(tensor))
    if isinstance(target, MetaOptimizer):
        new = copy.copy(target)
        new.state_groups = list(extract_state_dict(target, by=by, device=device))
        new._slots, new.param_containers_groups = list(target._slots), list(target.param_containers_groups)
        return new
    return pytree.tree_map(lambda leaf: of(leaf) if isinstance(leaf, Tensor) else leaf, target)


def stop_gradient(target: Any) -> None:
    """Cut tensors off from what they were computed from, in place; those that required grad do so again, as leaves.

    Args:
        target: a module (its parameters), a state of `extract_state_dict`, a MetaOptimizer, or a tree of tensors.
    """
    if isinstance(target, nn.Module):
        target = tuple(target.parameters())
    elif isinstance(target, MetaOptimizer):
        target = target.state_dict()
    elif isinstance(target, ModuleState):
        target = (target.params, target.buffers)
    for leaf in pytree.tree_leaves(target):
        if isinstance(leaf, Tensor):
            required = leaf.requires_grad
            leaf.detach_().requires_grad_(required)


def module_detach_(target: Any) -> Any:
    """`stop_gradient`; returns the target."""
    stop_gradient(target)
    return target


def _unexpected(target: Any) -> TypeError:
    return TypeError(f"target: expected an nn.Module or a MetaOptimizer, got {target!r} ({type(target).__name__})")
