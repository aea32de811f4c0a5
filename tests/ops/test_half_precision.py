"""Half precision is how the engine's functions are given tensors; they compute in float32, under autocast too."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from cases.compiled import whole_graph
from torch import Tensor, nn

from mtml_kernels import (
    BackendUnavailable,
    head_inner_loop,
    hvp,
    inner_loop,
    linear_multihead_gram,
    linear_multihead_loss,
    multihead_loss,
    task_conv2d,
    task_linear,
    task_update,
    trace,
)
from mtml_kernels.functional.multihead_loss import multihead_loss_and_gradients
from mtml_kernels.precision import cast

T, S, Q, D, C = 3, 5, 4, 6, 3
F32 = torch.float32
HALVES = [torch.bfloat16, torch.float16]
NET = nn.Sequential(nn.Linear(D, 4), nn.Tanh(), nn.Linear(4, C))
PROGRAM = trace(NET, [(D,)])
Tensors = dict[str, Tensor]
Call = Callable[..., Any]


def autocast(dtype: torch.dtype = torch.bfloat16) -> AbstractContextManager[Any]:
    return torch.autocast("cpu", dtype)


def _inner(t: Tensors, **options: Any) -> Any:
    params = {name: t[name] for name in PROGRAM.names}
    found = inner_loop(
        PROGRAM, params, t["x"], t["y"], t["lr"], steps=3, loss="mse", query_x=t["qx"], query_y=t["qy"], **options
    )
    return found.loss, found.output, found.support_losses, *found.params.values()


def _started(t: Tensors, **options: Any) -> Any:
    own = {"2.bias": t["2.bias"].expand(T, C)}
    return _inner(t, start=own, mask=torch.linspace(0, 1, S).expand(T, S), **options)


def _head(t: Tensors, **options: Any) -> Any:
    given = (t["x"], t["ids"], t["qx"], t["w"], t["b"], 0.3)
    found = head_inner_loop(*given, steps=4, query_labels=t["query_ids"], adapted=True, **options)
    return tuple(found)


def _head_values(t: Tensors, **options: Any) -> Any:
    given = (t["x"], t["y"], t["qx"], t["w"], t["b"], 0.3)
    return tuple(head_inner_loop(*given, steps=2, loss="mse", query_labels=t["qy"], form="gram", **options))[:3]


def _losses(t: Tensors, **options: Any) -> Any:
    weights: Any = {"sample_weights": [torch.linspace(0.1, 1, T), None]}
    logits = [t["x"][:, 0, :C], t["x"][:, 1]]
    return multihead_loss(
        logits, [t["ids"][:, 0], t["x"][:, 2].detach()], ["cross_entropy", "mse"], **weights, **options
    )


def _apart(t: Tensors, **options: Any) -> Any:
    losses, gradients = multihead_loss_and_gradients([t["x"][:, 0]], [t["ids"][:, 0]], **options)
    return losses, *gradients


def _linear_losses(t: Tensors, **options: Any) -> Any:
    heads = [t["w"], t["w"][:2]], [t["b"], None], [t["ids"], t["y"][..., :2]]
    return linear_multihead_loss(t["x"], *heads, ["cross_entropy", "huber"], **options)


def _gram(t: Tensors, **options: Any) -> Any:
    return linear_multihead_gram(
        t["x"], [t["w"], t["w"][:2]], None, [t["ids"], t["y"][..., :2]], ["cross_entropy", "mse"], **options
    )


def _linear(t: Tensors, **options: Any) -> Any:
    return task_linear(t["x"], t["w"], t["b"], activation="tanh", **options)


def _conv(t: Tensors, **options: Any) -> Any:
    x = t["x"].unflatten(2, (1, 2, 3))
    return task_conv2d(x, t["w"][:, :4].reshape(C, 1, 2, 2), t["b"], padding=1, **options)


def _update(t: Tensors, **options: Any) -> Any:
    return tuple(task_update([t["x"], t["y"]], [t["x"], t["y"]], 0.1, rule="adam", **options))


def _hvp(t: Tensors, **options: Any) -> Any:
    """Of constants: what the products depend on they are not differentiated by."""
    params = {name: t[name].detach() for name in PROGRAM.names}
    vectors = {name: p.flip(0).expand(T, *p.shape) for name, p in params.items()}
    return tuple(hvp(PROGRAM, params, t["x"].detach(), t["y"], vectors, loss="mse", **options).values())


CALLS: dict[str, Call] = {
    "inner_loop": _inner,
    "inner_loop with starts": _started,
    "head_inner_loop": _head,
    "head_inner_loop of values": _head_values,
    "multihead_loss": _losses,
    "multihead_loss_and_gradients": _apart,
    "linear_multihead_loss": _linear_losses,
    "linear_multihead_gram": _gram,
    "task_linear": _linear,
    "task_conv2d": _conv,
    "task_update": _update,
    "hvp": _hvp,
}
ONE_DTYPE = {"task_update", "hvp"}  # whose results have the dtype of an argument, under autocast too
# whose way back is, in part, PyTorch's own of a product, which a user's autocast around `backward()` does round
BY_AUTOGRAD = {("head_inner_loop", "cpu"), ("head_inner_loop", "reference"), ("linear_multihead_loss", "reference")}
NO_GRADIENT = {"multihead_loss_and_gradients", "linear_multihead_gram", "hvp"}
SCHEDULED = ("inner_loop", "inner_loop with starts", "task_linear", "task_conv2d", "task_update", "hvp")
BACKENDS = dict.fromkeys(CALLS, ("cpu", "reference")) | dict.fromkeys(SCHEDULED, ("cpu", "torch", "reference"))


def tensors(dtype: torch.dtype = torch.float32, stored: torch.dtype = torch.bfloat16) -> Tensors:
    """Values of the dtype `stored`, in `dtype`."""
    torch.manual_seed(0)
    shapes = {"x": (T, S, D), "qx": (T, Q, D), "y": (T, S, C), "qy": (T, Q, C), "w": (C, D), "b": (C,)}
    found = {name: torch.randn(shape) for name, shape in shapes.items()}
    found |= {name: p.detach().clone() for name, p in NET.named_parameters()} | {"lr": torch.tensor(0.1)}
    found = {name: t.to(stored).to(dtype) for name, t in found.items()}
    asked = {name: t.requires_grad_(name not in ("y", "qy")) for name, t in found.items()}
    return asked | {"ids": torch.randint(C, (T, S)), "query_ids": torch.randint(C, (T, Q))}


def run(call: Call, t: Tensors, around: Any = nullcontext, back: Any = nullcontext, **options: Any) -> Sequence[Tensor]:
    """What comes out, and the gradients of its sum, made within `back`."""
    with around():
        found = call(t, **options)
    found = [found] if isinstance(found, Tensor) else [*found]
    leaves = [x for x in t.values() if x.requires_grad]
    total = torch.stack([x.float().sum() for x in found if x.requires_grad] or [torch.zeros(())]).sum()
    if not total.requires_grad:
        return found
    with back():
        return [*found, *torch.autograd.grad(total, leaves, materialize_grads=True)]


def assert_bits(found: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("name", CALLS)
def test_stored_in_half_precision_it_is_the_float32_call_rounded_once(name: str, dtype: torch.dtype) -> None:
    want = cast([t.detach() for t in run(CALLS[name], tensors(stored=dtype))], dtype, frozenset({torch.float32}))
    found = run(CALLS[name], tensors(dtype, dtype))
    assert {t.dtype for t in found} == {dtype}
    outputs = len(found) - (0 if name in NO_GRADIENT else sum(t.requires_grad for t in tensors().values()))
    assert_bits(found[:outputs], want[:outputs])
    near = 4 * torch.finfo(dtype).eps  # an argument that is read several times has its gradients added in its dtype
    torch.testing.assert_close(found[outputs:], want[outputs:], rtol=near, atol=near)


@pytest.mark.parametrize("backend", ["cpu", "torch", "reference"])
@pytest.mark.parametrize("name", CALLS)
def test_autocast_decides_nothing_inside(name: str, backend: str) -> None:
    """Neither around the call nor around the way back: those are float32's bits."""
    if backend not in BACKENDS[name]:
        with pytest.raises(BackendUnavailable):
            CALLS[name](tensors(), backend="torch")
        return
    want = run(CALLS[name], tensors(), backend=backend)
    assert_bits(run(CALLS[name], tensors(), autocast, backend=backend), want)
    if (name, backend) not in BY_AUTOGRAD:
        assert_bits(run(CALLS[name], tensors(), autocast, autocast, backend=backend), want)
        assert_bits(run(CALLS[name], tensors(), back=autocast, backend=backend), want)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("name", CALLS)
def test_under_autocast_dtypes_may_be_mixed(name: str, dtype: torch.dtype) -> None:
    """As a trunk's features in half precision beside float32 parameters."""
    want = run(CALLS[name], tensors(stored=dtype))
    mixed = {
        n: t.detach().to(dtype).requires_grad_(t.requires_grad) if n in ("x", "y", "b") else t
        for n, t in tensors(stored=dtype).items()
    }
    with (
        pytest.raises(TypeError, match=r"expected (torch\.)?(float32|float16|bfloat16)")
        if name not in ("multihead_loss", "multihead_loss_and_gradients", "task_update")
        else nullcontext()
    ):
        CALLS[name](mixed)
    found = run(CALLS[name], mixed, lambda: autocast(dtype))
    for a, b in zip(found, want, strict=True):
        if name not in ONE_DTYPE and a.dtype != dtype:
            assert a.dtype == torch.float32
        near = 4 * torch.finfo(a.dtype).eps
        torch.testing.assert_close(a.float(), b, rtol=near, atol=near)


@pytest.mark.parametrize("name", CALLS)
def test_float64_stays_what_it_is(name: str) -> None:
    want = run(CALLS[name], tensors(torch.float64))
    assert_bits(run(CALLS[name], tensors(torch.float64), autocast), want)
    assert {t.dtype for t in want} == {torch.float64}


@pytest.mark.parametrize(
    "name", ["inner_loop", "head_inner_loop", "multihead_loss", "linear_multihead_loss", "task_linear"]
)
def test_autocast_of_other_devices_says_nothing(name: str) -> None:
    want = run(CALLS[name], tensors())
    torch.set_autocast_enabled("cuda", True)
    try:
        assert_bits(run(CALLS[name], tensors()), want)
        with pytest.raises(TypeError):
            CALLS["task_linear"](tensors() | {"x": tensors(torch.bfloat16)["x"]})
    finally:
        torch.set_autocast_enabled("cuda", False)


def test_backends_that_take_half_precision_get_it() -> None:
    t = tensors(torch.bfloat16)
    assert not torch.equal(_linear(t, backend="reference"), _linear(t, backend="cpu"))  # PyTorch rounds before tanh
    torch.testing.assert_close(_linear(t, backend="reference"), _linear(t), rtol=2e-2, atol=2e-2)
    loss = _inner(t, backend="torch")[0]
    assert loss.dtype == torch.bfloat16
    torch.testing.assert_close(loss.float(), _inner(tensors())[0], rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize(
    "name", ["inner_loop", "head_inner_loop", "linear_multihead_loss", "task_linear", "task_update"]
)
@pytest.mark.parametrize("half", [True, False])
def test_under_torch_compile(name: str, half: bool) -> None:
    def step(t: Tensors) -> Any:
        with autocast() if not half else nullcontext():
            return CALLS[name](t)

    t = tensors(torch.bfloat16 if half else torch.float32)
    if not half:
        t["x"] = t["x"].detach().bfloat16().requires_grad_()
    if name == "task_update" and not half:
        t["y"] = t["y"].bfloat16()
    compiled, graphs = whole_graph(step)
    found, want = ([*r] if isinstance(r, tuple) else [r] for r in (compiled(t), step(t)))
    assert [a.dtype for a in found] == [a.dtype for a in want] and graphs() == 1
    torch.testing.assert_close(found, want, rtol=1e-2 if half else 1e-5, atol=1e-2 if half else 1e-6)
    grads = [
        torch.autograd.grad(r[0].float().sum(), [v for v in t.values() if v.requires_grad], allow_unused=True)
        for r in (found, want)
    ]
    torch.testing.assert_close(*([g for g in gs if g is not None] for gs in grads), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("name", ["task_linear", "task_conv2d", "linear_multihead_loss"])
def test_derivatives_by_formulas_under_autocast(name: str) -> None:
    """Forward mode, and a backward pass that is recorded, run PyTorch's operations in place of the backends."""
    t = tensors()
    tangent = torch.ones_like(t["x"])

    def pushed() -> Tensor:
        return torch.func.jvp(lambda x: CALLS[name](t | {"x": x}), (t["x"].detach(),), (tangent,))[1]

    def recorded() -> Tensor:
        (g,) = torch.autograd.grad(CALLS[name](t).square().sum(), t["x"], create_graph=True)
        return g

    for derivative in (pushed, recorded):
        want = derivative()
        with autocast():
            found = derivative()
        assert found.dtype == F32
        torch.testing.assert_close(found, want, rtol=1e-6, atol=1e-6)


def test_second_derivatives_of_the_building_blocks() -> None:
    """Double backward through the copies: exact in float32, and not the first derivative again."""

    def second(t: Tensors) -> Tensor:
        (g,) = torch.autograd.grad(_linear(t).float().square().sum(), t["x"], create_graph=True)
        (h,) = torch.autograd.grad(g.float().square().sum(), t["x"])
        return h.float()

    exact = second(tensors(torch.float64)).float()
    with autocast():
        inside = second(tensors())
    torch.testing.assert_close(inside, exact, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(second(tensors(torch.bfloat16)), exact, rtol=5e-2, atol=0.3)
