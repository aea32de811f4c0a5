"""`mtml::task_linear`: every backend against PyTorch, derivatives, transforms, precision, and bad arguments."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases.task_ops import TRANSFORMS, error, second_order, with_gradients
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mtml_kernels import BackendUnavailable, task_linear
from mtml_kernels.functional.task_linear import ACTIVATIONS
from mtml_kernels.ops.task_linear import BACKENDS

NAMES = BACKENDS.available()
every_backend = pytest.mark.parametrize("backend", NAMES)
ACTS = [None, *ACTIVATIONS]
FORMS = list(itertools.product([False, True], ["own", "shared", "none"]))  # weights of all tasks; biases


def tensors(
    tasks: int = 3,
    rows: int = 4,
    inputs: int = 5,
    outputs: int = 2,
    shared: bool = False,
    bias: str = "own",
    seed: int = 0,
) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    own = () if shared else (tasks,)
    shapes: list[tuple[int, ...]] = [(tasks, rows, inputs), (*own, outputs, inputs)]
    shapes += {"own": [(tasks, outputs)], "shared": [(outputs,)], "none": []}[bias]  # type: ignore[operator]
    return [torch.randn(s, dtype=torch.float64, generator=g) for s in shapes]


def plain(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Task after task by PyTorch's own layer."""
    every = [
        (weight if weight.ndim == 2 else weight[t], bias if bias is None or bias.ndim == 1 else bias[t])
        for t in range(len(x))
    ]
    return torch.stack([F.linear(x[t], w, b) for t, (w, b) in enumerate(every)])


@every_backend
@pytest.mark.parametrize("shared, bias", FORMS)
def test_is_pytorchs_layer_of_every_task(shared: bool, bias: str, backend: str) -> None:
    case = tensors(shared=shared, bias=bias)
    found, expected = with_gradients(task_linear, case, backend=backend), with_gradients(plain, case)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(
        second_order(lambda *a: task_linear(*a, backend=backend), case), second_order(plain, case)
    )


@pytest.mark.parametrize("activation", ACTS)
@pytest.mark.parametrize("backend", [name for name in NAMES if name != "reference"])
def test_activations(backend: str, activation: str | None) -> None:
    """Values, gradients and gradients of gradients."""
    case = tensors(rows=3)
    args: dict[str, Any] = {"activation": activation}
    found = with_gradients(task_linear, case, backend=backend, **args)
    torch.testing.assert_close(found, with_gradients(task_linear, case, backend="reference", **args))
    again = [second_order(lambda *a, b=b: task_linear(*a, backend=b, **args), case) for b in (backend, "reference")]
    torch.testing.assert_close(*again)


@settings(max_examples=60, deadline=None)
@given(
    tasks=st.integers(0, 4), rows=st.sampled_from([0, 1, 2, 7, 200]), inputs=st.sampled_from([0, 1, 3, 8, 33, 300]),
    outputs=st.sampled_from([1, 2, 8, 17, 40]), shared=st.booleans(), bias=st.sampled_from(["own", "shared", "none"]),
    activation=st.sampled_from(ACTS), seed=st.integers(0, 99),
)  # fmt: skip
def test_any_shape(
    tasks: int, rows: int, inputs: int, outputs: int, shared: bool, bias: str, activation: str | None, seed: int
) -> None:
    case = tensors(tasks, rows, inputs, outputs, shared, bias, seed)
    expected = with_gradients(task_linear, case, activation=activation, backend="reference")
    for backend in ("cpu", "torch"):
        found = with_gradients(task_linear, case, activation=activation, backend=backend)
        assert [f.shape for f in found] == [e.shape for e in expected]
        assert error(found, expected) < 1e-8, backend


@every_backend
@pytest.mark.parametrize("activation", [None, "tanh", "gelu"])
def test_gradcheck(activation: str | None, backend: str) -> None:
    case = [t.requires_grad_() for t in tensors(2, 2, 3, 2, shared=True)]

    def call(*a: Tensor) -> Tensor:
        return task_linear(*a, activation=activation, backend=backend)

    assert torch.autograd.gradcheck(call, case)
    assert torch.autograd.gradgradcheck(call, case)


def test_a_third_derivative() -> None:
    case = [t.requires_grad_() for t in tensors(2, 2, 2, 2)]

    def gradient(*a: Tensor) -> tuple[Tensor, ...]:
        y = task_linear(*a, activation="tanh", backend="cpu")
        return torch.autograd.grad((y * y).sum(), a, create_graph=True)

    assert torch.autograd.gradgradcheck(gradient, case)


def test_second_order_differs_from_first() -> None:
    """The negative control: a backward whose own graph is cut gives another second derivative."""
    case = tensors()

    class Cut(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *a: Tensor) -> Tensor:
            ctx.save_for_backward(*a)
            return task_linear(*a, activation="tanh")

        @staticmethod
        def backward(ctx: Any, d: Tensor) -> tuple[Tensor, ...]:
            with torch.enable_grad():
                leaves = [t.detach().requires_grad_() for t in ctx.saved_tensors]
                return torch.autograd.grad(task_linear(*leaves, activation="tanh"), leaves, d)

    true = second_order(lambda *a: task_linear(*a, activation="tanh"), case)
    cut = second_order(Cut.apply, case)
    assert error(cut, true) > 0.1


@pytest.mark.parametrize("form", [0, 2, 3])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_opcheck(backend: str, form: int) -> None:
    shared, bias = FORMS[form]
    x, weight, *rest = [t.requires_grad_() for t in tensors(shared=shared, bias=bias)]
    weight = weight[None] if shared else weight
    biases = None if not rest else rest[0] if bias == "own" else rest[0][None]
    for code in (-1, 2, 4) if form == 0 else (-1,):
        arguments = (x, weight, biases, code, 1.0, 0.0)
        torch.library.opcheck(torch.ops.mtml.task_linear.default, (*arguments, backend))
        y = torch.ops.mtml.task_linear(*arguments, backend).detach()
        d = torch.randn_like(y).requires_grad_()
        torch.library.opcheck(torch.ops.mtml.task_linear_backward.default, (d, y, *arguments, 7, backend))


@pytest.mark.parametrize("code", [-1, 2])
def test_gradgradcheck_of_the_op(code: int) -> None:
    case = [t.requires_grad_() for t in tensors(2, 2, 3, 2)]
    assert torch.autograd.gradgradcheck(lambda *a: torch.ops.mtml.task_linear(*a, code, 1.0, 0.0, "cpu"), case)


@pytest.mark.parametrize("way", TRANSFORMS)
@pytest.mark.parametrize("shared, bias", [(False, "own"), (True, "shared")])
def test_transforms(shared: bool, bias: str, way: str) -> None:
    case = tensors(shared=shared, bias=bias)
    for activation in (None, "tanh"):
        found = TRANSFORMS[way](lambda *a: task_linear(*a, activation=activation, backend="cpu"), case)  # noqa: B023
        formula = (lambda z: z) if activation is None else torch.tanh
        torch.testing.assert_close(found, TRANSFORMS[way](lambda *a: formula(plain(*a)), case))  # noqa: B023


def test_compiled() -> None:
    torch._dynamo.reset()
    case = tensors()

    def call(*a: Tensor) -> Tensor:
        return task_linear(*a, activation="relu") * 2

    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(with_gradients(compiled, case), with_gradients(call, case))


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("sizes", [(4, 25, 40, 40), (2, 5, 784, 64), (3, 400, 33, 5)])
def test_float32_is_no_worse_than_pytorch(sizes: tuple[int, int, int, int], shared: bool) -> None:
    errors: dict[str, list[float]] = {"ours": [], "theirs": []}
    for seed in range(12):
        case = tensors(*sizes, shared=shared, seed=seed)
        expected, single = with_gradients(plain, case), [t.float() for t in case]
        errors["ours"].append(error(with_gradients(task_linear, single, backend="cpu"), expected))
        errors["theirs"].append(error(with_gradients(plain, single), expected))
    ours, theirs = (torch.tensor(e).median().item() for e in errors.values())
    assert ours <= 2 * theirs, (ours, theirs)


@every_backend
def test_strided_tensors_and_expanded_cotangents(backend: str) -> None:
    x = torch.randn(5, 4, 3, dtype=torch.float64).permute(2, 1, 0)
    weight = torch.randn(5, 6, dtype=torch.float64).t()[::3].requires_grad_()  # [2, 5]
    bias = torch.randn(1, dtype=torch.float64).expand(3, 2)
    y = task_linear(x, weight, bias, backend=backend)
    torch.testing.assert_close(y, plain(x, weight, bias))
    (found,) = torch.autograd.grad(y.sum(), weight)
    torch.testing.assert_close(found, torch.autograd.grad(plain(x, weight, bias).sum(), weight)[0])


def test_a_task_does_not_depend_on_those_beside_it() -> None:
    case = [t.float() for t in tensors(5, 300, 40, 33)]
    alone, together = (with_gradients(task_linear, c, backend="cpu") for c in ([t[:1] for t in case], case))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        single = with_gradients(task_linear, case, backend="cpu")
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(together, single, strict=True))
    grads = with_gradients(lambda *a: task_linear(*a, backend="cpu")[0] * 1, case)
    assert torch.equal(alone[0][0], together[0][0]) and torch.equal(alone[0][0], grads[0])


def test_nan_stays_in_its_task_and_infinity_behind_a_relu() -> None:
    x, weight, bias = tensors()
    x[1, 2, 3] = float("nan")
    y = task_linear(x, weight, bias, activation="relu", backend="cpu")
    assert y[1, 2].isnan().all() and not y[[0, 2]].isnan().any() and not y[1, 0].isnan().any()
    b = torch.full((1, 1), -1.0, requires_grad=True)
    y = task_linear(torch.zeros(1, 1, 2), torch.zeros(1, 1, 2), b, activation="relu", backend="cpu")
    (g,) = torch.autograd.grad(y, b, torch.full_like(y, float("inf")))
    assert g.item() == 0


@every_backend
def test_nothing_aliases_an_argument(backend: str) -> None:
    case = tensors(2, 3, 1, 1)
    held = {t.untyped_storage().data_ptr() for t in case}
    results = with_gradients(task_linear, case, backend=backend)
    assert not held & {t.untyped_storage().data_ptr() for t in results}


BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "rank of x": ({"x": torch.zeros(4, 5)}, ValueError, r"x: expected 3 dimensions, got float32 \[4, 5\]"),
    "no tensor": ({"weight": 3}, TypeError, "weight: expected a tensor, got 3.*Shapes are"),
    "inputs": ({"weight": torch.zeros(3, 2, 4)}, ValueError, r"weight: expected \[3, 2, 5\] or \[1, 2, 5\]"),
    "tasks": ({"weight": torch.zeros(2, 2, 5)}, ValueError, r"weight: expected \[3, 2, 5\]"),
    "bias": ({"bias": torch.zeros(3)}, ValueError, r"bias: expected \[3, 2\] or \[1, 2\], got float32 \[1, 3\]"),
    "dtype": ({"weight": torch.zeros(2, 5).double()}, TypeError, r"weight: expected torch.float32, got float64"),
    "integers": ({"x": torch.zeros(3, 4, 5).long()}, TypeError, "x: expected floating-point numbers, got int64"),
    "device": ({"bias": torch.zeros(2, device="meta")}, ValueError, "bias: expected a dense tensor on cpu"),
    "activation": ({"activation": "swish"}, ValueError, "activation: expected None or one of 'relu'.*got 'swish'"),
    "no name": ({"activation": F.relu}, ValueError, "activation: expected None or one of 'relu'"),
    "backend": ({"backend": "cup"}, ValueError, "unknown backend 'cup'"),
    "missing backend": ({"backend": "cuda"}, BackendUnavailable, "task_linear has no 'cuda' backend"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments(name: str) -> None:
    changed, kind, message = BAD[name]
    arguments = {"x": torch.zeros(3, 4, 5), "weight": torch.zeros(2, 5), "bias": torch.zeros(2), **changed}
    with pytest.raises(kind, match=message):
        task_linear(**arguments)


def test_half_precision_beside_pytorchs_kernels() -> None:
    case = [t.bfloat16() for t in tensors()]
    found = with_gradients(task_linear, case)
    assert {t.dtype for t in found} == {torch.bfloat16}
    torch.testing.assert_close(found, with_gradients(plain, case), rtol=0.05, atol=0.05)
