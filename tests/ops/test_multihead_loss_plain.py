"""Plain tensors in the multi-head loss: read by the engine itself, with their gradients in one piece of memory."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from mtml_kernels import HeadLoss, multihead_loss, native
from mtml_kernels.native.multihead_loss import FAST_LANE
from mtml_kernels.ops.multihead_loss_backends import BACKENDS
from mtml_kernels.schema.multihead_loss import FastLane

pytestmark = pytest.mark.skipif(
    native.availability() is not None or not hasattr(Tensor, "__dlpack_c_exchange_api__"),
    reason="there is no compiled engine, or PyTorch has no table of its tensors",
)
Heads = tuple[Any, Any, Any]


@pytest.fixture
def taken() -> Iterator[list[int]]:
    """Grows with every call on plain tensors."""
    calls: list[int] = []

    def counted(*args: Any) -> Any:
        calls.append(1)
        return FAST_LANE.forward(*args)

    with with_lane(dataclasses.replace(FAST_LANE, forward=counted)):
        yield calls


@contextmanager
def with_lane(lane: FastLane | None) -> Iterator[None]:
    cpu = BACKENDS.named("cpu")
    BACKENDS.register(dataclasses.replace(cpu, fast_lane=lane))
    yield
    BACKENDS.register(cpu)


def equal_heads(dtype: torch.dtype = torch.float32) -> Heads:
    return [torch.randn(6, 5, dtype=dtype) for _ in range(3)], [torch.randint(5, (6,)) for _ in range(3)], HeadLoss()


def mixed_heads(dtype: torch.dtype = torch.float32) -> Heads:
    shapes = [(6, 10), (2, 40), (3, 4, 7), (5,), (3, 8), (1, 1)]
    kinds = ["cross_entropy", HeadLoss("cross_entropy", label_smoothing=0.1), "cross_entropy", "mse", "gaussian_nll"]
    logits = [torch.randn(shape, dtype=dtype) for shape in shapes]
    ids = [torch.randint(4, (shape[0], *shape[2:])) for shape in shapes[:3]]
    values = [torch.randn(shape, dtype=dtype) for shape in [(5,), (3, 4), (1, 1)]]
    return logits, [*ids, *values], [*kinds, "l1"]


def stack(dtype: torch.dtype = torch.float32) -> Heads:
    return torch.randn(4, 6, 5, dtype=dtype), torch.randint(5, (4, 6)), HeadLoss(reduction="sum")


def losses_and_gradients(heads: Heads, cotangent: Callable[[Tensor], Tensor]) -> list[Tensor]:
    logits, targets, kinds = heads
    leaves = [z.clone().requires_grad_() for z in ([logits] if isinstance(logits, Tensor) else logits)]
    losses = multihead_loss(leaves[0] if isinstance(logits, Tensor) else leaves, targets, kinds, backend="cpu")
    return [losses.detach(), *torch.autograd.grad(losses, leaves, cotangent(losses.detach()))]


COTANGENTS: dict[str, Callable[[Tensor], Tensor]] = {
    "ones": torch.ones_like,
    "ones of a sum": lambda x: torch.ones((), dtype=x.dtype).expand(x.shape),
    "some": lambda x: torch.linspace(-1, 1, len(x), dtype=x.dtype),
    "minus ones": lambda x: torch._neg_view(torch.ones_like(x)),
}


@pytest.mark.parametrize("cotangent", COTANGENTS)
@pytest.mark.parametrize("make", [equal_heads, mixed_heads, stack])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_bits_are_those_of_the_general_way(
    make: Callable[..., Heads], dtype: torch.dtype, cotangent: str, taken: list[int]
) -> None:
    heads = make(dtype)
    found = losses_and_gradients(heads, COTANGENTS[cotangent])
    assert taken == [1]
    with with_lane(None):
        expected = losses_and_gradients(heads, COTANGENTS[cotangent])
    assert taken == [1]
    for x, y in zip(found, expected, strict=True):
        assert torch.equal(x, y) and x.stride() == y.stride()


NOT_PLAIN: dict[str, Callable[[Tensor], Tensor]] = {
    "columns": lambda z: z.t().contiguous().t(),
    "to be negated": lambda z: torch._neg_view(-z),
    "expanded": lambda z: z[:1].expand(6, 5),
    "a subclass": lambda z: z.as_subclass(Other),
    "empty": lambda z: z[:0],
}


class Other(Tensor):
    pass


@pytest.mark.parametrize("name", NOT_PLAIN)
def test_other_tensors_go_the_general_way(name: str, taken: list[int]) -> None:
    z, y = torch.randn(6, 5), torch.randint(5, (6,))
    own = NOT_PLAIN[name](z)
    assert FAST_LANE.read([own], [y]) is None
    loss = multihead_loss([own, z], [y[: len(own)], y], backend="cpu")
    expected = multihead_loss([z[:0] if name == "empty" else own.as_subclass(Tensor) + 0, z], [y[: len(own)], y])
    assert torch.equal(loss.as_subclass(Tensor), expected)


def test_what_a_transform_left_behind_is_not_plain() -> None:
    left: list[Tensor] = []
    torch.func.grad(lambda z: (left.append(z), z.sum())[1])(torch.randn(6, 5))  # type: ignore[func-returns-value]
    assert FAST_LANE.read(left, [torch.randint(5, (6,))]) is None


def test_targets_that_are_not_plain() -> None:
    z, y = torch.randn(6, 5), torch.randint(5, (6,))
    for target in (y.int(), torch.rand(6, 5, dtype=torch.float64), torch.rand(6, 5, requires_grad=True), [1], None):
        assert FAST_LANE.read([z], [target]) is None  # type: ignore[list-item]
    assert FAST_LANE.read([y], [y]) is None and FAST_LANE.read([z, z.double()], [y, y]) is None
    assert FAST_LANE.read([torch.nn.Parameter(z)], [y]) is not None
    with pytest.raises(ValueError, match=r"targets\[0\]: expected a tensor that requires no grad"):
        multihead_loss([z], [torch.rand(6, 5, requires_grad=True)], backend="cpu")


def test_every_shape_is_another_call() -> None:
    """What was checked once is not taken for checked where shapes, kinds or the division into heads differ."""
    shapes = [[(6, 5)], [(5, 6)], [(6, 5), (5, 6)], [(5, 6), (6, 5)], [(6, 5, 1)], [(2, 3, 5)]]
    for _ in range(2):
        for kinds in ("mse", "l1"):
            for some in shapes:
                zs, ys = [torch.randn(s) for s in some], [torch.randn(s) for s in some]
                expected = multihead_loss(zs, ys, kinds, backend="reference")
                torch.testing.assert_close(multihead_loss(zs, ys, kinds, backend="cpu"), expected)
    with pytest.raises(ValueError, match=r"targets\[0\]: expected \[6, 5\]"):
        multihead_loss([torch.randn(6, 5)], [torch.randn(5, 6)], "mse", backend="cpu")


def test_gradients_are_the_callers_own(taken: list[int]) -> None:
    logits, targets, _ = mixed_heads()
    leaves = [z.requires_grad_() for z in logits[:3]]
    loss = multihead_loss(leaves, targets[:3], backend="cpu").sum()
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    kept = [g.clone() for g in first]
    first[0].fill_(7)
    assert taken == [1] and torch.equal(first[1], kept[1]) and not first[1]._is_view()
    last = torch.autograd.grad(loss, leaves)
    assert all(torch.equal(x, y) for x, y in zip(last, kept, strict=True))
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, leaves)


def test_without_gradients(taken: list[int]) -> None:
    logits, targets, kinds = mixed_heads()
    found = multihead_loss(logits, targets, kinds, backend="cpu")
    assert taken == [1] and not found.requires_grad
    assert torch.equal(found, losses_and_gradients((logits, targets, kinds), torch.ones_like)[0])


@pytest.mark.parametrize("before", [True, False])
def test_first_derivatives_before_and_after_second_ones(before: bool, taken: list[int]) -> None:
    z, y = torch.randn(4, 5, dtype=torch.float64, requires_grad=True), torch.randint(5, (4,))
    loss = multihead_loss([z], [y], backend="cpu").sum()
    (first,) = torch.autograd.grad(loss, z, retain_graph=True, create_graph=not before)
    (second,) = torch.autograd.grad(loss, z, create_graph=before)
    expected = torch.func.jvp(torch.func.grad(lambda x: torch.nn.functional.cross_entropy(x, y)), (z,), (z,))
    torch.testing.assert_close((first, second), (expected[0], expected[0]))
    torch.testing.assert_close(torch.autograd.grad(second if before else first, z, z)[0], expected[1])
    assert taken == [1]


def test_a_gradient_outlives_the_others_on_any_thread() -> None:
    logits, targets, _ = equal_heads()
    found = losses_and_gradients((logits, targets, HeadLoss()), torch.ones_like)[1:]
    kept = [g.clone() for g in found]
    thread = threading.Thread(target=lambda: [found.pop(0) for _ in range(2)] and None)
    thread.start()
    thread.join()
    assert len(found) == 1 and torch.equal(found[0], kept[2])


def test_a_gradient_that_lives_when_the_interpreter_ends() -> None:
    code = """
import torch
from mtml_kernels import multihead_loss
logits = [torch.zeros(2, 3, requires_grad=True) for _ in range(2)]
multihead_loss(logits, [torch.zeros(2, dtype=torch.long)] * 2, backend="cpu").sum().backward()
torch.kept = [z.grad for z in logits]
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
