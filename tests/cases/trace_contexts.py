"""Contexts in which the first call of a MAML may stand: each runs `maml.meta_loss(*batch)` once, and nothing after."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from mtml import MAML

Batch = tuple[Tensor, ...]


class _Functions(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class _Dispatch(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def within(context: Callable[[], Any]) -> Callable[[MAML, Batch], None]:
    def first(maml: MAML, batch: Batch) -> None:
        with context():
            maml.meta_loss(*batch)

    return first


def checkpointed(maml: MAML, batch: Batch) -> None:
    checkpoint(maml.meta_loss, *batch, use_reentrant=False).sum().backward()


def of_inputs(transform: Callable[[Callable[[Tensor], Tensor], Tensor], Any]) -> Callable[[MAML, Batch], None]:
    """A transform of torch.func over a factor of the support inputs."""

    def first(maml: MAML, batch: Batch) -> None:
        transform(lambda factor: maml.meta_loss(factor * batch[0], *batch[1:]).sum(), batch[0].new_ones(()))

    return first


def of_parameters(maml: MAML, batch: Batch) -> None:
    """torch.func.grad over the model's parameters, which are wrapped within."""

    def loss(params: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(maml, params, batch, {}, strict=False).sum()

    maml.forward = maml.meta_loss  # type: ignore[method-assign]
    try:
        torch.func.grad(loss)({n: p.detach() for n, p in maml.named_parameters()})
    finally:
        del maml.forward


def dual(maml: MAML, batch: Batch) -> None:
    with forward_ad.dual_level(), torch.no_grad():
        maml.meta_loss(*batch)


def fake(maml: MAML, batch: Batch) -> None:
    with FakeTensorMode(allow_non_fake_inputs=True):
        maml.meta_loss(*batch)


def traced(maml: MAML, batch: Batch) -> None:
    make_fx(lambda *args: maml.meta_loss(*args))(*batch)


def compiled(maml: MAML, batch: Batch) -> None:
    torch._dynamo.reset()
    torch.compile(lambda *args: maml.meta_loss(*args).sum(), backend="eager")(*batch)


CONTEXTS: dict[str, Callable[[MAML, Batch], None]] = {
    "no_grad": within(torch.no_grad),
    "inference_mode": within(torch.inference_mode),
    "checkpoint": checkpointed,
    "saved tensors on the cpu": within(torch.autograd.graph.save_on_cpu),
    "saved tensors refused": within(lambda: torch.autograd.graph.disable_saved_tensors_hooks("none here")),
    "grad": of_inputs(lambda f, x: torch.func.grad(f)(x)),
    "jvp": of_inputs(lambda f, x: torch.func.jvp(f, (x,), (torch.ones_like(x),))),
    "vmap": of_inputs(lambda f, x: torch.func.vmap(f)(x.expand(2))),
    "grad of parameters": of_parameters,
    "meta device": within(lambda: torch.device("meta")),
    "function mode": within(_Functions),
    "dispatch mode": within(_Dispatch),
    "FakeTensorMode": fake,
    "make_fx": traced,
    "torch.compile": compiled,
    "dual level": dual,
    "autocast": within(lambda: torch.autocast("cpu", torch.bfloat16)),
}
