"""What the ops share: autograd inside an op, results in memory of their own, the choice of a backend under tracing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from mtml_kernels.registry import Registry

__all__ = ["contiguous", "own_memory", "recording", "resolved_name_in"]


@contextmanager
def recording() -> Iterator[None]:
    """Autograd inside an op: the dispatcher switches it off below the op's own formula, grad mode included."""
    key = torch._C.DispatchKey.AutogradFunctionality
    with torch._C._SetExcludeDispatchKeyGuard(key, False), torch.enable_grad():
        yield


def own_memory(tensor: Tensor, inputs: Sequence[Tensor]) -> Tensor:
    """The tensor, detached, contiguous and in memory of its own."""
    tensor = tensor.detach()
    storages = {t.untyped_storage().data_ptr() for t in inputs}
    if tensor.is_contiguous() and tensor.untyped_storage().data_ptr() not in storages:
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)


def contiguous(grad: Tensor | None) -> Tensor | None:
    """A cotangent as a backend reads it, plain memory: those of a sum are expanded (stride 0)."""
    return grad if grad is None else grad.resolve_neg().contiguous()


def resolved_name_in(backends: Registry) -> Callable[[str, str, torch.dtype], str]:
    """(backend asked for, device type, dtype) -> the name of the one that runs, a constant to torch.compile."""

    def resolved_name(backend: str, device_type: str, dtype: torch.dtype) -> str:
        return backends.resolve(backend, device_type, dtype).name

    # What torch.compiler.assume_constant_result does, less its import of torch._dynamo (half a second): the choice
    # reads the environment and may warn, which a traced function cannot.
    resolved_name._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return resolved_name
