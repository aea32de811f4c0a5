"""The optimizer that a meta-gradient flows through: it puts other tensors into a module instead of changing them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mtml.compat.torchopt.base import Chain, GradientTransformation, UninitializedState, kernel_of, uninitialised
from mtml.compat.torchopt.containers import Container, Slots
from mtml.compat.torchopt.optim.base import check_impl, loaded
from mtml.compat.torchopt.transform.leaves import added, present, put
from mtml.compat.torchopt.transform.simple import Scale
from mtml.gradients import recorded_gradients
from mtml_kernels.transforms import refuse_transforms

__all__ = ["MetaOptimizer"]

_APART = (
    "loss: expected one that depends on a parameter of the module that requires grad; compute it after "
    "recover_state_dict and after the step before"
)


class MetaOptimizer:
    """Steps of a transformation, differentiable any number of times.

    After `step` the module holds tensors computed from those it held before, so that gradients of what it computes next
    arrive in the original parameters. `torchopt.extract_state_dict` before, `recover_state_dict` after a task.

    Args:
        module: parameters that require no grad, or that the loss does not depend on, stay as they are.
        impl: the transformation, such as `torchopt.sgd(lr=0.1, moment_requires_grad=True)`.

    Raises:
        TypeError: no module, or no transformation.

    Example:
        >>> import torch
        >>> from mtml.compat import torchopt
        >>> net = torch.nn.Linear(2, 1)
        >>> weight, x = net.weight, torch.ones(4, 2)
        >>> MetaOptimizer(net, torchopt.sgd(lr=0.1)).step(net(x).square().mean())
        >>> net(x).square().mean().backward()
        >>> weight.grad.shape
        torch.Size([1, 2])
    """

    def __init__(self, module: nn.Module, impl: GradientTransformation) -> None:
        self.impl = check_impl(impl)
        self.param_containers_groups: list[tuple[Container, ...]] = []
        self.state_groups: list[Any] = []
        self._slots: list[Slots] = []
        self._engine: Any = None  # of torchopt.meta_loss
        self.add_param_group(module)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_engine": None}  # a copy makes its own

    def add_param_group(self, module: nn.Module) -> None:
        """The parameters of one more module, with a state of their own."""
        slots = Slots(module)
        self._slots.append(slots)
        self.param_containers_groups.append(slots.containers)
        self.state_groups.append(UninitializedState())

    def state_dict(self) -> tuple[Any, ...]:
        """The states themselves, no copies."""
        return tuple(self.state_groups)

    def load_state_dict(self, state_dict: Sequence[Any]) -> None:
        """Take over states, those of the original library too."""
        self.state_groups[:] = loaded(state_dict, len(self._slots))

    def step(self, loss: Tensor) -> None:
        """One step on the loss, of all groups.

        Raises:
            TypeError, ValueError: the loss is no scalar tensor.
            RuntimeError: the loss depends on no parameter that the module holds now.
        """
        _check_loss(loss)
        rows = [slots.tensors() for slots in self._slots]
        every = [tensor for tensors, _ in rows for tensor in tensors]
        asked = [i for i, tensor in enumerate(every) if tensor.requires_grad]
        if not asked:
            raise RuntimeError(_APART)
        rate = self._rate(loss, every)
        found = recorded_gradients(loss, [every[i] for i in asked], 1.0 if rate is None else rate)
        if all(grad is None for grad in found):
            raise RuntimeError(_APART)
        grads = put([None] * len(every), asked, found)
        for i, (slots, (tensors, places)) in enumerate(zip(self._slots, rows, strict=True)):
            own, grads = grads[: len(tensors)], grads[len(tensors) :]
            slots.put(places, self._stepped(i, tensors, own, scaled_already=rate is not None))

    def _stepped(self, group: int, tensors: list[Tensor], grads: list[Any], scaled_already: bool) -> list[Tensor]:
        state = self.state_groups[group]
        state = self.impl.init(tensors) if uninitialised(state) else state
        updates = grads
        if not scaled_already:
            updates, state = self.impl.update(grads, state, params=tensors, inplace=False)
        self.state_groups[group] = state
        at = present(updates)
        if len(at) == len(tensors):
            return list(added(tensors, updates))
        return put(tensors, at, added([tensors[i] for i in at], [updates[i] for i in at]))

    def _rate(self, loss: Tensor, tensors: list[Tensor]) -> float | None:
        """What the gradient may begin with, to be scaled nowhere else: -lr of plain gradient descent.

        Not where some of it may be float16, whose range the smaller numbers could leave.
        """
        kernel = kernel_of(self.impl)
        while isinstance(kernel, Chain) and len(kernel.kernels) == 1:
            kernel = kernel.kernels[0]
        if not isinstance(kernel, Scale) or isinstance(kernel.factor, Tensor):
            return None
        half = torch.is_autocast_enabled(loss.device.type) or any(t.dtype == torch.float16 for t in (loss, *tensors))
        return None if half else float(kernel.factor)


def _check_loss(loss: Any) -> None:
    refuse_transforms("step", "the transformation's init and update on gradients of torch.func.grad")
    if not isinstance(loss, Tensor):
        raise TypeError(f"loss: expected a scalar tensor, got {type(loss).__name__}")
    if loss.numel() != 1:
        raise ValueError(f"loss: expected one number, got {list(loss.shape)}; take its mean")
    if loss.is_complex():
        raise TypeError(f"loss: expected a real number, got {loss.dtype}")
    if not loss.requires_grad or not torch.is_grad_enabled():
        raise RuntimeError(
            "loss: expected one that requires grad, and a step that records; compute it from the module and call step "
            "outside torch.no_grad()"
        )
