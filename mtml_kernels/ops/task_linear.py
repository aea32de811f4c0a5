"""`mtml::task_linear`: a linear layer and its activation for a batch of tasks, differentiable any number of times."""

from __future__ import annotations

from torch import Tensor

from mtml_kernels import native
from mtml_kernels.native.task_linear import linear_backward, linear_forward
from mtml_kernels.ops.checks import Door
from mtml_kernels.ops.common import resolved_name_in
from mtml_kernels.ops.task_layer_ops import register_layer
from mtml_kernels.ops.task_layers import Static, TaskLayer, layer_call, part, reference_backend
from mtml_kernels.program.activations import Act
from mtml_kernels.reference.task_linear import activate, slope_times, task_linear
from mtml_kernels.registry import REFERENCE, Backend, Registry
from mtml_kernels.schedule.kernels import Linear
from mtml_kernels.schedule.torch_kernels import TORCH
from mtml_kernels.schema.dtypes import cpu_supports, floating_supports
from mtml_kernels.schema.task_linear import BACKWARD_SCHEMA, FORWARD_SCHEMA, NO_ACTIVATION, LinearForm
from mtml_kernels.triton.backends import TASK_LINEAR

__all__ = ["BACKENDS", "task_linear_call"]

BACKENDS = Registry("task_linear")
_DOOR = Door("task_linear", "Shapes are x [T, N, I], weight [T, O, I] or [O, I], bias [T, O] or [O]")
_CODES = [NO_ACTIVATION, *map(int, Act)]


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, form: LinearForm) -> None:
    """Raises TypeError or ValueError where an argument does not fit x, and names it."""
    for name, t, dims in (("x", x, 3), ("weight", weight, 3), ("bias", bias, 2)):
        if t is not None or name != "bias":
            _DOOR.given(name, t)
            _DOOR.expect(t is not None and t.ndim == dims, name, f"{dims} dimensions", t)
    _DOOR.floats(x, "x")
    tasks, _, inputs = x.shape
    outputs = weight.shape[1]
    _DOOR.shape("weight", weight, (tasks, outputs, inputs), (1, outputs, inputs))
    _DOOR.shape("bias", bias, (tasks, outputs), (1, outputs))
    _DOOR.kinds([("weight", weight, x.dtype), ("bias", bias, x.dtype)], x.device)
    _DOOR.expect(form.activation in _CODES, "activation", f"a code from {_CODES[0]} to {_CODES[-1]}", form.activation)


# --- PyTorch's kernels, by the schedule's table -----------------------------------------------------------------------


def _torch_forward(x: Tensor, weight: Tensor, bias: Tensor | None, form: LinearForm) -> Tensor:
    row = None if bias is None else bias.unsqueeze(1)
    (y,) = TORCH["linear.forward"](part("linear.forward", Linear(False, False)), x.unsqueeze(2), weight, row)
    assert y is not None
    return activate(y.squeeze(2), form)


def _torch_backward(
    d: Tensor, y: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, form: LinearForm, needs: int
) -> list[Tensor | None]:
    if form != form.plain:
        d = slope_times(_torch_forward(x, weight, bias, form.plain), d, form)
    found: list[Tensor | None] = [None, None, None]
    for i, t in enumerate((x, weight, bias)):
        if t is None or not needs >> i & 1:
            continue
        one = part("linear.backward", Linear(False, i > 0 and t.shape[0] == 1), [j == i for j in range(3)])
        g = TORCH["linear.backward"](one, d.unsqueeze(2), x.unsqueeze(2), weight)[i]
        assert g is not None
        found[i] = g.reshape(t.shape).to(t.dtype)
    return found


BACKENDS.register(Backend("cpu", native.availability, linear_forward, linear_backward, cpu_supports))
BACKENDS.register(TASK_LINEAR)
BACKENDS.register(Backend("torch", lambda: None, _torch_forward, _torch_backward, floating_supports))
BACKENDS.register(reference_backend(REFERENCE, task_linear))

_LAYER = TaskLayer("task_linear", BACKENDS, task_linear, slope_times, LinearForm, _check)
_WAY_OUT = "mtml_kernels.task_linear, which every transform differentiates any number of times."
_library = register_layer(_LAYER, (FORWARD_SCHEMA, BACKWARD_SCHEMA), _WAY_OUT)
_resolved_name = resolved_name_in(BACKENDS)


def task_linear_call(x: Tensor, weight: Tensor, bias: Tensor | None, form: LinearForm, backend: str) -> Tensor:
    """y [T, N, O] of x [T, N, I], weight [T or 1, O, I] and bias [T or 1, O] or None, by the door that is right here.

    Raises:
        TypeError, ValueError: a tensor does not fit.
        BackendUnavailable: the backend asked for cannot run here.
    """
    _check(x, weight, bias, form)
    return layer_call(Static(_LAYER, form, _resolved_name(backend, x.device.type, x.dtype)), x, weight, bias)
