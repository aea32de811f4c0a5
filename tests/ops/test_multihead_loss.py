"""The multi-head loss on the CPU: against the reference, PyTorch's own functions, and its promises."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases.multihead_loss import Head, arguments, error, evaluate, random_head
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mtml_kernels import HeadLoss, multihead_loss, native
from mtml_kernels.functional.multihead_loss import multihead_loss_and_gradients
from mtml_kernels.losses import HEAD_KINDS as KINDS

pytestmark = pytest.mark.skipif(native.availability() is not None, reason="the compiled engine is not there")
SEEDS = st.integers(0, 1 << 30)


def agree(seeds: list[int]) -> None:
    heads = [random_head(seed) for seed in seeds]
    cotangent = torch.rand(len(heads), dtype=torch.float64).round()  # ones are passed on, others scaled
    assert error(evaluate(heads, "cpu", cotangent), evaluate(heads, "reference", cotangent)) < 1e-9


@settings(max_examples=60, deadline=None)
@given(st.lists(SEEDS, min_size=1, max_size=5))
def test_any_heads_agree_with_the_reference(seeds: list[int]) -> None:
    agree(seeds)


@pytest.mark.parametrize("seed", range(40))
def test_float32_is_no_worse_than_twice_pytorch(seed: int) -> None:
    head = random_head(seed)
    truth, single = evaluate([head], "reference"), head.to(torch.float32)
    # the head as float32 sees it: its own rounding is in both
    truth = evaluate([single.to(torch.float64)], "reference")
    own, theirs = error(evaluate([single], "cpu"), truth), error(evaluate([single], "reference"), truth)
    assert own <= 2 * theirs + 3e-7


def test_the_very_functions_of_pytorch() -> None:
    z, y = torch.randn(64, 33, dtype=torch.float64), torch.randint(33, (64,))
    t, weights = torch.softmax(torch.randn_like(z), 1), torch.rand(33, dtype=torch.float64)
    kind = HeadLoss("cross_entropy", label_smoothing=0.1, ignore_index=3)
    kinds = [kind, "cross_entropy", "kl", "bce_with_logits", "mse", "l1", HeadLoss("huber", delta=0.3)]
    found = multihead_loss([z] * 7, [y, t, t, t, t, t, t], kinds, class_weights=[weights, *[None] * 6], backend="cpu")
    expected = [
        F.cross_entropy(z, y, weights, label_smoothing=0.1, ignore_index=3),
        F.cross_entropy(z, t),
        F.kl_div(F.log_softmax(z, 1), t, reduction="batchmean"),
        F.binary_cross_entropy_with_logits(z, t),
        F.mse_loss(z, t),
        F.l1_loss(z, t),
        F.huber_loss(z, t, delta=0.3),
    ]
    torch.testing.assert_close(found, torch.stack(expected))


@pytest.mark.parametrize("shape", [(8, 10), (4, 200), (2, 10, 40)])
def test_extreme_logits(shape: tuple[int, ...]) -> None:
    z = torch.empty(shape).uniform_(-1e4, 1e4, generator=torch.Generator().manual_seed(0))
    y = torch.randint(0, 10, (shape[0], *shape[2:]), generator=torch.Generator().manual_seed(1))
    head = Head(HeadLoss(), z, y)
    truth = evaluate([head.to(torch.float64)], "reference")
    assert error(evaluate([head], "cpu"), truth) <= 2 * error(evaluate([head], "reference"), truth) + 1e-7


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_exponentials_over_the_whole_range(dtype: torch.dtype) -> None:
    """A softmax over (0, x) gives exp(x) / (1 + exp(x)), down to the smallest numbers."""
    x = torch.linspace(-103 if dtype == torch.float32 else -745, 0, 100_001, dtype=dtype)
    for pixels in (False, True):
        z = torch.stack([torch.zeros_like(x), x])[None] if pixels else torch.stack([torch.zeros_like(x), x], 1)
        y = torch.zeros(z.numel() // 2, dtype=torch.long).view(z.shape[0], *z.shape[2:])
        g = multihead_loss_and_gradients([z], [y], HeadLoss("cross_entropy", "sum"), backend="cpu")[1][0]
        p = (g[0, 1] if pixels else g[:, 1]).double()
        e = torch.exp(x.double())
        truth = e / (1 + e)
        smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
        assert (
            float(((p - truth).abs() / (truth + 2 * smallest / torch.finfo(dtype).eps)).max())
            < 4 * torch.finfo(dtype).eps
        )


@pytest.mark.parametrize("kind", KINDS)
def test_empty_heads(kind: str) -> None:
    for shape in [(0, 4), (0, 4, 6)]:
        z = torch.zeros(shape, requires_grad=True)
        y = torch.zeros(*shape[:-1], shape[-1] // 2 if kind == "gaussian_nll" else shape[-1])
        loss = multihead_loss([z], [y], [kind], backend="cpu")
        loss.sum().backward()
        assert loss.tolist() == [0.0] and z.grad is not None and z.grad.shape == shape
    assert multihead_loss([], []).shape == (0,)


def test_one_class_and_all_ignored() -> None:
    one = torch.tensor([[1e4], [-3.0]], requires_grad=True)
    ignored = torch.tensor([[float("nan"), 1.0], [float("inf"), 2.0]], requires_grad=True)
    pixels = torch.full((1, 2, 40), float("nan"), requires_grad=True)
    targets = [torch.zeros(2, dtype=torch.long), torch.full((2,), -100), torch.full((1, 40), -100)]
    losses = multihead_loss([one, ignored, pixels], targets, backend="cpu")
    losses.sum().backward()
    assert losses.tolist() == [0.0, 0.0, 0.0]
    for z in (one, ignored, pixels):
        assert z.grad is not None and not z.grad.any()


def test_a_nan_stays_in_its_row_and_head() -> None:
    logits = [torch.randn(4, c, requires_grad=True) for c in (10, 200, 10)]
    with torch.no_grad():
        logits[1][2, 3] = float("nan")
    losses = multihead_loss(logits, [torch.zeros(4, dtype=torch.long)] * 3, backend="cpu")
    losses.sum().backward()
    assert losses.isnan().tolist() == [False, True, False]
    assert logits[1].grad is not None
    assert logits[1].grad.isnan().any(1).tolist() == [False, False, True, False]


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize(("label", "row"), [(10, 0), (-1, 3), (1 << 40, 2), (-(1 << 60), 1)])
def test_a_label_out_of_range_is_named(backend: str, label: int, row: int) -> None:
    targets = [torch.zeros(4, dtype=torch.long) for _ in range(2)]
    targets[1][row] = label
    with pytest.raises(ValueError, match=rf"targets\[1\]: expected class ids in \[0, 10\).*got {label} in row {row}"):
        multihead_loss([torch.randn(4, 10)] * 2, targets, backend=backend)
    with pytest.raises(ValueError, match=r"in \[0, 0\)"):
        multihead_loss([torch.randn(4, 0)], [targets[0]], backend=backend)


def second_order_heads() -> list[Head]:
    heads = [random_head(seed, kind) for kind in KINDS for seed in range(300, 400) if _small(random_head(seed, kind))][
        :40
    ]
    return heads[:: max(len(heads) // 8, 1)]


def _small(head: Head) -> bool:
    return 0 < head.logits.numel() < 40


@pytest.mark.parametrize("head", second_order_heads(), ids=lambda h: h.spec.kind)
def test_first_and_second_derivatives_by_finite_differences(head: Head) -> None:
    targets, kinds, options = arguments([head])

    def losses(z: Tensor) -> Tensor:
        return multihead_loss([z], targets, kinds, backend="cpu", **options)

    z = head.logits.clone().requires_grad_()
    assert torch.autograd.gradcheck(losses, z)
    assert torch.autograd.gradgradcheck(losses, z)


def test_third_derivatives_and_a_negative_control() -> None:
    z, y = torch.randn(3, 4, dtype=torch.float64, requires_grad=True), torch.tensor([0, 1, 3])

    def third(backend: str) -> Tensor:
        value = multihead_loss([z], [y], backend=backend).sum()
        for _ in range(3):
            (g,) = torch.autograd.grad(value, z, create_graph=True)
            value = (g * torch.arange(12.0, dtype=torch.float64).view(3, 4)).sum()
        return g

    assert torch.equal(third("reference").sign(), third("cpu").sign())
    torch.testing.assert_close(third("cpu"), third("reference"))
    assert float(third("cpu").detach().abs().max()) > 1e-3  # not the zero that a missing formula would give


def stack_case() -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    return torch.randn(5, 7, 10, generator=g, dtype=torch.float64), torch.randint(10, (5, 7), generator=g)


def test_stacks_are_their_heads() -> None:
    z, y = stack_case()
    own, classes = torch.rand(5, 7), torch.rand(5, 10)
    a, b = z.clone().requires_grad_(), z.clone().requires_grad_()
    stacked = multihead_loss(a, y, sample_weights=own, class_weights=classes, backend="cpu")
    listed = multihead_loss(list(b), list(y), sample_weights=list(own), class_weights=list(classes), backend="cpu")
    weights = torch.arange(5.0)
    (stacked * weights).sum().backward()
    (listed * weights).sum().backward()
    assert torch.equal(stacked, listed) and torch.equal(a.grad, b.grad)  # type: ignore[arg-type]


def test_torch_func_transforms() -> None:
    z, y = stack_case()

    def loss(z: Tensor, y: Tensor) -> Tensor:
        return multihead_loss([z, 2 * z], [y, y], backend="cpu").sum()

    expected = torch.stack([torch.func.grad(loss)(a, b) for a, b in zip(z, y, strict=True)])
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(loss))(z, y), expected)
    torch.testing.assert_close(
        torch.func.vmap(loss)(z, y), torch.stack([loss(a, b) for a, b in zip(z, y, strict=True)])
    )
    nested = torch.func.vmap(torch.func.vmap(loss), in_dims=(0, None))(torch.stack([z, z * z]), y)
    torch.testing.assert_close(nested[1, 2], loss(z[2] * z[2], y[2]))
    hessian = torch.func.hessian(loss)(z[0, :2], y[0, :2])
    own = torch.autograd.functional.hessian(lambda a: loss(a, y[0, :2]), z[0, :2])
    torch.testing.assert_close(hessian, own)


def test_a_batch_of_cotangents() -> None:
    z, y = stack_case()
    z.requires_grad_()
    losses = multihead_loss(z, y, backend="cpu")
    (batched,) = torch.autograd.grad(losses, z, torch.eye(5, dtype=torch.float64), is_grads_batched=True)
    expected = torch.autograd.grad(multihead_loss(z, y, backend="cpu").sum(), z)[0]
    torch.testing.assert_close(batched.sum(0), expected)


def test_inside_an_inner_loop() -> None:
    """A meta-gradient through one step taken on the loss."""
    z, y = stack_case()
    w = torch.randn(10, 10, dtype=torch.float64, requires_grad=True)

    def meta(backend: str) -> Tensor:
        inner = multihead_loss([z[0] @ w], [y[0]], backend=backend).sum()
        (g,) = torch.autograd.grad(inner, w, create_graph=True)
        outer = multihead_loss([z[1] @ (w - 0.3 * g)], [y[1]], backend=backend).sum()
        return torch.autograd.grad(outer, w)[0]

    torch.testing.assert_close(meta("cpu"), meta("reference"))


def test_a_second_backward_is_right_whatever_became_of_the_first_gradient() -> None:
    z, y = torch.randn(4, 5, requires_grad=True), torch.zeros(4, dtype=torch.long)
    loss = multihead_loss([z], [y], backend="cpu").sum()
    (first,) = torch.autograd.grad(loss, z, retain_graph=True)
    kept = first.clone()
    first.zero_()
    (second,) = torch.autograd.grad(loss, z, retain_graph=True)
    assert torch.equal(second, kept)
    loss.backward(retain_graph=True)
    loss.backward(retain_graph=True)
    loss.backward()
    torch.testing.assert_close(z.grad, 3 * kept)


def test_bits_do_not_depend_on_threads_or_on_other_heads() -> None:
    heads = [random_head(seed).to(torch.float32) for seed in range(30)]
    g = torch.Generator().manual_seed(0)
    heads += [
        Head(HeadLoss(), torch.randn(3, 21, 50, 50, generator=g), torch.randint(21, (3, 50, 50), generator=g)),
        Head(HeadLoss(), torch.randn(20, 4000, generator=g), torch.randint(4000, (20,), generator=g)),
        Head(HeadLoss("mse"), torch.randn(3, 40000, generator=g), torch.randn(3, 40000, generator=g)),
    ]
    threads = torch.get_num_threads()
    try:
        found = []
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            found.append(evaluate(heads, "cpu"))
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))
    for i, head in enumerate(heads):
        loss, gradient = evaluate([head], "cpu")
        assert torch.equal(loss[0], found[0][0][i]) and torch.equal(gradient, found[0][1 + i])


def test_strided_inputs_and_memory_of_its_own() -> None:
    z, y = torch.randn(10, 6, dtype=torch.float64), torch.randint(10, (12,))
    heads = [Head(HeadLoss(), z.t(), y[::2])]
    assert error(evaluate(heads, "cpu"), evaluate(heads, "reference")) < 1e-12
    losses, gradients = multihead_loss_and_gradients([z.t()], [y[::2]], backend="cpu")
    assert not losses.requires_grad and gradients[0].untyped_storage().data_ptr() != z.untyped_storage().data_ptr()


def test_values_still_to_be_negated() -> None:
    z, y = torch.randn(4, 5), torch.randint(5, (4,))
    for own in (None, [torch._neg_view(-torch.rand(4))]):
        expected = multihead_loss([-z], [y], sample_weights=own and [own[0].resolve_neg()], backend="cpu")
        assert torch.equal(multihead_loss([torch._neg_view(z)], [y], sample_weights=own, backend="cpu"), expected)


@pytest.mark.parametrize("classes", [[5, 5], [5, 7]])
def test_another_default_device(classes: list[int]) -> None:
    """`torch.set_default_device` is for tensors the user makes; those of the losses lie where the logits do."""
    logits = [torch.randn(4, c, requires_grad=True) for c in classes]
    targets = [torch.zeros(4, dtype=torch.long) for _ in classes]
    with torch.device("meta"):
        assert torch.empty(0).is_meta
        losses = multihead_loss(logits, targets, backend="cpu")
        (losses * losses.detach()).sum().backward()
    assert losses.device.type == "cpu" and all(z.grad is not None and z.grad.device.type == "cpu" for z in logits)


def test_compiled() -> None:
    z, y = stack_case()
    w = torch.tensor([0.5, 2.0], dtype=torch.float64, requires_grad=True)

    def total(a: Tensor, b: Tensor) -> Tensor:
        kinds = [HeadLoss("cross_entropy", label_smoothing=0.1), "mse"]
        return (w * multihead_loss([a, b], [y[0], b.detach() + 1], kinds, backend="cpu")).sum()

    results = []
    for fn in (total, torch.compile(total, backend="aot_eager", fullgraph=True)):
        a, b = (t.clone().requires_grad_() for t in z[:2])
        results.append([t.detach() for t in torch.autograd.grad(fn(a, b), [a, b, w])])
    for x, expected in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(x, expected)


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        ({"targets": []}, ValueError, "targets: expected one entry for each of 1 heads, got 0"),
        ({"targets": [[1]]}, TypeError, r"targets\[0\]: expected a tensor"),
        ({"targets": [torch.zeros(3, dtype=torch.long)]}, ValueError, r"targets\[0\]: expected \[4\]"),
        ({"targets": [torch.zeros(4)]}, TypeError, "use .long"),
        ({"targets": [torch.zeros(4, 5).double()]}, TypeError, "expected torch.float32, as the logits"),
        ({"kinds": "mse"}, TypeError, "use .float"),
        ({"kinds": "hinge"}, ValueError, "expected one of cross_entropy"),
        ({"kinds": ["mse", "mse"]}, ValueError, "kinds: expected one entry"),
        ({"logits": [torch.zeros(4)]}, ValueError, r"logits\[0\]: expected logits of 'cross_entropy'"),
        ({"sample_weights": [torch.ones(5)]}, ValueError, r"sample_weights\[0\]: expected \[N\]"),
        ({"sample_weights": torch.ones(4)}, TypeError, "expected a list with one entry a head"),
        ({"class_weights": [torch.ones(4)]}, ValueError, r"class_weights\[0\]: expected \[5\]"),
        ({"pos_weights": [torch.ones(5)]}, ValueError, "only bce_with_logits has them"),
        ({"class_weights": [torch.ones(5, requires_grad=True)]}, ValueError, "backend='reference'"),
    ],
)
def test_bad_input_is_named(call: dict[str, Any], kind: type[Exception], message: str) -> None:
    arguments = {"logits": [torch.zeros(4, 5)], "targets": [torch.zeros(4, dtype=torch.long)], "kinds": "cross_entropy"}
    with pytest.raises(kind, match=message):
        multihead_loss(**{**arguments, **call}, backend="cpu")  # type: ignore[arg-type]
