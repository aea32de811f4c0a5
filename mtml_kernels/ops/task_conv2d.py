"""`mtml::task_conv2d`: a convolution for a batch of tasks, differentiable any number of times."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from mtml_kernels import native
from mtml_kernels.native.task_conv2d import conv2d_backward, conv2d_forward
from mtml_kernels.ops.checks import Door
from mtml_kernels.ops.common import resolved_name_in
from mtml_kernels.ops.task_layer_ops import register_layer
from mtml_kernels.ops.task_layers import Static, TaskLayer, layer_call, part, reference_backend
from mtml_kernels.reference.task_conv2d import task_conv2d
from mtml_kernels.registry import REFERENCE, Backend, Registry
from mtml_kernels.schedule.kernels import Convolution
from mtml_kernels.schedule.torch_kernels import TORCH
from mtml_kernels.schema.dtypes import cpu_supports, floating_supports
from mtml_kernels.schema.task_conv2d import BACKWARD_SCHEMA, FORWARD_SCHEMA, ConvForm
from mtml_kernels.triton.backends import TASK_CONV2D

__all__ = ["BACKENDS", "task_conv2d_call"]

BACKENDS = Registry("task_conv2d")
_DOOR = Door(
    "task_conv2d",
    "Shapes are x [T, N, C, H, W], weight [T, O, C / groups, kh, kw] or [O, C / groups, kh, kw], bias [T, O] or [O]",
)

_MOST = 1 << 31  # of an option, and of the pixels of an image: no product of two leaves an int64


def _read(stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], groups: int) -> ConvForm:
    """A form of the op's options."""
    for name, pair, least in (("stride", stride, 1), ("padding", padding, 0), ("dilation", dilation, 1)):
        right = len(pair) == 2 and all(least <= value < _MOST for value in pair)
        _DOOR.expect(right, name, f"two whole numbers of at least {least}", list(pair))
    _DOOR.expect(1 <= groups < _MOST, "groups", "a whole number of at least 1", groups)
    (sh, sw), (ph, pw), (dh, dw) = stride, padding, dilation
    return ConvForm((sh, sw), (ph, pw), (dh, dw), groups)


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, form: ConvForm) -> None:
    """Raises TypeError or ValueError where an argument does not fit x, and names it."""
    for name, t, dims in (("x", x, 5), ("weight", weight, 5), ("bias", bias, 2)):
        if t is not None or name != "bias":
            _DOOR.given(name, t)
            _DOOR.expect(t is not None and t.ndim == dims, name, f"{dims} dimensions", t)
    _DOOR.floats(x, "x")
    tasks, _, channels = x.shape[:3]
    outputs, groups = weight.shape[1], form.groups
    _DOOR.expect(channels > 0 and channels % groups == 0, "x", f"channels in {groups} groups", x)
    _DOOR.expect(outputs > 0 and outputs % groups == 0, "weight", f"outputs in {groups} groups", weight)
    _DOOR.expect(min(weight.shape[3:]) > 0, "weight", "a kernel of at least one pixel", weight)
    own = (outputs, channels // groups, *weight.shape[3:])
    _DOOR.shape("weight", weight, (tasks, *own), (1, *own))
    _DOOR.shape("bias", bias, (tasks, outputs), (1, outputs))
    _DOOR.kinds([("weight", weight, x.dtype), ("bias", bias, x.dtype)], x.device)
    height, width = form.outputs(x, weight)
    _DOOR.expect(min(height, width) > 0, "x", "images that the dilated kernel fits into with padding", x)
    _DOOR.expect(height * width < _MOST, "padding", f"outputs of fewer than {_MOST} pixels", f"{height} x {width}")


# --- PyTorch's kernels, by the schedule's table -----------------------------------------------------------------------


def _plane(images: Tensor) -> Tensor:
    """[T, N, C, H, W] as [T, N, H W, C]."""
    return images.flatten(3).transpose(2, 3)


def _convolution(x: Tensor, weight: Tensor, form: ConvForm, over_tasks: bool) -> Convolution:
    pairs = (x.shape[3:], form.outputs(x, weight), weight.shape[3:], form.stride, form.padding, form.dilation)
    return Convolution((*(float(value) for pair in pairs for value in pair), float(form.groups)), over_tasks)


def _torch_forward(x: Tensor, weight: Tensor, bias: Tensor | None, form: ConvForm) -> Tensor:
    if not x.shape[0]:
        return task_conv2d(x, weight, bias, form)
    row = None if bias is None else bias.unsqueeze(1)
    one = part("conv.forward", _convolution(x, weight, form, False))
    (y,) = TORCH["conv.forward"](one, _plane(x), weight.flatten(2), row)
    assert y is not None
    return y.transpose(2, 3).unflatten(3, form.outputs(x, weight)).contiguous()


def _torch_backward(
    d: Tensor, y: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, form: ConvForm, needs: int
) -> list[Tensor | None]:
    found: list[Tensor | None] = [None, None, None]
    for i, t in enumerate((x, weight, bias)):
        if t is None or not needs >> i & 1:
            continue
        if not x.shape[0]:
            found[i] = t.new_zeros(t.shape)
            continue
        constants = _convolution(x, weight, form, i > 0 and t.shape[0] == 1)
        one = part("conv.backward", constants, [j == i for j in range(3)])
        g = TORCH["conv.backward"](one, _plane(d), _plane(x), weight.flatten(2))[i]
        assert g is not None
        found[i] = (g.transpose(2, 3) if i == 0 else g).reshape(t.shape).to(t.dtype)
    return found


BACKENDS.register(Backend("cpu", native.availability, conv2d_forward, conv2d_backward, cpu_supports))
BACKENDS.register(TASK_CONV2D)
BACKENDS.register(Backend("torch", lambda: None, _torch_forward, _torch_backward, floating_supports))
BACKENDS.register(reference_backend(REFERENCE, task_conv2d))

_LAYER = TaskLayer("task_conv2d", BACKENDS, task_conv2d, None, _read, _check)
_WAY_OUT = "mtml_kernels.task_conv2d, which every transform differentiates any number of times."
_library = register_layer(_LAYER, (FORWARD_SCHEMA, BACKWARD_SCHEMA), _WAY_OUT)
_resolved_name = resolved_name_in(BACKENDS)


def task_conv2d_call(x: Tensor, weight: Tensor, bias: Tensor | None, form: ConvForm, backend: str) -> Tensor:
    """y [T, N, O, OH, OW] of x [T, N, C, H, W], weight [T or 1, O, C / groups, kh, kw], bias [T or 1, O] or None.

    Raises:
        TypeError, ValueError: an argument does not fit.
        BackendUnavailable: the backend asked for cannot run here.
    """
    _check(x, weight, bias, form := _read(*form))
    return layer_call(Static(_LAYER, form, _resolved_name(backend, x.device.type, x.dtype)), x, weight, bias)
