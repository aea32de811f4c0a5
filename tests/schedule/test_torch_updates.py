"""Update rules, clipping and rates of the `torch` provider against torch.func of `reference.update` in float64."""

from __future__ import annotations

import itertools

import pytest
import torch
from cases.schedule_kernels import close, run, scattered
from torch import Tensor

from mtml_kernels.reference.update import clip, update
from mtml_kernels.schedule.kernels import Rule, Shape
from mtml_kernels.schema.update import HYPERS, UpdateSpec

T = 3
HYPER = torch.tensor([0.7, 0.1, 0.8, 0.3, 0.7, 0.9, 1e-2, 1e-3], dtype=torch.float64)


def every_rule() -> list[UpdateSpec]:
    found = []
    for flags in itertools.product((False, True), repeat=4):
        names = dict(zip(("momentum", "nesterov", "decoupled", "centered"), flags, strict=True))
        for rule in ("sgd", "adam", "rmsprop"):
            try:
                found += [UpdateSpec(rule, **names, decayed=decayed) for decayed in (False, True)]
            except ValueError:
                continue
    return found


def stepped(rule: Rule, theta: Tensor, g: Tensor, alpha: Tensor, hyper: Tensor, *s: Tensor) -> list[Tensor]:
    """(after, t...) of the reference, which is elementwise here: all tasks at once."""
    numbers = dict(zip(HYPERS, hyper.unbind(), strict=True))
    after, kept = update(rule.spec, numbers, [theta], [g], [alpha], [[plane] for plane in s], rule.step)
    return [after[0], *(plane[0] for plane in kept)]


@pytest.mark.parametrize("spec", every_rule(), ids=str)
@pytest.mark.parametrize(("step", "elements"), [(0, False), (2, True)])
def test_rule(spec: UpdateSpec, step: int, elements: bool) -> None:
    rule, count = Rule(spec, step), len(spec.moments)
    theta, g = scattered(T if step else 1, 4, 5), scattered(T, 4, 5)
    g[0, 0, 0] = 0
    alpha = torch.rand(1, 4, 5, dtype=g.dtype) if elements else torch.tensor(0.3, dtype=g.dtype)
    s = [scattered(T, 4, 5).square() + 1 if step else None for _ in range(count)]
    padded = [*s, None, None, None][:3]
    values = [torch.zeros_like(g) if plane is None else plane for plane in s]
    results, back = torch.func.vjp(
        lambda *at: stepped(rule, *at), theta.expand(T, 4, 5).clone(), g, alpha, HYPER, *values
    )
    wants = (True, *(i < count for i in range(3)))
    after, *moments = run("update.rule", rule, theta, g, alpha, *padded, HYPER, wants=wants)
    for mine, expected in zip([after, *moments], results, strict=False):
        close(mine, expected, "after")
    for present in ([True] * count, [False] * count):
        lam, mu = scattered(T, 4, 5), [scattered(T, 4, 5) if there else None for there in present]
        cotangents = [lam, *(torch.zeros_like(lam) if m is None else m for m in mu)]
        below, v, dalpha, dhyper, *nu = back(cotangents)
        wants = (True, True, *(i < count for i in range(3)), True, True)
        given = (theta, g, alpha, *padded, lam, *[*mu, None, None, None][:3], HYPER)
        mine = run("update.adjoint", rule, *given, wants=wants)
        expected = [v, below, *[*nu, None, None, None][:3], dalpha, dhyper]
        for role, got, right in zip(
            ("v", "below", "nu0", "nu1", "nu2", "dalpha", "dhyper"), mine, expected, strict=True
        ):
            if right is not None:
                close(got, right, role)


@pytest.mark.parametrize("rule", ["adam", "rmsprop"])
def test_without_eps_what_had_no_gradient_stays(rule: str) -> None:
    theta, g, lam = torch.ones(T, 1, 2), torch.zeros(T, 1, 2), torch.ones(T, 1, 2)
    alpha, hyper, given = torch.tensor(0.1), HYPER.clone(), Rule(UpdateSpec(rule), 0)
    hyper[HYPERS.index("eps")] = hyper[HYPERS.index("eps_root")] = 0
    assert torch.equal(run("update.rule", given, theta, g, alpha, None, None, None, hyper)[0], theta)
    results = run("update.adjoint", given, theta, g, alpha, None, None, None, lam, None, None, None, hyper)
    assert all(t.isfinite().all() for t in results if t is not None)


def test_dropping_a_moment_is_noticed() -> None:
    """The negative control: without its cotangent the adjoint is another."""
    rule = Rule(UpdateSpec("sgd", momentum=True), 1)
    given = [scattered(T, 4, 5) for _ in range(5)]
    operands = (given[0], given[1], torch.tensor(0.1), given[2], None, None, given[3])
    right = run("update.adjoint", rule, *operands, given[4], None, None, HYPER)[0]
    with pytest.raises(AssertionError):
        close(run("update.adjoint", rule, *operands, None, None, None, HYPER)[0], right)


@pytest.mark.parametrize("bound", [0.7, 3.0, 1e3])
def test_clipping(bound: float) -> None:
    hyper = HYPER.clone()
    hyper[0] = bound
    shapes = [(T, 4, 5), (T, 1, 2), (T, 1, 1)]
    gs, hs = ([scattered(*shape) for shape in shapes] for _ in range(2))

    def clipped(hyper: Tensor, *gs: Tensor) -> list[Tensor]:
        tasks = [clip([g[t] for g in gs], hyper[0]) for t in range(T)]
        return [torch.stack(each) for each in zip(*tasks, strict=True)]

    results, back = torch.func.vjp(clipped, hyper, *gs)
    scale, *mine = run("update.clip", None, hyper, *gs, wants=[True] * (1 + len(gs)))
    for got, expected in zip(mine, results, strict=True):
        close(got, expected)
    dhyper, *vs = back(hs)
    mine = run("update.unclip", len(gs), hyper, scale, *hs, *gs, wants=[True] * (len(gs) + 1))
    for got, expected in zip(mine, [*vs, dhyper], strict=True):
        close(got, expected)
    without = [hs[0], None, hs[2]]
    dhyper, *vs = back([torch.zeros_like(g) if h is None else h for g, h in zip(gs, without, strict=True)])
    mine = run("update.unclip", len(gs), hyper, scale, *without, *gs, wants=[True] * (len(gs) + 1))
    for got, expected in zip(mine, [*vs, dhyper], strict=True):
        close(got, expected)


def test_clipping_of_nan_and_of_nothing() -> None:
    g = torch.zeros(T, 1, 2)
    g[1, 0, 0] = float("nan")
    scale, _ = run("update.clip", None, HYPER, g)
    assert scale[[0, 2]].tolist() == [1, 1] and scale[1].isnan()
    v, dhyper = run("update.unclip", 1, HYPER, scale, torch.ones_like(g), g, wants=(True, False))
    assert v.isnan().flatten(1).any(1).tolist() == [False, True, False] and dhyper is None


@pytest.mark.parametrize("elements", [False, True])
def test_plain_sgd(elements: bool) -> None:
    alpha = torch.rand(1, 4, 5, dtype=torch.float64) if elements else torch.tensor(0.3, dtype=torch.float64)
    theta, g, lam = scattered(1, 4, 5), scattered(T, 4, 5), scattered(T, 4, 5)
    close(run("update.step", None, theta, g, alpha)[0], theta - alpha * g)
    close(run("update.direction", None, lam, alpha)[0], -alpha * lam)
    rate = run("update.rate", Shape(tuple(alpha.shape)), g, lam)[0]
    close(rate, -(g * lam).sum_to_size(alpha.shape))
    close(run("update.rate", Shape(tuple(alpha.shape)), g, lam[:1])[0], -(g * lam[:1]).sum_to_size(alpha.shape))
