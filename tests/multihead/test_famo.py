"""FAMO against the algorithm as the paper writes it, with PyTorch's Adam for its logits."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mtml
from mtml.weighting import FAMO

HEADS = {"a": mtml.Classification(3), "b": mtml.Regression(2), "c": mtml.MultiLabel(4)}


class Run:
    """A trunk, its heads and an optimiser, in float64."""

    def __init__(self, weighting: FAMO | str = "famo") -> None:
        torch.manual_seed(3)
        self.trunk = nn.Linear(5, 4).double()
        self.heads = mtml.MultiHead(4, HEADS, weighting).double()
        self.optimizer = torch.optim.SGD([*self.trunk.parameters(), *self.heads.parameters()], 0.3)

    def losses(self, x: Tensor, targets: dict[str, Tensor]) -> mtml.HeadLosses:
        return self.heads.loss(self.trunk(x), targets)

    def step(self, x: Tensor, targets: dict[str, Tensor]) -> None:
        self.optimizer.zero_grad()
        self.losses(x, targets).total.backward()
        self.optimizer.step()
        with torch.no_grad():
            self.heads.weighting.update(self.losses(x, targets))


def batch(*absent: str) -> tuple[Tensor, dict[str, Tensor]]:
    draw = {"dtype": torch.float64}
    targets = {"a": torch.randint(3, (6,)), "b": torch.randn(6, 2, **draw), "c": torch.rand(6, 4, **draw)}
    return torch.randn(6, 5, **draw), {name: y for name, y in targets.items() if name not in absent}


@pytest.mark.parametrize("lower", [None, {"a": -0.5, "c": -2.0}])
def test_is_lius(lower: dict[str, float] | None) -> None:
    run, plain = Run(FAMO(0.05, 0.01, lower=lower)), Run("sum")
    logits = nn.Parameter(torch.zeros(3, dtype=torch.float64))
    adam = torch.optim.Adam([logits], 0.05, weight_decay=0.01)
    bounds = torch.tensor([(lower or {}).get(name, 0.0) for name in HEADS], dtype=torch.float64)
    for _ in range(8):
        data = batch()
        run.step(*data)

        z = logits.detach().softmax(0)
        each = torch.stack(list(plain.losses(*data).per_head.values())) - bounds
        plain.optimizer.zero_grad()
        ((z * each.log()).sum() / (z / each.detach()).sum()).backward()
        plain.optimizer.step()
        after = torch.stack(list(plain.losses(*data).per_head.values())) - bounds
        change = (each.log() - after.log()).detach()
        (logits.grad,) = torch.autograd.grad(logits.softmax(0), logits, change)
        adam.step()
    torch.testing.assert_close(run.heads.weighting.logits, logits.detach())
    assert logits.abs().max() > 0.01
    for p, q in zip(run.trunk.parameters(), plain.trunk.parameters(), strict=True):
        torch.testing.assert_close(p, q)


def test_its_gradient_is_a_convex_combination() -> None:
    run, data = Run(), batch()
    run.heads.weighting.logits.copy_(torch.tensor([1.0, -1.0, 0.5]))
    each = torch.stack(list(run.losses(*data).per_head.values())).detach().requires_grad_()
    run.heads.weighting(each, torch.ones(3, dtype=torch.bool)).backward()
    assert each.grad.sum().item() == pytest.approx(1) and (each.grad > 0).all()
    # what changes a loss's size alone does not change how fast it falls
    torch.testing.assert_close(each.grad * each / (each.grad * each).sum(), run.heads.weighting.weights())


def test_an_absent_head_and_a_loss_that_is_no_number_move_nothing() -> None:
    run = Run()
    for _ in range(3):
        run.step(*batch())
    state = copy.deepcopy(run.heads.weighting.state_dict())
    run.step(*batch("b"))
    data = batch("a", "c")
    data[1]["b"][0] = float("nan")
    run.losses(*data)
    with torch.no_grad():
        run.heads.weighting.update(run.losses(*data))
    for name, value in run.heads.weighting.state_dict().items():
        if name != "before":
            assert value[1] == state[name][1] and (value[[0, 2]] != state[name][[0, 2]]).all()
    assert run.heads.weighting.steps.tolist() == [4, 3, 4]


def test_goes_on_from_a_state_dict_and_begins_again_after_reset() -> None:
    first, second, data = Run(), Run(), [batch() for _ in range(6)]
    for each in data[:3]:
        first.step(*each)
    second.trunk.load_state_dict(first.trunk.state_dict())
    second.heads.load_state_dict(first.heads.state_dict())
    for run in (first, second):
        for each in data[3:]:
            run.step(*each)
    assert torch.equal(first.heads.weighting.logits, second.heads.weighting.logits)
    first.heads.weighting.reset()
    fresh = Run().heads.weighting.state_dict()
    torch.testing.assert_close(first.heads.weighting.state_dict(), fresh, equal_nan=True)


def test_without_an_update_nothing_is_learned_and_a_second_one_moves_nothing() -> None:
    run, data = Run(), batch()
    run.step(*data)
    logits = run.heads.weighting.logits.clone()
    with torch.no_grad():
        run.heads.weighting.update(run.losses(*data))
    run.losses(*data)
    assert torch.equal(run.heads.weighting.logits, logits) and logits.any()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (lambda losses: losses, r"expected those after the optimizer's step, made under torch.no_grad\(\)"),
        (lambda losses: {"a": losses.per_head["a"]}, "losses: expected those of a, b, c, got a"),
        (lambda losses: torch.zeros(2), r"losses: expected \[3\], one a head, got .*\[2\]"),
    ],
)
def test_bad_input(given: Callable[[Any], Any], message: str) -> None:
    run = Run()
    with pytest.raises(ValueError, match=message):
        run.heads.weighting.update(given(run.losses(*batch())))
