"""learn2learn's learners, one task at a time: values, gradients, what is shared, and errors in the place of traps."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cases.maml_oracle import assert_same, gradients, mlp, oracle, regression
from torch import Tensor, nn

import mtml
import mtml.compat.learn2learn as l2l

Batch = tuple[Tensor, ...]


def loop(learner: Any, batch: Batch, steps: int) -> Tensor:
    """The query losses [T] of a script."""
    losses = []
    for sx, sy, qx, qy in zip(*batch, strict=True):
        clone = learner.clone()
        for _ in range(steps):
            clone.adapt(F.mse_loss(clone(sx), sy))
        losses.append(F.mse_loss(clone(qx), qy))
    return torch.stack(losses)


@pytest.mark.parametrize("first_order", [False, True])
def test_maml_is_the_plain_loop(first_order: bool) -> None:
    model, batch = mlp(3, 6, 2), regression()
    params = list(model.parameters())
    got = loop(l2l.algorithms.MAML(model, 0.1, first_order=first_order), batch, 3)
    want = oracle(model, batch, F.mse_loss, 0.1, 3, first_order=first_order).loss
    assert_same(got, want)
    assert_same(gradients(got, params), gradients(want, params))


def test_second_order_is_there() -> None:
    model, batch = mlp(3, 6, 2), regression(1)
    exact, first = (
        gradients(loop(l2l.algorithms.MAML(model, 0.1, first_order=f), batch, 2), list(model.parameters()))
        for f in (False, True)
    )
    assert max(float((a - b).abs().max()) for a, b in zip(exact, first, strict=True)) > 1e-3  # type: ignore[operator]


def test_a_learned_rate() -> None:
    model, batch = mlp(3, 6, 2), regression()
    rate = nn.Parameter(torch.tensor([0.1], dtype=torch.float64))
    maml = l2l.algorithms.MAML(model, rate)
    assert next(name for name, _ in maml.named_parameters()) == "lr"
    got, want = loop(maml, batch, 2), oracle(model, batch, F.mse_loss, lambda n, k: rate, 2).loss
    assert_same(got, want)
    assert_same(gradients(got, list(maml.parameters())), gradients(want, list(maml.parameters())))


def test_a_rate_of_numpys() -> None:
    model, batch = mlp(3, 6, 2), regression()
    maml, like = l2l.algorithms.MAML(model, np.float32(0.5)), l2l.algorithms.MAML(model, 0.5)
    assert_same(loop(maml, batch, 2), loop(like, batch, 2))
    assert_same(maml.meta_loss(*batch, loss="mse"), like.meta_loss(*batch, loss="mse"))


def test_rates_for_each_step_as_maml_plus_plus_reads_them() -> None:
    model, (sx, sy, qx, qy) = mlp(3, 6, 2), regression(1)
    rates = mtml.InnerLR(model, 0.1, per="tensor", steps=2)
    with torch.no_grad():
        for rate in rates.parameters():
            rate[1] *= 3
    losses = []
    for order in ((None, None), (0, 1), (1, 0)):
        learner = l2l.algorithms.MAML(model, rates).clone()
        for step in order:
            learner.adapt(F.mse_loss(learner(sx[0]), sy[0]), step=step)
        losses.append(F.mse_loss(learner(qx[0]), qy[0]))
    assert_same(losses[0], losses[1])
    assert not torch.allclose(losses[1], losses[2])
    with pytest.raises(ValueError, match="expected at least steps=3 rates"):
        learner.adapt(F.mse_loss(learner(sx[0]), sy[0]))


class PlusPlus(l2l.algorithms.BaseLearner):
    """In the manner of the MAML++ example: a learner of one's own, with a rate for each layer and step."""

    def __init__(self, module: nn.Module, rates: dict[str, Tensor]) -> None:
        super().__init__(module)
        self.rates = rates

    def clone(self) -> PlusPlus:
        return PlusPlus(l2l.clone_module(self.module), l2l.clone_named_parameters(self.rates))

    def adapt(self, loss: Tensor, step: int) -> None:
        named = list(self.module.named_parameters())
        grads = torch.autograd.grad(loss, [p for _, p in named], create_graph=True)
        layers = [name.partition(".")[0] for name, _ in named]
        l2l.update_module(self.module, [-self.rates[layer][step] * g for layer, g in zip(layers, grads, strict=True)])


def test_a_learner_of_ones_own() -> None:
    model, batch = mlp(3, 6, 2), regression(1)
    rates = {name: torch.tensor([0.1, 0.2], dtype=torch.float64, requires_grad=True) for name in ("0", "2")}
    learner = PlusPlus(model, rates).clone()
    for step in range(2):
        learner.adapt(F.mse_loss(learner(batch[0][0]), batch[1][0]), step=step)
    got = F.mse_loss(learner(batch[2][0]), batch[3][0]).reshape(1)
    want = oracle(model, batch, F.mse_loss, lambda name, k: rates[name.partition(".")[0]][k], 2).loss
    trained = [*model.parameters(), *rates.values()]
    assert_same(got, want)
    assert_same(gradients(got, trained), gradients(want, trained))


def test_meta_sgd() -> None:
    model, batch = mlp(3, 6, 2), regression()
    sgd = l2l.algorithms.MetaSGD(model, lr=0.1)
    names = [name for name, _ in model.named_parameters()]
    got = loop(sgd, batch, 2)
    want = oracle(model, batch, F.mse_loss, lambda name, k: sgd.lrs[names.index(name)], 2).loss
    assert_same(got, want)
    assert_same(gradients(got, list(sgd.parameters())), gradients(want, list(sgd.parameters())))
    assert len(list(sgd.clone().parameters())) == len(names) and len(list(sgd.parameters())) == 2 * len(names)


def test_gbml_of_a_rate_is_maml() -> None:
    model, batch = mlp(3, 6, 2), regression()
    gbml = l2l.algorithms.GBML(model, lambda p: l2l.nn.Scale(p.shape, 0.5).double(), lr=0.2)
    got, want = loop(gbml, batch, 3), loop(l2l.algorithms.MAML(model, 0.1), batch, 3)
    params = list(model.parameters())
    assert_same(got, want)
    assert_same(gradients(got, params), gradients(want, params))
    assert all(g is not None and g.any() for g in gradients(got, list(gbml.parameters())))


@pytest.mark.parametrize("first_order", [False, True])
def test_gbml_adapts_its_transforms(first_order: bool) -> None:
    # theta1 = theta0 - lr s g0; s1 = s - lr dL1/ds with dL1/ds = -lr g0 . g1; theta2 = theta1 - lr s1 g1
    model, lr = nn.Linear(1, 1, bias=False).double(), 0.3
    gbml = l2l.algorithms.GBML(model, lambda p: l2l.nn.Scale(1).double(), lr, adapt_transform=True)
    learner = gbml.clone(first_order=first_order)
    x = torch.tensor([[2.0]], dtype=torch.float64)
    for _ in range(2):
        learner.adapt(learner(x).square().mean())
    theta = model.weight.detach().item()
    g0 = 8 * theta
    theta1 = theta - lr * g0
    g1 = 8 * theta1
    want = theta1 - lr * (1 + lr * lr * g0 * g1) * g1
    assert learner.module.weight.item() == pytest.approx(want, rel=1e-12)


def test_gbml_takes_adapts_arguments_in_learn2learns_order() -> None:
    model = mlp(3, 6, 2)
    model.register_parameter("spare", nn.Parameter(torch.ones(2, dtype=torch.float64)))
    learner = l2l.algorithms.GBML(model, lambda p: None, 0.1).clone()
    x = torch.ones(1, 3, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="does not depend on"):
        learner.adapt(learner(x).sum(), None, True)
    learner.adapt(learner(x).sum(), None, None, True)


def test_what_clones_share() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.norm = nn.Linear(3, 3), nn.Linear(3, 3), nn.BatchNorm1d(3)
            self.b.weight = self.a.weight
            self.parts = [self.a, self.b]  # what an attribute holds is the clone's own

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.parts[1](torch.tanh(self.parts[0](x))))

    model, x = Tied().double(), torch.randn(5, 3, dtype=torch.float64)
    learner = l2l.algorithms.MAML(model, 0.1).clone()
    for steps in range(2):
        assert learner.a.weight is learner.b.weight and learner.a.weight is not model.a.weight
        assert learner.module.parts[0] is learner.module.a
        assert int(model.norm.num_batches_tracked) == steps
        learner.adapt(learner(x).square().mean())
    learner(x).square().mean().backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("kind", [nn.RNN, nn.LSTM, nn.GRU])
def test_recurrent_layers_use_the_adapted_weights(kind: Any) -> None:
    model, x = kind(3, 4).double(), torch.randn(5, 2, 3, dtype=torch.float64)
    learner = l2l.algorithms.MAML(model, 0.5).clone()
    before = learner(x)[0].square().mean()
    learner.adapt(before)
    after = learner(x)[0].square().mean()
    assert after < before
    after.backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())


def test_unused_and_frozen_parameters_are_errors_that_name_them() -> None:
    model, x = mlp(3, 6, 2), torch.randn(4, 3, dtype=torch.float64)
    model.register_parameter("spare", nn.Parameter(torch.ones(2, dtype=torch.float64)))
    learner = l2l.algorithms.MAML(model, 0.1).clone()
    with pytest.raises(RuntimeError, match="depend on these parameters: 'spare'; pass allow_unused=True"):
        learner.adapt(learner(x).square().mean())
    learner.adapt(learner(x).square().mean(), allow_unused=True)
    assert_same(learner.spare, model.spare)
    model[0].weight.requires_grad_(False)
    learner = l2l.algorithms.MAML(model, 0.1).clone(allow_unused=True)
    with pytest.raises(RuntimeError, match=r"do not require grad: '0.weight'; pass allow_nograd=True"):
        learner.adapt(learner(x).square().mean())
    learner.adapt(learner(x).square().mean(), allow_nograd=True)
    assert l2l.algorithms.MAML(model, 0.1, allow_nograd=True).allow_unused
    sgd = l2l.algorithms.MetaSGD(model.requires_grad_(True)).clone()
    with pytest.raises(RuntimeError, match="does not depend on these parameters: 'spare'"):
        sgd.adapt(sgd(x).square().mean())


def test_errors() -> None:
    model = mlp(3, 6, 2)
    learner = l2l.algorithms.MAML(model, 0.1).clone()
    with pytest.raises(ValueError, match="one number for the task"):
        learner.adapt(learner(torch.ones(1, 3, dtype=torch.float64)))
    with pytest.raises(RuntimeError, match="does not require grad"):
        learner.adapt(torch.zeros(()))
    with pytest.raises(TypeError, match=r"model: expected an nn.Module, got function"):
        l2l.algorithms.MAML(F.relu, 0.1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="lr"):
        l2l.algorithms.MAML(model, float("nan"))
    with pytest.raises(AttributeError, match="nothing_of_the_kind"):
        _ = learner.nothing_of_the_kind
    with pytest.raises(AttributeError):
        _ = l2l.algorithms.BaseLearner().anything


def test_attributes_of_the_module_are_found() -> None:
    class Named(nn.Linear):
        loss, steps, params = "a", "b", "c"  # names that mtml.MAML has for itself

    learner = l2l.algorithms.MAML(Named(2, 1), 0.1).clone()
    assert (learner.loss, learner.steps, learner.params, learner.in_features) == ("a", "b", "c", 2)


def test_a_subclass_stays_one() -> None:
    class Mine(l2l.algorithms.MAML):
        pass

    learner = Mine(mlp(3, 2), 0.1)
    learner.extra = [1]
    clone = learner.clone()
    assert type(clone) is Mine and clone.extra is learner.extra


@pytest.mark.parametrize("again", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies_of_a_learner(again: Any) -> None:
    batch = regression()
    learners = [
        l2l.algorithms.MAML(mlp(3, 6, 2), 0.1),
        l2l.algorithms.MetaSGD(mlp(3, 6, 2), 0.1),
        l2l.algorithms.GBML(mlp(3, 6, 2), l2l.optim.MetaCurvatureTransform, 0.1),
    ]
    for learner in learners:
        want = learner.meta_loss(*batch, steps=2, loss="mse")
        other = again(learner)
        with torch.no_grad():
            for p in learner.parameters():
                p.zero_()
        assert_same(loop(other, batch, 2), want)
        assert_same(other.meta_loss(*batch, steps=2, loss="mse"), want)


def test_state_dicts_have_learn2learns_keys() -> None:
    net = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    module = ["module.0.weight", "module.0.bias", "module.1.weight", "module.1.bias"]
    assert list(l2l.algorithms.MAML(net, 0.1).state_dict()) == module
    assert list(l2l.algorithms.MetaSGD(net).state_dict()) == [*module, "lrs.0", "lrs.1", "lrs.2", "lrs.3"]
    only = l2l.optim.TransformDictionary({net[1].weight: l2l.optim.ModuleTransform(nn.Linear)})
    transforms = [f"compute_update.transforms_modules.0.transform.{name}" for name in ("weight", "bias")]
    gbml = l2l.algorithms.GBML(net, only)
    assert list(gbml.state_dict()) == [*module, *transforms]
    gbml.load_state_dict({name: tensor + 1 for name, tensor in gbml.state_dict().items()})


def test_data_parallel() -> None:
    model, batch = mlp(3, 6, 2), regression()
    want = loop(l2l.algorithms.MAML(model, 0.1), batch, 2)
    wrapped = l2l.algorithms.MAML(nn.DataParallel(model), 0.1)
    assert_same(loop(wrapped, batch, 2), want)
    assert_same(wrapped.meta_loss(*batch, steps=2, loss="mse"), want)
    learner = l2l.algorithms.MAML(model, 0.1).clone()
    learner.module = nn.DataParallel(learner.module)  # as its Lightning classes have it
    learner.adapt(F.mse_loss(learner(batch[0][0]), batch[1][0]))
    assert F.mse_loss(learner(batch[2][0]), batch[3][0]).requires_grad


def test_distributed_data_parallel_is_refused_with_the_way_out() -> None:
    wrapped = nn.parallel.DistributedDataParallel.__new__(nn.parallel.DistributedDataParallel)
    nn.Module.__init__(wrapped)
    with pytest.raises(TypeError, match=r"average_gradients\(learner.parameters\(\)\) between backward and step"):
        l2l.algorithms.MAML(nn.Sequential(wrapped), 0.1)


def test_a_clone_that_its_user_changes() -> None:
    model, batch = mlp(3, 6, 2), regression(1)
    learner = l2l.algorithms.MAML(model, 0.1).clone()
    learner.adapt(F.mse_loss(learner(batch[0][0]), batch[1][0]))
    learner.module[2] = nn.Linear(6, 2).double()
    before = learner.module[2].weight
    learner.adapt(F.mse_loss(learner(batch[0][0]), batch[1][0]))
    assert learner.module[2].weight is not before and not torch.equal(learner.module[2].weight, before)
