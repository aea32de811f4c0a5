"""Tests of what launches of the schedule fuse, through Triton's interpreter: test_triton_inner_loop.py runs them.

A schedule runs once part by part with PyTorch and once in launches; all that somebody reads must be equal.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
import torch
from cases.engine import LOSSES
from cases.schedule_kernels import part_of
from cases.triton_watch import permuted, poison, watched
from schedule.test_torch_losses import SOFT, case, some_mask
from torch import Tensor, nn

from mtml_kernels.program import trace
from mtml_kernels.program.activations import Act
from mtml_kernels.program.layers.norm import Norm
from mtml_kernels.schedule.build import Plan
from mtml_kernels.schedule.call import ABSENT, Call, Part, Plane, Schedule, Source
from mtml_kernels.schedule.kernels import Activation, Linear, Normalisation
from mtml_kernels.schedule.run import Bound
from mtml_kernels.schedule.torch_kernels import TORCH
from mtml_kernels.schema.inner_loop import NEED_PARAMS, NEED_SUPPORT_X, InnerLoopArgs, InnerLoopSpec
from mtml_kernels.schema.losses import LossSpec
from mtml_kernels.triton.inner_loop import bound, launching, policy
from mtml_kernels.triton.inner_loop.launching import LaunchKernel

assert os.environ.get("TRITON_INTERPRET") == "1", "run test_triton_inner_loop.py, which sets the interpreter up"
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def strided() -> nn.Module:
    """Gradients by phases of pixels go to a norm, and sums of rows of their own behind each."""
    first = [nn.Conv2d(1, 3, 2), nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 3, 3, stride=2, padding=1)]
    return nn.Sequential(*first, nn.BatchNorm2d(3), nn.Tanh(), nn.Flatten(), nn.Linear(27, 3))


def pooling() -> nn.Module:
    """Two norms, of an image and of what is pooled of it; points are left over."""
    first = [nn.Conv2d(1, 3, 2, bias=False), nn.BatchNorm2d(3), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*first, nn.BatchNorm2d(3), nn.Sigmoid(), nn.AvgPool2d(2, 1), nn.Flatten(), nn.Linear(3, 3))


def call_of(make: Callable[[], nn.Module], dtype: torch.dtype, side: int = 6, samples: int = 3) -> InnerLoopArgs:
    """A step of two tasks, and the query loss: 75 rows of a norm are more than a tile."""
    torch.manual_seed(1)
    net = make().to(dtype)
    program, loss = trace(net, [(1, side, side)]), LossSpec("cross_entropy")
    spec = InnerLoopSpec.of(program, [True] * len(program.params), (loss, loss), steps=1)
    named, x, y = dict(net.named_parameters()), torch.randn(2, 2, samples, 1, side, side, dtype=dtype), [0, 1, 2] * 99
    ids = torch.tensor([y[:samples]] * 2)
    params = [named[p.name].detach() for p in program.params]
    rate, needs = [torch.full((1,), 0.1, dtype=dtype)], NEED_PARAMS | NEED_SUPPORT_X
    return InnerLoopArgs(params, rate, [x[0]], [x[1]], [], [], ids, ids, None, None, None, spec, needs)


def both_ways(a: InnerLoopArgs, bind: Callable[[Schedule], Bound]) -> list[Tensor]:
    """Results and gradients."""
    plan = Plan.of(a)
    trip = plan.trip(plan.usually)

    def given(plane: Plane) -> Tensor:
        source = plane.source
        assert source is not None
        if source.field == "grad_loss":
            return torch.ones(plane.shape, dtype=plane.dtype)
        owner = getattr(a, source.field)
        return (owner[source.position] if isinstance(owner, list) else owner).reshape(plane.shape)

    there = bind(trip.there).run(given, {})
    back = bind(trip.back).run(given, {i: t for i in trip.there.kept if (t := there[i]) is not None})
    found = [there[i] for i in trip.there.results if i != ABSENT] + [back[i] for i in trip.back.results if i != ABSENT]
    return [t for t in found if t is not None]


def by_torch(schedule: Schedule) -> Bound:
    return Bound.of(schedule, TORCH)


@pytest.mark.parametrize("most, elements", [(policy.SHARES, policy.ELEMENTS), (1, 64)])
@pytest.mark.parametrize("make", [strided, pooling])
def test_sums_of_norms_as_shares(
    make: Callable[[], nn.Module], most: int, elements: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where programs take several tiles, and where a product has too many for their shares."""
    monkeypatch.setattr(policy, "SHARES", most)
    monkeypatch.setattr(policy, "ELEMENTS", elements)
    a = call_of(make, torch.float64)
    for got, expected in zip(both_ways(a, bound), both_ways(a, by_torch), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("make", [strided, pooling])
def test_without_a_race_whatever_the_order_of_programs(
    make: Callable[[], nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(policy, "SHARES", 3)
    monkeypatch.setattr(launching, "empty", lambda *args, **options: poison(torch.empty(*args, **options)))
    a = call_of(make, torch.float32)
    expected = both_ways(a, bound)
    with watched() as watch, permuted(2):
        found = both_ways(a, bound)
    assert watch.launches > 20 and not watch.conflicts
    assert all(torch.equal(got, right) for got, right in zip(found, expected, strict=True))


def shares_of(schedule: Schedule) -> set[str]:
    """The parts of which launches store shares."""
    kernels = [step[0] for step in bound(schedule).steps]
    jobs = [job for kernel in kernels if isinstance(kernel, LaunchKernel) for job in kernel.launch.jobs]
    return {share.part.kernel for job in jobs for share in job.shares}


def test_every_kind_of_sum_is_fused() -> None:
    for make in (strided, pooling):
        plan = Plan.of(call_of(make, torch.float32))
        trip = plan.trip(plan.usually)
        assert shares_of(trip.there) | shares_of(trip.back) == {
            f"norm.{name}" for name in ("stats", "sums", "stats_tangent", "sums_tangent")
        }


# --- losses -----------------------------------------------------------------------------------------------------------


def logits_and_loss(spec: LossSpec, tasks: int, masked: bool) -> tuple[Schedule, list[Tensor]]:
    """Logits and their tangents by products, of weights that `tasks` have each their own, and the loss of both."""
    torch.manual_seed(2)
    given, _, target = case(spec, ignored=not spec.soft)
    target = torch.randn(3, 4, 5).double() if target.is_floating_point() and not spec.info.classes else target
    mask = some_mask() if masked else None
    c = None if mask is None and target.is_floating_point() else TORCH["weights.forward"](
        part_of("weights.forward", given, [mask, None if target.is_floating_point() else target]),
        mask, None if target.is_floating_point() else target,
    )[0]  # fmt: skip
    x, xt, seed = torch.randn(3, 4, 1, 7).double(), torch.randn(3, 4, 1, 7).double(), torch.randn(3).double()
    w, wt = torch.randn(tasks, 5, 7).double(), torch.randn(tasks, 5, 7).double()
    tensors = [x, xt, w, wt, target, seed, *([] if c is None else [c])]
    at = 6 if c is not None else ABSENT
    planes = [Plane(tuple(t.shape), t.dtype, "", Source("x", i)) for i, t in enumerate(tensors)]
    shapes = [(3, 4, 1, 5), (3, 4), (3, 4, 1, 5), (3,), (3, 4, 1, 5), (3, 4, 1, 5)]
    z, each, d, total, zt, dt = range(len(planes), len(planes) + 6)
    planes += [Plane(shape, torch.float64, "") for shape in shapes]
    linear = Linear(False, False)
    calls = (
        (Part("linear.forward", (0, 2, ABSENT), (z,), linear), Part("loss.forward", (z, 4, at), (each, d), given)),
        (Part("loss.sum", (each, at), (total,), given),),
        (
            Part("linear.tangent", (0, 1, 2, 3, ABSENT), (zt,), linear),
            Part("loss.tangent", (z, zt, 4, at, 5), (dt,), given),
        ),
    )
    return Schedule(tuple(planes), tuple(Call(parts, "here") for parts in calls), (d, total, dt)), tensors


@pytest.mark.parametrize("spec", [*LOSSES, *SOFT], ids=lambda spec: f"{spec}{'soft' * spec.soft}")
@pytest.mark.parametrize("tasks, masked", [(1, False), (3, True)])
def test_losses_behind_their_logits(spec: LossSpec, tasks: int, masked: bool) -> None:
    schedule, tensors = logits_and_loss(spec, tasks, masked)
    launches = bound(schedule)
    assert len(launches.steps) == 3 and all(isinstance(step[0], LaunchKernel) for step in launches.steps)
    found, right = (b.run(lambda plane: tensors[plane.source[1]], {}) for b in (launches, by_torch(schedule)))  # type: ignore[index]
    for plane in schedule.results:
        got, expected = found[plane], right[plane]
        assert got is not None and expected is not None
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)


def test_a_label_out_of_range_behind_logits_is_nan_there_alone() -> None:
    schedule, tensors = logits_and_loss(LossSpec("cross_entropy"), 1, False)
    tensors[4][:] = torch.tensor([0, 4, 5, -1])
    found = bound(schedule).run(lambda plane: tensors[plane.source[1]], {})  # type: ignore[index]
    d = found[schedule.results[0]]
    assert d is not None and d.isnan().all(3).squeeze().tolist() == [[False, False, True, True]] * 3


# --- statistics -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("most", [1024, 2])
def test_a_large_mean_costs_the_statistics_no_digits(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of f(x) = c1 + x, be the first tile constant or not; a share's tiles are put together by their means."""
    monkeypatch.setattr(policy, "SHARES", most)
    shape, one = (2, 300, 1, 20), (2, 1, 1, 20)
    planes = [Plane(shape, torch.float32, "x", Source("x")), Plane(shape, torch.float32, "y")]
    planes += [Plane(one, torch.float32, name) for name in ("mean", "rstd")]
    given = Normalisation(int(Norm.BATCH), 1e-5, 20, 0, 1, False)
    parts = (
        Part("affine.forward", (0,), (1,), Activation(int(Act.RELU), 1.0, 3000.0)),
        Part("norm.stats", (1,), (2, 3), given),
    )
    schedule = Schedule(tuple(planes), (Call(parts, "here"),), (1, 2, 3))
    assert shares_of(schedule) == {"norm.stats"}
    x = torch.randn(shape)
    x[:, :64] = 0.0
    y, mean, rstd = bound(schedule).run(lambda plane: x, {})[1:4]
    assert y is not None and mean is not None and rstd is not None
    exact = y.double()
    torch.testing.assert_close(mean.double(), exact.mean((1, 2), keepdim=True), rtol=1e-6, atol=0)
    variance = exact.var((1, 2), correction=0, keepdim=True)
    torch.testing.assert_close(rstd.double(), (variance + 1e-5).rsqrt(), rtol=2e-6, atol=0)
