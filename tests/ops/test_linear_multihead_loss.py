"""Linear heads with their losses on the CPU: against the reference, their promises and their memory."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases.multihead_loss import error, random_head
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mtml_kernels import HeadLoss, linear_multihead_gram, linear_multihead_loss, multihead_loss, native
from mtml_kernels.ops import linear_multihead_loss as op

pytestmark = pytest.mark.skipif(native.availability() is not None, reason="the compiled engine is not there")
Case = dict[str, Any]


def random_case(seed: int, dtype: torch.dtype = torch.float64, shared: bool = True) -> Case:
    """Up to five heads of any kind on features [N, D]."""
    g = torch.Generator().manual_seed(seed)
    n, d, count = (int(torch.randint(1, high, (), generator=g)) for high in (70, 90, 6))
    sizes = [2 * int(torch.randint(1, 70, (), generator=g)) for _ in range(count)]
    heads = [random_head(seed * 100 + i, shape=(33, size)).to(dtype) for i, size in enumerate(sizes)]
    take = torch.randint(33, (n,), generator=g)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g, dtype=torch.float64).to(dtype)

    x = draw(n, d)
    return {
        "features": x if shared else [x, *(draw(n, d) for _ in heads[1:])],
        "weights": [draw(h.logits.shape[1], d) / d**0.5 for h in heads],
        "biases": [draw(h.logits.shape[1]) if i % 2 else None for i, h in enumerate(heads)],
        "targets": [h.target[take] for h in heads],
        "kinds": [h.spec for h in heads],
        "sample_weights": [None if h.sample_weights is None else h.sample_weights[take] for h in heads],
        "class_weights": [h.class_weights for h in heads],
        "pos_weights": [h.pos_weights for h in heads],
    }


def evaluate(case: Case, backend: str, cotangent: Tensor | None = None) -> list[Tensor]:
    """Losses, then the gradients of features, weights and biases."""
    case = dict(case)
    xs = case["features"] if isinstance(case["features"], list) else [case["features"]]
    xs, ws = ([t.detach().clone().requires_grad_() for t in ts] for ts in (xs, case["weights"]))
    bs = [b if b is None else b.detach().clone().requires_grad_() for b in case["biases"]]
    case.update(features=xs if isinstance(case["features"], list) else xs[0], weights=ws, biases=bs)
    losses = linear_multihead_loss(**case, backend=backend)
    by = torch.ones_like(losses) if cotangent is None else cotangent.to(losses)
    leaves = [*xs, *ws, *(b for b in bs if b is not None)]
    return [losses.detach(), *torch.autograd.grad((by * losses).sum(), leaves)]


def agree(seed: int, shared: bool) -> None:
    case = random_case(seed, shared=shared)
    cotangent = torch.rand(len(case["weights"])).round(decimals=1)
    assert error(evaluate(case, "cpu", cotangent), evaluate(case, "reference", cotangent)) < 1e-9


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 1 << 20), st.booleans())
def test_any_heads_agree_with_the_reference(seed: int, shared: bool) -> None:
    agree(seed, shared)


@pytest.mark.parametrize("seed", range(8))
def test_blocks_without_logits_agree_with_the_reference(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(op, "LARGE", 1000)
    agree(seed, True)


@pytest.mark.parametrize("seed", range(12))
def test_float32_is_no_worse_than_twice_pytorch(seed: int) -> None:
    case = random_case(seed, torch.float32)
    truth = evaluate(_double(case), "reference")
    own, theirs = error(evaluate(case, "cpu"), truth), error(evaluate(case, "reference"), truth)
    assert own <= 2 * theirs + 3e-7


def _double(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.double() if value.is_floating_point() else value
    if isinstance(value, dict):
        return {k: _double(v) for k, v in value.items()}
    return [_double(v) for v in value] if isinstance(value, list) else value


def tokens(dtype: torch.dtype = torch.float64) -> Case:
    g = torch.Generator().manual_seed(0)
    features = torch.randn(2, 5, 3, 20, generator=g).to(dtype)
    y = torch.randint(37, (2, 5, 3), generator=g)
    return {
        "features": features,
        "weights": [torch.randn(37, 20, generator=g).to(dtype), torch.randn(4, 20, generator=g).to(dtype)],
        "biases": [None, torch.randn(4, generator=g).to(dtype)],
        "targets": [y, torch.randn(2, 5, 3, 4, generator=g).to(dtype)],
        "kinds": [HeadLoss("cross_entropy", ignore_index=3), "mse"],
        "sample_weights": [torch.rand(2, 5, generator=g), torch.rand(2, generator=g)],
    }


def test_leading_dimensions_are_rows() -> None:
    case = tokens()
    assert error(evaluate(case, "cpu"), evaluate(case, "reference")) < 1e-12
    logits = F.linear(case["features"], case["weights"][0])
    expected = F.cross_entropy(logits.flatten(0, 2), case["targets"][0].flatten(), ignore_index=3)
    plain = linear_multihead_loss(case["features"], case["weights"][:1], None, case["targets"][:1], case["kinds"][0])
    torch.testing.assert_close(plain[0], expected)


def test_several_blocks_of_rows_and_panels() -> None:
    g = torch.Generator().manual_seed(0)
    n, d, c = 900, 300, 1100  # more than two blocks of rows, panels in every direction
    case = {
        "features": torch.randn(n, d, generator=g),
        "weights": [torch.randn(c, d, generator=g) / 20],
        "biases": [None],
    }
    case["targets"] = [torch.randint(c, (n,), generator=g)]
    truth = evaluate(_double(case), "reference")
    theirs = error(evaluate(case, "reference"), truth)
    assert error(evaluate(case, "cpu"), truth) <= 2 * theirs + 1e-7
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(op, "LARGE", 1)
        assert (
            error(evaluate(case, "cpu", torch.tensor([3.0])), [truth[0], *(3 * t for t in truth[1:])])
            <= 2 * theirs + 1e-7
        )


@pytest.mark.parametrize("large", [False, True])
def test_first_and_second_derivatives_by_finite_differences(large: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(op, "LARGE", 1 if large else op.LARGE)
    y, t = torch.tensor([0, 2, 1]), torch.rand(3, 2, dtype=torch.float64)

    def losses(x: Tensor, w: Tensor, v: Tensor, b: Tensor) -> Tensor:
        return linear_multihead_loss(x, [w, v], [None, b], [y, t], ["cross_entropy", "bce_with_logits"], backend="cpu")

    shapes = [(3, 4), (3, 4), (2, 4), (2,)]
    leaves = tuple(torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes)
    assert torch.autograd.gradcheck(losses, leaves)
    assert torch.autograd.gradgradcheck(losses, leaves)


@pytest.mark.parametrize("large", [False, True])
def test_a_second_backward_is_right_whatever_became_of_the_first(large: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(op, "LARGE", 1 if large else op.LARGE)
    x, w = torch.randn(6, 5, requires_grad=True), torch.randn(4, 5, requires_grad=True)
    loss = linear_multihead_loss(x, [w], None, [torch.zeros(6, dtype=torch.long)], backend="cpu").sum()
    first = torch.autograd.grad(loss, [x, w], retain_graph=True)
    kept = [g.clone() for g in first]
    for g in first:
        g.zero_()
    assert all(torch.equal(a, b) for a, b in zip(torch.autograd.grad(loss, [x, w]), kept, strict=True))


@pytest.mark.parametrize("large", [False, True])
def test_another_default_device(large: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """`torch.set_default_device` is for tensors the user makes; those of the heads lie where the features do."""
    monkeypatch.setattr(op, "LARGE", 1 if large else op.LARGE)
    x, w = torch.randn(6, 5, requires_grad=True), torch.randn(4, 5, requires_grad=True)
    y, cotangent = torch.zeros(6, dtype=torch.long), torch.tensor([2.0, 3.0])

    def results() -> list[Tensor]:
        losses = linear_multihead_loss(x, [w, w], None, [y, y], backend="cpu")
        return [losses.detach(), *torch.autograd.grad(losses, [x, w], cotangent)]

    expected = results()
    with torch.device("meta"):
        assert torch.empty(0).is_meta
        found = results()
        with torch.no_grad():
            found.append(linear_multihead_loss(x, [w, w], None, [y, y], backend="cpu"))
    assert all(torch.equal(a, b) for a, b in zip(found, [*expected, expected[0]], strict=True))


@pytest.mark.parametrize("large", [False, True])
def test_values_still_to_be_negated(large: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors with PyTorch's negative bit do not lie in memory as they are."""
    monkeypatch.setattr(op, "LARGE", 1 if large else op.LARGE)
    case = random_case(3)
    expected = linear_multihead_loss(**case, backend="cpu")
    for name in ("features", "weights", "biases", "sample_weights"):
        given = case[name] if isinstance(case[name], list) else [case[name]]
        views = [t if t is None else torch._neg_view(-t) for t in given]
        case[name] = views if isinstance(case[name], list) else views[0]
    assert torch.equal(linear_multihead_loss(**case, backend="cpu"), expected)


def test_a_batch_of_cotangents() -> None:
    case = random_case(7)
    case["features"].requires_grad_()
    losses = linear_multihead_loss(**case, backend="cpu")
    eye = torch.eye(len(losses), dtype=torch.float64)
    (batched,) = torch.autograd.grad(losses, case["features"], eye, is_grads_batched=True)
    (expected,) = torch.autograd.grad(linear_multihead_loss(**case, backend="cpu").sum(), case["features"])
    torch.testing.assert_close(batched.sum(0), expected)


def test_torch_func_and_compile() -> None:
    case = random_case(5)
    x, w, y = torch.randn(4, 3, 7), torch.randn(5, 7), torch.randint(5, (4, 3))

    def loss(x: Tensor, y: Tensor) -> Tensor:
        return linear_multihead_loss(x, [w], None, [y], backend="cpu")[0]

    expected = torch.stack([torch.autograd.functional.jacobian(lambda a, i=i: loss(a, y[i]), x[i]) for i in range(4)])
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(loss))(x, y), expected)
    compiled = torch.compile(lambda a: linear_multihead_loss(**{**case, "features": a}), backend="aot_eager")
    torch.testing.assert_close(compiled(case["features"]), linear_multihead_loss(**case))


def test_bits_do_not_depend_on_threads_or_on_other_heads() -> None:
    cases = [random_case(seed, torch.float32) for seed in range(6)]
    threads = torch.get_num_threads()
    for case in cases:
        case["features"] = torch.randn(600, case["features"].shape[1])
        case["targets"] = [t[torch.randint(len(t), (600,))] for t in case["targets"]]
        case["sample_weights"] = [None] * len(case["targets"])
        found = []
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            found.append(evaluate(case, "cpu"))
        torch.set_num_threads(threads)
        assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))
        one = {k: v if k == "features" else v[-1:] for k, v in case.items()}
        assert torch.equal(evaluate(one, "cpu")[0][0], found[0][0][-1])


def test_empty_inputs_nan_and_labels() -> None:
    w, y = torch.randn(3, 4, requires_grad=True), torch.zeros(2, dtype=torch.long)
    for x in (torch.zeros(0, 4), torch.zeros(2, 0, 4)):
        loss = linear_multihead_loss(x, [w], None, [torch.zeros(x.shape[:-1], dtype=torch.long)], backend="cpu")
        loss.sum().backward()
        assert loss.tolist() == [0.0] and w.grad is not None and not w.grad.any()
    assert linear_multihead_loss(torch.zeros(2, 4), [], None, []).shape == (0,)
    ignored = linear_multihead_loss(torch.randn(2, 4), [w], None, [y - 100], backend="cpu")
    assert ignored.tolist() == [0.0]
    x = torch.randn(2, 4)
    bad = w.detach().clone()
    bad[1, 2] = float("nan")
    assert linear_multihead_loss(x, [w, bad, w], None, [y] * 3, backend="cpu").isnan().tolist() == [False, True, False]
    with pytest.raises(ValueError, match=r"targets\[1\]: expected class ids in \[0, 3\).*got 3 in row 1"):
        linear_multihead_loss(x, [w, w], None, [y, torch.tensor([0, 3])], backend="cpu")


def test_the_gram_matrix_of_the_heads_gradients() -> None:
    case = random_case(3)
    losses, gram = linear_multihead_gram(**case, backend="cpu")
    x = case["features"].clone().requires_grad_()
    each = linear_multihead_loss(**{**case, "features": x}, backend="reference")
    rows = torch.stack([torch.autograd.grad(loss, x, retain_graph=True)[0].flatten() for loss in each])
    torch.testing.assert_close(losses, each.detach())
    torch.testing.assert_close(gram, rows @ rows.t())


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        ({"weights": [torch.zeros(5, 3)]}, ValueError, r"weights\[0\]: expected \[C, D\] with D = 4"),
        ({"weights": []}, ValueError, "targets: expected one entry for each of 0 heads"),
        ({"biases": [torch.zeros(4)]}, ValueError, r"biases\[0\]: expected \[C\] = \[5\]"),
        ({"biases": torch.zeros(5)}, TypeError, "biases: expected a list"),
        ({"features": torch.zeros(4)}, ValueError, r"features: expected \[..., N, D\]"),
        ({"weights": [torch.zeros(5, 4).double()]}, TypeError, r"weights\[0\]: expected torch.float32"),
        ({"targets": [torch.zeros(7, dtype=torch.long)]}, ValueError, r"targets\[0\]: expected \[8\]"),
        ({"class_weights": [torch.ones(5, requires_grad=True)]}, ValueError, "backend='reference'"),
    ],
)
def test_bad_input_is_named(call: Case, kind: type[Exception], message: str) -> None:
    good = {"features": torch.zeros(8, 4), "weights": [torch.zeros(5, 4)], "biases": None}
    good["targets"] = [torch.zeros(8, dtype=torch.long)]
    with pytest.raises(kind, match=message):
        linear_multihead_loss(**{**good, **call}, backend="cpu")


def memory_of_a_large_vocabulary(rows: int, features: int, words: int) -> float:
    """MiB by which a loss and its gradients raise this process's peak, beyond the gradients."""
    import resource

    torch.set_num_threads(2)
    x, w = torch.randn(rows, features, requires_grad=True), torch.randn(words, features).requires_grad_()
    y = torch.randint(words, (rows,))
    linear_multihead_loss(x[:1, :8].detach(), [w[:10, :8].detach()], None, [y[:1] % 10], backend="cpu")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    linear_multihead_loss(x, [w], None, [y], backend="cpu").sum().backward()
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert x.grad is not None and w.grad is not None
    return (grown * 1024 - x.grad.nbytes - w.grad.nbytes) / 2**20


def script(code: str, **variables: str) -> str:
    folders = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
    path = os.pathsep.join([*folders, os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, **variables, "PYTHONPATH": path}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_memory_does_not_grow_with_the_logits() -> None:
    """Logits [768, 65536] are 192 MiB; the published limit is 200 MB at 4096 rows, 131072 words."""
    text = script("import test_linear_multihead_loss as t; print(t.memory_of_a_large_vocabulary(768, 64, 65536))")
    assert float(text) < 130


def test_equal_to_the_two_steps() -> None:
    case = random_case(11)
    logits = [F.linear(case["features"], w, b) for w, b in zip(case["weights"], case["biases"], strict=True)]
    options = {k: case[k] for k in ("sample_weights", "class_weights", "pos_weights")}
    two = multihead_loss(logits, case["targets"], case["kinds"], **options, backend="cpu")
    torch.testing.assert_close(linear_multihead_loss(**case, backend="cpu"), two)
