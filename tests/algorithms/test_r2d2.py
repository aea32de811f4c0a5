"""mtml.R2D2: ridge regressions in closed form, against one task's normal equations at a time."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases.few_shot import clusters, curves, perceptron, trained
from torch import Tensor, nn

import mtml
from mtml.paths.ridge import ridge
from mtml.tasks import TaskBatch

D = torch.float64
T, S, Q, C = 3, 6, 5, 3


def trunk(width: int = 9) -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, width), nn.Tanh()).to(D)


def batch(loss: str = "cross_entropy", masks: bool = False) -> TaskBatch:
    def targets(n: int) -> Tensor:
        return torch.randint(C, (T, n)) if loss == "cross_entropy" else torch.rand(T, n, C, dtype=D)

    sets = torch.randn(T, S, 4, dtype=D), targets(S), torch.randn(T, Q, 4, dtype=D), targets(Q)
    weights = (torch.rand(T, S, dtype=D), torch.rand(T, Q, dtype=D)) if masks else ()
    if masks:
        weights[0][0, :2] = 0
    return TaskBatch(*sets, *weights)


def learner(width: int = 9, **options: Any) -> mtml.R2D2:
    return mtml.R2D2(trunk(width), C, strength=0.7, scale=1.3, shift=-0.2, **options)


def plain(r2d2: mtml.R2D2, data: TaskBatch, loss: str) -> Tensor:
    """Query losses [T] by lstsq of the stacked system, whose solution is the ridge regression's."""
    losses = []
    for t in range(T):
        x, y = r2d2.features(data.sx[t]), data.sy[t]
        y = F.one_hot(y, C).to(D) if loss == "cross_entropy" else y
        w = torch.ones(S, dtype=D) if data.support_mask is None else data.support_mask[t]
        left = torch.cat((w.sqrt()[:, None] * x, r2d2.strength.sqrt() * torch.eye(x.shape[1], dtype=D)))
        right = torch.cat((w.sqrt()[:, None] * y, torch.zeros(x.shape[1], C, dtype=D)))
        head = torch.linalg.pinv(left) @ right
        output = r2d2.scale * r2d2.features(data.qx[t]) @ head + r2d2.shift
        if loss == "cross_entropy":
            each = F.cross_entropy(output, data.qy[t], reduction="none")
        else:
            each = (output - data.qy[t]).square().mean(1)
        v = torch.ones(Q, dtype=D) if data.query_mask is None else data.query_mask[t]
        losses.append((v * each).sum() / v.sum())
    return torch.stack(losses)


def gradients(losses: Tensor, r2d2: mtml.R2D2) -> tuple[Tensor, ...]:
    return torch.autograd.grad((torch.linspace(0.5, 1.5, T, dtype=D) * losses).sum(), list(r2d2.parameters()))


@pytest.mark.parametrize("width", [9, 4])  # more features than samples, and fewer
@pytest.mark.parametrize("loss", ["cross_entropy", "mse"])
@pytest.mark.parametrize("masks", [False, True])
def test_equal_to_a_plain_loop(width: int, loss: str, masks: bool) -> None:
    r2d2, data = learner(width, loss=loss), batch(loss, masks)
    wanted, found = plain(r2d2, data, loss), r2d2.meta_loss(data)
    assert len(list(r2d2.parameters())) == 5
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(gradients(found, r2d2), gradients(wanted, r2d2), rtol=1e-9, atol=1e-11)
    adapted = r2d2.adapt_tasks(data)
    torch.testing.assert_close(adapted.loss(data), wanted, rtol=1e-9, atol=1e-11)
    output = r2d2.meta_forward(data).output
    torch.testing.assert_close(adapted.task(1)(data.qx[1]), output[1])
    assert not adapted.detach()(data.qx).isnan().any() and type(adapted.detach()) is type(adapted)


@pytest.mark.parametrize("samples", [3, 8])
def test_the_solution_is_differentiable_twice(samples: int) -> None:
    x, y = torch.randn(2, samples, 5, dtype=D), torch.randn(2, samples, 2, dtype=D)
    given = (x, y, torch.rand(2, samples, dtype=D) + 0.1, torch.tensor(0.5, dtype=D))
    given = tuple(t.requires_grad_() for t in given)
    assert torch.autograd.gradcheck(ridge, given) and torch.autograd.gradgradcheck(ridge, given)


def test_control_a_constant_solution_has_another_gradient() -> None:
    r2d2, data = learner(), batch()
    exact = gradients(r2d2.meta_loss(data), r2d2)
    head = r2d2.adapt_tasks(data).params["head.weight"].detach() / r2d2.scale.detach()
    output = r2d2.scale * r2d2.features(data.qx) @ head.mT + r2d2.shift
    losses = F.cross_entropy(output.transpose(1, 2), data.qy, reduction="none").mean(1)
    torch.testing.assert_close(losses, r2d2.meta_loss(data))
    total = (torch.linspace(0.5, 1.5, T, dtype=D) * losses).sum()
    dropped = torch.autograd.grad(total, list(r2d2.features.parameters()))
    own = exact[-2:]
    assert all(float((a - b).norm() / a.norm()) > 1e-2 for a, b in zip(own, dropped, strict=True))


def test_ignored_ids_and_masked_samples_are_as_if_not_there() -> None:
    r2d2, data = learner(), batch()
    cut = TaskBatch(data.sx[:, :4], data.sy[:, :4], data.qx, data.qy)
    ignored = data._replace(sy=data.sy.index_fill(1, torch.tensor([4, 5]), -100))
    masked = data._replace(support_mask=torch.tensor([1.0, 1, 1, 1, 0, 0], dtype=D).expand(T, S))
    for given in (ignored, masked):
        torch.testing.assert_close(r2d2.meta_loss(given), r2d2.meta_loss(cut))


def test_copies_and_explain(capsys: pytest.CaptureFixture[str]) -> None:
    r2d2, data = learner(learnable=False), batch()
    assert len([p for p in r2d2.parameters() if p.requires_grad]) == 2
    for other in (copy.deepcopy(r2d2), pickle.loads(pickle.dumps(r2d2))):
        other.meta_loss(data).sum().backward()
        assert r2d2.features[0].weight.grad is None and other.features[0].weight.grad is not None
    found = r2d2.explain(data)
    assert found.path == "ridge" and "closed form" in capsys.readouterr().out


def raised(call: Callable[[], Any]) -> str:
    with pytest.raises((TypeError, ValueError)) as error:
        call()
    return str(error.value)


def test_errors_name_the_argument() -> None:
    r2d2, data = learner(), batch()
    assert raised(lambda: mtml.R2D2(trunk(), 0)).startswith("outputs: expected at least 1")
    assert raised(lambda: mtml.R2D2(trunk(), 2, strength=0.0)).startswith("strength: expected above 0, got 0.0")
    assert raised(lambda: mtml.R2D2(trunk(), 2, loss=lambda o, t: o)).startswith("loss: expected one known by name")
    assert raised(lambda: mtml.R2D2("trunk", 2)).startswith("features: expected an nn.Module")
    assert raised(lambda: r2d2.meta_loss(data, steps=3)).startswith("steps: R2D2 has none")
    assert raised(lambda: r2d2.meta_loss(data, first_order=True)).startswith("first_order: R2D2 has none")
    assert raised(lambda: r2d2.meta_loss(data._replace(sy=data.sy + 1))).startswith("sy: ")
    assert raised(lambda: r2d2.meta_loss(data._replace(qy=data.qy - 5))).startswith("qy: ")
    assert raised(lambda: r2d2.meta_loss(data._replace(sy=data.sy[:, :3]))).startswith("sy: ")


def test_it_learns() -> None:
    features = perceptron(6, 16)
    before, after = trained(mtml.R2D2(features, 3, scale=5.0), clusters, 150)
    assert after < 0.5 * before
    before, after = trained(mtml.R2D2(perceptron(1, 16), 1, loss="mse"), curves, 150)
    assert after < 0.5 * before


def test_a_table_of_integers_before_the_layers_is_not_the_dtype() -> None:
    class Indexed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.arange(3), requires_grad=False)
            self.layer = nn.Linear(2, 4).double()

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x)

    learner = mtml.R2D2(Indexed(), 2)
    assert {p.dtype for p in (learner.log_strength, learner.scale, learner.shift)} == {torch.float64}
    batch = torch.randn(2, 4, 2, dtype=torch.float64), torch.randint(2, (2, 4))
    assert learner.meta_loss(*batch, *batch).dtype == torch.float64
    assert mtml.R2D2(nn.Flatten(), 2).scale.dtype == torch.float32


def test_a_tensor_given_as_a_number_stays_the_users() -> None:
    scale = torch.tensor(2.0)
    learner = mtml.R2D2(trunk(), 2, scale=scale)
    with torch.no_grad():
        learner.scale.add_(1.0)
    assert scale == 2.0 and learner.scale == 3.0
