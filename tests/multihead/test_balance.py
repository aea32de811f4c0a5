"""The gradient methods, each against its definition on explicit gradient vectors."""

from __future__ import annotations

import random

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mtml.balance import (
    METHODS,
    aligned_mtl,
    cagrad,
    config,
    dualproj,
    fairgrad,
    imtl_g,
    mgda,
    nash,
    pcgrad,
    upgrad,
)  # fmt: skip

optimize = pytest.importorskip("scipy.optimize")

Array = npt.NDArray[np.float64]


@st.composite
def jacobians(draw: st.DrawFn, full_rank: bool = False) -> Array:
    """Gradients [H, P] of different lengths; conflicts are frequent, repeated rows and P < H happen."""
    h = draw(st.integers(1, 5))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    rows = rng.standard_normal((h, h + 2 if full_rank else draw(st.integers(1, 8))))
    rows += draw(st.sampled_from([0.0, 1.0, -0.3])) * rows[0]
    if h > 2 and not full_rank and draw(st.booleans()):
        rows[-1] = 2 * rows[0]
    return rows * 10.0 ** rng.uniform(-2, 2, (h, 1))


def unit(rows: Array) -> Array:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


@given(jacobians(), st.integers(0, 1000))
def test_pcgrad_projects_one_after_another(j: Array, seed: int) -> None:
    orders = torch.Generator().manual_seed(seed)
    want = np.zeros(j.shape[1])
    for i, g in enumerate(j):
        current = g.copy()
        for k in torch.randperm(len(j), generator=orders).tolist():
            if k != i and current @ j[k] < 0:
                current -= (current @ j[k]) / (j[k] @ j[k]) * j[k]
        want += current
    got = pcgrad(j @ j.T, generator=torch.Generator().manual_seed(seed)) @ j
    # a product that is 0 up to rounding may fall on either side, and then projects next to nothing
    np.testing.assert_allclose(got, want, atol=1e-7 * np.abs(j).max())


def test_pcgrad_of_two() -> None:
    j = np.array([[1.0, 0.0], [-1.0, 1.0]])
    np.testing.assert_allclose(pcgrad(j @ j.T) @ j, [0.5, 1.5])


@given(jacobians())
def test_mgda_meets_the_conditions_of_the_shortest_vector(j: Array) -> None:
    w = mgda(j @ j.T)
    assert (w >= 0).all() and w.sum() == pytest.approx(1)
    d = w @ j
    # <g_h, d> >= |d|^2 for every h, with equality where w_h > 0
    slack = j @ d - d @ d
    scale = np.abs(j @ j.T).max()
    assert (slack >= -1e-9 * scale).all()
    assert np.abs(w * slack).max() <= 1e-9 * scale


@given(jacobians())
def test_mgda_of_two_has_a_closed_form(j: Array) -> None:
    a, b = j[0], j[-1] if len(j) > 1 else -j[0] + 1
    difference = (a - b) @ (a - b)
    first = 0.5 if difference == 0 else np.clip((b - a) @ b / difference, 0, 1)
    w = mgda(np.stack([a, b]) @ np.stack([a, b]).T)
    np.testing.assert_allclose(w @ np.stack([a, b]), first * a + (1 - first) * b, atol=1e-6 * np.abs(j).max())


@given(jacobians(full_rank=True), st.sampled_from([0.0, 0.2, 0.4, 0.9]))
def test_cagrad_finds_the_best_worst_case(j: Array, c: float) -> None:
    j = unit(j) * np.linspace(1, 3, len(j))[:, None]
    mean = j.mean(0)
    radius = c * np.linalg.norm(mean)
    d = cagrad(j @ j.T, c=c) @ j
    assert np.linalg.norm(d - mean) <= radius * (1 + 1e-6) + 1e-12
    # the definition, over d itself and the worst product t: max t with <g_i, d> >= t within the ball
    constraints = [
        {"type": "ineq", "fun": lambda x: j @ x[:-1] - x[-1]},
        {"type": "ineq", "fun": lambda x: radius**2 - (x[:-1] - mean) @ (x[:-1] - mean)},
    ]
    start = np.append(mean, (j @ mean).min())
    found = optimize.minimize(lambda x: -x[-1], start, constraints=constraints, options={"ftol": 1e-12, "maxiter": 500})
    assert (j @ d).min() >= -found.fun - 1e-4 * np.abs(j @ j.T).max()


@given(jacobians(full_rank=True))
def test_imtl_g_projects_equally(j: Array) -> None:
    w = imtl_g(j @ j.T)
    projections = unit(j) @ (w @ j)
    assert w.sum() == pytest.approx(1)
    np.testing.assert_allclose(projections, projections[0], rtol=1e-6, atol=1e-8 * np.abs(w).max() * np.abs(j).max())


@given(jacobians())
def test_upgrad_is_the_mean_projection_and_conflicts_with_none(j: Array) -> None:
    d = upgrad(j @ j.T) @ j
    scale = np.abs(j).max()
    # the projection onto {d: J d >= 0} is g + J' l with the l >= 0 of least |g + J' l|
    want = np.mean([g + j.T @ optimize.nnls(j.T, -g, maxiter=1000)[0] for g in j], axis=0)
    np.testing.assert_allclose(d, want, atol=1e-6 * scale)
    assert (unit(j) @ d >= -1e-6 * scale).all()


@given(jacobians(full_rank=True))
def test_upgrad_is_the_mean_where_none_conflicts(j: Array) -> None:
    j = np.abs(j)
    np.testing.assert_allclose(upgrad(j @ j.T), 1 / len(j))


@given(jacobians())
def test_aligned_mtl_makes_all_singular_values_the_smallest(j: Array) -> None:
    j = unit(j)
    u, s, v = np.linalg.svd(j, full_matrices=False)
    rank = int((s**2 > s[0] ** 2 * len(j) * np.finfo(np.float32).eps).sum())
    want = (s[rank - 1] * u[:, :rank] @ v[:rank]).mean(0)
    np.testing.assert_allclose(aligned_mtl(j @ j.T) @ j, want, atol=1e-6)


@given(jacobians())
def test_dualproj_is_the_mean_s_projection(j: Array) -> None:
    j = unit(j) * np.linspace(1, 3, len(j))[:, None]
    mean, d = j.mean(0), dualproj(j @ j.T) @ j
    # the projection onto {d: J d >= 0} is g + J' l with the l >= 0 of least |g + J' l|
    np.testing.assert_allclose(d, mean + j.T @ optimize.nnls(j.T, -mean, maxiter=1000)[0], atol=1e-6)
    assert (j @ d >= -1e-6).all()


@given(jacobians(full_rank=True))
def test_dualproj_is_the_mean_where_none_conflicts(j: Array) -> None:
    np.testing.assert_allclose(dualproj(np.abs(j) @ np.abs(j).T), 1 / len(j))


@given(jacobians(full_rank=True))
def test_config_has_one_angle_with_all_gradients(j: Array) -> None:
    units = unit(j)
    d = config(j @ j.T) @ j
    length = np.linalg.norm(d)
    cosines = units @ d / length
    np.testing.assert_allclose(cosines, cosines[0], rtol=1e-5)
    assert cosines[0] > 0
    np.testing.assert_allclose(length, (j @ d).sum() / length, rtol=1e-6)
    direction = np.linalg.pinv(units) @ np.ones(len(j))  # the paper's formula
    np.testing.assert_allclose(d / length, direction / np.linalg.norm(direction), atol=1e-6)


@pytest.mark.parametrize("alpha", [0.5, 0.7, 1.0, 2.0, 5.0, 10.0])
@given(jacobians(full_rank=True))
def test_fairgrad_meets_its_equation(alpha: float, j: Array) -> None:
    gram = j @ j.T
    w = fairgrad(gram, alpha=alpha)
    assert (w > 0).all()
    np.testing.assert_allclose(gram @ w, w ** (-1 / alpha), rtol=1e-6)


@given(jacobians(full_rank=True))
def test_nash_is_the_bargain(j: Array) -> None:
    w = nash(j @ j.T)
    d = w @ j
    np.testing.assert_allclose(w, fairgrad(j @ j.T, alpha=1.0), rtol=1e-9)
    assert np.linalg.norm(d) == pytest.approx(np.sqrt(len(j)))
    # of all d of this length it is the one with the largest product of the gains <g_i, d>
    rng, gains = np.random.default_rng(0), unit(j) @ d
    for size in (1e-4, 1e-2, 1.0):
        other = d + size * rng.standard_normal(len(d))
        others = unit(j) @ (other * np.linalg.norm(d) / np.linalg.norm(other))
        assert (others <= 0).any() or np.log(others).sum() <= np.log(gains).sum() + 1e-9


@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.0, 10.0])
def test_fairgrad_agrees_with_a_general_solver(alpha: float) -> None:
    for seed in range(20):
        j = np.random.default_rng(seed).standard_normal((4, 9)) - 0.2
        gram = j @ j.T

        def residual(w: Array, gram: Array = gram) -> Array:
            return gram @ w - w ** (-1 / alpha)

        found = optimize.least_squares(residual, np.full(4, 0.25), bounds=(0, np.inf), xtol=1e-14, ftol=1e-14)
        np.testing.assert_allclose(fairgrad(gram, alpha=alpha), found.x, rtol=1e-5)


@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.0, 10.0])
def test_fairgrad_stops_where_gradients_cancel(alpha: float) -> None:
    rng = np.random.default_rng(1)
    for dtype in (np.float64, np.float32):
        j = rng.standard_normal((3, 50)).astype(dtype)
        j[2] = -(2 * j[0] + 0.1 * j[1])  # in float32 up to rounding
        assert not fairgrad((j @ j.T).astype(np.float64), alpha=alpha).any()
        repeated = np.stack([j[0], j[0], j[1]])  # linearly dependent, and yet all can fall
        gram = (repeated @ repeated.T).astype(np.float64)
        w = fairgrad(gram, alpha=alpha)
        np.testing.assert_allclose(gram @ w, w ** (-1 / alpha), rtol=1e-4)


def test_fairgrad_alpha() -> None:
    for alpha in (0.0, 0.4, 11.0, float("nan")):
        with pytest.raises(ValueError, match=rf"alpha: expected in \[0.5, 10\], got {alpha}"):
            fairgrad(np.eye(2), alpha=alpha)


@pytest.mark.parametrize("name", [name for name in METHODS if name != "pcgrad"])  # which draws by place
@settings(max_examples=10)
@given(jacobians(full_rank=True), st.randoms())
def test_the_losses_order_does_not_matter(name: str, j: Array, draws: random.Random) -> None:
    order = draws.sample(range(len(j)), len(j))
    j = unit(j)
    want = METHODS[name](j @ j.T) @ j
    np.testing.assert_allclose(METHODS[name](j[order] @ j[order].T) @ j[order], want, atol=1e-5)


@given(jacobians(full_rank=True), st.sampled_from([1e-12, 1e-3, 1e12]), st.sampled_from([0.5, 1.0, 2.0, 10.0]))
def test_fairgrad_under_another_scale(j: Array, scale: float, alpha: float) -> None:
    want = fairgrad(j @ j.T, alpha=alpha) * scale ** (-alpha / (1 + alpha))
    np.testing.assert_allclose(fairgrad(scale * (j @ j.T), alpha=alpha), want, rtol=1e-6)


@pytest.mark.parametrize("name", [name for name in METHODS if name not in ("fairgrad", "nash")])
@given(jacobians(full_rank=True), st.sampled_from([1e-12, 1e12]))
def test_the_gradients_scale_does_not_matter(name: str, j: Array, scale: float) -> None:
    j, options = unit(j), {"generator": torch.Generator().manual_seed(0)} if name == "pcgrad" else {}
    want = METHODS[name](j @ j.T, **options)
    if options:
        options["generator"].manual_seed(0)
    np.testing.assert_allclose(METHODS[name](scale * (j @ j.T), **options) @ j, want @ j, atol=1e-5)


@pytest.mark.parametrize("name", METHODS)
def test_a_single_loss_keeps_its_direction(name: str) -> None:
    # CAGrad goes to the rim of its ball; 9 w = 1 / w, and 9 w = w^(-1 / 2)
    want = {"cagrad": 1.4, "nash": 1 / 3, "fairgrad": 9 ** (-2 / 3)}.get(name, 1.0)
    np.testing.assert_allclose(METHODS[name](np.array([[9.0]])), [want])


@pytest.mark.parametrize("name", METHODS)
def test_opposite_gradients_cancel(name: str) -> None:
    j = np.array([[1.0, 2.0], [-1.0, -2.0]])
    w = METHODS[name](j @ j.T)
    assert np.isfinite(w).all()
    np.testing.assert_allclose(w @ j, 0, atol=1e-6)


def test_cagrad_radius() -> None:
    with pytest.raises(ValueError, match=r"c: expected in \[0, 1\), got 1.5"):
        cagrad(np.eye(2), c=1.5)


def test_an_independent_library_agrees() -> None:
    torchjd = pytest.importorskip("torchjd.aggregation")
    exact = pytest.importorskip("torchjd.linalg").QuadprogProjector(norm_eps=1e-12, reg_eps=1e-12)
    for seed in range(20):
        j = np.random.default_rng(seed).standard_normal((4, 9)) - 0.2
        matrix = torch.from_numpy(j)
        theirs = {  # its MGDA is Frank-Wolfe, which comes near slowly
            "aligned_mtl": torchjd.AlignedMTL(),
            "config": torchjd.ConFIG(),
            "dualproj": torchjd.DualProj(projector=exact),
            "fairgrad": torchjd.FairGrad(alpha=2.0),
            "imtl_g": torchjd.IMTLG(),
            "mgda": torchjd.MGDA(epsilon=1e-9, max_iters=2000),
            "upgrad": torchjd.UPGrad(projector=exact),
        }
        for name, aggregator in theirs.items():
            want = aggregator(matrix).numpy()
            np.testing.assert_allclose(METHODS[name](j @ j.T) @ j, want, atol=2e-2 if name == "mgda" else 1e-5)
        two = j[:2]  # with two losses PCGrad knows no order
        np.testing.assert_allclose(pcgrad(two @ two.T) @ two, torchjd.PCGrad()(matrix[:2]).numpy(), atol=1e-9)
