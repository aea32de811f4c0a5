"""GradVac and MoDo, which remember, against their papers' formulas on explicit gradient vectors."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mtml.balance import GradVac, MoDo, backward, pcgrad

Array = npt.NDArray[np.float64]


def drawn(seed: int, h: int = 3, p: int = 7) -> Array:
    rng = np.random.default_rng(seed)
    return rng.standard_normal((h, p)) + 0.3 * rng.standard_normal(p)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def step(method: Any, j: Array, **options: Any) -> tuple[Tensor, Tensor]:
    """The weights, and the update, of gradients j."""
    x = torch.zeros(j.shape[1], dtype=torch.float64, requires_grad=True)
    weights = backward(torch.from_numpy(j) @ x, method=method, shared=x, **options).weights
    assert x.grad is not None
    return weights, x.grad


def test_gradvac_is_wangs() -> None:
    """Five calls beside the algorithm as the paper writes it, on vectors."""
    method, orders, beta = GradVac(4, 0.3, generator=seeded()), seeded(), 0.3
    averages, turned = np.zeros((4, 4)), 0
    for seed in range(5):
        j = drawn(seed, 4)
        current = j.copy()
        for i in range(4):
            for k in torch.randperm(4, generator=orders).tolist():
                if k == i:
                    continue
                own, other = np.linalg.norm(current[i]), np.linalg.norm(j[k])
                cosine, aim = current[i] @ j[k] / (own * other), averages[i, k]
                if cosine < aim:
                    numerator = aim * np.sqrt(1 - cosine**2) - cosine * np.sqrt(1 - aim**2)
                    current[i] += own * numerator / (other * np.sqrt(1 - aim**2)) * j[k]
                    assert current[i] @ j[k] == pytest.approx(aim * np.linalg.norm(current[i]) * other)
                    turned += aim != 0
                averages[i, k] = (1 - beta) * aim + beta * cosine
        np.testing.assert_allclose(step(method, j)[1], current.sum(0), rtol=1e-9)
        np.testing.assert_allclose(method.cosines, averages, atol=1e-12)
    assert turned > 10


def test_gradvac_without_memory_is_pcgrad() -> None:
    for seed in range(10):
        j = drawn(seed)
        weights, _ = step(GradVac(3, 0.0, generator=seeded()), j)
        np.testing.assert_allclose(weights, pcgrad(j @ j.T, generator=seeded()), atol=1e-12)


@given(st.integers(0, 1000), st.sampled_from([1e-12, 1e12]))
def test_gradvac_knows_no_scale(seed: int, scale: float) -> None:
    first, second = GradVac(3, 0.5, generator=seeded()), GradVac(3, 0.5, generator=seeded())
    for i in range(3):
        j = drawn(seed + i)
        np.testing.assert_allclose(first.weigh(j @ j.T), second.weigh(scale * (j @ j.T)), rtol=1e-6)


@pytest.mark.parametrize("turn", [1.0, -1.0])
def test_gradvac_of_parallel_gradients(turn: float) -> None:
    method, g = GradVac(2, 1.0), np.array([1.0, 2.0])
    for _ in range(3):
        weights, update = step(method, np.stack([g, 3 * turn * g]))
        assert weights.isfinite().all()
    # cosines of 1 leave all as it is; opposite ones cancel once, and then are what is usual
    np.testing.assert_allclose(update, (1 + 3 * turn) * g, atol=1e-9)
    weights, _ = step(method, np.array([[1.0, 0.0], [0.0, 1.0]]))  # far from an average of 1
    assert weights.isfinite().all()


def modo_weights(batches: list[tuple[Array, Array]], gamma: float, rho: float) -> Array:
    optimize = pytest.importorskip("scipy.optimize")
    w = np.full(len(batches[0][0]), 1 / len(batches[0][0]))
    simplex = {"type": "eq", "fun": lambda u: u.sum() - 1}
    for first, second in batches:
        point = w - gamma * (first @ (second.T @ w) + rho * w)
        found = optimize.minimize(
            lambda u, point=point: ((u - point) ** 2).sum(), w, jac=lambda u, point=point: 2 * (u - point),
            bounds=[(0, 1)] * len(w), constraints=simplex, method="SLSQP", options={"ftol": 1e-15},
        )  # fmt: skip
        w = found.x
    return w


def modo_update(method: MoDo, first: Array, second: Array) -> None:
    x = torch.zeros(first.shape[1], dtype=torch.float64, requires_grad=True)
    method.update(torch.from_numpy(first) @ x, torch.from_numpy(second) @ x, shared=x)


@pytest.mark.parametrize(("gamma", "rho"), [(0.01, 0.0), (0.1, 0.5), (1.0, 0.0)])
def test_modo_is_chens(gamma: float, rho: float) -> None:
    method, batches = MoDo(4, gamma, rho), [(drawn(2 * i, 4), drawn(2 * i + 1, 4)) for i in range(6)]
    for i, batch in enumerate(batches):
        modo_update(method, *batch)
        want = modo_weights(batches[: i + 1], gamma, rho)
        np.testing.assert_allclose(method.weights, want, atol=1e-6)
        j = drawn(100 + i, 4)
        weights, update = step(method, j)
        np.testing.assert_allclose(weights, want, atol=1e-6)
        np.testing.assert_allclose(update, weights.numpy() @ j)
    assert method.weights.sum().item() == pytest.approx(1) and (method.weights >= 0).all()


def test_modo_of_one_batch_comes_to_the_shortest_vector() -> None:
    j = drawn(5, 3)
    j /= np.linalg.norm(j, axis=1, keepdims=True)
    method = MoDo(3, 0.5)
    for _ in range(200):
        modo_update(method, j, j)
    d = method.weights.numpy() @ j
    slack = j @ d - d @ d  # as of MGDA: at least 0, and 0 where the weight is above
    assert (slack >= -1e-6).all() and np.abs(method.weights.numpy() * slack).max() <= 1e-6


@pytest.mark.parametrize("make", [lambda: GradVac(3, 0.4), lambda: MoDo(3)])
def test_an_absent_loss_takes_no_part(make: Callable[[], Any]) -> None:
    method, j = make(), drawn(0)
    for seed in range(3):
        if isinstance(method, MoDo):
            modo_update(method, drawn(seed), drawn(seed + 10))
        step(method, drawn(seed))
    before = copy.deepcopy(method.state_dict())
    j[1] = 0
    if isinstance(method, MoDo):
        modo_update(method, j, drawn(7))
    weights, _ = step(method, j)
    assert weights[1] == 0 and weights[0] != 0
    name = "cosines" if isinstance(method, GradVac) else "weights"
    now, then = method.state_dict()[name], before[name]
    assert torch.equal(now[1], then[1]) and not torch.equal(now[0], then[0])
    assert now[:, 1].equal(then[:, 1]) if isinstance(method, GradVac) else now.sum().item() == pytest.approx(1)


@pytest.mark.parametrize("make", [lambda: GradVac(3, 0.4, generator=seeded()), lambda: MoDo(3)])
def test_state_and_reset(make: Callable[[], Any]) -> None:
    def run(method: Any, seeds: range) -> list[Tensor]:
        found = []
        for seed in seeds:
            if isinstance(method, MoDo):
                modo_update(method, drawn(seed), drawn(seed + 10))
            elif method.generator is not None:
                method.generator.manual_seed(seed)
            found.append(step(method, drawn(seed))[0])
        return found

    first, second, fresh = make(), make(), make()
    start = run(first, range(3))
    second.load_state_dict(first.state_dict())
    torch.testing.assert_close(run(first, range(3, 6)), run(second, range(3, 6)), rtol=0, atol=0)
    assert not torch.equal(run(fresh, range(5, 6))[0], run(second, range(5, 6))[0])
    first.reset()
    torch.testing.assert_close(run(first, range(3)), start, rtol=0, atol=0)
    assert {value.device.type for value in first.to("meta").state_dict().values()} == {"meta"}


@pytest.mark.parametrize("make", [lambda: GradVac(3), lambda: MoDo(3)])
def test_gradients_that_are_not_finite_are_seen_and_not_remembered(make: Callable[[], Any]) -> None:
    method, j = make(), drawn(0)
    if isinstance(method, MoDo):
        modo_update(method, drawn(1), drawn(2))
    before = copy.deepcopy(method.state_dict())
    j[0, 0] = np.nan
    if isinstance(method, MoDo):
        modo_update(method, j, drawn(2))
        before["updates"] += 1
    weights, update = step(method, j)
    assert weights.isnan().all() and update.isnan().all()
    torch.testing.assert_close(method.state_dict(), before, rtol=0, atol=0)


def test_modo_over_two_batches_of_a_network() -> None:
    torch.manual_seed(0)
    trunk = torch.nn.Linear(4, 3)

    def losses() -> list[Tensor]:
        features = trunk(torch.randn(6, 4))
        return [features.square().mean(), features.sin().mean()]

    first, second, method = losses(), losses(), MoDo(2, 0.1)
    parameters = list(trunk.parameters())
    rows = [
        [torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters, retain_graph=True)]) for loss in batch]
        for batch in (first, second)
    ]
    left, right = (torch.stack(row).double() for row in rows)
    method.update(first, second, shared=trunk.parameters())
    moved = 0.5 - 0.1 * (left @ (right.T @ torch.full((2,), 0.5, dtype=torch.float64)))
    torch.testing.assert_close(method.weights, moved + (1 - moved.sum()) / 2)
    backward([(a + b) / 2 for a, b in zip(first, second, strict=True)], method=method, shared=trunk.parameters())
    want = (method.weights @ (left + right) / 2).float()
    torch.testing.assert_close(torch.cat([p.grad.flatten() for p in parameters]), want)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda j: step("gradvac", j), ValueError, r"method: expected an object .* mtml\.balance\.GradVac\(H\)"),
        (lambda j: step("modo", j), ValueError, r"mtml\.balance\.MoDo\(H\)"),
        (lambda j: step(MoDo(3), j), RuntimeError, r"expected a MoDo that has seen two batches.*update\(first, second"),
        (lambda j: step(GradVac(2), j), ValueError, "expected 2 losses, as this GradVac was made for, got 3"),
        (lambda j: modo_update(MoDo(2), j, j), ValueError, "expected 2 losses, as this MoDo was made for, got 3"),
        (lambda j: step(GradVac(3), j, beta=0.5), TypeError, "beta: expected no options beside a GradVac"),
        (lambda j: GradVac(3, 1.5), ValueError, r"beta: expected in \[0, 1\], got 1\.5"),
        (lambda j: MoDo(3, 0.0), ValueError, "gamma: expected above 0"),
        (lambda j: MoDo(3, rho=-1.0), ValueError, "rho: expected at least 0"),
        (lambda j: MoDo(0), ValueError, "losses: expected their number, at least 1"),
        (lambda j: MoDo(3).update([], [], shared=None), ValueError, "shared|losses: expected at least one"),
    ],
)
def test_bad_input(call: Callable[[Array], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call(drawn(0))


def test_an_independent_library_agrees() -> None:
    torchjd = pytest.importorskip("torchjd.aggregation")
    modo, theirs = MoDo(4, 0.1, 0.1), torchjd.MoDoWeighting(gamma=0.1, rho=0.1)
    vaccine, their_vaccine = GradVac(2, 0.5), torchjd.GradVac(beta=0.5)  # of two losses, which have but one order
    for seed in range(10):
        first, second = drawn(seed, 4), drawn(seed + 50, 4)
        modo_update(modo, first, second)
        np.testing.assert_allclose(modo.weights, theirs(torch.from_numpy(first @ second.T)), atol=1e-9)
        want = their_vaccine(torch.from_numpy(first[:2]))
        np.testing.assert_allclose(step(vaccine, first[:2])[1], want, atol=1e-6)
