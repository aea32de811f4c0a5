"""Loss weightings, each against its published formula written out."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import mtml
import mtml_kernels
from mtml.weighting import COSMOS, DWA, FAMO, GLS, IMTLL, RLW, STCH, Fixed, GradNorm, Uncertainty, Weighting

HEADS = {"a": mtml.Classification(3), "b": mtml.Regression(2), "c": mtml.MultiLabel(4)}
ALL = torch.ones(3, dtype=torch.bool)
NAMED = ("sum", "uncertainty", "dwa", "gls", "rlw", "gradnorm", "famo", "stch", "imtl_l", "cosmos")


def bound(weighting: Weighting) -> Weighting:
    weighting.bind(HEADS)
    return weighting


def losses(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float32, requires_grad=True)


def batch(*absent: str) -> tuple[Tensor, dict[str, Tensor]]:
    targets = {"a": torch.randint(3, (6,)), "b": torch.randn(6, 2), "c": torch.rand(6, 4)}
    return torch.randn(6, 5), {name: y for name, y in targets.items() if name not in absent}


def test_fixed() -> None:
    assert bound(Fixed())(losses(1, 2, 3), ALL).item() == 6
    assert bound(Fixed({"b": 0.5, "c": 0.0}))(losses(1, 2, 3), ALL).item() == 2


def test_uncertainty_is_kendalls() -> None:
    weighting = bound(Uncertainty(0.3))
    with torch.no_grad():
        weighting.log_vars.copy_(torch.tensor([0.5, -0.2, 0.1]))
    each = losses(1.0, 2.0, 3.0)
    total = weighting(each, ALL)
    # classification L / sigma^2 + log sigma, regression L / (2 sigma^2) + log sigma
    sigma = [math.exp(s / 2) for s in (0.5, -0.2, 0.1)]
    want = [
        each[0].item() / sigma[0] ** 2 + math.log(sigma[0]),
        each[1].item() / (2 * sigma[1] ** 2) + math.log(sigma[1]),
        each[2].item() / sigma[2] ** 2 + math.log(sigma[2]),
    ]
    torch.testing.assert_close(total.item(), sum(want), rtol=1e-6, atol=0)
    total.backward()
    torch.testing.assert_close(each.grad, torch.tensor([1 / sigma[0] ** 2, 0.5 / sigma[1] ** 2, 1 / sigma[2] ** 2]))
    slopes = [0.5 - each[0].item() / sigma[0] ** 2, 0.5 - each[1].item() / (2 * sigma[1] ** 2), 0.5 - 3 / sigma[2] ** 2]
    torch.testing.assert_close(weighting.log_vars.grad, torch.tensor(slopes))


def test_uncertainty_is_a_likelihood_whichever_way_its_square_is_written() -> None:
    torch.manual_seed(0)
    mean, y, s = torch.randn(40, 1), torch.randn(40, 1), 0.7
    kinds = {"mse": mean, "huber": mean, "gaussian_nll": torch.cat([mean, torch.zeros(40, 1)], 1)}
    likelihood = -torch.distributions.Normal(mean, math.exp(s / 2)).log_prob(y).mean() - math.log(2 * math.pi) / 2
    for loss, prediction in kinds.items():
        head = mtml.Regression(1, loss=loss, delta=1e6 if loss == "huber" else 1.0)  # never linear
        weighting = Uncertainty(s)
        weighting.bind({loss: head})
        found = weighting(mtml_kernels.multihead_loss([prediction], [y], [head.spec])[0].reshape(1), ALL[:1])
        torch.testing.assert_close(found, likelihood, rtol=1e-5, atol=1e-6)


def test_dwa_follows_the_epochs_means() -> None:
    weighting = bound(DWA(temperature=2.0))
    epochs = [[(4.0, 1.0, 2.0), (2.0, 1.0, 4.0)], [(1.0, 1.0, 1.0), (2.0, 1.0, 2.0)], [(1.0, 0.5, 1.0)]]
    means: list[list[float]] = []
    for epoch in epochs:
        if len(means) < 2:
            want = [1.0, 1.0, 1.0]
        else:
            powers = [math.exp(now / before / 2.0) for now, before in zip(means[-1], means[-2], strict=True)]
            want = [3 * p / sum(powers) for p in powers]
        for values in epoch:
            each = losses(*values)
            weighting(each, ALL).backward()
            torch.testing.assert_close(each.grad, torch.tensor(want))
        means.append([sum(column) / len(epoch) for column in zip(*epoch, strict=True)])
        weighting.end_epoch()


def test_dwa_forgets_nothing_in_an_epoch_without_a_head() -> None:
    weighting = bound(DWA())
    present = torch.tensor([True, False, True])
    for values, here in [((4, 4, 4), ALL), ((2, 4, 4), ALL), ((1, 0, 2), present)]:
        weighting(losses(*values), here)
        weighting.end_epoch()
    torch.testing.assert_close(weighting.history[:, 1], torch.tensor([4.0, 4.0]))
    torch.testing.assert_close(weighting.weights(), 3 * torch.tensor([0.25, 0.5, 0.25]).softmax(0))


@pytest.mark.parametrize("still", ["eval", "no_grad"])
@pytest.mark.parametrize("name", NAMED)
def test_nothing_is_learned_in_evaluation(name: str, still: str) -> None:
    heads = mtml.MultiHead(5, HEADS, name)
    before = copy.deepcopy(heads.weighting.state_dict())
    heads.train(still != "eval")
    features, targets = batch()
    with torch.set_grad_enabled(still != "no_grad"):
        first, second = (heads.loss(features.requires_grad_(), targets).total for _ in range(2))
    assert torch.equal(first, second)
    assert str(heads.weighting.state_dict()) == str(before)


def test_rlw_is_a_softmax_of_normal_draws() -> None:
    weighting, again = bound(RLW(seed=3)), bound(RLW(seed=3))
    draws = []
    for _ in range(2000):
        each = losses(1, 1, 1)
        weighting(each, ALL).backward()
        draws.append(each.grad)
    weights = torch.stack(draws)
    torch.testing.assert_close(weights.sum(1), torch.ones(2000))
    logs = weights.log()  # log w_i - log w_j = z_i - z_j, normal with variance 2
    for i, j in ((0, 1), (1, 2), (0, 2)):
        difference = logs[:, i] - logs[:, j]
        assert abs(difference.mean().item()) < 4 * math.sqrt(2 / 2000)
        assert abs(difference.var().item() - 2) < 4 * 2 * math.sqrt(2 / 2000)
    assert len(weights.unique(dim=0)) == 2000
    values = losses(1, 2, 3)
    torch.testing.assert_close(again(values, ALL), (weights[0] * values).sum())
    again.load_state_dict(weighting.state_dict())
    torch.testing.assert_close(again(values, ALL), weighting(values, ALL), rtol=0, atol=0)


def test_rlw_shares_one_among_the_present() -> None:
    each = losses(1, 0, 1)
    bound(RLW())(each, torch.tensor([True, False, True])).backward()
    assert each.grad[1] == 0 and each.grad.sum().item() == pytest.approx(1)


def test_gls_is_the_geometric_mean() -> None:
    each = losses(2.0, 0.5, 27.0)
    total = bound(GLS())(each, ALL)
    torch.testing.assert_close(total.item(), 3.0)
    total.backward()
    torch.testing.assert_close(each.grad, 3.0 / (3 * each.detach()))
    assert bound(GLS())(losses(1e-30, 1e-30, 1e-30), ALL).item() == pytest.approx(1e-30, rel=1e-4)


def slopes(weighting: Weighting, values: np.ndarray) -> tuple[float, np.ndarray]:
    """The total and its gradient, in float64."""
    each = torch.from_numpy(values).requires_grad_()
    total = weighting.double()(each, ALL)
    return total.item(), torch.autograd.grad(total, each)[0].numpy()


@pytest.mark.parametrize("mu", [1e-4, 0.05, 1.0, 50.0])
def test_stch_is_the_smooth_maximum(mu: float) -> None:
    weighting = bound(STCH(mu, preferences={"a": 3.0, "c": 0.5}, ideal={"a": 0.25, "b": -1.0}))
    values, w, z = np.array([1.0, 2.0, 30.0]), np.array([3.0, 1.0, 0.5]) / 4.5, np.array([0.25, -1.0, 0.0])
    scores = w * (values - z) / mu
    powers = np.exp(scores - scores.max())
    total, gradient = slopes(weighting, values)
    np.testing.assert_allclose(total, mu * (np.log(powers.sum()) + scores.max()), rtol=1e-7)
    np.testing.assert_allclose(gradient, w * powers / powers.sum(), rtol=1e-7, atol=1e-12)
    bounds = (w * (values - z)).max()
    assert bounds <= total <= bounds + mu * math.log(3) + 1e-9


def test_imtl_l_is_lius() -> None:
    weighting, values = bound(IMTLL()), np.array([1.0, 2.0, 30.0])
    s = np.array([0.5, -0.2, 0.1])
    with torch.no_grad():
        weighting.scales.copy_(torch.from_numpy(s))
    total, gradient = slopes(weighting, values)
    np.testing.assert_allclose(total, (np.exp(s) * values - s).sum(), rtol=1e-6)
    np.testing.assert_allclose(gradient, np.exp(s), rtol=1e-6)
    weighting.scales.data = -torch.from_numpy(values).log()  # where every scaled loss is 1
    (slope,) = torch.autograd.grad(weighting(torch.from_numpy(values), ALL), weighting.scales)
    torch.testing.assert_close(slope, torch.zeros(3, dtype=torch.float64))


@pytest.mark.parametrize("penalty", [0.0, 0.5, 8.0])
def test_cosmos_is_ruchtes(penalty: float) -> None:
    weighting, values = bound(COSMOS(penalty, preferences={"a": 2.0})), np.array([1.0, 2.0, 3.0])
    r = np.array([2.0, 1.0, 1.0]) / 4
    lengths = np.linalg.norm(r) * np.linalg.norm(values)
    total, gradient = slopes(weighting, values)
    np.testing.assert_allclose(total, r @ values - penalty * (r @ values) / lengths)
    cosine = r / lengths - (r @ values) / lengths * values / (values @ values)
    np.testing.assert_allclose(gradient, r - penalty * cosine)


def test_cosmos_takes_preferences() -> None:
    heads, (features, targets) = mtml.MultiHead(5, HEADS, "cosmos"), batch()
    given = torch.distributions.Dirichlet(torch.ones(3)).sample()
    assert torch.equal(heads.weighting.prefer(given), given)
    total, per_head = heads.loss(features, targets)
    each = torch.stack(list(per_head.values()))
    torch.testing.assert_close(total, given @ each - nn.functional.cosine_similarity(given, each, 0))
    again = mtml.MultiHead(5, HEADS, "cosmos")
    again.load_state_dict(heads.state_dict())
    assert torch.equal(again.weighting.preferences, given)
    with pytest.raises(ValueError, match=r"preferences: expected \[3\], one a head \(a, b, c\), got .*\[2\]"):
        heads.weighting.prefer(torch.ones(2))
    for wrong in ([-1.0, 1.0, 1.0], [math.nan, 1.0, 1.0], [1.0, math.inf, 1.0], [0.0, 0.0, 0.0]):
        with pytest.raises(
            ValueError, match="preferences: expected finite numbers of at least 0, one of them above 0, got"
        ):
            heads.weighting.prefer(torch.tensor(wrong))
    for shape in ((), (1, 3), (4,)):
        with pytest.raises(ValueError, match=r"preferences: expected \[3\], one a head"):
            heads.weighting.prefer(torch.ones(shape))
    assert torch.equal(heads.weighting.preferences, given)  # what was refused changed nothing
    assert torch.equal(heads.weighting.prefer(torch.tensor([0, 2, 2])), torch.tensor([0.0, 2.0, 2.0]))


@pytest.mark.parametrize("make", [STCH, COSMOS])
def test_preferences_of_0_for_all_are_refused(make: type[STCH] | type[COSMOS]) -> None:
    with pytest.raises(ValueError, match="weighting: expected preferences of which one is above 0, got 0 for a, b, c"):
        bound(make(preferences=dict.fromkeys(HEADS, 0.0)))
    bound(make(preferences={"a": 0.0, "b": 0.0}))


@pytest.mark.parametrize("make", [STCH, COSMOS])
def test_preferences_are_of_the_present(make: type[STCH] | type[COSMOS]) -> None:
    given = {"a": 1.0, "b": 5.0, "c": 3.0}
    weighting, pair = bound(make(preferences=given)), make(preferences={"a": 0.25, "c": 0.75})
    pair.bind({name: HEADS[name] for name in ("a", "c")})
    found = weighting(losses(1, 0, 3), torch.tensor([True, False, True]))
    torch.testing.assert_close(found, pair(losses(1, 3), ALL[:2]))


@pytest.mark.parametrize("name", [name for name in NAMED if name != "rlw"])  # which draws by place
def test_the_heads_order_does_not_matter(name: str) -> None:
    heads, features = mtml.MultiHead(5, HEADS, name), batch()
    other = mtml.MultiHead(5, dict(reversed(HEADS.items())), name)
    other.layers.load_state_dict(heads.layers.state_dict())
    features[0].requires_grad_()
    torch.testing.assert_close(other.loss(*features).total, heads.loss(*features).total)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.5])
@pytest.mark.parametrize("where", ["features", "weight"])
def test_gradnorm_is_chens(alpha: float, where: str) -> None:
    """Ten steps of both optimisers, beside the algorithm as the paper writes it."""
    trunk = nn.Linear(5, 4).double()
    weighting = GradNorm(alpha, shared=[trunk.weight] if where == "weight" else None)
    heads = mtml.MultiHead(4, HEADS, weighting).double()
    trunk2, heads2 = copy.deepcopy((trunk, heads))
    parameters2 = [*trunk2.parameters(), *heads2.layers.parameters()]
    optimizer = torch.optim.SGD([*trunk.parameters(), *heads.parameters()], 0.1)
    x, targets = batch()
    x, targets = x.double(), {k: y.double() if y.is_floating_point() else y for k, y in targets.items()}
    w = torch.ones(3, dtype=torch.float64)
    initial: list[float] = []
    for _ in range(10):
        optimizer.zero_grad()
        losses = heads.loss(trunk(x), targets)
        losses.total.backward()
        optimizer.step()

        w.requires_grad_()
        features = trunk2(x)
        each = list(heads2.loss(features, targets).per_head.values())
        at = features if where == "features" else trunk2.weight
        grads = torch.autograd.grad(
            sum(w_h * loss for w_h, loss in zip(w.detach(), each, strict=True)), parameters2, retain_graph=True
        )
        sizes = [
            torch.autograd.grad(w_h * loss, at, create_graph=True)[0].norm() for w_h, loss in zip(w, each, strict=True)
        ]
        initial = initial or [loss.item() for loss in each]
        ratios = [loss.item() / first for loss, first in zip(each, initial, strict=True)]
        mean = sum(size.item() for size in sizes) / 3
        constants = [mean * (ratio / (sum(ratios) / 3)) ** alpha for ratio in ratios]
        own = sum((size - constant).abs() for size, constant in zip(sizes, constants, strict=True))
        (slope,) = torch.autograd.grad(own, w)
        with torch.no_grad():
            for p, g in zip(parameters2, grads, strict=True):
                p -= 0.1 * g
            w = w - 0.1 * slope
            w = w * 3 / w.sum()
    weighting.renormalise()
    torch.testing.assert_close(weighting.weights.detach(), w)
    assert (w - 1).abs().max() > 0.01
    for p, q in zip([*trunk.parameters(), *heads.layers.parameters()], parameters2, strict=True):
        torch.testing.assert_close(p, q)


def test_gradnorm_gradients_stay_apart() -> None:
    heads = mtml.MultiHead(5, HEADS, "gradnorm")
    x, targets = batch()
    heads.weighting.weights.data = torch.tensor([0.5, 2.0, 0.5])
    x.requires_grad_()
    losses = heads.loss(x, targets)
    (got,) = torch.autograd.grad(losses.total, x, retain_graph=True)
    weighted = sum(w * loss for w, loss in zip((0.5, 2.0, 0.5), losses.per_head.values(), strict=True))
    (want,) = torch.autograd.grad(weighted, x)
    torch.testing.assert_close(got, want)


def test_gradnorm_weights_never_fall_below_0() -> None:
    weighting = bound(GradNorm())
    for given, want in [([3.0, -1.0, 1.0], [2.25, 0, 0.75]), ([-1.0, -2.0, 0.0], [1, 1, 1])]:
        weighting.weights.data = torch.tensor(given)
        weighting.renormalise()
        assert weighting.weights.tolist() == want


@pytest.mark.parametrize("name", NAMED)
def test_an_absent_head_moves_nothing(name: str) -> None:
    heads = mtml.MultiHead(5, HEADS, name)
    pair = mtml.MultiHead(5, {k: h for k, h in HEADS.items() if k != "b"}, name)
    pair.layers.load_state_dict({k: v for k, v in heads.layers.state_dict().items() if not k.startswith("b.")})
    optimizer = torch.optim.SGD(heads.parameters(), 0.1)
    before = heads.layers["b"].weight.clone()
    for step in range(3):
        features, targets = batch()
        features.requires_grad_()
        if step % 2:  # no target, all ignored, all masked out: the same
            del targets["b"]
        losses = heads.loss(features, targets, masks={"b": torch.zeros(6)} if "b" in targets else None)
        if step == 0 and name != "rlw":  # which draws three numbers, not two
            want = pair.loss(features, {k: y for k, y in targets.items() if k != "b"})
            torch.testing.assert_close(losses.total, want.total)
        assert losses.per_head["b"] == 0
        optimizer.zero_grad()
        losses.total.backward()
        optimizer.step()
        heads.weighting.end_epoch()
    assert torch.equal(heads.layers["b"].weight, before)
    if name == "uncertainty":
        assert heads.weighting.log_vars[1] == 0 and heads.weighting.log_vars[0] != 0
    if name == "gradnorm":
        assert heads.weighting.initial.isnan().tolist() == [False, True, False]
    if name == "dwa":
        assert heads.weighting.history[:, 1].isnan().all() and not heads.weighting.history[:, 0].isnan().any()


@pytest.mark.parametrize("name", NAMED)
def test_nobody_is_there(name: str) -> None:
    heads = mtml.MultiHead(5, HEADS, name)
    features, targets = batch()
    total, _ = heads.loss(features.requires_grad_(), targets, masks={k: torch.zeros(6) for k in HEADS})
    assert total == 0
    total.backward()
    assert all(p.grad is None or not p.grad.any() for p in heads.parameters())
    assert heads.loss(features, {}).total == 0


@pytest.mark.parametrize("name", NAMED)
def test_state_dict(name: str) -> None:
    heads, features = mtml.MultiHead(5, HEADS, name), []
    for _ in range(3):
        x, targets = batch()
        features.append((x.requires_grad_(), targets))
        losses = heads.loss(*features[-1])
        losses.total.backward()
        with torch.no_grad():
            for p in heads.parameters():
                p -= 0.1 * p.grad
            if name == "famo":
                heads.weighting.update(heads.loss(*features[-1]))
        heads.weighting.end_epoch()
    other, twin = mtml.MultiHead(5, HEADS, name), copy.deepcopy(heads)
    other.load_state_dict(heads.state_dict())
    want = heads.loss(*features[-1]).total
    assert torch.equal(other.loss(*features[-1]).total, want) and torch.equal(twin.loss(*features[-1]).total, want)


@pytest.mark.parametrize("name", NAMED)
def test_nan_is_seen(name: str) -> None:
    heads = mtml.MultiHead(5, HEADS, name)
    features, targets = batch()
    targets["b"][0] = float("nan")
    losses = heads.loss(features.requires_grad_(), targets)
    assert losses.total.isnan() and losses.per_head["b"].isnan() and losses.per_head["a"].isfinite()


def bad(weighting: object, heads: Sequence[str] = ("a", "b")) -> None:
    mtml.MultiHead(5, {name: HEADS[name] for name in heads}, weighting)  # type: ignore[arg-type]


def test_bad_input() -> None:
    for weighting, message in [
        ("kendall", "weighting: expected one of 'sum', .* got 'kendall'"),
        ({"z": 1.0}, "weighting: expected weights for a, b, got one for 'z'"),
        ({"a": -1.0}, "expected finite weights of at least 0, got -1.0 for 'a'"),
    ]:
        with pytest.raises(ValueError, match=message):
            bad(weighting)
    with pytest.raises(TypeError, match="weighting: expected a name"):
        bad(3)
    with pytest.raises(ValueError, match="temperature: expected above 0"):
        DWA(0.0)
    with pytest.raises(ValueError, match="alpha: expected at least 0"):
        GradNorm(-1.0)
    with pytest.raises(ValueError, match="mu: expected above 0, got 0"):
        STCH(0.0)
    with pytest.raises(ValueError, match="penalty: expected at least 0"):
        COSMOS(-1.0)
    with pytest.raises(ValueError, match="decay: expected at least 0"):
        FAMO(decay=-1.0)
    with pytest.raises(ValueError, match=r"expected finite preferences of at least 0, got -1\.0 for 'a'"):
        STCH(preferences={"a": -1.0})
    with pytest.raises(ValueError, match="expected finite lower bounds, got nan for 'a'"):
        FAMO(lower={"a": math.nan})
    with pytest.raises(ValueError, match="expected lower bounds for a, b, got one for 'z'"):
        bad(FAMO(lower={"z": 1.0}))
    shared = DWA()
    bad(shared)
    bad(shared)  # the same heads: allowed
    with pytest.raises(ValueError, match="of its own for every MultiHead"):
        bad(shared, ("a", "c"))
    with pytest.raises(ValueError, match="features: expected features that require grad"):
        mtml.MultiHead(5, HEADS, "gradnorm").loss(*batch())
