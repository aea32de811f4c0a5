"""`hvp`, the documented function: Hessian-vector products of a batch of tasks' losses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from mtml_kernels.checks import check_devices, check_dtypes, shown
from mtml_kernels.functional.inner_loop import inner_loop
from mtml_kernels.losses import Loss
from mtml_kernels.ops.inner_loop import BACKENDS
from mtml_kernels.precision import cast, computed_in, float32_call
from mtml_kernels.program import Program

__all__ = ["follows", "hvp", "long_rate", "products", "recordable"]

_computed = computed_in(BACKENDS)


def hvp(
    program: Program,
    params: Mapping[str, Tensor],
    x: Tensor | Sequence[Tensor],
    y: Tensor,
    vectors: Mapping[str, Tensor],
    *,
    loss: Loss,
    mask: Tensor | None = None,
    start: Mapping[str, Tensor] | None = None,
    backend: str = "auto",
) -> dict[str, Tensor]:
    """H_t v_t for each of T tasks, {name: [T, *shape]}: H_t is the second derivative of the loss of task t.

    It is read off the backward pass of one gradient step, theta' = theta - alpha g(theta), whose Jacobian is I - alpha
    H: by forward-over-reverse, without a graph. alpha = 1 / eps makes v vanish beside alpha H v, so that the difference
    (v - (I - alpha H) v) / alpha is exact to rounding.

    Args:
        program: the model, from `mtml_kernels.program.trace`.
        params: the program's parameters by name, [*shape], shared by all tasks.
        x, y, loss, mask: data [T, S, ...] and loss as of `inner_loop`.
        vectors: {name: [T, *shape]} of parameters; those that it does not name count as constants.
        start: {name: [T, *shape]} of parameters among them: where each task stands, in place of `params`.
        backend: as of `inner_loop`, and so are float16 and bfloat16; products come in the dtype of their vectors.

    Raises:
        ValueError, TypeError, BackendUnavailable: as `inner_loop`; vectors that fit no parameter.
        RuntimeError: from differentiating the products again; the general path's are differentiable:
            `mtml.MAML(..., backend="general").hvp`.

    Example:
        >>> import torch
        >>> from mtml_kernels import hvp, trace
        >>> net = torch.nn.Linear(2, 1)
        >>> x, y = torch.randn(4, 8, 2), torch.randn(4, 8, 1)
        >>> params, v = dict(net.named_parameters()), {"bias": torch.ones(4, 1)}
        >>> hvp(trace(net, [(2,)]), params, x, y, v, loss="mse")["bias"].flatten().tolist()
        [2.0, 2.0, 2.0, 2.0]

    Paper: Pearlmutter, "Fast Exact Multiplication by the Hessian", 1994; Kemaev et al. 2025 (arXiv:2505.00793).
    """
    if not isinstance(vectors, Mapping) or not vectors:
        raise TypeError(f"vectors: expected {{name: [T, *shape]}} of at least one parameter, got {shown(vectors)}")
    if not isinstance(params, Mapping):
        raise TypeError(f"params: expected {{name: tensor}}, got {type(params).__name__}")
    if not isinstance(y, Tensor):
        raise TypeError(f"y: expected a tensor of targets [T, S, ...], got {shown(y)}")
    if float32_call(_computed, backend, next(iter(params.values()), None), params, x, y, vectors, start):
        copies = cast((dict(params), x, y, dict(vectors), start), torch.float32)
        found = hvp(program, *copies[:4], loss=loss, mask=mask, start=copies[4], backend=backend)
        return {name: product.to(vectors[name].dtype) for name, product in found.items()}
    given, tasks = {} if start is None else dict(start), y.shape[0]
    recording = follows(params, x, y, mask, given, vectors)
    with torch.inference_mode(False), torch.enable_grad():
        params, x, y, mask, given, vectors = (recordable(v) for v in (dict(params), x, y, mask, given, dict(vectors)))
        at = {}
        for name in vectors:
            if name not in params:
                raise ValueError(f"vectors: expected names of parameters, {', '.join(params)}; got {name!r}")
            own = given[name] if name in given else params[name].expand(tasks, *params[name].shape)
            at[name] = own if recording and own.requires_grad else own.detach().requires_grad_()
        rate = long_rate(next(iter(at.values())).dtype)
        options: dict[str, Any] = {"adapted": list(vectors), "start": given | at, "backend": backend}
        after = inner_loop(program, params, x, y, rate, steps=1, loss=loss, mask=mask, **options).params
        return products(at, after, vectors, create_graph=recording)


def follows(*values: Any) -> bool:
    """Whether autograd follows a tensor among them: then the products are to have a graph, which raises or is right."""
    tensors = pytree.tree_leaves([dict(v) if isinstance(v, Mapping) else v for v in values])
    return torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in tensors)


def recordable(value: Any) -> Any:
    """The same with copies of tensors that were made in inference mode, which autograd does not take."""
    return pytree.tree_map_only(Tensor, lambda t: t.clone() if t.is_inference() else t, value)


def long_rate(dtype: torch.dtype) -> float:
    """The rate of the step, a power of two."""
    return 1.0 / torch.finfo(dtype).eps


def products(
    at: Mapping[str, Tensor], after: Mapping[str, Tensor], vectors: Mapping[str, Tensor], create_graph: bool = False
) -> dict[str, Tensor]:
    """H v from the points before and after a step of `long_rate`, {name: [T, *shape]} with its graph, which stays.

    Raises ValueError or TypeError for vectors unlike the points.
    """
    for name, vector in vectors.items():
        _check(name, vector, at)
    outputs, inputs, given = [after[n] for n in vectors], [at[n] for n in vectors], list(vectors.values())
    found = torch.autograd.grad(
        outputs, inputs, given, retain_graph=True, create_graph=create_graph, materialize_grads=True
    )
    return {name: (v - g) / long_rate(v.dtype) for (name, v), g in zip(vectors.items(), found, strict=True)}


def _check(name: str, vector: Any, at: Mapping[str, Tensor]) -> None:
    label = f"vectors[{name!r}]"
    if name not in at:
        raise ValueError(f"vectors: expected names of adapted tensors, {', '.join(at)}; got {name!r}")
    if not isinstance(vector, Tensor):
        raise TypeError(f"{label}: expected a tensor, got {shown(vector)}")
    if vector.shape != at[name].shape:
        raise ValueError(f"{label}: expected [T, *shape] = {list(at[name].shape)}, got {list(vector.shape)}")
    check_devices(at[name].device, iter([(label, vector)]))
    check_dtypes(at[name].dtype, iter([(label, vector)]), "the dtype of the parameters")
