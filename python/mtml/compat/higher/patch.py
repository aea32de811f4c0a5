"""Copies of modules whose weights are tensors that may be computed from others: what an inner loop adapts."""

from __future__ import annotations

import functools
import types
import warnings
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn

from mtml.compat.higher.fast_weights import FastWeights
from mtml.compat.higher.utils import copied
from mtml.compat.higher.zero_gradients import watch
from mtml.wrappers import refuse_data_parallel
from mtml_kernels.checks import shown
from mtml_kernels.general.twin import Twins

__all__ = ["FunctionalModule", "buffer_sync", "make_functional", "monkeypatch"]


class FunctionalModule(nn.Module):
    """A patched module, or a part of one. Its class derives from the original's too.

    `fmodel(x)` computes with the latest weights, `fmodel(x, params=[...])` takes those as the latest first. To assign
    to a parameter (``fmodel.fc.weight = w``) is to take the next step of weights.
    """

    _fast: FastWeights
    _patched: type  # the original's class

    def __setattr__(self, name: str, value: Any) -> None:
        held = self.__dict__.get("_parameters")
        if held is None or held.get(name) is None:
            super().__setattr__(name, value)
            return
        if not isinstance(value, Tensor):
            raise TypeError(f"{name}: expected a tensor as the weight of a patched module, got {shown(value)}")
        if not self._fast.replace(held[name], value):
            held[name] = value

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _empty, (type(self)._patched, isinstance(self, _Root)), self.__dict__

    @property
    def fast_params(self) -> list[Tensor] | None:
        """The latest weights, in the order of the original's `parameters()`; to set it is to take a step."""
        return self._fast.now

    @fast_params.setter
    def fast_params(self, value: Any) -> None:
        self._fast.put(value)

    @property
    def init_fast_params(self) -> list[Tensor]:
        """The first weights."""
        if not self.track_higher_grads:
            raise RuntimeError("init_fast_params: the first weights are kept only where track_higher_grads is True")
        return self._fast.history[0]

    @property
    def track_higher_grads(self) -> bool:
        """Whether the weights of all steps are kept."""
        return self._fast.track

    @track_higher_grads.setter
    def track_higher_grads(self, value: bool) -> None:
        if not isinstance(value, bool):
            raise ValueError(f"track_higher_grads: expected True or False, got {shown(value)}")
        self._fast.track = value

    def update_params(self, params: Any) -> None:
        """The next weights, in the order of the original's `parameters()`."""
        self._fast.put(params)


class _Root(FunctionalModule):
    """The whole of a patched module."""

    def parameters(self, recurse: bool = True, time: int | None = None) -> Iterator[Any]:
        """The weights, in the order of the original's `parameters()`.

        Args:
            recurse: False warns and changes nothing.
            time: how many steps of weights after the start; None: the latest.

        Raises:
            RuntimeError: there are none yet (`make_functional` alone gives none).
            ValueError: an earlier time, where they are not kept.
            IndexError: no such time.
        """
        history = self._fast.history
        if not history:
            raise RuntimeError("parameters: this patched module has no weights of its own; call it with params=")
        if not recurse:
            warnings.warn("recurse=False: a patched module gives the weights of all its parts", stacklevel=2)
        if not self._fast.track and time not in (None, -1, 0):
            raise ValueError(
                f"time: expected None where track_higher_grads is False, got {time}: only the last is kept"
            )
        if time is not None and not -len(history) <= time < len(history):
            raise IndexError(f"time: expected a step below {len(history)}, got {time}")
        return iter(history[-1 if time is None else time])


_MonkeyPatchBase = FunctionalModule  # scripts use the original's name


@functools.lru_cache(maxsize=1024)
def _class_of(patched: type, whole: bool) -> type:
    """The class of a patched module: behaviour of the module's own, called as `FunctionalModule` is."""
    plain = patched.__call__ is nn.Module.__call__
    call = nn.Module._call_impl if plain else patched.__call__  # the first saves a Python frame in every layer
    run = patched.forward  # type: ignore[attr-defined]

    def __call__(self: Any, *args: Any, params: Any = None, **kwargs: Any) -> Any:
        self._fast.take(params)
        return call(self, *args, **kwargs)

    def forward(self: Any, *args: Any, params: Any = None, **kwargs: Any) -> Any:
        self._fast.take(params)
        return run(self, *args, **kwargs)

    body: dict[str, Any] = {"__call__": __call__, "_patched": patched, "__module__": __name__}
    if whole:
        body["forward"] = forward
    if issubclass(patched, nn.RNNBase):
        body["flatten_parameters"] = lambda self: None  # it would move weights that the graph holds
    name = ("Functional" if whole else "InnerFunctional") + patched.__name__
    bases = (_Root if whole else FunctionalModule, patched)
    return types.new_class(name, bases, exec_body=lambda namespace: namespace.update(body))


def _empty(patched: type, whole: bool) -> Any:
    """For pickle: what is to be filled."""
    kind: Any = _class_of(patched, whole)
    return kind.__new__(kind)


def _patch(module: nn.Module, of: Callable[[Tensor, bool], Tensor]) -> tuple[Any, list[Tensor]]:
    """A patched copy with `of(tensor, is_parameter)` for the module's tensors, and the copies of its parameters."""
    if not isinstance(module, nn.Module):
        raise TypeError(f"module: expected an nn.Module, got {shown(module)}")
    refuse_data_parallel("module", module)
    twins = Twins(module, of)
    if any(isinstance(part, FunctionalModule) for part, _ in twins.pairs):
        raise ValueError("module: expected a module that is not patched yet; call monkeypatch on the original")
    if isinstance(twins.root, torch.jit.ScriptModule):
        raise TypeError("module: expected a module in Python, got TorchScript; patch it before torch.jit.script")
    originals: list[Tensor] = list({id(p): p for p in module.parameters()}.values())
    if any(id(p) not in twins.tensors for p in originals):
        raise ValueError("module: expected parameters() to give tensors that the module or its parts have registered")
    fast = FastWeights(originals, twins)
    for _, part in twins.pairs:
        part.__dict__["_fast"] = fast
        kind: Any = type(part)
        part.__class__ = _class_of(kind, part is twins.root)
    return twins.root, [twins.tensors[id(p)] for p in originals]


def make_functional(
    module: nn.Module, encapsulator: Callable[[Any, nn.Module], None] | None = None
) -> FunctionalModule:
    """A patched copy without weights of its own: call it with ``params=[...]``, one for each of `module.parameters()`.

    Args:
        encapsulator: called with (patched module, module), to give it weights for example.

    Raises:
        TypeError, ValueError: no module, or one that is patched already.

    Example:
        >>> import torch
        >>> net = torch.nn.Linear(2, 1)
        >>> make_functional(net)(torch.ones(3, 2), params=[torch.ones(1, 2), torch.zeros(1)]).tolist()
        [[2.0], [2.0], [2.0]]
    """
    fmodule, _ = _patch(module, lambda tensor, is_parameter: tensor if is_parameter else tensor.detach().clone())
    if encapsulator is not None:
        encapsulator(fmodule, module)
    return cast(FunctionalModule, fmodule)


def monkeypatch(
    module: nn.Module,
    device: torch.device | None = None,
    copy_initial_weights: bool = True,
    track_higher_grads: bool = True,
) -> FunctionalModule:
    """A patched copy with weights of its own: `module`'s at first, then what an inner loop makes of them.

    Buffers are detached copies: running statistics of an inner loop stay in it.

    Args:
        module: any module; shared parameters stay shared, recurrent layers too.
        device: where weights and buffers are to be.
        copy_initial_weights: start from detached copies of the weights. **MAML needs False**: with True no gradient
            reaches the module, only `fmodule.parameters(time=0)`.
        track_higher_grads: keep the weights of all steps.

    Raises:
        TypeError, ValueError: no module, one in DataParallel or TorchScript, or one that is patched already.

    Example:
        >>> import torch
        >>> net = torch.nn.Linear(2, 1)
        >>> fnet = monkeypatch(net, copy_initial_weights=False)
        >>> fnet.fast_params = [2 * p for p in fnet.parameters()]
        >>> fnet(torch.ones(1, 2)).sum().backward()
        >>> net.weight.grad
        tensor([[2., 2.]])
    """

    def of(tensor: Tensor, is_parameter: bool) -> Tensor:
        if not is_parameter:
            return tensor.detach().to(device, copy=True)
        return copied(tensor, device) if copy_initial_weights else tensor.clone().to(device)

    fmodule, weights = _patch(module, of)
    fmodule._fast.history.append(weights)
    fmodule.track_higher_grads = track_higher_grads
    if copy_initial_weights and track_higher_grads:
        watch(module, weights)
    return cast(FunctionalModule, fmodule)


def buffer_sync(module: nn.Module, fmodule: nn.Module, device: torch.device | None = None) -> None:
    """Give a patched module detached copies of the module's present buffers.

    Raises:
        KeyError: the two are not built alike.

    Example:
        >>> import torch
        >>> norm = torch.nn.BatchNorm1d(2)
        >>> fnorm = monkeypatch(norm)
        >>> _ = fnorm(torch.randn(8, 2))
        >>> buffer_sync(norm, fnorm)
        >>> fnorm.running_mean
        tensor([0., 0.])
    """
    for name, value in module._buffers.items():
        fmodule._buffers[name] = value if value is None else value.detach().to(device, copy=True)
    for name, child in module._modules.items():
        if name not in fmodule._modules:
            raise KeyError(f"fmodule: expected a part {name!r}, as the module has, and found {[*fmodule._modules]}")
        if child is not None:
            buffer_sync(child, cast(nn.Module, fmodule._modules[name]), device)
