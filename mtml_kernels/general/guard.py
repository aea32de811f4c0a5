"""What PyTorch cannot differentiate twice, found out beforehand and said in our words."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from mtml_kernels.general.norms import NATIVE_NORMS, only_updates
from mtml_kernels.general.private import Private

__all__ = ["Notice", "blocked", "check_functions", "explain", "once_only"]

MISSING = re.compile(
    r"derivative for '?(?:aten::)?(\w+?)'? is not implemented"
    r"|marked with @once_differentiable|functions with out=... arguments don't support automatic differentiation"
)
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
        self.functions: list[str] = []  # modules whose output comes from an autograd.Function

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in NATIVE_NORMS and not only_updates():
            given = dict(zip((a.name for a in func._schema.arguments), args, strict=False)) | (kwargs or {})
            if given.get("training", True):
                self.norm = name
        if self.path:
            self.layers.setdefault(SUFFIXES.sub("", name), self.path[-1])
        return func(*args, **(kwargs or {}))

    def leave(self, output: Any) -> None:
        """A module is done."""
        layer = self.path.pop()
        made = (t.grad_fn for t in pytree.tree_leaves(output) if isinstance(t, Tensor))
        if any(isinstance(node, torch.autograd.function.BackwardCFunction) for node in made):
            self.functions.append(layer)


def _layer(model: nn.Module, tensors: Mapping[str, Tensor], x: Any, operation: str) -> str:
    """Which of the model's layers runs the operation ("": an autograd.Function), in words; "" where none does."""
    private = Private(model)
    private(tensors, x)
    assert private.copy is not None
    with Notice() as notice:
        for name, module in private.copy.twins.root.named_modules():
            if not isinstance(module, torch.jit.ScriptModule):
                text = f"layer {name!r} ({type(module).__name__})" if name else f"the model ({type(module).__name__})"
                module.register_forward_pre_hook(lambda *_, text=text: notice.path.append(text))
                module.register_forward_hook(lambda _, args, output: notice.leave(output), always_call=True)
        private(tensors, x)
    if not operation:
        return next(iter(notice.functions), "")
    return next((layer for name, layer in notice.layers.items() if name == SUFFIXES.sub("", operation)), "")


def check_functions(value: Tensor) -> None:
    """Raise for an autograd.Function of once_differentiable that a gradient passed: PyTorch does so in `backward`, but
    leaves its part out without a word in `autograd.grad`.
    """
    seen, found = set(), [value.grad_fn]
    while found:
        node = found.pop()
        if node is not None and node not in seen:
            seen.add(node)
            if type(node).__name__ == "DelayedError" or node.name().endswith("::Error"):
                raise RuntimeError("a function that was marked with @once_differentiable")
            found += [following for following, _ in node.next_functions]


def explain(error: Exception, model: nn.Module, tensors: Mapping[str, Tensor], x: Any) -> str:
    """Why an exact meta-gradient failed, where that is for a second derivative which PyTorch lacks; else ""."""
    found = MISSING.search(str(error))
    if found is None:
        return ""
    if found[1] is None:
        where = _layer(model, tensors, x, "") or "the model, the loss or the update rule"
        what = "an autograd.Function"
    else:
        where = _layer(model, tensors, x, found[1]) or "the loss or the update rule"
        what = f"{SUFFIXES.sub('', found[1]).strip('_')!r}"
    return (
        f"first_order: expected True, because {where} runs {what}, which PyTorch can differentiate only once, and "
        "exact meta-gradients need its second derivative; pass first_order=True, or write it in operations that have it"
    )


class _Marked(torch.autograd.Function):
    """The tensor itself; its gradient and `why` are given to `then`."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, why: str, then: Callable[[Tensor, str], Tensor]) -> Tensor:
        ctx.why, ctx.then = why, then
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return ctx.then(grads[0], ctx.why), None, None


def _refuse(grad: Tensor, why: str) -> Tensor:
    raise RuntimeError(why)


def blocked(tensor: Tensor, why: str) -> Tensor:
    """The tensor, whose backward raises what `why` says: its value is right all the same."""
    result: Tensor = _Marked.apply(tensor, why, _refuse) if tensor.requires_grad else tensor
    return result


def once_only(tensor: Tensor, why: str) -> Tensor:
    """The tensor, whose gradient is right and raises what `why` says where it is differentiated once more."""
    result: Tensor = _Marked.apply(tensor, why, blocked) if tensor.requires_grad else tensor
    return result
