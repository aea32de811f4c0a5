"""mtml.MultiTaskMAML against a plain autograd loop, and what it promises beside that."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import multitask as cases
from torch import Tensor, nn

import mtml
from mtml_kernels.reference.multihead_loss import head_loss

pytestmark = pytest.mark.filterwarnings("ignore::mtml.FallbackWarning")


@pytest.fixture(autouse=True)
def _exact() -> Any:
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def made(**options: Any) -> mtml.MultiTaskMAML:
    options = {"lr": 0.3, "steps": 3} | options
    return mtml.MultiTaskMAML(cases.trunks(), cases.HEADS, **options)


def gradients(loss: Tensor, model: nn.Module) -> dict[str, Tensor]:
    named = dict(model.named_parameters())
    found = torch.autograd.grad(loss, list(named.values()), retain_graph=True, allow_unused=True)
    return {n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(named.items(), found, strict=True)}


def close(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-9, atol=1e-11, msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.parametrize("masks", [False, True])
@pytest.mark.parametrize("first_order", [False, True])
def test_heads_are_adapted_as_by_the_plain_loop(masks: bool, first_order: bool) -> None:
    model, data = made(first_order=first_order), cases.batches(masks)
    found = model.meta_loss(data)
    expected = cases.plain(model, data, lr=0.3, steps=3, first_order=first_order)
    close(found.per_task, expected)
    total = torch.stack([each.mean() for each in expected.values()]).sum()
    torch.testing.assert_close(found.total, total, rtol=1e-9, atol=0)
    close(gradients(found.total, model), gradients(total, model))


@pytest.mark.parametrize("masks", [False, True])
def test_whole_models_are_adapted_as_by_the_plain_loop(masks: bool) -> None:
    model, data = made(params="*", lr=0.1, steps=2), cases.batches(masks)
    found = model.meta_loss(data)
    expected = cases.plain(model, data, lr=0.1, steps=2, adapted="")
    close(found.per_task, expected)
    total = torch.stack([each.mean() for each in expected.values()]).sum()
    close(gradients(found.total, model), gradients(total, model))


@pytest.mark.parametrize("params", [None, "*"])
def test_second_order_is_not_first_order(params: str | None) -> None:
    model, data = made(params=params), cases.batches()
    exact, first = (gradients(model.meta_loss(data, first_order=f).total, model) for f in (False, True))
    for name in (
        "trunk.class.0.weight",
        "trunk.pixel.0.weight",
        "trunk.token.cells.weight_hh_l0",
        "heads.value.weight",
    ):
        assert (exact[name] - first[name]).abs().max() > 1e-3 * exact[name].abs().max(), name


def test_no_steps_are_plain_multi_task_learning() -> None:
    model, data = made(steps=0), cases.batches(masks=True)
    found = model.meta_loss(data)
    expected = cases.plain(model, data, lr=0.3, steps=0)
    close(found.per_task, expected)
    total = torch.stack([each.mean() for each in expected.values()]).sum()
    close(gradients(found.total, model), gradients(total, model))


OPTIONS = [
    mtml.Classification(3, class_weights=[0.5, 1.0, 2.0]),
    mtml.Classification(3, class_weights=[0.5, 1.0, 2.0], label_smoothing=0.2),
    mtml.Classification(3, label_smoothing=0.2, ignore_index=1),
    mtml.Classification(3, reduction="sum", ignore_index=2),
    mtml.Classification(3, bias=False),
    mtml.Regression(2, loss="huber", delta=0.4),
    mtml.Regression(2, loss="l1"),
    mtml.Regression(2, loss="gaussian_nll"),
    mtml.MultiLabel(2, pos_weight=[0.5, 3.0]),
    mtml.Segmentation(3, class_weights=[0.5, 1.0, 2.0], ignore_index=0),
    mtml.Tokens(3, label_smoothing=0.1),
]


@pytest.mark.parametrize("params", ["head.*", "*"])
@pytest.mark.parametrize("head", OPTIONS, ids=lambda head: f"{type(head).__name__}-{head.spec.kind}")
def test_options_of_heads_are_the_heads_own_loss(head: Any, params: str) -> None:
    """Against the specification of the heads' losses, which has tests of its own against PyTorch's."""
    images = isinstance(head, mtml.Segmentation)
    trunk = cases.conv() if images else cases.Recurrent() if isinstance(head, mtml.Tokens) else cases.dense()
    model = mtml.MultiTaskMAML(trunk, {"it": head}, lr=0.1, steps=2, params=params)
    shape = {True: (4, 3), False: (5,) if isinstance(head, mtml.Tokens) else ()}[images]

    def drawn(n: int) -> tuple[Tensor, Tensor]:
        x = (
            torch.randint(7, (2, n, 5))
            if isinstance(head, mtml.Tokens)
            else torch.randn(2, n, *((1, 4, 3) if images else (4,)))
        )
        ids = isinstance(head, mtml.Classification)
        return x, torch.randint(3, (2, n, *shape)) if ids else torch.rand(2, n, head.outputs)

    batch = mtml.TaskBatch(*drawn(4), *drawn(3), torch.rand(2, 4), torch.rand(2, 3))
    whole = cases.GroupModel(trunk, model.heads["it"])

    def loss(z: Tensor, y: Tensor, w: Tensor) -> Tensor:
        z = z.movedim(-1, 1) if isinstance(head, mtml.Tokens) else z
        return head_loss(z, y, head.spec, w, whole.head.class_weights, whole.head.pos_weight)

    names = [n for n, _ in whole.named_parameters() if params == "*" or n.startswith("head.")]
    expected = cases.plain_losses(whole, names, batch, loss, 0.1, 2)
    found = model.meta_loss({"it": batch})
    close(found.per_task, {"it": expected})
    close(gradients(found.total, model), gradients(expected.mean(), model))
