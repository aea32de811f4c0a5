"""Tests of the linear heads on Triton's interpreter: test_triton_linear_multihead_loss.py runs them elsewhere."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases.multihead_loss import error
from ops import test_linear_multihead_loss as cpu
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mtml_kernels import HeadLoss, linear_multihead_gram, linear_multihead_loss, multihead_loss
from mtml_kernels.losses import HEAD_KINDS as KINDS
from mtml_kernels.ops import linear_multihead_loss as op
from mtml_kernels.triton import linear_multihead_loss as kernels

assert os.environ.get("TRITON_INTERPRET") == "1", "run test_triton_linear_multihead_loss.py, which sets it up"
# The interpreter computes padding lanes, which are masked, in numpy, which warns of their logarithms.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
FORMS = ("kept", "chunks")
CHUNK = 16  # rows


@pytest.fixture(params=FORMS)
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Both forms: gradients kept at small heads' logits, and large heads by chunks of a few rows."""
    if request.param == "chunks":
        small_chunks(monkeypatch)
    yield request.param


def small_chunks(monkeypatch: pytest.MonkeyPatch, rows: int = CHUNK) -> None:
    monkeypatch.setattr(op, "LARGE", 0)
    monkeypatch.setattr(kernels, "CHUNK_BYTES", 0)
    monkeypatch.setattr(kernels, "CHUNK_ROWS", rows)


def head_case(rows: int, classes: int = 5, dtype: torch.dtype = torch.float32, **options: Any) -> dict[str, Any]:
    """One cross-entropy head with a bias on features [rows, 7]; some ids are ignored."""
    y = torch.randint(classes, (rows,))
    y[torch.rand(rows) < 0.2] = -100
    tensors = {"features": torch.randn(rows, 7), "weights": [torch.randn(classes, 7)], "biases": [torch.randn(classes)]}
    case = {n: t.to(dtype) if isinstance(t, Tensor) else [one.to(dtype) for one in t] for n, t in tensors.items()}
    return case | {"targets": [y], "kinds": HeadLoss(**options)}


def check(case: dict[str, Any], cotangent: Tensor | None = None) -> None:
    """float32 errors are at most twice PyTorch's own."""
    truth = cpu.evaluate(cpu._double(case), "reference", cotangent)
    theirs = error(cpu.evaluate(case, "reference", cotangent), truth)
    assert error(cpu.evaluate(case, "triton", cotangent), truth) <= 2 * theirs + 3e-7


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_every_kind(form: str, reduction: str) -> None:
    rows = 21
    targets = {kind: torch.rand(rows, 3 if kind == "gaussian_nll" else 6) for kind in KINDS}
    targets |= {"kl": torch.rand(rows, 6).softmax(1), "cross_entropy": torch.randint(6, (rows,))}
    case = {
        "features": torch.randn(rows, 7),
        "weights": [torch.randn(6, 7) for kind in KINDS],
        "biases": [torch.randn(6) for kind in KINDS],
        "targets": [targets[kind] for kind in KINDS],
        "kinds": [HeadLoss(kind, reduction=reduction) for kind in KINDS],
    }
    check(case)
    check(case | {"sample_weights": [torch.rand(rows).round(decimals=1) for _ in KINDS]}, torch.rand(len(KINDS)))


@pytest.mark.parametrize("seed", [2, 4, 7, 12])
def test_any_heads_agree_with_the_reference(form: str, seed: int) -> None:
    """Heads of any kind and size with any weights, with and without bias, on shared features or on their own."""
    case = cpu.random_case(seed, torch.float32, shared=seed % 4 > 0)
    check(case, torch.rand(len(case["weights"])).round(decimals=1))


@pytest.mark.parametrize("rows", [1, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK, 3 * CHUNK - 1])
def test_chunk_borders(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    small_chunks(monkeypatch)
    case = head_case(rows)
    case["targets"][0][0] = 1
    case["sample_weights"] = [torch.rand(rows)]
    check(case)
    check(case | {"kinds": "bce_with_logits", "targets": [torch.rand(rows, 5)]})


def test_chunks_of_the_policy() -> None:
    assert kernels.chunk_rows(128256, 2) == 1024 and kernels.chunk_rows(10**9, 4) == 1024
    assert kernels.chunk_rows(1000, 2) % 128 == 0 and 0 <= (64 << 20) - kernels.chunk_rows(1000, 2) * 2000 < 128 * 2000


def test_leading_dimensions_are_rows(form: str) -> None:
    case = cpu.tokens(torch.float32)
    assert error(cpu.evaluate(case, "triton"), cpu.evaluate(cpu.tokens(), "reference")) < 1e-6


def test_strided_tensors_and_a_negative_bit(form: str) -> None:
    case = head_case(20)
    expected = cpu.evaluate(case, "triton")
    strided = {**case, "features": case["features"].t().contiguous().t(), "targets": [case["targets"][0].int()]}
    losses = linear_multihead_loss(**strided, backend="triton")
    assert torch.equal(losses, expected[0])
    weights = torch.rand(20)
    found = [
        linear_multihead_loss(**case, sample_weights=[own], backend="triton")
        for own in (weights, torch._neg_view(-weights))
    ]
    assert torch.equal(*found)


def test_nothing_to_count(form: str) -> None:
    case = head_case(20)
    for change in ({"targets": [torch.full((20,), -100)]}, {"sample_weights": [torch.zeros(20)]}):
        assert not any(t.any() for t in cpu.evaluate({**case, **change}, "triton"))
    w = torch.randn(3, 7, requires_grad=True)
    for x in (torch.zeros(0, 7), torch.zeros(2, 0, 7)):
        loss = linear_multihead_loss(x, [w], None, [torch.zeros(x.shape[:-1], dtype=torch.long)], backend="triton")
        loss.sum().backward()
        assert loss.tolist() == [0.0] and w.grad is not None and not w.grad.any()
    none = torch.zeros(0, 7, requires_grad=True)
    loss = linear_multihead_loss(torch.randn(4, 7), [none], None, [torch.zeros(4, 0)], "mse", backend="triton")
    assert loss.tolist() == [0.0] and torch.autograd.grad(loss.sum(), none)[0].shape == (0, 7)
    assert linear_multihead_loss(torch.zeros(2, 7), [], None, [], backend="triton").shape == (0,)


def test_labels_out_of_range_make_their_heads_loss_nan(form: str) -> None:
    case = head_case(20)
    classes = torch.rand(5)
    two = {name: value if name in ("features", "kinds") else value * 2 for name, value in case.items()}
    two["targets"] = [case["targets"][0].clone(), case["targets"][0]]
    two["class_weights"] = [classes, classes]
    two["targets"][0][17], two["targets"][0][3] = 5, 2**40
    losses = linear_multihead_loss(**two, backend="triton")
    assert losses.isnan().tolist() == [True, False]


def test_bits_do_not_depend_on_the_other_heads_or_on_gradients(form: str) -> None:
    case = cpu.random_case(2, torch.float32)
    assert len(case["weights"]) > 1
    found = [cpu.evaluate(case, "triton") for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert torch.equal(linear_multihead_loss(**case, backend="triton"), found[0][0])
    for i in range(len(case["weights"])):
        one = {k: v if k == "features" else v[i : i + 1] for k, v in case.items()}
        assert torch.equal(cpu.evaluate(one, "triton")[0][0], found[0][0][i])


def test_a_second_backward_is_right_whatever_became_of_the_first(form: str) -> None:
    x, w = torch.randn(40, 7, requires_grad=True), torch.randn(5, 7, requires_grad=True)
    loss = linear_multihead_loss(x, [w], None, [torch.zeros(40, dtype=torch.long)], backend="triton").sum()
    first = torch.autograd.grad(loss, [x, w], retain_graph=True)
    kept = [g.clone() for g in first]
    for g in first:
        g.zero_()
    for _ in range(2):
        again = torch.autograd.grad(loss, [x, w], retain_graph=True)
        assert all(torch.equal(a, b) for a, b in zip(again, kept, strict=True))


def test_only_what_is_asked_for(form: str) -> None:
    case = head_case(40)
    x, w, b = case["features"], case["weights"][0], case["biases"][0]
    whole = cpu.evaluate(case, "triton")[1:]
    for t, expected in zip((x, w, b), whole, strict=True):
        t.requires_grad_()
        losses = linear_multihead_loss(**case, backend="triton")
        assert torch.equal(torch.autograd.grad(losses.sum(), t)[0], expected)
        t.requires_grad_(False)


def test_second_derivatives_and_batches_of_cotangents() -> None:
    case = cpu.random_case(2, torch.float32)
    results = []
    for backend in ("triton", "reference"):
        case["features"] = case["features"].detach().requires_grad_()
        losses = linear_multihead_loss(**case, backend=backend)
        (g,) = torch.autograd.grad(losses.sum(), case["features"], create_graph=True)
        (second,) = torch.autograd.grad(g.square().sum(), case["features"])
        losses = linear_multihead_loss(**case, backend=backend)
        (batched,) = torch.autograd.grad(losses, case["features"], torch.eye(len(losses)), is_grads_batched=True)
        results.append([second, batched])
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)
    assert results[0][0].abs().max() > 1e-3


def test_torch_func() -> None:
    x, w, y = torch.randn(4, 3, 7), torch.randn(5, 7), torch.randint(5, (4, 3))

    def loss(x: Tensor, y: Tensor, backend: str = "triton") -> Tensor:
        return linear_multihead_loss(x, [w], None, [y], backend=backend)[0]

    found = torch.func.vmap(torch.func.grad(loss))(x, y)
    expected = torch.stack([torch.func.grad(loss)(x[i], y[i], "reference") for i in range(4)])
    torch.testing.assert_close(found, expected)


def test_equal_to_the_two_steps_and_the_gram_matrix() -> None:
    case = cpu.random_case(12, torch.float32)
    logits = [F.linear(case["features"], w, b) for w, b in zip(case["weights"], case["biases"], strict=True)]
    options = {k: case[k] for k in ("sample_weights", "class_weights", "pos_weights")}
    two = multihead_loss(logits, case["targets"], case["kinds"], **options, backend="triton")
    torch.testing.assert_close(linear_multihead_loss(**case, backend="triton"), two)
    found, expected = (linear_multihead_gram(**case, backend=name) for name in ("triton", "reference"))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


# --- memory and waiting -----------------------------------------------------------------------------------------------


class Sizes(TorchDispatchMode):
    """How many numbers the largest tensor of a dtype has that any operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        sizes = [t.numel() for t in torch.utils._pytree.tree_leaves(out) if isinstance(t, Tensor)]
        self.largest = max([self.largest, *sizes])
        return out


@pytest.mark.parametrize(("chunk", "held"), [(CHUNK, False), (40, True)])
def test_logits_are_never_held(chunk: int, held: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With one chunk for all rows they are held, and seen."""
    rows, classes, features = 40, 60, 3
    small_chunks(monkeypatch, chunk)
    x, w = torch.randn(rows, features, requires_grad=True), torch.randn(classes, features, requires_grad=True)
    y, seen = torch.randint(classes, (rows,)), Sizes()

    def watched(call: op.LinearCall) -> Tensor:
        with seen:  # inside: under a dispatch mode the function takes the logits' way
            return op.linear_multihead_loss_call(call)

    monkeypatch.setattr(
        sys.modules["mtml_kernels.functional.linear_multihead_loss"], "linear_multihead_loss_call", watched
    )
    loss = linear_multihead_loss(x, [w], None, [y], backend="triton").sum()
    with seen:
        loss.backward()
    assert (seen.largest == rows * classes) == held
    assert seen.largest == max(chunk * classes, classes * features)


def forbid_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """What makes a number of a tensor raises: on a GPU it waits for all that is under way."""

    def wait(*_: Any) -> Any:
        raise AssertionError("a number was asked for")

    for name in ("tolist", "item", "__bool__", "__int__", "__float__", "__index__", "nonzero"):
        monkeypatch.setattr(Tensor, name, wait)


@pytest.mark.parametrize("cotangent", [[1.0, 1.0, 1.0], [0.5, 1.0, -2.0]])
def test_nothing_waits_for_the_device(form: str, cotangent: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    case = head_case(40)
    case["features"].requires_grad_()
    three = {name: value if name in ("features", "kinds") else value * 3 for name, value in case.items()}
    three["class_weights"] = [None, torch.rand(5), None]
    logits = [torch.randn(40, 5, requires_grad=True) for _ in range(3)]
    by = torch.tensor(cotangent)
    with monkeypatch.context() as patch:
        forbid_waiting(patch)
        with pytest.raises(AssertionError, match="a number was asked for"):
            by.tolist()
        losses = linear_multihead_loss(**three, backend="triton")
        found = torch.autograd.grad(losses, case["features"], by)
        losses = multihead_loss(logits, three["targets"], three["kinds"], backend="triton")
        found += torch.autograd.grad(losses, logits, by)
    losses = linear_multihead_loss(**three, backend="reference")
    expected = torch.autograd.grad(losses, case["features"], by)
    losses = multihead_loss(logits, three["targets"], three["kinds"], backend="reference")
    torch.testing.assert_close(found, expected + torch.autograd.grad(losses, logits, by))


def test_bad_input_is_named() -> None:
    x, w, y = torch.zeros(8, 4), torch.zeros(5, 4), torch.zeros(8, dtype=torch.long)
    with pytest.raises(ValueError, match=r"weights\[0\]: expected \[C, D\] with D = 4"):
        linear_multihead_loss(x, [w[:, :3]], None, [y], backend="triton")
    with pytest.raises(ValueError, match="backend='reference'"):
        weights = [torch.ones(5, requires_grad=True)]
        linear_multihead_loss(x, [w], None, [y], class_weights=weights, backend="triton")


# --- half precision ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float16, 2e-3), (torch.bfloat16, 1.6e-2)])
def test_half_precision(form: str, dtype: torch.dtype, limit: float) -> None:
    case = head_case(70, dtype=dtype)
    found = cpu.evaluate(case, "triton")
    assert all(t.dtype == dtype for t in found)
    assert error([t.double() for t in found], cpu.evaluate(cpu._double(case), "reference")) < limit


def test_sums_over_chunks_are_float32() -> None:
    """Two hundred products: the float32 sum keeps what a sum that is rounded each time loses."""
    terms = [(torch.rand(3, 8).bfloat16(), torch.rand(8, 2).bfloat16()) for _ in range(200)]
    truth = sum((a.double() @ b.double() for a, b in terms), torch.zeros(3, 2, dtype=torch.float64))
    total, lossy = None, torch.zeros(3, 2, dtype=torch.bfloat16)
    for a, b in terms:
        total = kernels.add_product(total, a, b)
        lossy = lossy + a @ b
    assert total is not None and total.dtype == torch.float32
    assert error([total.double()], [truth]) < 1e-6 < 1e-3 < error([lossy.double()], [truth])


def test_small_gradients_of_a_mean_do_not_underflow(monkeypatch: pytest.MonkeyPatch) -> None:
    """At the logits of a mean over 81920 elements they are below what float16 holds well; a scaled loss is exact."""
    case = head_case(40, classes=2048, dtype=torch.float16)
    case |= {"kinds": "mse", "targets": [torch.zeros(40, 2048, dtype=torch.float16)], "biases": [None]}
    case["features"] = case["features"] / 50
    truth = cpu.evaluate(cpu._double(case), "reference")[1:]
    scale = torch.tensor([4096.0], dtype=torch.float16)
    errors = []
    for chunks in (False, True):
        if chunks:
            small_chunks(monkeypatch)
        found = cpu.evaluate(case, "triton", scale)[1:]
        errors.append(error([t.double() for t in found], [t * scale for t in truth]))
    assert errors[1] < 1e-3 < errors[0], errors


def test_the_product_of_cuda_tensors_is_one_that_pytorch_has() -> None:
    """Half precision with a float32 sum: arguments that PyTorch understands, and has for CUDA tensors alone."""
    a = torch.zeros(3, 3, dtype=torch.bfloat16)
    with pytest.raises(NotImplementedError, match=r"aten::addmm.dtype_out.*'CPU'"):
        kernels.half_product(torch.zeros(3, 3), a, a, 1)


def test_autocast_changes_nothing(form: str) -> None:
    case = head_case(40)
    expected = cpu.evaluate(case, "triton")
    with torch.autocast("cpu", torch.bfloat16):
        found = cpu.evaluate(case, "triton")
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
