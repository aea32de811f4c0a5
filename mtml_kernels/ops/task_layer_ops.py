"""The registered ops of the layers in task_layers.py: schema, fake, checks, and derivatives by the formulas there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from mtml_kernels.ops.checks import Door
from mtml_kernels.ops.registration import OpLibrary, Rules, register_op
from mtml_kernels.ops.task_layers import Static, TaskLayer, adjoint, backward_call, backward_now, forward_now, spread

__all__ = ["register_layer"]


def register_layer(layer: TaskLayer, schemas: tuple[str, str], way_out: str) -> OpLibrary:
    """Registers the op and its backward op; the library must be kept."""

    def forward(x: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> Tensor:
        static = _static(layer, rest)
        layer.check(x, weight, bias, static.form)
        return forward_now(static, x, weight, bias)

    def forward_fake(x: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> Tensor:
        form = _static(layer, rest).form
        layer.check(x, weight, bias, form)
        return x.new_empty(form.output_shape(x, weight))

    def backward(d: Tensor, y: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> list[Tensor]:
        *options, needs, backend = rest
        static = _static(layer, (*options, backend))
        layer.check(x, weight, bias, static.form)
        _check_gradient(layer, d, y, x, weight, static, needs)
        asked = needs & (3 if bias is None else 7)
        return [g for g in backward_now(static, asked, d, y, x, weight, bias) if g is not None]

    def backward_fake(d: Tensor, y: Tensor, *rest: Any) -> list[Tensor]:
        needs = rest[-2]
        return [t.new_empty(t.shape) for i, t in enumerate(rest[:3]) if t is not None and needs >> i & 1]

    rules = Rules(forward, forward_fake, backward, backward_fake, *_op_formulas(layer))
    return register_op(schemas, rules, way_out=way_out)


def _static(layer: TaskLayer, rest: Sequence[Any]) -> Static:
    *options, backend = rest
    return Static(layer, layer.read(*options), backend)


def _check_gradient(
    layer: TaskLayer, d: Tensor, y: Tensor, x: Tensor, weight: Tensor, static: Static, needs: int
) -> None:
    door = Door(f"mtml::{layer.name}", f"Way out: autograd through mtml_kernels.{layer.name} passes what fits")
    shape = static.form.output_shape(x, weight)
    for name, t in (("grad", d), ("y", y)):
        door.given(name, t)
        door.shape(name, t, shape)
    door.kinds([("grad", d, x.dtype), ("y", y, x.dtype)], x.device)
    door.expect(0 <= needs < 8, "needs", "a number from 0 to 7", needs)
    door.memory([("grad", d), ("y", y)])


def _op_formulas(layer: TaskLayer) -> tuple[Callable[..., Any], ...]:
    """setup_context and gradient of the op, then of its backward op."""

    def setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.static = _static(layer, inputs[3:])
        ctx.save_for_backward(*inputs[:3], output)
        ctx.rest = len(inputs) - 3

    def gradient(ctx: Any, d: Tensor) -> tuple[Any, ...]:
        x, weight, bias, y = ctx.saved_tensors
        needs = sum(bool(need) << i for i, need in enumerate(ctx.needs_input_grad[:3]))
        return (*backward_call(ctx.static, needs, d, y, x, weight, bias), *[None] * ctx.rest)

    def setup_again(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
        d, _, *tensors = inputs[:5]
        *options, ctx.needs, backend = inputs[5:]
        ctx.static = _static(layer, (*options, backend))
        ctx.save_for_backward(d, *tensors)
        ctx.set_materialize_grads(False)
        ctx.rest = len(inputs) - 5

    def gradient_again(ctx: Any, cotangents: list[Tensor]) -> tuple[Any, ...]:
        d, x, weight, bias = ctx.saved_tensors
        needs = ctx.needs & (3 if bias is None else 7)
        found = adjoint(ctx.static, spread(cotangents, needs), d, x, weight, bias)
        return (found[0], None, *found[1:], *[None] * ctx.rest)

    return setup, gradient, setup_again, gradient_again
