"""The one line for the batched engine: what the loop over tasks computes, in one call."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases.maml_oracle import assert_same, classification, gradients, mlp, regression
from torch import Tensor, nn

import mtml
import mtml.compat.learn2learn as l2l


def loop(learner: Any, batch: tuple[Tensor, ...], steps: int, loss: Any = F.mse_loss, **options: Any) -> Tensor:
    losses = []
    for sx, sy, qx, qy in zip(*batch, strict=True):
        clone = learner.clone(**options)
        for _ in range(steps):
            clone.adapt(loss(clone(sx), sy))
        losses.append(loss(clone(qx), qy))
    return torch.stack(losses)


def same_as_the_loop(learner: Any, batch: tuple[Tensor, ...], steps: int, loss: Any = F.mse_loss) -> None:
    want, got = loop(learner, batch, steps, loss), l2l.meta_loss(learner, *batch, steps=steps, loss=loss)
    params = list(learner.parameters())
    assert_same(got, want)
    assert_same(gradients(got, params), gradients(want, params))


@pytest.mark.parametrize("first_order", [False, True])
def test_maml(first_order: bool) -> None:
    same_as_the_loop(l2l.algorithms.MAML(mlp(3, 6, 2), 0.1, first_order=first_order), regression(), 3)
    loss = nn.CrossEntropyLoss()
    same_as_the_loop(l2l.algorithms.MAML(mlp(3, 6, 4), 0.1, first_order=first_order), classification(), 2, loss)


@pytest.mark.parametrize("shape", [(), (1,)])
def test_maml_with_a_learned_rate(shape: tuple[int, ...]) -> None:
    rate = nn.Parameter(torch.full(shape, 0.1, dtype=torch.float64))
    same_as_the_loop(l2l.algorithms.MAML(mlp(3, 6, 2), rate), regression(), 2)


def test_maml_with_rates_per_step() -> None:
    model = mlp(3, 6, 2)
    same_as_the_loop(l2l.algorithms.MAML(model, mtml.InnerLR(model, 0.1, per="tensor", steps=3)), regression(), 3)


def test_meta_sgd() -> None:
    same_as_the_loop(l2l.algorithms.MetaSGD(mlp(3, 6, 2), 0.1), regression(), 2)
    frozen = mlp(3, 6, 2)
    frozen[0].bias.requires_grad_(False)
    assert l2l.meta_loss(l2l.algorithms.MetaSGD(frozen, 0.1), *regression(), loss="mse").shape == (3,)


@pytest.mark.parametrize(
    "transform",
    [
        l2l.optim.MetaCurvatureTransform,
        lambda p: l2l.optim.ModuleTransform(nn.Linear)(p).double(),
        lambda p: l2l.optim.KroneckerTransform(l2l.nn.KroneckerLinear)(p).double() if p.ndim > 1 else None,
    ],
    ids=["curvature", "linear", "kronecker"],
)
def test_gbml(transform: Any) -> None:
    same_as_the_loop(l2l.algorithms.GBML(mlp(3, 6, 2), transform, 0.1), regression(), 2)


def convolution() -> nn.Module:
    torch.manual_seed(1)
    block = l2l.vision.models.ConvBlock(1, 3, (3, 3))
    return nn.Sequential(block, l2l.nn.Flatten(), nn.Linear(3 * 4 * 4, 4)).double()


def images() -> tuple[Tensor, ...]:
    sx, qx = torch.randn(2, 3, 5, 1, 8, 8, dtype=torch.float64)
    return sx, torch.randint(4, (3, 5)), qx, torch.randint(4, (3, 5))


@pytest.mark.parametrize("mode", ["module", "track"])
def test_running_statistics(mode: str, recwarn: pytest.WarningsRecorder) -> None:
    one, all_ = l2l.algorithms.MAML(convolution(), 0.1), l2l.algorithms.MAML(convolution(), 0.1)
    before, batch = [b.clone() for b in all_.buffers()], images()
    want = loop(one, batch, 2, F.cross_entropy)
    got = all_.meta_loss(*batch, steps=2, batch_norm=mode)
    assert_same(got, want)
    grads = [gradients(loss, list(maml.parameters())) for loss, maml in ((got, all_), (want, one))]
    assert_same(*grads, atol=1e-9)
    moved = one.buffers() if mode == "track" else before
    assert_same([b.double() for b in all_.buffers()], [b.double() for b in moved])
    assert bool([w for w in recwarn if issubclass(w.category, mtml.FallbackWarning)]) == (mode == "track")
    one.eval()
    assert_same(one.meta_loss(*batch, steps=2), loop(one, batch, 2, F.cross_entropy))


def test_the_engine_is_kept_and_follows_changes() -> None:
    maml, batch = l2l.algorithms.MAML(mlp(3, 6, 2), 0.1), regression()
    maml.meta_loss(*batch, steps=2, loss="mse")
    engine = maml.__dict__["_engine"]
    maml.lr = 0.3
    assert_same(maml.meta_loss(*batch, steps=1, loss="mse"), loop(maml, batch, 1))
    assert maml.__dict__["_engine"] is engine
    for power in (2, 3):  # a function made anew for every call
        loss = lambda out, y, power=power: (out - y).abs().pow(power).mean()  # noqa: E731
        assert_same(maml.meta_loss(*batch, steps=1, loss=loss), loop(maml, batch, 1, loss))
        assert maml.__dict__["_engine"] is engine
    maml.first_order = True
    want = gradients(loop(maml, batch, 2), list(maml.parameters()))
    assert_same(gradients(maml.meta_loss(*batch, steps=2, loss="mse"), list(maml.parameters())), want)
    maml.lr = nn.Parameter(torch.tensor(0.2, dtype=torch.float64))
    assert_same(maml.meta_loss(*batch, steps=2, loss="mse"), loop(maml, batch, 2))
    maml.module = mlp(3, 2)
    assert_same(maml.meta_loss(*batch, steps=2, loss="mse"), loop(maml, batch, 2))
    assert "_engine" not in maml.clone().__dict__
    assert [name for name, _ in maml.named_modules()] == ["", "module", "module.0"]


@pytest.mark.parametrize(
    ("net", "shape"),
    [
        (lambda: l2l.vision.models.OmniglotFC(12, 3, sizes=[5, 4]), (12,)),
        (lambda: l2l.vision.models.OmniglotCNN(3, hidden_size=4), (1, 28, 28)),
        (lambda: l2l.vision.models.CNN4(3, hidden_size=4, embedding_size=4), (3, 16, 16)),
    ],
    ids=["OmniglotFC", "OmniglotCNN", "CNN4"],
)
def test_usual_models_are_fused(net: Any, shape: tuple[int, ...], recwarn: pytest.WarningsRecorder) -> None:
    x, y = torch.randn(2, 6, *shape), torch.randint(3, (2, 6))
    l2l.algorithms.MAML(net(), 0.1).meta_loss(x, y, x, y, steps=2).sum().backward()
    assert [str(w.message) for w in recwarn if issubclass(w.category, mtml.FallbackWarning)] == []


def test_a_task_batch() -> None:
    maml, batch = l2l.algorithms.MAML(mlp(3, 6, 2), 0.1), regression()
    assert_same(maml.meta_loss(mtml.TaskBatch(*batch), loss="mse"), loop(maml, batch, 1))


def test_errors() -> None:
    batch = regression()
    with pytest.raises(TypeError, match="learner: expected learn2learn's MAML, MetaSGD or GBML, got Sequential"):
        l2l.meta_loss(mlp(3, 2), *batch)
    gbml = l2l.algorithms.GBML(mlp(3, 2), l2l.optim.MetaCurvatureTransform, adapt_transform=True)
    with pytest.raises(ValueError, match="adapt_transform: expected False for meta_loss"):
        gbml.meta_loss(*batch, loss="mse")
