"""What one run of a task's function does: modules called, gradients taken, and the operations between them.

Operations within a module's call are the module's affair. Tensors are noted without the wrappings of torch.func.grad,
so that a body written with it leaves the same notes as one written with torch.autograd.grad.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from mtml_kernels.losses.vocabulary import OPERATIONS, OPERATORS

__all__ = ["Called", "Derived", "Ran", "Recording", "noting"]

_functorch = torch._C._functorch
_KNOWN = OPERATIONS | OPERATORS | {"clone", "full", "requires_grad", "is_leaf"}
_VALUES = {
    "item", "tolist", "numpy", "__bool__", "__float__", "__int__", "__index__", "__format__", "__repr__",
    "__contains__", "__array__", "equal", "allclose", "is_nonzero",
}  # fmt: skip


class Ran(NamedTuple):
    """An operation of PyTorch's; `made`: the tensors of its result, in order."""

    name: str
    function: Any
    args: Any
    kwargs: Any
    made: list[Tensor]


class Derived(NamedTuple):
    """A call of torch.autograd.grad, or what torch.func.grad makes of one: a gradient or None for every input."""

    outputs: list[Tensor]
    inputs: list[Tensor]
    grads: list[Tensor | None]
    second_order: bool


class Called(NamedTuple):
    """A call of a module, and every parameter and buffer that it then had by name."""

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    tensors: dict[str, Tensor]
    output: Any


class Recording:
    """The notes in order; `strange`: the first thing that no known inner loop does, or None."""

    def __init__(self) -> None:
        self.tape: list[Ran | Derived | Called] = []
        self.strange: str | None = None

    def refuse(self, what: str) -> None:
        """Note that the function does more than a known inner loop."""
        if self.strange is None:
            self.strange = what


def noting(fn: Callable[..., Any]) -> tuple[Recording, Callable[..., Any]]:
    """A function that does what `fn` does, and notes what its thread runs meanwhile."""
    notes = Recording()

    def noted(*args: Any, **kwargs: Any) -> Any:
        mode = _Notes(notes)
        hooks = [
            register_module_forward_pre_hook(mode.entered),
            register_module_forward_hook(mode.left, with_kwargs=True),
        ]
        try:
            with mode:
                result = fn(*args, **kwargs)
        finally:
            for hook in hooks:
                hook.remove()
        if mode.inside:
            notes.refuse("a call of a module in it fails")
        return result

    return notes, noted


class _Notes(TorchFunctionMode):
    def __init__(self, notes: Recording) -> None:
        super().__init__()
        self.notes = notes
        self.inside: list[
            bool
        ] = []  # of the modules being called, from outside in: whether it or one around has tensors
        self.thread = threading.get_ident()
        self.tracked = torch.is_grad_enabled()

    # --- modules ----------------------------------------------------------------------------------------------------

    def entered(self, module: nn.Module, args: Any) -> None:
        if threading.get_ident() == self.thread:
            self.inside.append(self.closed() or any(True for _ in (*module.parameters(), *module.buffers())))

    def left(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        """What has no tensors, such as a loss, is seen through."""
        if threading.get_ident() != self.thread or not self.inside.pop() or self.closed():
            return
        named = (*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False))
        with torch._C.DisableTorchFunction():
            tensors = {name: self._bare(t) for name, t in named}
            parts = self._bared((args, kwargs, output))
        self.notes.tape.append(Called(module, parts[0], parts[1], tensors, parts[2]))

    def closed(self) -> bool:
        """Whether what runs now is a module's affair."""
        return bool(self.inside) and self.inside[-1]

    # --- operations -------------------------------------------------------------------------------------------------

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        if name == "__get__":
            name = func.__self__.__name__
        if name in _VALUES:
            self.notes.refuse(f"it reads the value of a tensor ({name})")
        elif not self.closed():
            self._note(name, func, args, kwargs or {}, result)
        return result

    def _note(self, name: str, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        if func is torch.autograd.grad:
            self._derived(*args, **kwargs, found=result)
        elif name == "_set_grad_enabled":
            if self.tracked and not args[0]:
                self.notes.refuse("it turns gradients off")
        elif name == "requires_grad_":
            if not _functorch.is_functorch_wrapped_tensor(args[0]):
                self.notes.refuse("it asks a tensor for gradients (requires_grad_)")
        elif name not in _KNOWN or "out" in kwargs:
            self.notes.refuse(f"it uses {name!r}, which no known inner loop is made of")
        else:
            made = [self._bare(t) for t in pytree.tree_leaves(result) if isinstance(t, Tensor)]
            if made:
                self.notes.tape.append(Ran(name, func, self._bared(args), self._bared(kwargs), made))

    def _derived(
        self,
        outputs: Any,
        inputs: Any,
        grad_outputs: Any = None,
        retain_graph: Any = None,
        create_graph: bool = False,
        *_: Any,
        found: Any,
        **options: Any,
    ) -> None:
        cotangents = [self._bare(t) for t in pytree.tree_leaves(grad_outputs) if t is not None]
        if options.get("is_grads_batched") or any(t.ndim or float(t) != 1.0 for t in cotangents):
            self.notes.refuse("it takes gradients with cotangents of its own")
            return
        values, given = ([self._bare(t) for t in pytree.tree_leaves(part)] for part in (outputs, inputs))
        grads = [None if t is None else self._bare(t) for t in found]
        self.notes.tape.append(Derived(values, given, grads, bool(create_graph)))

    # --- tensors ----------------------------------------------------------------------------------------------------

    def _bared(self, value: Any) -> Any:
        return pytree.tree_map_only(Tensor, self._bare, value)

    def _bare(self, tensor: Tensor) -> Tensor:
        """Without the wrappings of torch.func.grad."""
        while _functorch.is_functorch_wrapped_tensor(tensor):
            if not _functorch.is_gradtrackingtensor(tensor):
                self.notes.refuse("it is inside, or uses, another transform of torch.func than grad")
            tensor = _functorch.get_unwrapped(tensor)
        return tensor
