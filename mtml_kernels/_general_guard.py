"""What PyTorch cannot differentiate twice, found out beforehand and said in our words."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from mtml_kernels._general_norms import NATIVE_NORMS
from mtml_kernels._general_private import Private

__all__ = ["Notice", "blocked", "explain", "once_only"]

MISSING = re.compile(r"derivative for '?(?:aten::)?(\w+?)'? is not implemented|(marked with @once_differentiable)")
SUFFIXES = re.compile(r"(_dense|_per_sample_weights)?(_backward|_forward)$")


class Notice(TorchDispatchMode):
    """Within it, `norm` names the last operation of `NATIVE_NORMS` that ran with statistics of its own, and `layers`
    says which modules ran an operation.

    Below autograd nothing escapes it: neither TorchScript nor the inside of an autograd.Function.
    """

    def __init__(self) -> None:
        super().__init__()
        self.norm: str | None = None
        self.layers: dict[str, str] = {}
        self.path: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in NATIVE_NORMS:
            given = dict(zip((a.name for a in func._schema.arguments), args, strict=False)) | (kwargs or {})
            if given.get("training", True):
                self.norm = name
        if self.path:
            self.layers.setdefault(SUFFIXES.sub("", name), self.path[-1])
        return func(*args, **(kwargs or {}))


def _layer(model: nn.Module, tensors: Mapping[str, Tensor], x: Any, operation: str) -> str:
    """Which of the model's layers runs the operation, in words; "" where none does."""
    private = Private(model)
    private(tensors, x)
    assert private.copy is not None
    with Notice() as notice:
        for name, module in private.copy.twins.root.named_modules():
            if not isinstance(module, torch.jit.ScriptModule):
                text = f"layer {name!r} ({type(module).__name__})" if name else f"the model ({type(module).__name__})"
                module.register_forward_pre_hook(lambda *_, text=text: notice.path.append(text))
                module.register_forward_hook(lambda *_: notice.path.pop() and None, always_call=True)
        private(tensors, x)
    return next((layer for name, layer in notice.layers.items() if name == SUFFIXES.sub("", operation)), "")


def explain(error: Exception, model: nn.Module, tensors: Mapping[str, Tensor], x: Any) -> str:
    """Why an exact meta-gradient failed, where that is for a second derivative which PyTorch lacks; else ""."""
    found = MISSING.search(str(error))
    if found is None:
        return ""
    if found[1] is None:
        where, what = "the model or the loss", "an autograd.Function that is marked with @once_differentiable"
    else:
        where = _layer(model, tensors, x, found[1]) or "the loss or the update rule"
        what = f"{SUFFIXES.sub('', found[1]).strip('_')!r}"
    return (
        f"first_order: expected True, because {where} runs {what}, which PyTorch can differentiate only once, and "
        "exact meta-gradients need its second derivative; pass first_order=True, or write it in operations that have it"
    )


class _Blocked(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, why: str) -> Tensor:
        ctx.why = why
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise RuntimeError(ctx.why)


def blocked(tensor: Tensor, why: str) -> Tensor:
    """The tensor, whose backward raises what `why` says: its value is right all the same."""
    result: Tensor = _Blocked.apply(tensor, why) if tensor.requires_grad else tensor
    return result


class _Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, why: str) -> Tensor:
        ctx.why = why
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return blocked(grads[0], ctx.why), None


def once_only(tensor: Tensor, why: str) -> Tensor:
    """The tensor, whose gradient is right and raises what `why` says where it is differentiated once more."""
    result: Tensor = _Once.apply(tensor, why) if tensor.requires_grad else tensor
    return result
