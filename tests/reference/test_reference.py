"""The reference inner loop against what it does not share code with: torch.func, finite differences, a plain loop."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases.inner_loop import named_arguments
from cases.program_models import Film, Siren, mlp
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from mtml_kernels.losses import LossSpec
from mtml_kernels.program import Program, trace
from mtml_kernels.reference.inner_loop import Results, inner_loop

T, S, Q = 3, 5, 4


@dataclasses.dataclass
class Problem:
    """A model with the arguments of the inner loop; `run` may override any of them."""

    model: nn.Module
    program: Program
    arguments: dict[str, Any]

    def run(self, **changes: Any) -> Results:
        return inner_loop(named_arguments(**{**self.arguments, **changes}))

    @property
    def params(self) -> list[Tensor]:
        return self.arguments["params"]


def problem(
    model: nn.Module | None = None, kind: str = "mse", steps: int = 2, x: tuple[int, ...] = (2,), **changes: Any
) -> Problem:
    model = (model or nn.Sequential(nn.Linear(2, 6), nn.Tanh(), nn.Linear(6, 3))).double()
    program = trace(model, [x])
    out = program.output_shape
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    codes = LossSpec(kind).encode()

    def target(n: int) -> Tensor:
        if kind == "cross_entropy":
            return torch.randint(0, out[-1], (T, n))
        return torch.randn(T, n, *out, dtype=torch.float64).sigmoid()

    arguments = {
        "params": [tensors[p.name] for p in program.params],
        "adapted": [True] * len(program.params),
        "support_x": [torch.randn(T, S, *x, dtype=torch.float64)],
        "support_y": target(S),
        "query_x": [torch.randn(T, Q, *x, dtype=torch.float64)],
        "query_y": target(Q),
        "support_mask": None,
        "query_mask": None,
        "lr": [torch.tensor([0.1], dtype=torch.float64)],
        "step_weights": None,
        "program": list(program.ints),
        "consts": list(program.consts),
        "steps": steps,
        "support_loss": list(codes[:2]),
        "query_loss": list(codes[:2]),
        "loss_args": [codes[2], codes[2]],
        "first_order": False,
        "keep": 0,
    }
    return Problem(model, program, arguments | changes)


def by_torch_func(
    p: Problem, loss: Callable[[Tensor, Tensor], Tensor], lr: float
) -> Callable[[dict[str, Tensor]], Tensor]:
    """The mean outer loss as a function of the parameters, written with functional_call and torch.func.grad."""
    a = p.arguments

    def task(params: dict[str, Tensor], sx: Tensor, sy: Tensor, qx: Tensor, qy: Tensor) -> Tensor:
        def inner(theta: dict[str, Tensor]) -> Tensor:
            return loss(functional_call(p.model, theta, (sx,)), sy)

        for _ in range(a["steps"]):
            slopes = grad(inner)(params)
            params = {name: params[name] - lr * slopes[name] for name in params}
        return loss(functional_call(p.model, params, (qx,)), qy)

    data = (a["support_x"][0], a["support_y"], a["query_x"][0], a["query_y"])
    return lambda params: vmap(task, (None, 0, 0, 0, 0))(params, *data).mean()


def calm_siren() -> nn.Module:
    """With its frequency of 30 and PyTorch's initialisation a SIREN is chaotic: only rounding would be compared."""
    model = Siren()
    model.w0 = 2.0
    return model


MODELS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "two layers, mse": (lambda: nn.Sequential(nn.Linear(2, 6), nn.Tanh(), nn.Linear(6, 3)), "mse"),
    "relu, cross_entropy": (lambda: mlp(2, 8, 8, 3), "cross_entropy"),
    "siren, huber": (calm_siren, "huber"),
    "film, bce": (Film, "bce_with_logits"),
    "gelu, l1": (lambda: nn.Sequential(nn.Linear(2, 6), nn.GELU(), nn.Linear(6, 3)), "l1"),
}
FUNCTIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mse": F.mse_loss,
    "cross_entropy": F.cross_entropy,
    "huber": F.huber_loss,
    "bce_with_logits": F.binary_cross_entropy_with_logits,
    "l1": F.l1_loss,
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("steps", [0, 1, 3])
def test_meta_gradient_equals_torch_func(name: str, steps: int) -> None:
    make, kind = MODELS[name]
    p = problem(make(), kind, steps)
    params = dict(p.model.named_parameters())
    outer = by_torch_func(p, FUNCTIONS[kind], 0.1)
    detached = {n: v.detach() for n, v in params.items()}
    expected = grad(outer)(detached)
    loss = p.run().loss.mean()
    torch.testing.assert_close(loss, outer(detached))
    found = torch.autograd.grad(loss, list(params.values()))
    torch.testing.assert_close(dict(zip(params, found, strict=True)), expected, rtol=1e-9, atol=1e-11)


def central_differences(loss: Callable[[], Tensor], leaf: Tensor, step: float = 1e-5) -> Tensor:
    """d loss / d leaf, element by element."""
    flat, result = leaf.detach().view(-1), torch.zeros_like(leaf).view(-1)
    for i in range(flat.numel()):
        value, sides = float(flat[i]), []
        for shift in (step, -step):
            flat[i] = value + shift
            sides.append(loss().item())
        flat[i] = value
        result[i] = (sides[0] - sides[1]) / (2 * step)
    return result.view_as(leaf)


@pytest.mark.parametrize("leaf", ["params", "lr", "support_x", "query_x", "support_y", "support_mask", "step_weights"])
def test_gradients_equal_central_differences(leaf: str) -> None:
    """A loss over everything the loop returns, with respect to everything it takes."""
    p = problem(
        support_mask=torch.rand(T, S, dtype=torch.float64),
        lr=[torch.rand(2, dtype=torch.float64) * 0.2],
        step_weights=torch.rand(3, dtype=torch.float64),
        keep=2,
    )
    directions: list[Tensor] = []

    def loss() -> Tensor:
        loss, output, support, adapted = p.run()
        values = [loss, output, support, *adapted]
        if not directions:
            directions.extend(torch.randn_like(v) for v in values)
        return sum(((d * v).sum() for d, v in zip(directions, values, strict=True)), torch.zeros(()))

    found = p.arguments[leaf]
    leaves = found if isinstance(found, list) else [found]
    for tensor in leaves:
        tensor.requires_grad_()
    expected = torch.autograd.grad(loss(), leaves)
    for tensor, gradient in zip(leaves, expected, strict=True):
        torch.testing.assert_close(central_differences(loss, tensor), gradient, rtol=1e-6, atol=1e-8)


def test_first_order_is_another_gradient() -> None:
    """The negative control: a second-order term that went missing would be noticed."""
    p = problem(steps=3)
    exact, first = (torch.autograd.grad(p.run(first_order=f).loss.sum(), p.params) for f in (False, True))
    gap = torch.cat([(a - b).flatten() for a, b in zip(exact, first, strict=True)]).norm()
    assert gap > 1e-2 * torch.cat([a.flatten() for a in exact]).norm()
    torch.testing.assert_close(p.run(first_order=True).loss, p.run().loss)


def test_first_order_gradient_is_that_at_the_adapted_parameters() -> None:
    p = problem(steps=3)
    found = torch.autograd.grad(p.run(first_order=True).loss.sum(), p.params)
    adapted = p.run(keep=1).kept
    expected = [torch.zeros_like(v) for v in p.params]
    for t in range(T):
        theta = [v[t].detach().requires_grad_() for v in adapted]
        names = [info.name for info in p.program.params]
        out = functional_call(p.model, dict(zip(names, theta, strict=True)), (p.arguments["query_x"][0][t],))
        slopes = torch.autograd.grad(F.mse_loss(out, p.arguments["query_y"][t]), theta)
        expected = [e + s for e, s in zip(expected, slopes, strict=True)]
    torch.testing.assert_close(list(found), expected)


def test_first_order_gradient_of_the_rates() -> None:
    """dL/dalpha_k = -g_k . lambda_{k+1}: exact in the last step, where no Hessian follows."""
    p = problem(steps=2, lr=[torch.full((2,), 0.1, dtype=torch.float64, requires_grad=True)])
    exact, first = (torch.autograd.grad(p.run(first_order=f).loss.sum(), p.arguments["lr"])[0] for f in (False, True))
    torch.testing.assert_close(exact[1], first[1])
    assert not torch.allclose(exact[0], first[0])


def expanded_lr(p: Problem, form: str) -> tuple[list[Tensor], list[list[Tensor]]]:
    """Rates in one of the forms, and alpha[k][i] for step k and parameter i, written out."""
    steps = p.arguments["steps"]

    def random(*shape: int) -> Tensor:
        return torch.rand(shape, dtype=torch.float64) * 0.2

    if form == "one":
        lr = [random(1)]
    elif form == "per step":
        lr = [random(steps)]
    elif form == "per tensor":
        lr = [random(1) for _ in p.params]
    elif form == "per tensor and step":
        lr = [random(steps) for _ in p.params]
    elif form == "per element":
        lr = [random(1, *v.shape) for v in p.params]
    elif form == "per element and step":
        lr = [random(steps, *v.shape) for v in p.params]
    else:
        lr = [random(1), random(steps), random(1, *p.params[2].shape), random(steps, *p.params[3].shape)]
    each = lr * len(p.params) if len(lr) == 1 else lr
    return lr, [[rate[k if len(rate) > 1 else 0] for rate in each] for k in range(steps)]


FORMS = ["one", "per step", "per tensor", "per tensor and step", "per element", "per element and step", "mixed"]


@pytest.mark.parametrize("form", FORMS)
def test_forms_of_the_learning_rate(form: str) -> None:
    p = problem(steps=3)
    lr, alpha = expanded_lr(p, form)
    results = p.run(lr=lr, keep=2)
    for t in range(T):
        theta = [v.detach().requires_grad_() for v in p.params]
        for k in range(3):
            names = [info.name for info in p.program.params]
            out = functional_call(p.model, dict(zip(names, theta, strict=True)), (p.arguments["support_x"][0][t],))
            loss = F.mse_loss(out, p.arguments["support_y"][t])
            torch.testing.assert_close(results.support_losses[k, t], loss)
            slopes = torch.autograd.grad(loss, theta)
            theta = [(v - a * g).detach().requires_grad_() for v, a, g in zip(theta, alpha[k], slopes, strict=True)]
            for kept, value in zip(results.kept, theta, strict=True):
                torch.testing.assert_close(kept[k + 1, t], value)


def test_parameters_that_are_not_adapted_stay_but_get_gradients() -> None:
    p = problem(adapted=[False, True, True, False], keep=1)
    results = p.run()
    assert [tuple(a.shape) for a in results.kept] == [(T, 6), (T, 3, 6)]
    grads = torch.autograd.grad(results.loss.sum(), p.params)
    assert all(g.abs().sum() > 0 for g in grads)


def test_buffers_and_frozen_parameters_can_be_adapted() -> None:
    p = problem(keep=1)
    for param in p.params[:2]:
        param.requires_grad_(False)
    results = p.run()
    assert all(not torch.equal(kept[0], param) for kept, param in zip(results.kept, p.params, strict=True))
    assert len(torch.autograd.grad(results.loss.sum(), p.params[2:])) == 2


def test_masks_equal_smaller_tasks() -> None:
    p = problem(kind="cross_entropy")
    mask = torch.tensor([[1, 1, 1, 0, 0]] * T)
    few = {
        "support_x": [p.arguments["support_x"][0][:, :3]],
        "support_y": p.arguments["support_y"][:, :3],
        "query_x": [p.arguments["query_x"][0][:, :2]],
        "query_y": p.arguments["query_y"][:, :2],
    }
    padded = p.run(support_mask=mask, query_mask=mask[:, 1:])
    small = p.run(**few)
    torch.testing.assert_close(padded.loss, small.loss)
    torch.testing.assert_close(padded.output[:, :2], small.output)
    grads = [torch.autograd.grad(r.loss.sum(), p.params) for r in (padded, small)]
    torch.testing.assert_close(*grads)


def test_a_task_without_samples_does_not_move() -> None:
    mask = torch.ones(T, S)
    mask[1] = 0
    p = problem(support_mask=mask, keep=1)
    results = p.run()
    for kept, param in zip(results.kept, p.params, strict=True):
        assert torch.equal(kept[1], param) and not torch.equal(kept[0], param)
    assert results.support_losses[:, 1].abs().sum().item() == 0.0


def test_nan_stays_in_its_task() -> None:
    p = problem(keep=1)
    clean = p.run()
    p.arguments["support_x"][0][1, 0] = float("nan")
    results = p.run()
    assert results.loss[1].isnan() and torch.equal(results.loss[[0, 2]], clean.loss[[0, 2]])


def test_step_weights_weigh_the_query_losses_on_the_way() -> None:
    p = problem(steps=2)
    losses = [p.run(steps=k).loss for k in range(3)]
    weights = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)
    found = p.run(step_weights=weights)
    expected = sum(w * loss for w, loss in zip(weights, losses, strict=True))
    torch.testing.assert_close(found.loss, expected)
    torch.testing.assert_close(found.output, p.run().output)
    grads = [torch.autograd.grad(loss.sum(), p.params) for loss in (found.loss, expected)]
    torch.testing.assert_close(*grads)


def test_shapes_with_and_without_a_query_set() -> None:
    p = problem(steps=2, keep=2)
    for changes, loss, queries in (
        ({}, (T,), Q),
        ({"query_y": None}, (0,), Q),
        ({"query_x": [], "query_y": None}, (0,), 0),
    ):
        results = p.run(**changes)
        assert results.loss.shape == loss and results.output.shape == (T, queries, 3)
        assert results.support_losses.shape == (2, T)
        assert [a.shape[:2] for a in results.kept] == [(3, T)] * 4
    assert p.run(keep=0).kept == []
    assert p.run(steps=0).support_losses.shape == (0, T)


def test_no_tasks() -> None:
    p = problem(keep=2)
    empty = {k: v[:0] for k, v in p.arguments.items() if k in ("support_y", "query_y")}
    lists = {k: [v[0][:0]] for k, v in p.arguments.items() if k in ("support_x", "query_x")}
    results = p.run(**empty, **lists)
    assert results.loss.shape == (0,) and results.support_losses.shape == (2, 0)
    assert results.kept[0].shape == (3, 0, 6, 2)


def test_no_result_aliases_an_argument() -> None:
    p = problem(steps=0, keep=1)
    results = p.run()
    for kept, param in zip(results.kept, p.params, strict=True):
        assert kept.untyped_storage().data_ptr() != param.untyped_storage().data_ptr()
        torch.testing.assert_close(kept, param.expand(T, *param.shape))


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_adapts_without_grad_mode(context: Callable[[], Any]) -> None:
    p = problem(kind="huber", keep=1, support_mask=torch.rand(T, S), step_weights=torch.rand(3))
    expected = p.run()
    with context():
        copies = {k: v.clone() for k, v in p.arguments.items() if isinstance(v, Tensor)}
        lists = {k: [t.clone() for t in p.arguments[k]] for k in ("params", "lr", "support_x", "query_x")}
        found = p.run(**copies, **lists)
    for a, b in zip(
        (found.loss, found.output, *found.kept), (expected.loss, expected.output, *expected.kept), strict=True
    ):
        assert not a.requires_grad
        torch.testing.assert_close(a, b.detach())


@pytest.mark.parametrize("name", ["two layers, mse", "siren, huber"])
def test_differentiable_again(name: str) -> None:
    """The gradient of the meta-gradient: third derivatives of the inner loss."""
    make, kind = MODELS[name]
    p = problem(make(), kind, 1)
    small = [v.detach().clone().mul_(0.3).requires_grad_() for v in p.params]
    assert torch.autograd.gradgradcheck(lambda *params: p.run(params=list(params)).loss.sum(), small, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_dtypes(dtype: torch.dtype) -> None:
    p = problem()
    changes: dict[str, Any] = {
        k: [t.detach().to(dtype) for t in v]
        for k, v in p.arguments.items()
        if k in ("params", "support_x", "query_x", "lr")
    }
    changes |= {k: p.arguments[k].to(dtype) for k in ("support_y", "query_y")}
    loss = p.run(**changes).loss
    assert loss.dtype == dtype
    torch.testing.assert_close(loss.double(), p.run().loss, rtol=0.1, atol=0.02)
