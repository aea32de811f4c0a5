"""What a module does besides computing: batch normalisation modes, and buffers that its forward writes to."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.module import register_module_forward_pre_hook

from mtml_kernels.checks import check_choice

__all__ = [
    "BATCH_NORM_MODES",
    "batch_norm_mode",
    "call",
    "call_twin",
    "call_with",
    "check_batch_norm",
    "fresh_buffers",
    "notice_recomputing",
    "relink",
    "tracks",
    "twin",
    "written_buffers",
]

BATCH_NORM_MODES = ("module", "track", "batch", "running", "per_step")


def check_batch_norm(model: nn.Module, mode: str) -> None:
    """Raise ValueError for an unknown mode, or one that the model's layers cannot follow."""
    check_choice("batch_norm", mode, BATCH_NORM_MODES)
    for name, module in model.named_modules():
        if mode == "per_step" and isinstance(module, _BatchNorm):
            raise ValueError(
                f"batch_norm: expected PerStepBatchNorm layers for 'per_step', but layer {name!r} is a "
                f"{type(module).__name__}; mtml.MAML(..., batch_norm='per_step') replaces nn.BatchNorm1d, 2d and 3d"
            )
        if mode == "running" and isinstance(module, _BatchNorm) and module.running_mean is None:
            raise ValueError(
                f"batch_norm: expected running statistics for 'running', but layer {name!r} keeps none; "
                "use 'batch', or build the layer with track_running_stats=True"
            )


def tracks(model: nn.Module) -> bool:
    """Does a batch normalisation layer of the model update running statistics as it stands?"""
    return any(
        isinstance(m, _BatchNorm) and m.training and m.track_running_stats and m.running_mean is not None
        for m in model.modules()
    )


@contextmanager
def batch_norm_mode(model: nn.Module, mode: str) -> Iterator[None]:
    """Within it, batch normalisation layers normalise as `mode` says and, unless that is "track", update nothing."""
    layers = [] if mode == "track" else [m for m in model.modules() if isinstance(m, _BatchNorm)]
    saved = [(m, m.training, m.track_running_stats) for m in layers]
    try:
        for layer in layers:
            if mode == "running":
                layer.training = False
            elif mode in ("batch", "per_step") or layer.training:
                # a training layer that tracks nothing uses the batch and is handed no buffers, so none can change
                layer.training, layer.track_running_stats = True, False
        yield
    finally:
        for layer, training, track in saved:
            layer.training, layer.track_running_stats = training, track


def call(model: nn.Module, tensors: Mapping[str, Tensor], x: Any) -> Any:
    """model(x) with `tensors` in place of its own by name; a tuple is several arguments, a dict keyword arguments."""
    if isinstance(x, Mapping):
        return call_with(model, tensors, (), dict(x))
    return call_with(model, tensors, tuple(x) if isinstance(x, list | tuple) else (x,), {})


def call_with(model: nn.Module, tensors: Mapping[str, Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """`torch.func.functional_call`, which by itself leaves a module that has several names with the given tensors.

    It swaps a tensor under every name that it has, and so twice in such a module: the second swap takes the given
    tensor for the module's own. Here each place that holds a tensor has one name.
    """
    places: dict[int, list[str]] = {}
    ids: dict[str, int] = {}
    for path, module in model.named_modules():
        prefix = f"{path}." if path else ""
        for table in (module._parameters, module._buffers):
            for name, tensor in table.items():
                if tensor is not None:
                    ids[prefix + name] = id(tensor)
                    places.setdefault(id(tensor), []).append(prefix + name)
    everywhere = {place: new for name, new in tensors.items() for place in places.get(ids.get(name, 0), [name])}
    return functional_call(model, everywhere, args, kwargs, tie_weights=False)


def twin(
    module: nn.Module, of: Callable[[Tensor, bool], Tensor], memo: dict[int, nn.Module] | None = None
) -> nn.Module:
    """The module again, with `of(tensor, is_parameter)` for its tensors; shared submodules stay shared."""
    memo = {} if memo is None else memo
    if id(module) in memo:
        return memo[id(module)]
    copy = memo[id(module)] = module.__new__(type(module))
    copy.__dict__.update(module.__dict__)
    inner = copy.__dict__
    inner["_parameters"] = {k: None if p is None else of(p, True) for k, p in module._parameters.items()}
    inner["_buffers"] = {k: None if b is None else of(b, False) for k, b in module._buffers.items()}
    inner["_modules"] = {k: None if m is None else twin(m, of, memo) for k, m in module._modules.items()}
    relink(copy)
    return copy


def relink(module: nn.Module) -> None:
    """Recurrent layers keep a flat list of their weights, which must hold the present ones."""
    if isinstance(module, nn.RNNBase):
        module.__dict__["_flat_weights"] = [module._parameters.get(name) for name in module._flat_weights_names]
        module.__dict__["_flat_weight_refs"] = [None for _ in module._flat_weights_names]


def call_twin(model: nn.Module, tensors: Mapping[str, Tensor], x: Any) -> Any:
    """As `call`, on a copy that keeps its tensors: activation checkpointing runs the forward again in the backward,
    when `call` has put the model's own tensors back.
    """
    own = dict(model.named_buffers()) | dict(model.named_parameters())
    new = {id(own[name]): tensor for name, tensor in tensors.items()}
    copy = twin(model, lambda tensor, _: new.get(id(tensor), tensor))
    if isinstance(x, Mapping):
        return copy(**x)
    return copy(*x) if isinstance(x, list | tuple) else copy(x)


@contextmanager
def notice_recomputing() -> Iterator[list[bool]]:
    """Within it, the list gets an entry when a module runs under hooks on saved tensors that were not there before.

    That is how activation checkpointing (not the reentrant kind, which autograd.grad refuses by itself) shows.
    """
    top = torch._C._autograd._top_saved_tensors_default_hooks
    outside, found = top(False), []

    def look(module: nn.Module, args: Any) -> None:
        if top(False) != outside:
            found.append(True)

    handle = register_module_forward_pre_hook(look)
    try:
        yield found
    finally:
        handle.remove()


def fresh_buffers(model: nn.Module, names: tuple[str, ...] | None = None) -> dict[str, Tensor]:
    """Copies of the named buffers (all of them for None) for a forward to write to in place of the module's own."""
    found = dict(model.named_buffers())
    return {name: found[name].detach().clone() for name in (found if names is None else names)}


def written_buffers(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> tuple[str, ...]:
    """Names of the buffers that changed between two snapshots."""

    def same(a: Tensor, b: Tensor) -> bool:
        return torch.equal(torch.nan_to_num(a), torch.nan_to_num(b)) if a.is_floating_point() else torch.equal(a, b)

    return tuple(name for name in before if not same(before[name], after[name]))
