"""Loss specifications: what is recognised, and that the values are PyTorch's."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtml_kernels.losses import KINDS, LOSSES, LossSpec, Opaque, per_sample, resolve, task_loss, unfused_target

FUNCTIONS = {kind: LOSSES[kind].functions[0] for kind in KINDS if LOSSES[kind].functions}  # PyTorch's own
SPECS = [
    *(LossSpec(kind, reduction) for kind in FUNCTIONS for reduction in ("mean", "sum")),
    LossSpec("cross_entropy", label_smoothing=0.2),
    LossSpec("huber", delta=0.3),
]


def options(spec: LossSpec) -> dict[str, Any]:
    return {spec.info.option: spec.p0} if spec.info.option else {}


def torch_loss(spec: LossSpec, output: Tensor, target: Tensor, reduction: str | None = None) -> Tensor:
    return FUNCTIONS[spec.kind](output, target, reduction=reduction or spec.reduction, **options(spec))


def data(spec: LossSpec, n: int = 6, shape: tuple[int, ...] = (4,)) -> tuple[Tensor, Tensor]:
    output = torch.randn(n, *shape, dtype=torch.float64, requires_grad=True)
    if spec.kind == "cross_entropy":
        return output, torch.randint(0, shape[-1], (n,))
    target = torch.randn(n, *shape, dtype=torch.float64)
    return output, target.sigmoid() if spec.kind == "bce_with_logits" else target


@pytest.mark.parametrize("spec", SPECS, ids=lambda value: type(value).__name__ if callable(value) else str(value))
def test_task_loss_is_the_function_of_that_name(spec: LossSpec) -> None:
    output, target = data(spec)
    found, expected = task_loss(spec, output, target), torch_loss(spec, output, target)
    torch.testing.assert_close(found, expected)
    ones = torch.ones(6, dtype=torch.float64)
    torch.testing.assert_close(task_loss(spec, output, target, ones), expected)
    torch.testing.assert_close(*(torch.autograd.grad(loss, output)[0] for loss in (found, expected)))


@pytest.mark.parametrize("spec", SPECS, ids=lambda value: type(value).__name__ if callable(value) else str(value))
def test_masked_samples_do_not_count(spec: LossSpec) -> None:
    output, target = data(spec)
    mask = torch.tensor([1, 0, 1, 1, 0, 1], dtype=torch.bool)
    found = task_loss(spec, output, target, mask)
    torch.testing.assert_close(found, torch_loss(spec, output[mask], target[mask]))
    assert float(torch.autograd.grad(found, output)[0][~mask].abs().sum()) == 0.0


@pytest.mark.parametrize("spec", SPECS, ids=lambda value: type(value).__name__ if callable(value) else str(value))
def test_weights(spec: LossSpec) -> None:
    output, target = data(spec)
    weights = torch.rand(6, dtype=torch.float64)
    each = torch_loss(spec, output, target, "none")
    each = each if spec.kind == "cross_entropy" else each.mean(1)
    torch.testing.assert_close(per_sample(spec, output, target), each)
    elements = 1 if spec.kind == "cross_entropy" else 4
    expected = {"mean": (weights * each).sum() / weights.sum(), "sum": (weights * each).sum() * elements}
    torch.testing.assert_close(task_loss(spec, output, target, weights), expected[spec.reduction])


@pytest.mark.parametrize("spec", SPECS, ids=lambda value: type(value).__name__ if callable(value) else str(value))
def test_without_any_weight_loss_and_gradient_are_zero(spec: LossSpec) -> None:
    output, target = data(spec)
    loss = task_loss(spec, output, target, torch.zeros(6))
    assert loss.item() == 0.0 and torch.autograd.grad(loss, output)[0].abs().sum().item() == 0.0
    assert task_loss(spec, output[:0], target[:0]).item() == 0.0


@pytest.mark.parametrize("spec", SPECS, ids=lambda value: type(value).__name__ if callable(value) else str(value))
def test_differentiable_twice(spec: LossSpec) -> None:
    output, target = data(spec)
    weights = torch.rand(6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda o, w: task_loss(spec, o, target, w), (output, weights))


@pytest.mark.parametrize("kind", [kind for kind in FUNCTIONS if not LOSSES[kind].ids])
@pytest.mark.parametrize("shape", [(), (3, 2)])
def test_any_shape_per_sample(kind: str, shape: tuple[int, ...]) -> None:
    spec = LossSpec(kind)
    output, target = data(spec, 5, shape)
    torch.testing.assert_close(task_loss(spec, output, target), torch_loss(spec, output, target))


def test_l1_at_its_kink() -> None:
    x = torch.zeros(1, 1, requires_grad=True)
    (grad,) = torch.autograd.grad(task_loss(LossSpec("l1"), x, torch.zeros(1, 1)), x, create_graph=True)
    assert grad.item() == 0.0
    assert float(torch.autograd.grad(grad.sum(), x, allow_unused=True, materialize_grads=True)[0]) == 0.0


def test_bce_at_zero_logits() -> None:
    """A head that starts at zero gives logits of exactly zero: gradient 1/2 - y, second derivative 1/4."""
    x = torch.zeros(1, 1, dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(
        task_loss(LossSpec("bce_with_logits"), x, torch.ones(1, 1).double()), x, create_graph=True
    )
    assert grad.item() == -0.5
    assert float(torch.autograd.grad(grad.sum(), x)[0]) == 0.25


@pytest.mark.parametrize("spec", SPECS, ids=lambda value: type(value).__name__ if callable(value) else str(value))
def test_codes_round_trip(spec: LossSpec) -> None:
    kind, reduction, p0 = spec.encode()
    assert KINDS[kind] == spec.kind and LossSpec.decode(kind, reduction, p0) == spec


RECOGNISED = [
    *((kind, LossSpec(kind)) for kind in KINDS),
    *((function, LossSpec(kind)) for kind, function in FUNCTIONS.items()),
    (nn.MSELoss(reduction="sum"), LossSpec("mse", "sum")),
    (nn.CrossEntropyLoss(label_smoothing=0.1), LossSpec("cross_entropy", label_smoothing=0.1)),
    (nn.BCEWithLogitsLoss(), LossSpec("bce_with_logits")),
    (nn.HuberLoss(delta=2.0), LossSpec("huber", delta=2.0)),
    (nn.SmoothL1Loss(), LossSpec("huber")),
    (nn.L1Loss(), LossSpec("l1")),
    (functools.partial(F.cross_entropy, label_smoothing=0.1), LossSpec("cross_entropy", label_smoothing=0.1)),
    (functools.partial(F.mse_loss, reduction="sum"), LossSpec("mse", "sum")),
    (LossSpec("huber", delta=3.0), LossSpec("huber", delta=3.0)),
]


@pytest.mark.parametrize(
    ("loss", "expected"), RECOGNISED, ids=lambda value: type(value).__name__ if callable(value) else str(value)
)
def test_recognised(loss: Any, expected: LossSpec) -> None:
    assert resolve(loss) == expected


class Squared(nn.MSELoss):
    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return super().forward(input, target) ** 2


class Unhashable:
    __hash__ = None  # type: ignore[assignment]

    def __call__(self, output: Tensor, target: Tensor) -> Tensor:
        return output.sum()


OPAQUE = [
    (nn.CrossEntropyLoss(weight=torch.ones(3)), "CrossEntropyLoss: the option weight is not fused"),
    (nn.CrossEntropyLoss(ignore_index=0), "the option ignore_index is not fused"),
    (nn.BCEWithLogitsLoss(pos_weight=torch.ones(1)), "the option pos_weight is not fused"),
    (nn.SmoothL1Loss(beta=0.5), "the option beta is not fused"),
    (nn.KLDivLoss(), "KLDivLoss: this loss is not fused"),
    (Squared(), "Squared: this loss is not fused"),
    (functools.partial(F.cross_entropy, weight=torch.ones(3)), "cross_entropy: the option weight is not fused"),
    (lambda output, target: output.sum(), "<lambda>: this callable is not fused"),
    (Unhashable(), "Unhashable: this callable is not fused"),
]


@pytest.mark.parametrize(("loss", "reason"), OPAQUE, ids=[f"{i}-{reason}" for i, (_, reason) in enumerate(OPAQUE)])
def test_opaque_losses_name_the_reason(loss: Any, reason: str) -> None:
    found = resolve(loss)
    assert isinstance(found, Opaque) and found.callable is loss and reason in found.reason


def test_hooks_on_a_loss_are_respected() -> None:
    loss = nn.MSELoss()
    loss.register_forward_hook(lambda m, args, out: out * 2)
    assert isinstance(resolve(loss), Opaque)


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (lambda: resolve("msee"), ValueError, "expected one of mse, cross_entropy"),
        (lambda: resolve(3), TypeError, "expected a name"),
        (lambda: resolve(nn.MSELoss(reduction="none")), ValueError, "expected reduction"),
        (lambda: LossSpec("cross_entropy", label_smoothing=1.5), ValueError, "label_smoothing"),
        (lambda: LossSpec("huber", delta=0.0), ValueError, "delta"),
    ],
)
def test_errors_name_what_was_expected(make: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        make()


def test_targets_that_are_not_fused() -> None:
    def reason(kind: str, output: tuple[int, ...], target: Tensor) -> str | None:
        return unfused_target(LossSpec(kind), output, target, tuple(target.shape[1:]))

    assert reason("mse", (3,), torch.zeros(2, 3)) is None
    assert reason("cross_entropy", (3,), torch.zeros(2, dtype=torch.long)) is None
    assert reason("cross_entropy", (3,), torch.zeros(2, 3)) is None
    assert "one label" in str(reason("cross_entropy", (4, 3), torch.zeros(2, 3, dtype=torch.long)))
    assert "not the output's" in str(reason("l1", (3,), torch.zeros(2)))
    assert "not floating point" in str(reason("mse", (3,), torch.zeros(2, 3, dtype=torch.long)))
