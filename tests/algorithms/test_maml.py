"""mtml.MAML through its public face: every path against the plain loop, selection, caching, the per-task loop."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases.maml_oracle import assert_same, classification, gradients, mlp, oracle, regression
from torch import Tensor, nn

import mtml
from mtml import MAML, FallbackWarning, TaskBatch
from mtml_kernels.ops.inner_loop import BACKENDS

PATHS = ["general", *BACKENDS.available()]
every_path = pytest.mark.parametrize("backend", PATHS)


def meta_gradients(maml: MAML, batch: Any, **options: Any) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    loss = maml.meta_loss(*batch, **options)
    return loss, gradients(loss, list(maml.parameters()))


# --- values and gradients -------------------------------------------------------------------------------------------


@every_path
@pytest.mark.parametrize("first_order", [False, True])
@pytest.mark.parametrize("steps", [0, 1, 3])
def test_against_the_loop(backend: str, first_order: bool, steps: int) -> None:
    model, batch = mlp(3, 6, 2), regression()
    maml = MAML(model, 0.1, first_order, steps=steps, loss="mse", backend=backend)
    got = maml.meta_forward(*batch)
    want = oracle(model, batch, F.mse_loss, 0.1, steps, first_order=first_order)
    assert_same(tuple(got), want[:3])
    assert_same(gradients(got.loss, list(model.parameters())), gradients(want.loss, list(model.parameters())))
    assert_same(maml.meta_loss(*batch), want.loss)


@every_path
def test_first_order_differs_from_second(backend: str) -> None:
    model, batch = mlp(3, 6, 2), regression()
    maml = MAML(model, 0.1, steps=2, loss="mse", backend=backend)
    exact, first = meta_gradients(maml, batch)[1], meta_gradients(maml, batch, first_order=True)[1]
    assert max(float((a - b).abs().max()) for a, b in zip(exact, first, strict=True)) > 1e-3


@every_path
@pytest.mark.parametrize("form", ["scalar", "per_step", "tensors", "elements", "tensors_per_step", "elements_per_step"])
def test_learning_rate_forms(backend: str, form: str) -> None:
    model, batch, steps = mlp(3, 6, 2), regression(), 3
    named = dict(model.named_parameters())

    def leaf(*shape: int) -> Tensor:
        return (0.05 + 0.1 * torch.rand(shape, dtype=torch.float64)).requires_grad_()

    rates: Any = {
        "scalar": lambda: leaf(),
        "per_step": lambda: leaf(steps),
        "tensors": lambda: {n: leaf() for n in named},
        "elements": lambda: {n: leaf(*p.shape) for n, p in named.items()},
        "tensors_per_step": lambda: {n: leaf(steps, *(1 for _ in p.shape)) for n, p in named.items()},
        "elements_per_step": lambda: {n: leaf(steps, *p.shape) for n, p in named.items()},
    }[form]()

    def at(name: str, k: int) -> Tensor:
        rate = rates[name] if isinstance(rates, dict) else rates
        return rate[k] if "per_step" in form else rate

    got = MAML(model, rates, steps=steps, loss="mse", backend=backend).meta_loss(*batch)
    want = oracle(model, batch, F.mse_loss, at, steps).loss
    leaves = [*named.values(), *(rates.values() if isinstance(rates, dict) else [rates])]
    assert_same(got, want)
    assert_same(gradients(got, leaves), gradients(want, leaves))


@every_path
def test_masks_are_weights(backend: str) -> None:
    model, batch = mlp(3, 6, 4), classification()
    masks = tuple(torch.rand(3, n, dtype=torch.float64) for n in (5, 4))
    masks[0][1], masks[1][2] = 0.0, 0.0
    maml = MAML(model, 0.1, steps=2, backend=backend)
    got = maml.meta_loss(*batch, support_mask=masks[0], query_mask=masks[1])
    want = oracle(model, batch, F.cross_entropy, 0.1, 2, masks=masks).loss
    assert_same(got, want)
    assert got[2] == 0.0
    assert_same(gradients(got, list(model.parameters())), gradients(want, list(model.parameters())))
    as_bools = (masks[0] > 0.5, masks[1] > 0.5)
    numbers = tuple(m.double() for m in as_bools)
    assert_same(
        maml.meta_loss(*batch, support_mask=as_bools[0], query_mask=as_bools[1]),
        oracle(model, batch, F.cross_entropy, 0.1, 2, masks=numbers).loss,
    )


@every_path
@pytest.mark.parametrize("weights", [[0.3, 0.7], [0.2, 0.3, 0.5]])
def test_step_weights(backend: str, weights: list[float]) -> None:
    model, batch = mlp(3, 6, 2), regression()
    maml = MAML(model, 0.1, steps=2, loss="mse", backend=backend)
    want = oracle(model, batch, F.mse_loss, 0.1, 2, step_weights=[0.0] * (3 - len(weights)) + weights)
    for given in (weights, tuple(weights), torch.tensor(weights, dtype=torch.float64)):
        got = maml.meta_forward(*batch, step_weights=given)
        assert_same(got.loss, want.loss)
        assert_same(got.output, want.output)
        assert_same(gradients(got.loss, list(model.parameters())), gradients(want.loss, list(model.parameters())))


@every_path
def test_query_loss_of_another_kind(backend: str) -> None:
    model, batch = mlp(3, 6, 2), regression()
    maml = MAML(model, 0.1, loss="mse", query_loss=nn.HuberLoss(delta=0.3), backend=backend)
    tuned = oracle(model, batch, F.mse_loss, 0.1, 1).output
    want = torch.stack([F.huber_loss(o, y, delta=0.3) for o, y in zip(tuned, batch[3], strict=True)])
    assert_same(maml.meta_loss(*batch), want)


@every_path
def test_gradients_of_inputs(backend: str) -> None:
    model = mlp(3, 6, 2)
    sx, sy, qx, qy = regression()
    batch = (sx.requires_grad_(), sy, qx.requires_grad_(), qy)
    got = MAML(model, 0.1, steps=2, loss="mse", backend=backend).meta_loss(*batch)
    assert_same(gradients(got, [sx, qx]), gradients(oracle(model, batch, F.mse_loss, 0.1, 2).loss, [sx, qx]))


@every_path
def test_gradients_of_targets(backend: str) -> None:
    model = mlp(3, 6, 2)
    sx, sy, qx, qy = regression()
    batch = (sx, sy.requires_grad_(), qx, qy.requires_grad_())
    got = MAML(model, 0.1, steps=2, loss="mse", backend=backend).meta_loss(*batch)
    assert_same(gradients(got, [sy, qy]), gradients(oracle(model, batch, F.mse_loss, 0.1, 2).loss, [sy, qy]))


def test_gradients_of_step_weights_take_the_general_path() -> None:
    weights = torch.tensor([0.0, 0.3, 0.7], dtype=torch.float64, requires_grad=True)
    maml = MAML(mlp(3, 6, 2), 0.1, steps=2, loss="mse")
    with pytest.warns(FallbackWarning, match="step_weights requires grad"):
        assert maml.meta_loss(*regression(), step_weights=weights).requires_grad


@every_path
def test_no_grad_still_adapts(backend: str) -> None:
    model, batch = mlp(3, 6, 2), regression()
    maml = MAML(model, 0.1, steps=2, loss="mse", backend=backend)
    want = maml.meta_loss(*batch)
    with torch.no_grad():
        got = maml.meta_loss(*batch)
    assert_same(got, want)
    assert not got.requires_grad


@every_path
def test_nan_stays_in_its_task(backend: str) -> None:
    model, batch = mlp(3, 6, 2, activation=nn.ReLU), regression()
    maml = MAML(model, 0.1, steps=2, loss="mse", backend=backend)
    clean = maml.meta_forward(*batch)
    broken = (batch[0].clone(), *batch[1:])
    broken[0][1] = float("nan")
    got = maml.meta_forward(*broken)
    assert got.loss[1].isnan()
    for a, b in ((got.loss, clean.loss), (got.output, clean.output), (got.support_losses.T, clean.support_losses.T)):
        assert_same(a[[0, 2]], b[[0, 2]])


@every_path
def test_inputs_of_several_forms(backend: str) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 2), nn.Linear(2, 2)

        def forward(self, left: Tensor, right: Tensor) -> Tensor:
            return self.a(left) + torch.tanh(self.b(right))

    model = Two().double()
    sx, sy, qx, qy = regression()
    pairs = [(x, torch.randn(*x.shape[:2], 2, dtype=torch.float64)) for x in (sx, qx)]
    want = oracle(model, (pairs[0], sy, pairs[1], qy), F.mse_loss, 0.1, 1).loss
    maml = MAML(model, 0.1, loss="mse", backend=backend)
    assert_same(maml.meta_loss(pairs[0], sy, pairs[1], qy), want)
    # a dict in another order than forward's arguments
    dicts = [{"right": right, "left": left} for left, right in pairs]
    assert_same(maml.meta_loss(dicts[0], sy, dicts[1], qy), want)
    assert_same(maml.meta_loss(TaskBatch(dicts[0], sy, dicts[1], qy)), want)
    with pytest.raises(TypeError, match="qx: expected the form of sx"):
        maml.meta_loss(dicts[0], sy, pairs[1], qy)


@every_path
def test_batches_as_one_argument(backend: str) -> None:
    model, batch = mlp(3, 6, 2), regression()
    maml = MAML(model, 0.1, loss="mse", backend=backend)
    mask = torch.rand(3, 5, dtype=torch.float64)
    want = maml.meta_loss(*batch, support_mask=mask)
    assert_same(maml.meta_loss(TaskBatch(*batch, support_mask=mask)), want)
    assert_same(maml.meta_loss((*batch, mask)), want)
    assert_same(maml.meta_loss(TaskBatch(*batch), support_mask=mask), want)
    assert_same(maml.meta_forward(TaskBatch(*batch, mask)).loss, want)
    assert_same(maml.adapt_tasks(TaskBatch(*batch, mask)).loss(*batch[2:]), want)
    with pytest.raises(TypeError, match="support_mask: given both"):
        maml.meta_loss(TaskBatch(*batch, mask), support_mask=mask)
    with pytest.raises(TypeError, match="qx, qy: expected the query sets"):
        maml.meta_loss(*batch[:2])
    with pytest.raises(TypeError, match="sy: expected targets"):
        maml.meta_loss(batch[0])


# --- what is adapted ------------------------------------------------------------------------------------------------


@every_path
@pytest.mark.parametrize(
    "params",
    ["2.*", ["2.weight", "2.bias"], lambda name, tensor: name.startswith("2")],
    ids=["pattern", "list", "predicate"],
)
def test_selected_parameters(backend: str, params: Any) -> None:
    model, batch = mlp(3, 6, 2), regression()
    maml = MAML(model, 0.1, steps=2, loss="mse", params=params, backend=backend)
    want = oracle(model, batch, F.mse_loss, 0.1, 2, ["2.weight", "2.bias"])
    got = maml.meta_loss(*batch)
    assert_same(got, want.loss)
    assert_same(gradients(got, list(model.parameters())), gradients(want.loss, list(model.parameters())))
    assert list(maml.adapt_tasks(*batch[:2]).params) == ["2.weight", "2.bias"]


class Modulated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.head, self.modulate = nn.Linear(3, 6), nn.Linear(6, 2), nn.Linear(4, 6)
        self.register_buffer("code", torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.trunk(x) + self.modulate(self.code)))


@every_path
@pytest.mark.parametrize("kind", ["buffer", "frozen"])
def test_codes_are_adapted_and_not_meta_trained(backend: str, kind: str) -> None:
    model, batch = Modulated().double(), regression()
    if kind == "frozen":
        del model.code
        model.code = nn.Parameter(torch.zeros(4, dtype=torch.float64), requires_grad=False)
    maml = MAML(model, 0.5, steps=2, loss="mse", params="code", backend=backend)
    got, want = maml.meta_loss(*batch), oracle(model, batch, F.mse_loss, 0.5, 2, ["code"]).loss
    trained = [p for p in model.parameters() if p.requires_grad]
    assert_same(got, want)
    assert_same(gradients(got, trained), gradients(want, trained))
    assert not model.code.any()


def test_frozen_parameters_are_left_alone_unless_named() -> None:
    model, batch = mlp(3, 6, 2), regression()
    model[0].requires_grad_(False)
    maml = MAML(model, 0.1, loss="mse")
    assert list(maml.adapt_tasks(*batch[:2]).params) == ["2.weight", "2.bias"]
    model[0].requires_grad_(True)
    assert len(maml.adapt_tasks(*batch[:2]).params) == 4


def test_patterns_leave_running_statistics_alone() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).double()
    batch = regression()
    for params in ("*", lambda name, tensor: True):
        maml = MAML(model, 0.1, loss="mse", params=params, backend="general")
        assert list(maml.adapt_tasks(*batch[:2]).params) == [name for name, _ in model.named_parameters()]
    with pytest.raises(ValueError, match=r"params: 'tail.\*' matches no"):
        MAML(model, 0.1, params="tail.*")
    with pytest.raises(ValueError, match="predicate matched no"):
        MAML(model, 0.1, params=lambda name, tensor: False)
    with pytest.raises(TypeError, match="params: expected"):
        MAML(model, 0.1, params=[3])


@every_path
def test_a_parameter_that_the_model_never_reads(backend: str) -> None:
    model, batch = mlp(3, 6, 2), regression()
    model.register_parameter("spare", nn.Parameter(torch.ones(2, dtype=torch.float64)))
    maml = MAML(model, 0.1, steps=2, loss="mse", backend=backend)
    adapted = maml.adapt_tasks(*batch[:2], keep_steps=True)
    assert_same(adapted.params["spare"], torch.ones(3, 2, dtype=torch.float64))
    assert adapted.params_at(0)["spare"].shape == (3, 2)
    maml.meta_loss(*batch).sum().backward()
    assert model.spare.grad is None or not model.spare.grad.any()


# --- the module -----------------------------------------------------------------------------------------------------


def test_state_dict_copy_and_pickle() -> None:
    model, batch = mlp(3, 6, 2), regression()
    maml = MAML(model, 0.1, steps=2, loss="mse", backend=PATHS[-1])
    want = maml.meta_loss(*batch)
    assert list(maml.state_dict()) == [f"module.{name}" for name in model.state_dict()]
    for other in (copy.deepcopy(maml), copy.copy(maml), pickle.loads(pickle.dumps(maml))):
        assert_same(other.meta_loss(*batch), want)
        other.lr = 0.3
        assert_same(other.meta_loss(*batch), oracle(model, batch, F.mse_loss, 0.3, 2).loss)
        assert_same(maml.meta_loss(*batch), want)
    file = io.BytesIO()
    torch.save(maml.state_dict(), file)
    file.seek(0)
    fresh = MAML(mlp(3, 6, 2), 0.1, steps=2, loss="mse")
    fresh.load_state_dict(torch.load(file))
    assert_same(fresh.meta_loss(*batch), want)


def test_learned_rate_rule_and_loss_are_registered() -> None:
    class Rule(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gain = nn.Parameter(torch.ones((), dtype=torch.float64))

        def forward(self, params: Any, grads: Any, lr: Any, step: int) -> Any:
            return {n: p - self.gain * lr[n] * grads[n] for n, p in params.items()}

    model, batch = mlp(3, 6, 2), regression()
    maml = MAML(model, mtml.InnerLR(model, 0.1), loss="mse", update=Rule(), backend="general")
    assert len(list(maml.parameters())) == 6
    maml.meta_loss(*batch).sum().backward()
    assert all(p.grad is not None for p in maml.parameters())


def test_meta_training_learns() -> None:
    model, batch = mlp(1, 8, 1), regression(4, 8, 8, 1, 1)
    maml = MAML(model, 0.1, steps=2, loss="mse")
    optimizer = torch.optim.Adam(maml.parameters(), 1e-2)
    losses = []
    for _ in range(30):
        loss = maml.meta_loss(*batch).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_steps_of_wide_layers_with_many_samples() -> None:
    """18 MB of planes a task, which the engine keeps for the way back where layers are wide."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(2, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 1)).double()
    rates = {n: torch.full((4, *p.shape), 0.02).double().requires_grad_() for n, p in net.named_parameters()}
    sx, sy = torch.rand(1, 1100, 2).double(), torch.randn(1, 1100, 1).double()
    qx, qy = sx[:, :20] + 0.1, sy[:, :20]
    found = []
    for backend in ("cpu", "reference"):
        loss = MAML(net, rates, steps=4, loss="mse", backend=backend).meta_loss(sx, sy, qx, qy)
        found.append([loss, *torch.autograd.grad(loss.sum(), [*net.parameters(), *rates.values()])])
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-12)
