"""`task_linear`, the documented function."""

from __future__ import annotations

import torch
from torch import Tensor

from mtml_kernels.checks import shown
from mtml_kernels.functional.task_tensors import of_tasks
from mtml_kernels.ops.task_linear import BACKENDS, task_linear_call
from mtml_kernels.precision import cast, computed_in, float32_call, result_dtype
from mtml_kernels.program.activations import Act
from mtml_kernels.schema.task_linear import LinearForm

__all__ = ["task_linear"]

_computed = computed_in(BACKENDS)

# Those without options of their own; sin and cos of z itself.
ACTIVATIONS = {act.name.lower(): act for act in Act if act is not Act.RSQRT}
_FORMS: dict[str | None, LinearForm] = {None: LinearForm()}
for _name, _act in ACTIVATIONS.items():
    _FORMS[_name] = LinearForm(int(_act), *(_act.info.options() or (1.0, 0.0)))


def task_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    backend: str = "auto",
) -> Tensor:
    """A linear layer for a batch of tasks, each with its own weights: y[t] = f(x[t] W[t]^T + b[t]).

    Differentiable any number of times, in forward mode and under torch.func's transforms. A weight or bias without the
    task dimension is shared by all tasks; its gradient is the sum over them.

    Args:
        x: [T, N, I].
        weight: [T, O, I], or [O, I] for all tasks.
        bias: [T, O], or [O] for all tasks, or None.
        activation: None, "relu", "leaky_relu", "tanh", "sigmoid", "gelu", "gelu_tanh", "silu", "softplus", "sin",
            "cos" or "elu", with PyTorch's default options.
        backend: "auto", "cpu" (float32 and float64), "triton" (CUDA tensors), "torch" (any device) or "reference".

    float16 and bfloat16 are computed in float32 where the backend does not take them; under autocast dtypes may differ,
    and y is float32.

    Returns:
        y [T, N, O].

    Raises:
        ValueError: shapes or devices disagree, or an unknown activation or backend.
        TypeError: an argument is no tensor, or dtypes disagree.
        BackendUnavailable: `backend` names one that cannot run here.

    Example:
        >>> import torch
        >>> from mtml_kernels import task_linear
        >>> x, weight = torch.randn(4, 10, 3), torch.randn(4, 5, 3, requires_grad=True)
        >>> y = task_linear(x, weight, torch.zeros(5), activation="tanh")
        >>> y.square().mean().backward()
        >>> y.shape, weight.grad.shape
        (torch.Size([4, 10, 5]), torch.Size([4, 5, 3]))
    """
    form = _FORMS.get(activation) if activation is None or isinstance(activation, str) else None
    if form is None:
        names = ", ".join(map(repr, ACTIVATIONS))
        raise ValueError(f"activation: expected None or one of {names}; got {shown(activation)}")
    if float32_call(_computed, backend, x, x, weight, bias):
        given = cast((x, weight, bias), torch.float32)
        return task_linear(*given, activation=activation, backend=backend).to(result_dtype(x))
    return task_linear_call(x, of_tasks("weight", weight, 2), of_tasks("bias", bias, 1), form, backend)
