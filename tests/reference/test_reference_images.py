"""Convolution, pooling and normalisation of the reference against torch.func, finite differences and PyTorch's own."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from cases.conv_models import conv4, resnet12
from cases.inner_loop import named_arguments
from torch import Tensor, nn
from torch.func import functional_call

from mtml_kernels.batch_norm import PerStepBatchNorm
from mtml_kernels.losses import LossSpec
from mtml_kernels.program import Norm, Pool, Program, trace
from mtml_kernels.program.layers.conv import convolve
from mtml_kernels.program.layers.norm import normalise
from mtml_kernels.program.layers.pool import pool
from mtml_kernels.reference.inner_loop import Results, inner_loop

T, S, Q = 2, 6, 5


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def window(*numbers: int) -> list[float]:
    return [float(n) for n in numbers]


def rows(image: Tensor) -> Tensor:
    return image.flatten(2).transpose(1, 2)


# The operations


def test_a_window_may_begin_outside_and_end_anywhere() -> None:
    """Padding above and left is a number; what is needed below and right follows from the output's size."""
    image, weight, bias = random(2, 3, 5, 4), random(4, 3, 2, 3), random(4)
    for out, around in (((6, 6), (2, 2, 1, 1)), ((5, 3), (2, -1, 1, 0)), ((3, 2), (2, -2, 1, -2))):
        expected = F.conv2d(F.pad(image, around), weight, bias)
        found = convolve(rows(image), weight, bias, window(5, 4, *out, 2, 3, 1, 1, 1, 2, 1, 1, 1))
        torch.testing.assert_close(found, rows(expected))


def test_max_pool_takes_nothing_from_its_padding() -> None:
    image = -1.0 - torch.rand(2, 3, 4, 5, dtype=torch.float64)
    found = pool(Pool.MAX, rows(image), window(4, 5, 3, 3, 3, 3, 2, 2, 1, 1, 1, 1, 0))
    torch.testing.assert_close(found, rows(F.max_pool2d(image, 3, 2, 1, ceil_mode=True)))
    assert found.max() < 0


def test_nan_stays_in_its_windows() -> None:
    image = random(1, 1, 4, 4)
    image[0, 0, 0, 0] = torch.nan
    found = pool(Pool.MAX, rows(image), window(4, 4, 2, 2, 2, 2, 2, 2, 0, 0, 1, 1, 0))
    assert found.isnan().flatten().tolist() == [True, False, False, False]


WINDOWS: dict[str, Callable[[Tensor], Tensor]] = {
    "conv": lambda x: convolve(
        x, x[0, :6, :4].reshape(4, 2, 3, 1), None, window(4, 5, 2, 3, 3, 1, 1, 2, 0, 0, 1, 1, 2)
    ),
    "max": lambda x: pool(Pool.MAX, x, window(4, 5, 2, 3, 3, 2, 2, 2, 1, 0, 1, 1, 0)),
    "avg": lambda x: pool(Pool.AVG, x, window(4, 5, 3, 3, 2, 2, 2, 2, 1, 0, 1, 1, -1)),
    "adaptive": lambda x: pool(Pool.ADAPTIVE_AVG, x, window(4, 5, 3, 2, 1, 1, 1, 1, 0, 0, 1, 1, 0)),
    "batch": lambda x: normalise(Norm.BATCH, x, 1e-2, 1, x[0, 0], x[0, 1]),
    "group": lambda x: normalise(Norm.GROUP, x, 1e-2, 2, None, x[0, 1]),
    "layer": lambda x: normalise(Norm.LAYER, x, 1e-1, 1, x[0, 0], None),
}


@pytest.mark.parametrize("name", WINDOWS)
def test_derivatives(name: str) -> None:
    x = random(2, 20, 4).requires_grad_()
    assert torch.autograd.gradcheck(WINDOWS[name], (x,), fast_mode=True)
    assert torch.autograd.gradgradcheck(WINDOWS[name], (x,), fast_mode=True)


def test_third_derivatives_of_normalisation() -> None:
    x = random(3, 4, 2).requires_grad_()
    out = normalise(Norm.BATCH, x, 1e-3, 1).pow(3).sum()
    for _ in range(3):
        out = torch.autograd.grad(out, x, create_graph=True)[0].pow(2).sum()
    assert out.isfinite()


# The inner loop


def arguments(
    model: nn.Module, shape: tuple[int, ...], steps: int, program: Program | None = None
) -> dict[str, object]:
    program = program or trace(model, [shape])
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    codes = LossSpec("cross_entropy").encode()
    frozen = {n + "." for n, m in model.named_modules() if isinstance(m, PerStepBatchNorm)}
    return {
        "params": [tensors[p.name] for p in program.params],
        "adapted": [not any(p.name.startswith(prefix) for prefix in frozen) for p in program.params],
        "support_x": [random(T, S, *shape)],
        "support_y": torch.randint(0, 5, (T, S)),
        "query_x": [random(T, Q, *shape)],
        "query_y": torch.randint(0, 5, (T, Q)),
        "support_mask": None,
        "query_mask": None,
        "lr": [torch.tensor([0.1], dtype=torch.float64)],
        "step_weights": None,
        "program": program.ints,
        "consts": program.consts,
        "steps": steps,
        "support_loss": codes[:2],
        "query_loss": codes[:2],
        "loss_args": [codes[2], codes[2]],
        "first_order": False,
        "keep": 0,
    }


def run(given: dict[str, object]) -> Results:
    return inner_loop(named_arguments(**given))  # type: ignore[arg-type]


def plain_loss(
    model: nn.Module, given: dict[str, object], theta: dict[str, Tensor], at: Callable[[int, bool], dict[str, Tensor]]
) -> Tensor:
    """The outer losses [T], with sum of w_k = k + 1 where there are step weights, by torch.autograd on the module."""
    sx, sy, qx, qy = (given[name] for name in ("support_x", "support_y", "query_x", "query_y"))
    steps, weights = given["steps"], given["step_weights"]
    assert isinstance(sx, list) and isinstance(qx, list) and isinstance(steps, int)
    losses = []
    for t in range(T):
        fast, total = theta, torch.zeros((), dtype=torch.float64)
        for k in range(steps + 1):
            if weights is not None or k == steps:
                query = F.cross_entropy(functional_call(model, {**fast, **at(k, True)}, (qx[0][t],)), qy[t])  # type: ignore[index]
                total = total + query * (1 if weights is None else k + 1)
            if k < steps:
                loss = F.cross_entropy(functional_call(model, {**fast, **at(k, False)}, (sx[0][t],)), sy[t])  # type: ignore[index]
                grads = torch.autograd.grad(loss, list(fast.values()), create_graph=True)
                fast = {n: p - 0.1 * g for (n, p), g in zip(fast.items(), grads, strict=True)}
        losses.append(total)
    return torch.stack(losses)


NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "conv4": (lambda: conv4(2, 4, track_running_stats=False), (2, 16, 16)),
    "conv4, strided": (lambda: conv4(1, 4, pooled=False, size=32, eps=1e-3), (1, 32, 32)),
    "resnet-12": (lambda: resnet12(2, 3, 3, 4), (3, 16, 16)),
}


@pytest.mark.parametrize("name", NETS)
def test_meta_gradient_of_networks(name: str) -> None:
    make, shape = NETS[name]
    model = make().double()
    given = arguments(model, shape, 2)
    theta = dict(model.named_parameters())
    for module in model.modules():  # the plain loop must not update what it shares
        if isinstance(module, nn.BatchNorm2d):
            module.track_running_stats = False
    expected, found = plain_loss(model, given, theta, lambda k, query: {}), run(given).loss
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)
    grads = [torch.autograd.grad(loss.sum(), list(theta.values())) for loss in (found, expected)]
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("steps", [0, 1, 2, 4])
@pytest.mark.parametrize("each_step", [False, True])
def test_rows_of_the_steps(steps: int, each_step: bool) -> None:
    """Support step k reads row min(k, K-1); a query pass after k updates reads row min(max(k-1, 0), K-1); K = 3."""
    norm = PerStepBatchNorm(3, steps=3)
    plain = nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3, track_running_stats=False), nn.Flatten(), nn.Linear(12, 5)
    )
    for parameter in norm.parameters():
        nn.init.normal_(parameter)
    model = nn.Sequential(plain[0], norm, plain[2], plain[3]).double()
    plain.double()
    given = arguments(model, (1, 4, 4), steps)
    if each_step:
        given["step_weights"] = torch.arange(1, steps + 2, dtype=torch.float64)

    def row(k: int, query: bool) -> dict[str, Tensor]:
        at = min(max(k - 1, 0) if query else k, 2)
        return {"1.weight": norm.weight[at], "1.bias": norm.bias[at]}

    theta = {n: p for n, p in plain.named_parameters() if not n.startswith("1.")}
    expected, found = plain_loss(plain, given, theta, row), run(given).loss
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    leaves = list(model.parameters())
    grads = [torch.autograd.grad(loss.sum(), leaves, materialize_grads=True) for loss in (found, expected)]
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-8, atol=1e-10)
