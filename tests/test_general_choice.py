"""vmap or loop: the rules, the measurement, and what a look at the model finds out."""

from __future__ import annotations

from typing import Any

import torch
from maml_oracle import assert_same, gradients, mlp, regression
from test_general import Batch, Counting, run
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mtml_kernels._general_choice import choose, probe
from mtml_kernels._general_loss import TaskLoss
from mtml_kernels._general_task import TaskRule
from mtml_kernels.general import GeneralPlan, general_inner_loop
from mtml_kernels.losses import resolve


def _chosen(model: nn.Module, batch: Batch, **options: Any) -> GeneralPlan:
    names = tuple(n for n, _ in model.named_parameters())
    loss = TaskLoss(resolve(options.pop("loss", "mse")))
    rule = TaskRule(model, names, loss, loss, 1)
    data = dict(zip(("sx", "sy", "qx", "qy"), batch, strict=True))
    found = probe(model, batch[0], "module")
    rates = [torch.full((1,), 0.1, dtype=torch.float64)]
    return choose(rule, dict(model.named_parameters()), rates, data, None, "module", found)


def test_choice_measures_and_leaves_no_trace() -> None:
    model = nn.Sequential(nn.Linear(3, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(6, 2)).double()
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
