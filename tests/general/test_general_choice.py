"""vmap or loop: the rules, the measurement, and what a look at the model finds out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases.maml_oracle import assert_same, gradients, mlp, oracle, regression
from test_general import Batch, Counting, run
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mtml_kernels.general import GeneralPlan, general_inner_loop
from mtml_kernels.general import choice as _general_choice
from mtml_kernels.general.choice import choose, probe
from mtml_kernels.general.task import TaskRule
from mtml_kernels.losses import resolve
from mtml_kernels.losses.task import TaskLoss


def _chosen(model: nn.Module, batch: Batch, **options: Any) -> GeneralPlan:
    names = tuple(n for n, _ in model.named_parameters())
    loss = TaskLoss(resolve(options.pop("loss", "mse")))
    rule = TaskRule(model, names, loss, loss, 1, **options)
    data = dict(zip(("sx", "sy", "qx", "qy"), batch, strict=True))
    found = probe(model, batch[0], "module")
    rates = [torch.full((1,), 0.1, dtype=torch.float64)]
    return choose(rule, dict(model.named_parameters()), rates, data, None, "module", found)


def test_choice_measures_and_leaves_no_trace() -> None:
    model = nn.Sequential(nn.Linear(3, 6), nn.BatchNorm1d(6, affine=False), nn.Dropout(0.5), nn.Linear(6, 2)).double()
    batch = regression()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    plan = _chosen(model, batch)
    assert torch.equal(torch.rand(3), expected)
    assert plan.mode in ("loop", "vmap") and "vmap" in plan.reason and "loop" in plan.reason
    assert all(p.grad is None for p in model.parameters())
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_choice_by_rule() -> None:
    batch = regression()
    plan = _chosen(Counting().double(), batch)
    assert plan.mode == "loop" and "calls" in plan.reason and plan.stateful == ("calls",)
    assert _chosen(mlp(3, 5, 2), tuple(t[:1] for t in batch)).reason == "there is one task"

    def impossible(output: Tensor, target: Tensor) -> Tensor:
        return (output - target).square().mean() * (1.0 if float(output.detach().sum()) < 1e9 else 2.0)

    plan = _chosen(mlp(3, 5, 2), batch, loss=impossible)
    assert plan.mode == "loop" and "vmap cannot run" in plan.reason


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.head = nn.Sequential(nn.Linear(3, 6), nn.BatchNorm1d(6), nn.Tanh()), nn.Linear(6, 2)
        self.saving = True

    def forward(self, x: Tensor) -> Tensor:
        return self.head(checkpoint(self.trunk, x, use_reentrant=False) if self.saving else self.trunk(x))


def test_activation_checkpointing_recomputes_with_the_parameters_of_its_step() -> None:
    model, batch = Checkpointed().double(), regression()
    model.trunk[1].track_running_stats = False
    plan = _chosen(model, batch)
    assert plan.mode == "loop" and plan.recomputes and "checkpoints" in plan.reason
    tensors, loss = dict(model.named_parameters()), TaskLoss(resolve("mse"))
    rule = TaskRule(model, tuple(tensors), loss, loss, 2)
    data = dict(zip(("sx", "sy", "qx", "qy"), batch, strict=True))
    got = general_inner_loop(rule, plan, tensors, [torch.full((1,), 0.1, dtype=torch.float64)], data).loss
    got_gradients = gradients(got, list(model.parameters()))
    model.saving = False
    want = run(model, batch, "loop").loss
    assert_same(got, want)
    assert_same(got_gradients, gradients(want, list(model.parameters())))


class Normed(nn.Module):
    """A normalisation between two layers, of values [N, 4, 2] with as many channels as its weight."""

    def __init__(self, norm: Callable[[Tensor, Tensor, Tensor], Tensor] | nn.Module, features: int = 4) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, 8), nn.Linear(8, 2)
        self.weight, self.bias = nn.Parameter(torch.randn(features)), nn.Parameter(torch.randn(features))
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).unflatten(1, (4, 2))
        x = self.norm(x) if isinstance(self.norm, nn.Module) else self.norm(x, self.weight, self.bias)
        return self.last(torch.tanh(x.flatten(1)))


NORMS: dict[str, Callable[[], nn.Module]] = {
    "layer norm": lambda: Normed(nn.LayerNorm([4, 2])),
    "layer norm without bias": lambda: Normed(nn.LayerNorm(2, bias=False)),
    "batch norm": lambda: Normed(nn.BatchNorm1d(4)),
    "instance norm": lambda: Normed(nn.InstanceNorm1d(4, affine=True)),
    "functional layer norm": lambda: Normed(lambda x, w, b: F.layer_norm(x, (2,), w, b), 2),
    "functional batch norm": lambda: Normed(lambda x, w, b: F.batch_norm(x, None, None, w, b, training=True)),
    "functional instance norm": lambda: Normed(lambda x, w, b: F.instance_norm(x, None, None, w, b)),
    "group norm": lambda: Normed(nn.GroupNorm(2, 4)),
    "functional group norm": lambda: Normed(lambda x, w, b: F.group_norm(x, 2, w, b)),
    "batch norm in eval": lambda: Normed(nn.BatchNorm1d(4)).eval(),
    "batch norm without weight": lambda: Normed(nn.BatchNorm1d(4, affine=False)),
    "layer norm without weight": lambda: Normed(nn.LayerNorm(2, elementwise_affine=False)),
    "instance norm without weight": lambda: Normed(nn.InstanceNorm1d(4)),
    "rms norm": lambda: Normed(nn.RMSNorm(2)),
}


def _vmap_where_it_may(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_general_choice, "_measure", lambda rule, norm, args: GeneralPlan("vmap", "", norm))


@pytest.mark.parametrize("first_order", [False, True])
@pytest.mark.parametrize("name", NORMS)
def test_second_order_through_normalisations(name: str, first_order: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """vmap may be chosen: each model's meta-gradient is the plain loop's all the same."""
    _vmap_where_it_may(monkeypatch)
    model, batch = NORMS[name]().double(), regression()
    plan = _chosen(model, batch, first_order=first_order)
    assert plan.mode == "vmap"
    found = run(model, batch, plan.mode, lr=0.3, first_order=first_order)
    expected = oracle(model, batch, F.mse_loss, 0.3, 2, first_order=first_order)
    assert_same(found[:3], expected[:3])
    parameters = list(model.parameters())
    assert_same(gradients(found.loss, parameters), gradients(expected.loss, parameters))


@torch.jit.script
def scripted_norm(x: Tensor, weight: Tensor) -> Tensor:
    return torch.nn.functional.layer_norm(x, [2], weight)


def _scripted_in_the_model() -> tuple[nn.Module, dict[str, Any]]:
    return Normed(lambda x, w, b: scripted_norm(x, w), 2).double(), {}


def _scripted_in_the_loss() -> tuple[nn.Module, dict[str, Any]]:
    weight = torch.tensor([0.5, 2.0], dtype=torch.float64)
    return mlp(3, 4, 2), {"loss": lambda o, t: (scripted_norm(o, weight) - t).square().mean()}


def _scripted_in_the_update() -> tuple[nn.Module, dict[str, Any]]:
    weight = torch.tensor([0.5, 2.0], dtype=torch.float64)

    def update(params: Any, grads: Any, lr: Any, step: int) -> Any:
        normed = {n: scripted_norm(g, weight) if g.shape[-1] == 2 else g for n, g in grads.items()}
        return {n: p - lr[n] * normed[n] for n, p in params.items()}

    return mlp(3, 2, 2), {"update": update}


@pytest.mark.parametrize("case", [_scripted_in_the_model, _scripted_in_the_loss, _scripted_in_the_update])
def test_norms_in_torch_script_run_in_the_loop_and_once(
    case: Callable[[], tuple[nn.Module, dict[str, Any]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing can stand in for them, so what PyTorch has wrong there is not given: vmap, and the third order."""
    _vmap_where_it_may(monkeypatch)
    (model, options), batch = case(), regression()
    plan = _chosen(model, batch, **options)
    assert plan.mode == "loop" and "wrong second derivatives through" in plan.reason
    assert _chosen(model, batch, first_order=True, **options).mode == "vmap"
    tensors, loss = dict(model.named_parameters()), TaskLoss(resolve(options.get("loss", "mse")))
    rule = TaskRule(model, tuple(tensors), loss, loss, 2, update=options.get("update"))
    data = dict(zip(("sx", "sy", "qx", "qy"), batch, strict=True))
    found = general_inner_loop(rule, plan, tensors, [torch.full((1,), 0.1, dtype=torch.float64)], data).loss
    want = run(model, batch, "loop", **options).loss
    parameters = list(model.parameters())
    assert_same(gradients(found, parameters), gradients(want, parameters))
    grads = torch.autograd.grad(found.sum(), parameters, create_graph=True, materialize_grads=True)
    with pytest.raises(RuntimeError, match="differentiated once: native_layer_norm"):
        torch.autograd.grad(sum(g.square().sum() for g in grads), parameters, allow_unused=True)


def test_norms_in_torch_script_run_in_the_loop_inside_a_transform() -> None:
    (model, _), batch = _scripted_in_the_model(), regression()
    plans = []

    def loss(weight: Tensor) -> Tensor:
        plans.append(_chosen(model, batch))
        return weight.sum()

    torch.func.grad(loss)(torch.ones(2))
    assert plans[0].mode == "loop"


def test_running_statistics_are_no_reason_to_refuse_the_third_order() -> None:
    model = Normed(nn.InstanceNorm1d(4, affine=True, track_running_stats=True)).double()
    plan = _chosen(model, regression())
    assert plan.stateful and not plan.once and not plan.blocked


def test_without_gradients_vmap_may_be_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    _vmap_where_it_may(monkeypatch)
    model, _ = _scripted_in_the_model()
    with torch.no_grad():
        assert _chosen(model, regression()).mode == "vmap"
