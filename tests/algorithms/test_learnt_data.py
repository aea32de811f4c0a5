"""Soft labels, distilled data and learnt sample weights: gradients to targets and masks through mtml, fused."""

from __future__ import annotations

import itertools
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mtml
from mtml import MAML, inner
from mtml_kernels.ops.inner_loop import BACKENDS

D = torch.float64
T, S, Q, K = 3, 4, 5, 3
ENGINE = "cpu" if "cpu" in BACKENDS.available() else "reference"
LOSSES: dict[str, Any] = {
    "mse": "mse",
    "l1": F.l1_loss,
    "huber": nn.HuberLoss(delta=0.6),
    "bce": "bce_with_logits",
    "soft": "cross_entropy",
    "soft smoothed": nn.CrossEntropyLoss(label_smoothing=0.2),
    "ids": F.cross_entropy,
}
RULES: dict[str, Any] = {"descent": lambda: None, "adam": lambda: inner.Adam((0.8, 0.9), eps=1e-2)}


def net(dtype: torch.dtype = D) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 3)).to(dtype)


def data(loss: str, per_step: bool = False) -> dict[str, Tensor]:
    torch.manual_seed(1)
    lead = (T, K, S) if per_step else (T, S)

    def target(*lead: int) -> Tensor:
        if loss == "ids":
            return torch.randint(3, lead)
        return torch.rand(*lead, 3, dtype=D) if loss == "bce" else torch.randn(*lead, 3, dtype=D).softmax(-1)

    found = {
        "sx": torch.randn(*lead, 3, dtype=D),
        "sy": target(*lead),
        "qx": torch.randn(T, Q, 3, dtype=D),
        "qy": target(T, Q),
        "support_mask": torch.rand(*lead, dtype=D),
        "query_mask": torch.rand(T, Q, dtype=D),
    }
    found["support_mask"][..., 1] = 0
    return {name: t.requires_grad_() if t.is_floating_point() else t for name, t in found.items()}


def learner(loss: str, backend: str, rule: str = "descent", **options: Any) -> MAML:
    return MAML(net(), 0.2, steps=K, loss=LOSSES[loss], update=RULES[rule](), backend=backend, **options)


def gradients(maml: MAML, batch: dict[str, Tensor], **options: Any) -> list[Tensor]:
    with warnings.catch_warnings():
        warnings.simplefilter("error" if maml.backend != "general" else "ignore")
        loss = maml.meta_loss(**batch, **options)
    leaves = [*maml.module.parameters(), *(t for t in batch.values() if t.requires_grad)]
    weights = torch.linspace(0.5, 1.5, loss.numel(), dtype=loss.dtype).view(loss.shape)
    return [loss, *torch.autograd.grad((weights * loss).sum(), leaves)]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("loss", LOSSES)
def test_gradients_to_all_data_equal_the_general_path(loss: str, rule: str) -> None:
    for first_order, per_step in itertools.product((False, True), (False, True)):
        batch, options = data(loss, per_step), {"per_step": True} if per_step else {}
        ours, theirs = (
            gradients(learner(loss, name, rule, first_order=first_order), batch, **options)
            if not first_order
            else _allowing_unused(learner(loss, name, rule, first_order=True), batch, options)
            for name in (ENGINE, "general")
        )
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)


def _allowing_unused(maml: MAML, batch: dict[str, Tensor], options: dict[str, Any]) -> list[Tensor]:
    """The same where the data of the support sets reach nothing: their gradients are zeros or None."""
    loss = maml.meta_loss(**batch, **options)
    leaves = [*maml.module.parameters(), *(t for t in batch.values() if t.requires_grad)]
    return [loss, *torch.autograd.grad(loss.sum(), leaves, allow_unused=True, materialize_grads=True)]


def test_query_losses_of_every_step() -> None:
    batch = data("soft")
    ours, theirs = (gradients(learner("soft", name), batch, query_steps=True) for name in (ENGINE, "general"))
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("loss", ["soft", "mse", "ids"])
def test_it_is_said_to_be_fused(loss: str) -> None:
    batch, maml = data(loss), learner(loss, "auto")
    found = maml.explain(mtml.TaskBatch(**batch))
    assert (found.path, found.reasons) == ("fused", [])
    gradients(maml, batch)  # a warning is an error


@pytest.mark.parametrize("wanted", ["sy", "support_mask", "query_mask", None])
def test_a_model_that_is_one_layer(wanted: str | None) -> None:
    """Whose inner loop runs in the Gram form but for what that form lacks."""
    torch.manual_seed(0)
    layer = nn.Linear(64, 3).double()
    kind = "mse" if wanted else "soft"
    batch = {name: t.detach() for name, t in data(kind).items()}
    batch |= {"sx": torch.randn(T, S, 64, dtype=D), "qx": torch.randn(T, Q, 64, dtype=D)}
    if wanted:
        batch[wanted].requires_grad_()
    results = []
    for backend in (ENGINE, "general"):
        maml = MAML(layer, 0.05, steps=K, loss=LOSSES[kind], backend=backend)
        results.append(gradients(maml, batch))
        if backend == ENGINE:
            assert "Gram" not in maml.explain(mtml.TaskBatch(**batch)).reason
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-11)


def test_a_trunk_that_runs_once() -> None:
    results = []
    for backend in (ENGINE, "general"):
        batch = data("soft")
        maml = learner("soft", backend, params="2.*")
        results.append(gradients(maml, batch))
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-11)


def test_soft_labels_without_gradients_are_fused_too() -> None:
    batch = {name: t.detach() for name, t in data("soft").items()}
    maml = learner("soft", "auto")
    assert maml.explain(mtml.TaskBatch(**batch)).path == "fused"
    ids = {**batch, "sy": batch["sy"].argmax(-1), "qy": batch["qy"].argmax(-1)}
    hot = {**batch, "sy": F.one_hot(ids["sy"], 3).to(D), "qy": F.one_hot(ids["qy"], 3).to(D)}
    torch.testing.assert_close(maml.meta_loss(**hot), maml.meta_loss(**ids), rtol=1e-12, atol=1e-14)
    mixed = {**ids, "sy": batch["sy"]}  # distilled soft labels, judged on real ones
    assert maml.explain(mtml.TaskBatch(**mixed)).path == "fused"
    general = learner("soft", "general")
    torch.testing.assert_close(maml.meta_loss(**mixed), general.meta_loss(**mixed), rtol=1e-12, atol=1e-14)


def test_learning_to_reweight() -> None:
    """Ren et al. 2018 (arXiv:1803.09050): weights that start at zero, all of them but one, see which samples help."""
    batch = {name: t.detach() for name, t in data("ids").items()}
    weights = torch.full((T, S), 0.01, dtype=D, requires_grad=True)
    batch |= {"support_mask": weights, "query_mask": torch.ones(T, Q, dtype=D)}
    found, expected = (gradients(learner("ids", name), batch)[-1] for name in (ENGINE, "general"))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(found.sum(1), torch.zeros(T, dtype=D), rtol=0, atol=1e-9)  # a mean knows no scale


def test_probabilities_of_another_dtype_take_the_general_path() -> None:
    batch = {name: t.detach() for name, t in data("soft").items()}
    batch["sy"] = batch["sy"].float()
    with pytest.warns(mtml.FallbackWarning, match="the probabilities are torch.float32, the model torch.float64"):
        found = learner("soft", "auto").meta_loss(**batch)
    torch.testing.assert_close(found, learner("soft", "general").meta_loss(**batch))


def test_adapted_models_differentiate_by_their_labels() -> None:
    batch = data("soft")
    found = []
    for backend in (ENGINE, "general"):
        adapted = learner("soft", backend).adapt_tasks(batch["sx"], batch["sy"], support_mask=batch["support_mask"])
        assert isinstance(adapted, mtml.Adapted)
        output = adapted(batch["qx"])
        leaves = [batch["sy"], batch["support_mask"]]
        found.append(torch.autograd.grad(output.square().sum(), leaves))
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-11)
