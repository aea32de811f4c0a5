"""The general path against the plain loop, in float64: both modes, every option, any module."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases.maml_oracle import assert_same, classification, gradients, mlp, oracle, regression
from torch import Tensor, nn

from mtml_kernels import general
from mtml_kernels.general import GeneralPlan, GeneralResult, forward_tasks, general_inner_loop
from mtml_kernels.general.task import TaskRule
from mtml_kernels.losses import resolve
from mtml_kernels.losses.task import TaskLoss
from mtml_kernels.rates import op_rates
from mtml_kernels.schema.inner_loop import KEEP_LAST, KEEP_STEPS

both_modes = pytest.mark.parametrize("mode", ["loop", "vmap"])
Batch = tuple[Any, ...]


def run(model: nn.Module, batch: Batch, mode: str, loss: Any = "mse", lr: Any = 0.1, **options: Any) -> GeneralResult:
    steps, weights = options.pop("steps", 2), options.pop("weights", None)
    masks = options.pop("masks", (None, None))
    batch_norm, stateful = options.pop("batch_norm", "module"), options.pop("stateful", ())
    tensors = dict(model.named_buffers()) | dict(model.named_parameters())
    names = tuple(options.pop("names", [n for n, p in model.named_parameters() if p.requires_grad]))
    task_loss = TaskLoss(resolve(loss))
    rule = TaskRule(model, names, task_loss, task_loss, steps, **options)
    rates = op_rates(lr, {n: tensors[n].shape for n in names}, steps, torch.float64, torch.device("cpu"), list(tensors))
    data = dict(zip(("sx", "sy", "qx", "qy", "support_mask", "query_mask"), (*batch, *masks), strict=True))
    data = {key: value for key, value in data.items() if value is not None}
    plan = GeneralPlan(mode, "", batch_norm, stateful)
    return general_inner_loop(rule, plan, {n: tensors[n] for n in names}, rates, data, weights)


@both_modes
@pytest.mark.parametrize("first_order", [False, True])
@pytest.mark.parametrize("steps", [0, 1, 3])
def test_values_and_meta_gradients(mode: str, first_order: bool, steps: int) -> None:
    model, batch = mlp(3, 6, 2), regression()
    parameters = list(model.parameters())
    got = run(model, batch, mode, steps=steps, first_order=first_order, keep=KEEP_STEPS)
    want = oracle(model, batch, F.mse_loss, 0.1, steps, first_order=first_order)
    assert_same(got[:3], want[:3])
    for k, params in enumerate(want.trajectory):
        for name, value in params.items():
            assert_same(got.adapted[name][k], value)
    assert_same(gradients(got.loss, parameters), gradients(want.loss, parameters))
    if steps:
        assert_same(gradients(got.support_losses, parameters), gradients(want.support_losses, parameters))


@both_modes
def test_unchanged_tensors_are_copies(mode: str) -> None:
    model = mlp(3, 6, 2)
    with torch.no_grad():
        found = run(model, regression(), mode, steps=0, keep=KEEP_LAST).adapted
        before = {name: p.clone() for name, p in model.named_parameters()}
        for value in found.values():
            value.zero_()
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]), name


@both_modes
def test_first_order_differs_from_second(mode: str) -> None:
    """The negative control: an inner loop that silently dropped its second order would pass neither of the two."""
    model, batch = mlp(3, 6, 2), regression()
    parameters = list(model.parameters())
    exact, first = (gradients(run(model, batch, mode, first_order=f).loss, parameters) for f in (False, True))
    assert max(float((a - b).abs().max()) for a, b in zip(exact, first, strict=True)) > 1e-3


@both_modes
def test_differentiable_twice(mode: str) -> None:
    model, batch = mlp(2, 4, 2), regression(2, 3, 3, 2, 2)
    parameters = [p.detach().requires_grad_() for p in model.parameters()]
    names = [n for n, _ in model.named_parameters()]

    def loss(*values: Tensor) -> Tensor:
        rule = TaskRule(model, tuple(names), TaskLoss(resolve("mse")), TaskLoss(resolve("mse")), 1)
        data = dict(zip(("sx", "sy", "qx", "qy"), batch, strict=True))
        theta = dict(zip(names, values, strict=True))
        return general_inner_loop(rule, GeneralPlan(mode, ""), theta, [torch.full((1,), 0.1).double()], data).loss

    assert torch.autograd.gradcheck(loss, parameters)
    assert torch.autograd.gradgradcheck(loss, parameters)


@both_modes
def test_every_gradient(mode: str) -> None:
    """With respect to rates, inputs, targets, masks and step weights at once."""
    model = mlp(3, 5, 2)
    batch = tuple(t.requires_grad_() for t in regression())
    masks = tuple(torch.rand(3, n, dtype=torch.float64).add(0.1).requires_grad_() for n in (5, 4))
    lr = torch.tensor([0.1, 0.2], dtype=torch.float64, requires_grad=True)
    weights = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64, requires_grad=True)
    got = run(model, batch, mode, lr=lr, weights=weights, masks=masks)
    want = oracle(model, batch, F.mse_loss, lambda _, k: lr[k], 2, masks=masks, step_weights=weights)
    wanted = [*model.parameters(), *batch, *masks, lr, weights]
    assert_same(got.loss, want.loss)
    assert_same(gradients(got.loss, wanted), gradients(want.loss, wanted))


@both_modes
def test_multi_step_loss_skips_nothing_that_counts(mode: str) -> None:
    model, batch = mlp(3, 5, 2), regression()
    for weights in ([0.0, 0.0, 1.0], [1.0, 0.0, 0.0], [0.5, 0.0, 0.0], [0.1, 0.2, 0.7], [0.0, 0.0, 0.0]):
        got = run(model, batch, mode, weights=weights)
        want = oracle(model, batch, F.mse_loss, 0.1, 2, step_weights=weights)
        assert_same(got.loss, want.loss)
        assert_same(got.output, want.output)


@both_modes
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("kind", ["mse", "huber", "l1", "cross_entropy", "bce_with_logits"])
def test_losses_and_masks(mode: str, kind: str, reduction: str) -> None:
    from mtml_kernels.losses import LossSpec, task_loss

    spec = LossSpec(kind, reduction, label_smoothing=0.1 if kind == "cross_entropy" else 0.0, delta=0.7)
    model = mlp(3, 5, 4)
    batch = classification() if kind == "cross_entropy" else regression(outputs=4)
    if kind == "bce_with_logits":
        batch = (batch[0], batch[1].sigmoid(), batch[2], batch[3].sigmoid())
    mask = torch.tensor([[1, 1, 0, 2, 0.5], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1]], dtype=torch.float64)
    for masks in ((None, None), (mask, mask[:, :4])):
        got = run(model, batch, mode, loss=spec, masks=masks)
        parameters = list(model.parameters())
        want = oracle_with(model, batch, lambda o, t, m: task_loss(spec, o, t, m), masks)
        assert_same(got.loss, want)
        assert_same(gradients(got.loss, parameters), gradients(want, parameters))


def oracle_with(model: nn.Module, batch: Batch, loss: Any, masks: Any) -> Tensor:
    """Two steps at 0.1 with a task loss that takes the mask itself."""
    rows = []
    for t in range(len(batch[0])):
        sm, qm = (None if m is None else m[t] for m in masks)
        params = dict(model.named_parameters())
        for _ in range(2):
            value = loss(torch.func.functional_call(model, params, (batch[0][t],)), batch[1][t], sm)
            grads = torch.autograd.grad(value, list(params.values()), create_graph=True)
            params = {n: p - 0.1 * g for (n, p), g in zip(params.items(), grads, strict=True)}
        rows.append(loss(torch.func.functional_call(model, params, (batch[2][t],)), batch[3][t], qm))
    return torch.stack(rows)


@both_modes
def test_callables_return_a_scalar_or_losses_per_sample(mode: str) -> None:
    model, batch = mlp(3, 5, 2), regression()
    scalar = run(model, batch, mode, loss=lambda o, t: (o - t).pow(4).mean())
    each = run(model, batch, mode, loss=lambda o, t: (o - t).pow(4))
    assert_same(each.loss, scalar.loss)
    mask = torch.ones(3, 5, dtype=torch.float64)
    mask[:, 3:] = 0
    masked = run(model, batch, mode, loss=lambda o, t: (o - t).pow(4), masks=(mask, None))
    short = run(model, (batch[0][:, :3], batch[1][:, :3], *batch[2:]), mode, loss=lambda o, t: (o - t).pow(4))
    assert_same(masked.loss, short.loss)
    with pytest.raises(ValueError, match="one loss per sample"):
        run(model, batch, mode, loss=lambda o, t: (o - t).pow(4).mean(), masks=(mask, None))


@both_modes
def test_no_grad_still_adapts_and_saves_nothing(mode: str) -> None:
    model, batch = mlp(3, 5, 2), regression()
    want = run(model, batch, mode, keep=KEEP_LAST)
    with torch.no_grad():
        got = run(model, batch, mode, keep=KEEP_LAST)
    assert_same(got[:3], want[:3])
    assert not got.loss.requires_grad
    assert not any(value.requires_grad for value in got.adapted.values())


@both_modes
def test_nan_stays_in_its_task(mode: str) -> None:
    model, batch = mlp(3, 5, 2, activation=nn.ReLU), regression()
    clean = run(model, batch, mode, keep=KEEP_LAST)
    broken = (batch[0].clone(), *batch[1:])
    broken[0][1, 2, 0] = float("nan")
    got = run(model, broken, mode, keep=KEEP_LAST)
    assert got.loss[1].isnan()
    assert_same(got.loss[[0, 2]], clean.loss[[0, 2]])
    for name, value in got.adapted.items():
        assert_same(value[[0, 2]], clean.adapted[name][[0, 2]])


class Film(nn.Module):
    """A trunk modulated by a latent code: the code, a buffer, is adapted; the trunk is only meta-learned (CAVIA)."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.head = nn.Linear(3, 6), nn.Linear(6, 2)
        self.modulate = nn.Linear(4, 6)
        self.register_buffer("code", torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.trunk(x) * (1 + self.modulate(self.code))))


@both_modes
def test_an_adapted_buffer(mode: str) -> None:
    model, batch = Film().double(), regression()
    got = run(model, batch, mode, names=["code"], keep=KEEP_LAST, lr=0.5)
    want = oracle(model, batch, F.mse_loss, 0.5, 2, ["code"])
    parameters = list(model.parameters())
    assert_same(got.loss, want.loss)
    assert_same(got.adapted["code"], want.trajectory[-1]["code"])
    assert_same(gradients(got.loss, parameters), gradients(want.loss, parameters))
    assert not model.code.any()


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(3, 2), nn.Embedding(5, 2)

    def forward(self, dense: Tensor, ids: Tensor) -> Tensor:
        return self.left(dense) + self.right(ids)


@both_modes
@pytest.mark.parametrize("named", [False, True])
def test_several_inputs_and_integer_inputs(mode: str, named: bool) -> None:
    model = TwoInputs().double()
    sx, sy, qx, qy = regression()
    pairs = [(x, torch.randint(5, x.shape[:2])) for x in (sx, qx)]
    inputs = [dict(zip(("dense", "ids"), pair, strict=True)) if named else pair for pair in pairs]
    batch = (inputs[0], sy, inputs[1], qy)
    got, want = run(model, batch, mode), oracle(model, batch, F.mse_loss, 0.1, 2)
    assert_same(got.loss, want.loss)
    assert_same(gradients(got.loss, list(model.parameters())), gradients(want.loss, list(model.parameters())))


def test_shared_parameters_and_recurrent_layers() -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell, self.again = nn.LSTM(3, 4, batch_first=True), nn.Linear(4, 4, bias=False)
            self.last = nn.Linear(4, 4, bias=False)
            self.last.weight = self.again.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.last(torch.tanh(self.again(self.cell(x)[0][:, -1])))

    model = Recurrent().double()
    batch = tuple(torch.randn(2, *shape, dtype=torch.float64) for shape in ((3, 5, 3), (3, 4), (2, 5, 3), (2, 4)))
    got, want = run(model, batch, "loop"), oracle(model, batch, F.mse_loss, 0.1, 2)
    assert_same(got.loss, want.loss)
    assert_same(gradients(got.loss, list(model.parameters())), gradients(want.loss, list(model.parameters())))


@both_modes
def test_update_rules(mode: str) -> None:
    model, batch = mlp(3, 5, 2), regression()

    def heavy_ball(params: Any, grads: Any, lr: Any, step: int, state: Any) -> Any:
        speed = grads if state is None else {n: 0.9 * state[n] + g for n, g in grads.items()}
        return {n: p - lr[n] * speed[n] for n, p in params.items()}, speed

    plain = run(model, batch, mode, update=lambda p, g, lr, k: {n: p[n] - lr[n] * g[n] for n in p})
    assert_same(plain.loss, run(model, batch, mode).loss)
    got = run(model, batch, mode, update=heavy_ball, steps=3)
    params, speeds = dict(model.named_parameters()), [0.0] * 4
    for _ in range(3):
        loss = F.mse_loss(torch.func.functional_call(model, params, (batch[0][0],)), batch[1][0])
        grads = torch.autograd.grad(loss, list(params.values()), create_graph=True)
        speeds = [0.9 * s + g for s, g in zip(speeds, grads, strict=True)]
        params = {n: p - 0.1 * s for (n, p), s in zip(params.items(), speeds, strict=True)}
    want = F.mse_loss(torch.func.functional_call(model, params, (batch[2][0],)), batch[3][0])
    assert_same(got.loss[0], want)
    assert_same(gradients(got.loss[:1], list(model.parameters())), gradients(want.reshape(1), list(model.parameters())))
    with pytest.raises(TypeError, match="names of the adapted tensors"):
        run(model, batch, mode, update=lambda p, g, lr, k: {})


def norm_net(**options: Any) -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 6), nn.BatchNorm1d(6, **options), nn.ReLU(), nn.Linear(6, 2)).double()


@both_modes
def test_batch_norm_modes(mode: str) -> None:
    batch = regression()
    model = norm_net()
    model(batch[0].flatten(0, 1))  # some running statistics
    before = {name: b.clone() for name, b in model.named_buffers()}
    reference = norm_net(track_running_stats=False)
    reference.load_state_dict({k: v for k, v in model.state_dict().items() if "running" not in k and "num" not in k})
    by_batch = run(reference, batch, mode).loss
    assert_same(run(model, batch, mode).loss, by_batch)
    assert_same(run(model.eval(), batch, mode, batch_norm="batch").loss, by_batch)
    by_running = oracle(model, batch, F.mse_loss, 0.1, 2).loss
    assert_same(run(model, batch, mode).loss, by_running)
    assert_same(run(model.train(), batch, mode, batch_norm="running").loss, by_running)
    assert model[1].training and model[1].track_running_stats
    for name, buffer in model.named_buffers():
        assert_same(buffer, before[name])


def test_batch_norm_track_folds_in_by_task_step_and_query() -> None:
    batch = regression(tasks=2)
    model, twin = norm_net(), norm_net()
    twin.load_state_dict(model.state_dict())
    run(model, batch, "loop", batch_norm="track", names=["3.weight"], steps=2)
    for t in range(2):
        for x in (batch[0][t], batch[0][t], batch[2][t]):
            twin(x)
    for (name, got), want in zip(model.named_buffers(), twin.buffers(), strict=True):
        assert_same(got, want, msg=name)


class Counting(nn.Module):
    """A model that writes to a buffer in its forward."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls.add_(1)
        return self.layer(x) * self.calls


def test_each_task_gets_its_own_buffers() -> None:
    model, batch = Counting().double(), regression()
    got = run(model, batch, "loop", stateful=("calls",), steps=2)
    alone = run(model, tuple(t[2:] for t in batch), "loop", stateful=("calls",), steps=2)
    assert_same(got.loss[2:], alone.loss)
    assert float(model.calls) == 0.0


def test_under_torch_func_of_the_caller() -> None:
    """torch.func.grad over the whole meta-loss: the loop must not use torch.autograd.grad inside it."""
    model, batch = mlp(3, 5, 2), regression()
    names = tuple(n for n, _ in model.named_parameters())
    data = dict(zip(("sx", "sy", "qx", "qy"), batch, strict=True))
    rule = TaskRule(model, names, TaskLoss(resolve("mse")), TaskLoss(resolve("mse")), 2)
    want = gradients_of_sum(run(model, batch, "loop").loss, model)
    for mode in ("loop", "vmap"):

        def loss(theta: dict[str, Tensor], mode: str = mode) -> Tensor:
            rates = [torch.full((1,), 0.1, dtype=torch.float64)]
            return general_inner_loop(rule, GeneralPlan(mode, ""), theta, rates, data).loss.sum()

        got = torch.func.grad(loss)({n: p.detach() for n, p in model.named_parameters()})
        assert_same(list(got.values()), want)


def gradients_of_sum(loss: Tensor, model: nn.Module) -> list[Tensor]:
    return list(torch.autograd.grad(loss.sum(), list(model.parameters())))


@both_modes
def test_forward_tasks(mode: str) -> None:
    model, x = mlp(3, 5, 2), torch.randn(3, 4, 3, dtype=torch.float64)
    params = {n: torch.randn(3, *p.shape, dtype=torch.float64) for n, p in model.named_parameters()}
    want = [torch.func.functional_call(model, {n: p[t] for n, p in params.items()}, (x[t],)) for t in range(3)]
    assert_same(forward_tasks(model, params, x, GeneralPlan(mode, "")), torch.stack(want))


def test_plan_names_its_modes() -> None:
    with pytest.raises(ValueError, match="'vmap' or 'loop'"):
        GeneralPlan("both", "")
    assert general.__all__ == sorted(general.__all__) and all(hasattr(general, name) for name in general.__all__)
