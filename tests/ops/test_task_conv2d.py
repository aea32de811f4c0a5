"""`mtml::task_conv2d`: every backend against PyTorch, derivatives, transforms, precision, and bad arguments."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases.task_ops import TRANSFORMS, error, second_order, with_gradients
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mtml_kernels import BackendUnavailable, task_conv2d
from mtml_kernels.ops.task_conv2d import BACKENDS

NAMES = BACKENDS.available()
every_backend = pytest.mark.parametrize("backend", NAMES)
# stride, padding, dilation, groups
WINDOWS: dict[str, dict[str, Any]] = {
    "plain": {},
    "same": {"padding": 1},
    "strided": {"stride": 2, "padding": (1, 0)},
    "dilated": {"dilation": (1, 2), "padding": (0, 2)},
    "gaps": {"stride": (4, 3)},
    "groups": {"groups": 2, "padding": 1},
    "depthwise": {"groups": 4, "stride": (1, 2)},
}
every_window = pytest.mark.parametrize("window", WINDOWS)


def tensors(
    tasks: int = 2, samples: int = 3, channels: int = 4, outputs: int = 4, size: tuple[int, int] = (6, 5),
    kernel: tuple[int, int] = (3, 2), groups: int = 1, shared: bool = False, bias: str = "own", seed: int = 0,
) -> list[Tensor]:  # fmt: skip
    g = torch.Generator().manual_seed(seed)
    own = () if shared else (tasks,)
    shapes: list[tuple[int, ...]] = [(tasks, samples, channels, *size), (*own, outputs, channels // groups, *kernel)]
    shapes += {"own": [(tasks, outputs)], "shared": [(outputs,)], "none": []}[bias]  # type: ignore[operator]
    return [torch.randn(s, dtype=torch.float64, generator=g) for s in shapes]


def of_window(window: str, **sizes: Any) -> list[Tensor]:
    return tensors(groups=WINDOWS[window].get("groups", 1), **sizes)


def plain(x: Tensor, weight: Tensor, bias: Tensor | None = None, **options: Any) -> Tensor:
    """Task after task by PyTorch's own convolution."""
    weights = [weight if weight.ndim == 4 else weight[t] for t in range(len(x))]
    biases = [bias if bias is None or bias.ndim == 1 else bias[t] for t in range(len(x))]
    return torch.stack([F.conv2d(x[t], weights[t], biases[t], **options) for t in range(len(x))])


@every_backend
@pytest.mark.parametrize("shared, bias", [(False, "own"), (False, "none"), (True, "shared"), (True, "own")])
@every_window
def test_is_pytorchs_convolution_of_every_task(window: str, shared: bool, bias: str, backend: str) -> None:
    case, options = of_window(window, shared=shared, bias=bias), WINDOWS[window]
    found = with_gradients(task_conv2d, case, backend=backend, **options)
    torch.testing.assert_close(found, with_gradients(plain, case, **options))


@every_backend
@every_window
def test_second_derivatives(window: str, backend: str) -> None:
    case, options = of_window(window, samples=2), WINDOWS[window]
    found = second_order(lambda *a: task_conv2d(*a, backend=backend, **options), case)
    torch.testing.assert_close(found, second_order(lambda *a: plain(*a, **options), case))


def _pairs(low: int, high: int) -> st.SearchStrategy[tuple[int, int]]:
    return st.tuples(st.integers(low, high), st.integers(low, high))


@settings(max_examples=60, deadline=None)
@given(
    tasks=st.integers(0, 3), samples=st.sampled_from([0, 1, 2, 6]), groups=st.integers(1, 3),
    channels=st.sampled_from([1, 2, 9]), outputs=st.sampled_from([1, 3, 8, 17]), size=_pairs(1, 12),
    kernel=_pairs(1, 4), stride=_pairs(1, 3), padding=_pairs(0, 2), dilation=_pairs(1, 2), shared=st.booleans(),
    bias=st.sampled_from(["own", "shared", "none"]), seed=st.integers(0, 99),
)  # fmt: skip
def test_any_shape(
    tasks: int, samples: int, groups: int, channels: int, outputs: int, size: tuple[int, int], kernel: tuple[int, int],
    stride: tuple[int, int], padding: tuple[int, int], dilation: tuple[int, int], shared: bool, bias: str, seed: int,
) -> None:  # fmt: skip
    case = tensors(tasks, samples, groups * channels, groups * outputs, size, kernel, groups, shared, bias, seed)
    options = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    if any(size[i] + 2 * padding[i] < dilation[i] * (kernel[i] - 1) + 1 for i in (0, 1)):
        with pytest.raises(ValueError, match="x: expected images that the dilated kernel fits into"):
            task_conv2d(*case, **options)
        return
    expected = with_gradients(task_conv2d, case, backend="reference", **options)
    for backend in ("cpu", "torch"):
        found = with_gradients(task_conv2d, case, backend=backend, **options)
        assert [f.shape for f in found] == [e.shape for e in expected]
        assert error(found, expected) < 1e-11, backend


@every_backend
@pytest.mark.parametrize("shared", [False, True])
def test_gradcheck(shared: bool, backend: str) -> None:
    case = [t.requires_grad_() for t in tensors(2, 1, 2, 2, (3, 3), (2, 2), 1, shared)]

    def call(*a: Tensor) -> Tensor:
        return task_conv2d(*a, stride=2, padding=1, backend=backend)

    assert torch.autograd.gradcheck(call, case)
    assert torch.autograd.gradgradcheck(call, case)


def test_second_order_differs_from_first() -> None:
    """The negative control: without the graph of the gradient the second derivative is another."""
    case = tensors()
    zero = [torch.zeros_like(t) for t in case]
    assert error(zero, second_order(task_conv2d, case)) > 0.1


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("shared, bias", [(False, "own"), (True, "none")])
def test_opcheck(shared: bool, bias: str, backend: str) -> None:
    x, weight, *rest = [t.requires_grad_() for t in tensors(groups=2, shared=shared, bias=bias)]
    arguments = (x, weight[None] if shared else weight, rest[0] if rest else None, [2, 1], [0, 1], [1, 1], 2)
    torch.library.opcheck(torch.ops.mtml.task_conv2d.default, (*arguments, backend))
    y = torch.ops.mtml.task_conv2d(*arguments, backend).detach()
    d = torch.randn_like(y).requires_grad_()
    torch.library.opcheck(torch.ops.mtml.task_conv2d_backward.default, (d, y, *arguments, 7, backend))


def test_gradgradcheck_of_the_op() -> None:
    case = [t.requires_grad_() for t in tensors(2, 1, 2, 2, (3, 3), (2, 2))]
    options = ([1, 1], [1, 0], [1, 1], 1, "cpu")
    assert torch.autograd.gradgradcheck(lambda *a: torch.ops.mtml.task_conv2d(*a, *options), case)


@pytest.mark.parametrize("way", TRANSFORMS)
@pytest.mark.parametrize("shared, bias", [(False, "own"), (True, "shared")])
def test_transforms(shared: bool, bias: str, way: str) -> None:
    case, options = tensors(2, 2, 2, 2, (4, 3), (2, 2), 1, shared, bias), {"padding": (1, 0)}
    found = TRANSFORMS[way](lambda *a: task_conv2d(*a, backend="cpu", **options), case)
    torch.testing.assert_close(found, TRANSFORMS[way](lambda *a: plain(*a, **options), case))


def test_compiled() -> None:
    torch._dynamo.reset()
    case = tensors()

    def call(*a: Tensor) -> Tensor:
        return task_conv2d(*a, padding=1).relu()

    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(with_gradients(compiled, case), with_gradients(call, case))


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("sizes", [(2, 5, 16, 16, (14, 14), (3, 3)), (3, 8, 1, 32, (28, 28), (3, 3))])
def test_float32_is_no_worse_than_pytorch(sizes: Any, shared: bool) -> None:
    errors: dict[str, list[float]] = {"ours": [], "theirs": []}
    for seed in range(8):
        case = tensors(*sizes, shared=shared, seed=seed)
        expected, single = with_gradients(plain, case, padding=1), [t.float() for t in case]
        errors["ours"].append(error(with_gradients(task_conv2d, single, padding=1, backend="cpu"), expected))
        errors["theirs"].append(error(with_gradients(plain, single, padding=1), expected))
    ours, theirs = (torch.tensor(e).median().item() for e in errors.values())
    assert ours <= 2 * theirs, (ours, theirs)


@every_backend
def test_strided_tensors_and_expanded_cotangents(backend: str) -> None:
    x = torch.randn(5, 6, 4, 2, 3, dtype=torch.float64).permute(4, 3, 2, 1, 0)  # [3, 2, 4, 6, 5]
    weight = torch.randn(2, 2, 4, 6, dtype=torch.float64).permute(3, 2, 1, 0).requires_grad_()  # [6, 4, 2, 2]
    y = task_conv2d(x, weight, backend=backend)
    torch.testing.assert_close(y, plain(x, weight))
    (found,) = torch.autograd.grad(y.sum(), weight)
    torch.testing.assert_close(found, torch.autograd.grad(plain(x, weight).sum(), weight)[0])


def test_a_task_does_not_depend_on_those_beside_it() -> None:
    case = [t.float() for t in tensors(4, 7, 5, 9, (20, 20))]
    together = with_gradients(task_conv2d, case, backend="cpu")
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        single = with_gradients(task_conv2d, case, backend="cpu")
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(together, single, strict=True))
    assert torch.equal(task_conv2d(*(t[2:3] for t in case), backend="cpu")[0], together[0][2])


def test_nan_stays_in_its_task() -> None:
    case = tensors()
    case[0][1, 0, 0, 0, 0] = float("nan")
    y = task_conv2d(*case, backend="cpu")
    assert y[1, 0, :, 0, 0].isnan().all() and not y[0].isnan().any() and not y[1, 1:].isnan().any()


BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "rank of x": ({"x": torch.zeros(4, 5, 6, 6)}, ValueError, r"x: expected 5 dimensions, got float32 \[4, 5, 6, 6\]"),
    "no tensor": ({"x": None}, TypeError, "x: expected a tensor, got None"),
    "channels": (
        {"weight": torch.zeros(2, 3, 3, 3)},
        ValueError,
        r"weight: expected \[3, 2, 4, 3, 3\] or \[1, 2, 4, 3",
    ),
    "groups of x": ({"groups": 3}, ValueError, "x: expected channels in 3 groups"),
    "groups of weight": ({"groups": 4}, ValueError, "weight: expected outputs in 4 groups"),
    "no groups": ({"groups": 0}, ValueError, "groups: expected a whole number of at least 1, got 0"),
    "kind of groups": ({"groups": 1.0}, TypeError, "groups: expected a whole number, got 1.0"),
    "bias": ({"bias": torch.zeros(2, 2)}, ValueError, r"bias: expected \[3, 2\] or \[1, 2\]"),
    "stride": ({"stride": 0}, ValueError, r"stride: expected two whole numbers of at least 1, got \[0, 0\]"),
    "padding": ({"padding": (1, -1)}, ValueError, r"padding: expected two whole numbers of at least 0, got \[1, -1\]"),
    "same": ({"padding": "same"}, TypeError, "padding: expected a whole number or a pair .*, got 'same'"),
    "dilation": ({"dilation": (1, 2, 3)}, TypeError, "dilation: expected a whole number or a pair"),
    "small image": ({"dilation": 3}, ValueError, "x: expected images that the dilated kernel fits into"),
    "dtype": ({"bias": torch.zeros(2).double()}, TypeError, "bias: expected torch.float32, got float64"),
    "missing backend": ({"backend": "cuda"}, BackendUnavailable, "task_conv2d has no 'cuda' backend"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments(name: str) -> None:
    changed, kind, message = BAD[name]
    arguments = {"x": torch.zeros(3, 2, 4, 6, 6), "weight": torch.zeros(2, 4, 3, 3), "bias": torch.zeros(2), **changed}
    with pytest.raises(kind, match=message):
        task_conv2d(**arguments)
