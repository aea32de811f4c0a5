"""Autocast, GradScaler and models in half precision: what a plain loop does, in float32 where the model is fused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases.algorithms import EVERY, made
from cases.algorithms import batch as classes_batch
from cases.compiled import whole_graph
from torch import Tensor, nn
from torch.func import functional_call

import mtml
from mtml.tasks import TaskBatch

BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64


def autocast(dtype: torch.dtype = BF16) -> torch.autocast:
    return torch.autocast("cpu", dtype)


def to(data: Any, dtype: torch.dtype) -> Any:
    return TaskBatch(*(t.to(dtype) if isinstance(t, Tensor) and t.is_floating_point() else t for t in data))


def net(*, normed: bool = False) -> nn.Sequential:
    norm: list[nn.Module] = [nn.BatchNorm1d(16)] if normed else []
    return nn.Sequential(nn.Linear(3, 16), *norm, nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 2))


def values() -> TaskBatch:
    return TaskBatch(torch.randn(4, 6, 3), torch.randn(4, 6, 2), torch.randn(4, 5, 3), torch.randn(4, 5, 2))


def flat(grads: Any) -> Tensor:
    return torch.cat([g.double().flatten() for g in grads])


def error(found: Tensor, exact: Tensor) -> float:
    return float((found - exact).norm() / exact.norm())


def own(learner: nn.Module) -> list[nn.Parameter]:
    return [p for p in learner.parameters() if p.requires_grad]


def plain_loop(model: nn.Module, data: TaskBatch, steps: int) -> Tensor:
    """The mean query loss after steps of rate 0.1, task after task."""
    losses = []
    for sx, sy, qx, qy in zip(*data[:4], strict=True):
        fast: dict[str, Tensor] = dict(model.named_parameters())
        for _ in range(steps):
            loss = F.mse_loss(functional_call(model, fast, (sx,)), sy)
            grads = torch.autograd.grad(loss, list(fast.values()), create_graph=True)
            fast = {name: p - 0.1 * g for (name, p), g in zip(fast.items(), grads, strict=True)}
        losses.append(F.mse_loss(functional_call(model, fast, (qx,)), qy))
    return torch.stack(losses).mean()


def meta_gradient(learner: Any, data: Any, around: Any = nullcontext) -> tuple[Tensor, Tensor]:
    with around():
        loss = learner.meta_loss(data)
    grads = torch.autograd.grad(loss.sum(), own(learner), materialize_grads=True)
    assert [g.dtype for g in grads] == [p.dtype for p in own(learner)]
    return loss, flat(grads)


# --- errors -------------------------------------------------------------------------------------------------------

BY_PYTORCH = {"ANIL", "ProtoMAML", "R2D2", "MetaCurvature"}  # whose trunk or rule autocast does round


@pytest.mark.parametrize("dtype", [BF16, F16])
@pytest.mark.parametrize("name", EVERY)
def test_every_algorithm_under_autocast(name: str, dtype: torch.dtype) -> None:
    """Those of fused models to float32's rounding, others as autocast's; with data in half precision as well."""
    learner = made(name).float()
    for stored in (F32, dtype):
        data = to(classes_batch(), stored)
        _, exact = meta_gradient(copy.deepcopy(learner).double(), to(data, F64))
        loss, found = meta_gradient(learner, data, lambda: autocast(dtype))
        assert loss.dtype == F32
        assert error(found, exact) <= (4 * torch.finfo(dtype).eps if name in BY_PYTORCH else 2e-6)


@pytest.mark.parametrize("dtype", [BF16, F16])
@pytest.mark.parametrize("name", EVERY)
def test_every_algorithm_in_half_precision(name: str, dtype: torch.dtype) -> None:
    """Nothing is lost between the steps: the error is that of a few roundings."""
    learner = made(name).to(dtype)
    data = to(classes_batch(), dtype)
    _, exact = meta_gradient(copy.deepcopy(learner).double(), to(data, F64))
    loss, found = meta_gradient(learner, data)
    assert loss.dtype == dtype
    assert error(found, exact) <= 5 * torch.finfo(dtype).eps


def errors(seed: int, first_order: bool = False) -> tuple[float, float]:
    """Of the fused path and of a plain loop, both under autocast, beside a plain loop in float64."""
    torch.manual_seed(seed)
    model, data = net(normed=True), values()
    exact = copy.deepcopy(model).double()
    loops = []
    for m, around, d in ((exact, nullcontext, to(data, F64)), (model, autocast, data)):
        with around():
            loss = plain_loop(m, d, 3)
        loops.append(flat(torch.autograd.grad(loss, list(m.parameters()))))
    maml = mtml.MAML(model, 0.1, first_order, steps=3, loss="mse", backend="cpu")
    with autocast():
        loss = maml.meta_loss(data).mean()
    ours = flat(torch.autograd.grad(loss, list(model.parameters())))
    return error(ours, loops[0]), error(loops[1], loops[0])


def test_errors_beside_those_of_the_plain_loop() -> None:
    ours, plain = torch.tensor([errors(seed) for seed in range(20)]).median(0).values
    print(f"median error under autocast: mtml {ours:.1e}, plain loop {plain:.1e}")
    assert ours <= 2 * plain
    first_order = torch.tensor([errors(seed, True)[0] for seed in range(5)]).median()
    assert first_order > 2 * plain  # what drops second order is seen


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_the_general_path_under_autocast_is_the_plain_loop(dtype: torch.dtype) -> None:
    model, data = (
        nn.Sequential(nn.Unflatten(1, (1, 3)), nn.ConvTranspose1d(1, 2, 2), nn.Flatten(), nn.Linear(8, 2)),
        values(),
    )
    exact, data = copy.deepcopy(model).double(), to(data, dtype)
    want = plain_loop(exact, to(data, F64), 2)
    grads = [flat(torch.autograd.grad(want, list(exact.parameters())))]
    maml = mtml.MAML(model, 0.1, steps=2, loss="mse", backend="general")
    for call in (
        lambda: maml.meta_loss(data).mean(),
        lambda: plain_loop(model, data, 2),
    ):
        with autocast():
            loss = call()
        grads.append(flat(torch.autograd.grad(loss, list(model.parameters()))))
    assert error(grads[1], grads[0]) <= 2 * error(grads[2], grads[0])
    assert error(grads[1], grads[0]) > 1e-4  # autocast did round


def test_weights_stay_in_float32_from_step_to_step() -> None:
    """Steps that bfloat16 would round away: a plain loop stands still."""
    model = nn.Linear(1, 1, bias=False).to(BF16)
    with torch.no_grad():
        model.weight.fill_(1.0)
    x, y = torch.ones(1, 1, 1, dtype=BF16), torch.zeros(1, 1, 1, dtype=BF16)
    options: dict[str, Any] = {"steps": 100, "loss": "mse"}
    moved = mtml.MAML(model, 5e-4, **options).adapt_tasks(x, y).detach().params["weight"]
    assert moved.dtype == BF16
    assert float(moved) == pytest.approx(0.999**100, abs=4e-3)
    assert (
        float(mtml.MAML(model, 5e-4, **options, backend="general").adapt_tasks(x, y).detach().params["weight"]) == 1.0
    )


# --- which path, which dtype --------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [net, lambda: net(normed=True), lambda: nn.Linear(3, 2)])
@pytest.mark.parametrize("inside_first", [True, False])
def test_in_and_out_of_autocast_the_fused_path_has_the_same_bits(
    make: Callable[[], nn.Module], inside_first: bool
) -> None:
    maml, data = mtml.MAML(make(), 0.1, steps=3, loss="mse"), values()
    want = meta_gradient(mtml.MAML(copy.deepcopy(maml.module), 0.1, steps=3, loss="mse"), data)
    for inside in (inside_first, not inside_first, inside_first):
        found = meta_gradient(maml, data, autocast if inside else nullcontext)
        assert all(map(torch.equal, found, want))
    with autocast():
        output = maml.meta_forward(data)
        assert "in float32 throughout, which autocast does not round" in maml.explain(data).reason
    assert {t.dtype for t in output} == {F32}
    assert "float32" not in maml.explain(data).reason


def test_a_backward_pass_under_autocast_changes_nothing() -> None:
    for backend in ("cpu", "torch", "reference"):
        maml, data = mtml.MAML(net(), 0.1, steps=2, loss="mse", backend=backend), values()
        _, want = meta_gradient(maml, data)
        with autocast():
            _, found = meta_gradient(maml, data, autocast)
        assert torch.equal(found, want)


def test_a_model_that_changes_its_dtype_is_followed() -> None:
    maml, data = mtml.MAML(net(), 0.1, steps=2, loss="mse"), values()
    for dtype in (F32, BF16, F64, F16, F32):
        maml.to(dtype)
        loss, _ = meta_gradient(maml, to(data, dtype))
        explanation = maml.explain(to(data, dtype))
        assert loss.dtype == dtype
        assert explanation.kernel.startswith("cpu")
        assert ("is how tensors are stored" in explanation.reason) == (dtype in (BF16, F16))


def test_what_is_said_of_the_general_path_in_half_precision() -> None:
    maml, data = mtml.MAML(net().to(BF16), 0.1, loss="mse", backend="general"), to(values(), BF16)
    assert maml.explain(data).path == "general"
    with autocast():
        assert maml.explain(data).path == "general"


def test_models_of_several_dtypes_under_autocast() -> None:
    model = net(normed=True)
    model[0].to(BF16)
    maml, data = mtml.MAML(model, 0.1, steps=2, loss="mse"), values()
    _, exact = meta_gradient(mtml.MAML(copy.deepcopy(model).double(), 0.1, steps=2, loss="mse"), to(data, F64))
    with autocast():
        assert maml.explain(data).path == "fused"
        adapted = maml.adapt_tasks(data)
    loss, found = meta_gradient(maml, data, autocast)
    assert loss.dtype == F32
    assert {name: t.dtype for name, t in adapted.params.items()} == {n: p.dtype for n, p in model.named_parameters()}
    assert error(found, exact) < 4e-3


@pytest.mark.parametrize("data", [to(values(), BF16), to(values(), F64)])
def test_other_dtypes_outside_of_autocast_are_an_error(data: TaskBatch) -> None:
    maml = mtml.MAML(net(), 0.1, loss="mse")
    with pytest.raises(TypeError, match=r"sx: expected float32 .*first layer.* got (bfloat16|float64); convert it"):
        maml.meta_loss(data)
    if data.sx.dtype == F64:  # which autocast does not cast
        with autocast(), pytest.raises(TypeError, match="sx: expected float32"):
            maml.meta_loss(data)


@pytest.mark.parametrize("around", [nullcontext, autocast])
def test_adapted_models_have_the_models_dtype(around: Any) -> None:
    model, data = net().to(BF16), to(values(), BF16)
    rule = mtml.inner.Adam(eps=1e-2)
    maml = mtml.MAML(model, 0.1, steps=2, loss="mse", update=rule)
    with around():
        adapted = maml.adapt_tasks(data, keep_steps=True)
        further = maml.adapt_tasks(data, start=adapted)
        output, loss = adapted(data.qx), adapted.loss(data.qx, data.qy)
    for a in (adapted, further):
        assert {t.dtype for t in a.params.values()} == {BF16}
        assert a.state is not None
        assert {t.dtype for m in ("exp_avg", "exp_avg_sq") for t in a.state[m].values()} == {BF16}
    assert adapted.support_losses.dtype == (F32 if around is autocast else BF16)
    assert output.dtype == BF16
    assert loss.isfinite().all()
    torch.testing.assert_close(adapted.task(1)(data.qx[1]), adapted(data.qx)[1], rtol=2e-2, atol=2e-2)
    further.params["0.weight"].float().sum().backward()
    assert {p.grad.dtype for p in model.parameters() if p.grad is not None} == {BF16}


def test_adapted_models_can_be_exported() -> None:
    maml, data = mtml.MAML(net().to(BF16), 0.1, steps=2, loss="mse"), to(values(), BF16)
    task = maml.adapt_tasks(data).task(2)
    exported = torch.export.export(task, (data.qx[2],)).module()
    assert torch.equal(exported(data.qx[2]), task(data.qx[2]))


@pytest.mark.parametrize("kind", ["autocast", "half"])
def test_losses_as_their_users_write_them(kind: str) -> None:
    """A factor is applied in float32 and rounded once; ids that mean something else run live, in the stored dtype."""
    dtype, around = (BF16, nullcontext) if kind == "half" else (F32, autocast)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    data = to(classes_batch(), BF16)
    want = mtml.MAML(copy.deepcopy(model.to(BF16)).float(), 0.1, steps=2, loss=lambda z, y: 0.3 * F.cross_entropy(z, y))
    maml = mtml.MAML(model.to(BF16).to(dtype), 0.1, steps=2, loss=want.loss)
    with around():
        found = maml.meta_loss(data)
        assert maml.explain(data).path == "fused"
    assert torch.equal(found, want.meta_loss(to(data, F32)).to(dtype))
    odd = data._replace(qy=data.qy.clone().fill_(-100))
    clamped = mtml.MAML(maml.module, 0.1, loss=lambda z, y: F.cross_entropy(z, y, ignore_index=-5))
    with around(), pytest.raises((IndexError, ValueError, RuntimeError)):
        clamped.meta_loss(odd)


@pytest.mark.parametrize("dtype", [BF16, F32])
def test_gradients_and_products_of_tasks(dtype: torch.dtype) -> None:
    around = autocast if dtype == F32 else nullcontext
    model, data = net().to(BF16).to(dtype), to(to(values(), BF16), dtype)
    maml, exact = (
        mtml.MAML(model, 0.1, steps=2, loss="mse"),
        mtml.MAML(copy.deepcopy(model).double(), 0.1, steps=2, loss="mse"),
    )
    vectors = {name: torch.ones(4, *p.shape, dtype=dtype) for name, p in model.named_parameters()}
    with around():
        found = maml.task_gradients(data), maml.hvp(data, vectors=vectors)
    precise = to(data, F64)
    want = exact.task_gradients(precise), exact.hvp(precise, vectors={n: v.double() for n, v in vectors.items()})
    for ours, theirs in zip(found, want, strict=True):
        assert {t.dtype for t in ours.values()} == {dtype}
        assert error(flat(ours.values()), flat(theirs.values())) < (1e-2 if dtype == BF16 else 1e-5)


@pytest.mark.parametrize("name", ["IMAML", "IMAML with momentum"])
def test_long_steps_under_float16_stay_finite_on_the_general_path(name: str) -> None:
    """A Hessian is read off a step of rate 1 / eps, which float16 has no room for."""
    learner = made(name).float()
    learner.backend = "general"
    _, exact = meta_gradient(copy.deepcopy(learner).double(), to(classes_batch(), F64))
    _, found = meta_gradient(learner, to(classes_batch(), F32), lambda: autocast(F16))
    assert error(found, exact) < 1e-2


# --- training -----------------------------------------------------------------------------------------------------


def trained(scaler: torch.amp.GradScaler | None, poison: int | None = None) -> tuple[nn.Module, list[float]]:
    torch.manual_seed(1)
    model = net()
    maml, optimizer, scales = mtml.MAML(model, 0.1, steps=2, loss="mse"), torch.optim.SGD(model.parameters(), 0.1), []
    for i in range(4):
        data = values()
        if i == poison:
            data.qy[0, 0, 0] = torch.inf
        with autocast():
            loss = maml.meta_loss(data).mean()
        optimizer.zero_grad()
        if scaler is None:
            loss.backward()
            optimizer.step() if i != poison else None
        else:
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            scales.append(scaler.get_scale())
    return model, scales


def test_grad_scaler() -> None:
    """A power of two changes no bit; a step with an infinite gradient is skipped, and the scale halved."""
    model, scales = trained(torch.amp.GradScaler("cpu", init_scale=1024.0))
    assert scales == [1024.0] * 4
    assert all(map(torch.equal, model.parameters(), trained(None)[0].parameters()))
    model, scales = trained(torch.amp.GradScaler("cpu", init_scale=1024.0), poison=1)
    assert scales == [1024.0, 512.0, 512.0, 512.0]
    assert all(map(torch.equal, model.parameters(), trained(None, poison=1)[0].parameters()))


@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_under_torch_compile(dtype: torch.dtype, inside: bool) -> None:
    maml, data = mtml.MAML(net().to(dtype), 0.1, steps=2, loss="mse"), to(values(), BF16)

    def step(data: TaskBatch) -> Tensor:
        with autocast() if inside else nullcontext():
            return maml.meta_loss(data)

    compiled, graphs = whole_graph(step)
    with autocast(BF16 if dtype == F32 or inside else F16) if not inside else nullcontext():
        found, want = compiled(data), step(data)
    assert found.dtype == want.dtype == F32
    torch.testing.assert_close(found, want)
    grads = [flat(torch.autograd.grad(loss.sum(), own(maml))) for loss in (found, want)]
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-2, atol=1e-4)
    assert graphs() == 1
    if dtype == BF16:  # outside of autocast it is another graph, with another result
        outside = torch.compile(lambda data: maml.meta_loss(data), backend="aot_eager", fullgraph=True)(data)
        assert outside.dtype == BF16


def test_under_a_transform_of_torch_func() -> None:
    model, data = net(), values()
    maml = mtml.MAML(model, 0.1, steps=2, loss="mse")
    params = dict(maml.named_parameters())

    def loss(params: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(maml, params, tuple(data[:4]), strict=False).mean()

    maml.forward = maml.meta_loss  # type: ignore[method-assign]
    with autocast():
        grads = torch.func.grad(loss)(params)
    exact = mtml.MAML(copy.deepcopy(model).double(), 0.1, steps=2, loss="mse")
    _, want = meta_gradient(exact, to(data, F64))
    assert {g.dtype for g in grads.values()} == {F32}
    assert error(4 * flat(grads.values()), want) < 4e-2
