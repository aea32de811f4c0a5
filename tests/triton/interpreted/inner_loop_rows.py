"""Tests of the Triton kernels of rows and sums of the inner loop: test_triton_inner_loop_rows.py runs them elsewhere.

Every kernel must equal its form in PyTorch; `schedule/` holds that against torch.func.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from cases.inner_loop import make_case
from cases.schedule_kernels import part_of, scattered
from cases.schedule_samples import Sample, samples
from cases.triton_parts import LAUNCHED
from cases.triton_watch import permuted, watched
from schedule.test_torch_losses import LOSSES as LOSS_SPECS
from schedule.test_torch_losses import SOFT, case, some_mask
from schedule.test_torch_pointwise import POOLS
from schedule.test_torch_updates import HYPER, every_rule
from torch import Tensor, nn

from mtml_kernels.functional import inner_loop
from mtml_kernels.losses import LossSpec
from mtml_kernels.program import trace
from mtml_kernels.program.layers.norm import Norm
from mtml_kernels.program.layers.pool import Pool
from mtml_kernels.program.layers.softmax import Softmax
from mtml_kernels.schedule.kernels import Loss, Normalisation, Pooling, Rule, Shape, Table
from mtml_kernels.schedule.torch_kernels import TORCH
from mtml_kernels.schema.update import UpdateSpec
from mtml_kernels.triton.inner_loop import segments
from mtml_kernels.triton.inner_loop.clipping import CLIPPING
from mtml_kernels.triton.inner_loop.embedding import EMBEDDING
from mtml_kernels.triton.inner_loop.losses import LOSSES
from mtml_kernels.triton.inner_loop.norm_sums import NORM_SUMS
from mtml_kernels.triton.inner_loop.softmax import SOFTMAX
from mtml_kernels.triton.inner_loop.sums import SUMS, sum_tile
from mtml_kernels.triton.inner_loop.updates import UPDATES

assert os.environ.get("TRITON_INTERPRET") == "1", "run test_triton_inner_loop_rows.py, which sets the interpreter up"
# The interpreter computes padding, which is masked, in numpy, which warns of it.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
TRITON: dict[str, Any] = NORM_SUMS | SOFTMAX | LOSSES | SUMS | UPDATES | CLIPPING | LAUNCHED | EMBEDDING
TOLERANCES = {torch.float64: 1e-10, torch.float32: 3e-5, torch.float16: 4e-3, torch.bfloat16: 2e-2}
Operands = Sequence[Tensor | None]
Wants = Sequence[bool] | None


def run(name: str, constants: Any, *operands: Tensor | None, wants: Wants = None) -> list[Tensor | None]:
    """What is wanted of a kernel's results."""
    part = part_of(name, constants, operands, wants)
    results = TRITON[name](part, *operands)
    return [result if want else None for result, want in zip(results, part.wants, strict=True)]


def check(name: str, constants: Any, *operands: Tensor | None, wants: Wants = None) -> list[Tensor | None]:
    """Equal to the kernel of the `torch` provider: in shape, type and, to rounding, in value. Memory is full of NaN."""
    near = max(TOLERANCES.get(t.dtype, 0.0) for t in operands if t is not None)
    part = part_of(name, constants, operands, wants)
    before = [None if t is None else t.clone() for t in operands]
    theirs = [t.long() if t is not None and t.dtype == torch.int16 else t for t in operands]
    ours, right = run(name, constants, *operands, wants=wants), TORCH[name](part, *theirs)
    for at, (got, expected, want) in enumerate(zip(ours, right, part.wants, strict=True)):
        what = f"{name}, result {at}"
        if not want or expected is None:
            assert got is None, what
            continue
        assert got is not None and got.dtype == expected.dtype, what
        torch.testing.assert_close(
            got, expected.expand(got.shape), rtol=near, atol=near, equal_nan=True, msg=lambda m, w=what: f"{w}: {m}"
        )
    for t, old in zip(operands, before, strict=True):
        assert t is None or old is None or torch.equal(t.nan_to_num(), old.nan_to_num()), f"{name} changed an operand"
    return ours


def mine(dtype: torch.dtype, every: bool = True) -> Iterator[Sample]:
    """Of every kernel here; or one sample for each of its kinds."""
    seen = set()
    for sample in samples(dtype):
        key = sample.name, getattr(sample.constants, "kind", None), isinstance(sample.constants, Rule)
        if sample.name in TRITON and (every or key not in seen):
            seen.add(key)
            yield sample


# --- every kernel -----------------------------------------------------------------------------------------------------


HALF = [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)]


def test_equal_to_torch_and_without_a_race() -> None:
    found = set()
    for sample in mine(torch.float64):
        with watched() as watch:
            check(sample.name, sample.constants, *sample.operands, wants=sample.wants)
        assert not watch.conflicts, f"{sample.name}: {watch.conflicts}"
        found.add(sample.name)
    assert found == TRITON.keys()


def scattered_copy(t: Tensor | None) -> Tensor | None:
    """The same numbers, elsewhere in memory: dimensions in reverse, and gaps between the elements."""
    if t is None:
        return None
    order = list(reversed(range(t.ndim)))
    return torch.stack([t.permute(order).contiguous()] * 2, -1)[..., 0].permute(order)


@pytest.mark.parametrize("dtype", HALF)
def test_half_precision_whatever_the_order_of_programs_and_wherever_operands_lie(dtype: torch.dtype) -> None:
    """As PyTorch has it, and the same bits."""
    for seed, sample in enumerate(mine(dtype, every=dtype == torch.float16)):
        right = check(sample.name, sample.constants, *sample.operands, wants=sample.wants)
        with permuted(seed):
            moved = (scattered_copy(t) for t in sample.operands)
            again = run(sample.name, sample.constants, *moved, wants=sample.wants)
        for got, expected in zip(again, right, strict=True):
            assert (got is None) == (expected is None), sample.name
            assert got is None or (expected is not None and torch.equal(got, expected)), sample.name


def test_bits_do_not_depend_on_the_tasks_beside() -> None:
    for sample in mine(torch.float32, every=False):
        over = getattr(sample.constants, "over_tasks", False) or sample.name in ("tasks.sum", "update.rate")
        if over or isinstance(sample.constants, Shape):
            continue
        alone = [t[1:] if t is not None and t.ndim and len(t) == 2 else t for t in sample.operands]
        both = check(sample.name, sample.constants, *sample.operands, wants=sample.wants)
        one = run(sample.name, sample.constants, *alone, wants=sample.wants)
        for got, expected in zip(one, both, strict=True):
            if got is not None and expected is not None and expected.ndim and (len(got), len(expected)) == (1, 2):
                assert torch.equal(got, expected[1:]), sample.name


def test_one_operand_for_all_tasks() -> None:
    seen = set()
    for sample in mine(torch.float64):
        first, *rest = sample.operands
        if (
            first is None
            or first.ndim < 3
            or first.shape[0] != 2
            or sample.name in (*seen, "reduce", "tasks.sum", "embedding.backward")
        ):
            continue
        seen.add(sample.name)
        check(sample.name, sample.constants, first[:1], *rest, wants=sample.wants)


@pytest.mark.filterwarnings("ignore:.*degrees of freedom")
def test_of_no_samples_and_of_no_tasks() -> None:
    for sample in mine(torch.float64):
        if isinstance(sample.constants, Shape) or sample.name.startswith(("pool", "embedding.b")):
            continue  # PyTorch's kernels of these do not take no tasks
        none = [t if t is None or not t.ndim or len(t) != 2 else t[:0] for t in sample.operands]
        check(sample.name, sample.constants, *none, wants=sample.wants)
        none = [t if t is None or t.ndim < 4 else t[:, :0] for t in sample.operands]
        if all(t is None or t.ndim == 4 for t in none):
            check(sample.name, sample.constants, *none, wants=sample.wants)


# --- normalisations ---------------------------------------------------------------------------------------------------

T, N, R, F = 2, 2, 5, 6
NORMS = [
    (Norm.BATCH, 1e-3, 1),
    (Norm.GROUP, 1e-3, 3),
    pytest.param(Norm.GROUP, 1e-3, 1, marks=pytest.mark.slow),
    pytest.param(Norm.GROUP, 1e-3, 6, marks=pytest.mark.slow),
    (Norm.LAYER, 1e-3, 1),
    (Norm.RMS, -1.0, 1),
    (Norm.UNIT, 2.4, 1),  # some rows are shorter
]


def norm_case(given: Normalisation, *shape: int, sets: int) -> tuple[list[Tensor], Tensor, list[Tensor], bool]:
    """(x, d, xt, dt), rstd, (w, wt), whether the kind has a mean."""
    planes = [scattered(*shape) for _ in range(4)]
    centred = given.kind not in (Norm.RMS, Norm.UNIT)
    operands = [planes[0]]
    rstd = TORCH["norm.stats"](part_of("norm.stats", given, operands, (centred, True)), *operands)[1]
    assert rstd is not None
    return planes, rstd, [scattered(sets, given.rows, shape[3]) for _ in range(2)], centred


@pytest.mark.parametrize(("kind", "eps", "groups"), NORMS)
@pytest.mark.parametrize("affine", ["own", pytest.param("a row of three of all tasks", marks=pytest.mark.slow)])
def test_norm(kind: Norm, eps: float, groups: int, affine: str) -> None:
    rows, row, sets = (1, 0, T) if affine == "own" else (3, 1, 1)
    given = Normalisation(int(kind), eps, groups, row, rows, sets == 1)
    (x, d, xt, dt), rstd, (w, wt), centred = norm_case(given, T, N, R, F, sets=sets)
    wants = (centred, True, True, True)
    check("norm.stats", given, x, wants=(centred, True))
    check("norm.sums", given, d, x, rstd, w, wants=wants)
    check("norm.sums", given, d, x, rstd, None, wants=(centred, True, False, False))
    check("norm.sums", given, d, x, rstd, w, wants=(False, False, True, True))
    check("norm.stats_tangent", given, xt, x, rstd, wants=(centred, True))
    present = [(d, dt, xt, w, wt), (None, dt, xt, w, wt), (d, None, xt, None, wt), (d, dt, None, w, wt)]
    present += [(d, None, None, w, None), (d, None, None, w, wt)]
    for own, along, moved, weight, bent in present:
        check("norm.sums_tangent", given, own, along, x, moved, rstd, weight, bent, wants=wants)


@pytest.mark.parametrize(
    ("kind", "groups", "shape"),
    [
        (Norm.BATCH, 1, (1, 7, 200, 3)),
        (Norm.BATCH, 1, (1, 2, 3, 70)),
        (Norm.GROUP, 2, (1, 2, 1100, 6)),
        (Norm.LAYER, 1, (1, 2, 2, 1100)),
    ],
)
def test_norm_of_many(kind: Norm, groups: int, shape: tuple[int, ...]) -> None:
    """More rows than a chunk, more features than a tile."""
    given = Normalisation(int(kind), 1e-3, groups, 0, 1, False)
    (x, d, xt, dt), rstd, (w, wt), _ = norm_case(given, *shape, sets=1)
    with watched() as watch:
        check("norm.stats", given, x)
        check("norm.sums_tangent", given, d, dt, x, xt, rstd, w, wt)
    assert not watch.conflicts


def test_moments_keep_their_digits_beside_a_large_mean() -> None:
    """At most twice PyTorch's error in float32."""
    given, errors = Normalisation(int(Norm.BATCH), 1e-5, 1, 0, 1, False), []
    for seed in range(5):
        x = torch.randn(1, 6, 100, 2, generator=torch.Generator().manual_seed(seed)) + 100
        part = part_of("norm.stats", given, [x])
        exact = TORCH["norm.stats"](part, x.double())[1]
        both = [kernels["norm.stats"](part, x)[1] for kernels in (TRITON, TORCH)]
        errors.append([float((rstd.double() - exact).norm()) for rstd in both])
    ours, theirs = torch.tensor(errors).median(0).values
    assert ours <= 2 * theirs + 2 * torch.finfo(torch.float32).eps


# --- losses -----------------------------------------------------------------------------------------------------------


def often(spec: LossSpec) -> bool:
    """Whether a loss is tried in every run: each kind with its option, as a mean, and one as a sum."""
    return (spec.reduction == "sum") == (spec.kind == "mse") and (spec.p0 > 0 or not spec.info.option)


SPECS = [spec if often(spec) else pytest.param(spec, marks=pytest.mark.slow) for spec in (*LOSS_SPECS, *SOFT)]


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: f"{spec}{'soft' * spec.soft}")
def test_loss(spec: LossSpec) -> None:
    given, z, target = case(spec, ignored=True)
    z, target, seed = z[:2], target[:2], torch.randn(2, dtype=z.dtype)
    ids = None if target.is_floating_point() else target
    mask = some_mask()[:2] if spec.info.ids else None
    c = None
    if mask is not None or ids is not None:
        operands = [mask, ids]
        check("weights.forward", given, *operands)
        c, total = TORCH["weights.forward"](part_of("weights.forward", given, operands), *operands)
        check("weights.backward", given, torch.randn(2, 4, dtype=z.dtype), c, total, ids)
    check("loss.forward", given, z, target, c)
    zt = scattered(*z.shape)
    for moved, seeded in ((zt, seed), (None, seed), (zt, None), (None, None)):
        check("loss.tangent", given, z, moved, target, c, seeded)
        check("loss.data", given, z, moved, target, c, seeded, wants=(ids is None, True))


def test_many_classes_and_elements() -> None:
    """More than a tile has."""
    z, zt, p = scattered(1, 2, 1, 700), scattered(1, 2, 1, 700), scattered(1, 2, 700).softmax(-1)
    ids, c, seed = torch.randint(0, 700, (1, 2)), torch.rand(1, 2).double(), torch.rand(1).double()
    for kind, target in ((1, ids), (5, p), (0, p)):
        given = Loss(kind, 0.1, False, torch.float64)
        check("loss.forward", given, z, target, c)
        check("loss.data", given, z, zt, target, c, seed, wants=(kind != 1, True))


def test_ids_that_are_no_classes_index_nothing() -> None:
    given, z = Loss(1, 0.0, False), torch.randn(1, 4, 1, 3)
    z[0, 0, 0, 1] = -torch.inf
    with watched() as watch:
        each, d = run("loss.forward", given, z, torch.tensor([[0, -1, 3, -100]]), None)
    assert not watch.conflicts
    assert each is not None and each.isnan().tolist() == [[False, True, True, False]] and each[0, 0] < torch.inf
    assert d is not None and d.isnan().flatten(2).any(2).tolist() == each.isnan().tolist()


def test_nan_stays_in_its_sample() -> None:
    z = torch.zeros(2, 3, 1, 2)
    z[0, 1, 0, 0] = float("nan")
    for kind in range(6):
        target = torch.ones(2, 3, dtype=torch.long) if kind == 1 else torch.ones(2, 3, 2)
        check("loss.forward", Loss(kind, 1.0, False), z, target, None)
        check("loss.tangent", Loss(kind, 1.0, False), z, z, target, None, None)


# --- rows and sums ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", list(Softmax))
def test_softmax(kind: Softmax) -> None:
    x, d, dt, yt = (scattered(2, 2, 2, 5) for _ in range(4))
    x[0, 0, 0, 1] = -torch.inf
    x[1, 1] = -torch.inf  # a row without anything is NaN
    check("softmax.forward", int(kind), x)
    y = scattered(2, 2, 2, 5).softmax(-1) if kind == Softmax.SOFTMAX else scattered(2, 2, 2, 5).log_softmax(-1)
    for own, along, moved in ((d, dt, yt), (None, dt, yt), (d, None, yt), (d, dt, None), (d, None, None)):
        check("softmax.back_tangent", int(kind), own, along, y, moved)
    wide = torch.randn(1, 2, 1, 1500, dtype=torch.float64)
    check("softmax.forward", int(kind), wide)
    y = wide.softmax(-1) if kind == Softmax.SOFTMAX else wide.log_softmax(-1)
    check("softmax.back_tangent", int(kind), wide, wide, y, wide)


@pytest.mark.parametrize(
    "shape", [(2, 3, 1, 6), (2, 1, 1, 6), (1, 1, 1, 6), (1, 3, 4, 1), (2, 1, 4, 1), (1, 1, 1, 1), (1, 3, 4, 6)]
)
def test_sums_to_a_shape(shape: tuple[int, ...]) -> None:
    x, b, bt = scattered(2, 3, 4, 6), scattered(2, 1, 4, 1), scattered(2, 1, 4, 1)
    check("reduce", Shape(shape), x)
    check("mul.backward", Shape(shape), x, scattered(2, 3, 4, 6), b, bt)
    check("mul.backward", Shape(shape), x, None, None, bt)
    check("mul.backward", Shape(shape), x, None, b, None)


def test_sums_of_many_are_of_chunks() -> None:
    x = scattered(2, 7, 160, 3)
    assert sum_tile(7 * 160, 3).chunk >= 7 * 160 > sum_tile(160, 3).chunk / 8
    with watched() as watch:
        check("reduce", Shape((2, 1, 1, 3)), torch.randn(2, 70, 71, 3, dtype=torch.float64))
        check("update.rate", Shape(()), *(torch.randn(2, 150, 130, dtype=torch.float64) for _ in range(2)))
        check("reduce", Shape((2, 1, 1, 1)), x)
    assert not watch.conflicts


# --- updates ----------------------------------------------------------------------------------------------------------


RULES = [spec if spec.decayed else pytest.param(spec, marks=pytest.mark.slow) for spec in every_rule()]


@pytest.mark.parametrize("spec", RULES, ids=str)
def test_rule(spec: UpdateSpec) -> None:
    count = len(spec.moments)
    for step, elements in ((0, False), (2, True)):
        given = Rule(spec, step)
        theta, g, lam = (scattered(1, 3, 5) for _ in range(3))
        g[0, 0, 0] = 0
        alpha = torch.rand(1, 3, 5, dtype=g.dtype) if elements else torch.tensor(0.3, dtype=g.dtype)
        s = [scattered(1, 3, 5).square() + 1 if step and i < count else None for i in range(3)]
        mu = [scattered(1, 3, 5) if step and i < count else None for i in range(3)]
        kept = [i < count for i in range(3)]
        check("update.rule", given, theta, g, alpha, *s, HYPER, wants=(True, *kept))
        operands = (theta, g, alpha, *s, lam if step else None, *mu, HYPER)
        check("update.adjoint", given, *operands, wants=(True, True, *kept, True, True))


@pytest.mark.parametrize("rule", ["adam", "rmsprop"])
def test_without_eps_what_had_no_gradient_stays(rule: str) -> None:
    theta, g, lam = torch.ones(2, 1, 2), torch.zeros(2, 1, 2), torch.ones(2, 1, 2)
    alpha, hyper, given, none = torch.tensor(0.1), HYPER.clone(), Rule(UpdateSpec(rule), 0), (None, None, None)
    hyper[-2:] = 0
    kept = (True, rule == "adam", False)
    check("update.rule", given, theta, g, alpha, *none, hyper, wants=(True, *kept))
    check("update.adjoint", given, theta, g, alpha, *none, lam, *none, hyper, wants=(True, True, *kept, True, True))


def test_half_and_shared_parameters() -> None:
    theta, g = torch.randn(1, 3, 700).bfloat16(), torch.randn(2, 3, 700)
    check("update.step", None, theta, g, torch.tensor(0.1))
    check("update.rule", Rule(UpdateSpec("adam"), 0), theta, g, torch.tensor(0.1), None, None, None, HYPER)


def several(shapes: Sequence[tuple[int, ...]]) -> list[Tensor]:
    return [scattered(*shape) for shape in shapes]


@pytest.mark.parametrize(
    ("most", "rates"), [(24, [(), (1, 1, 1300), (2, 1, 1)]), (2, [(), (1, 1, 1), ()])], ids=["mixed", "numbers"]
)
def test_rules_of_several_tensors(most: int, rates: Sequence[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch) -> None:
    """In one launch, or in two: each as PyTorch has it, and the same bits as alone."""
    monkeypatch.setattr(segments, "MOST", most)
    shapes = [(2, 4, 5), (2, 1, 1300), (2, 1, 1)]
    theta, g, m, v, lam, mu = (several(shapes) for _ in range(6))
    given, n, none = Rule(UpdateSpec("adam", decoupled=True, decayed=True), 2), len(shapes), [None] * 3
    alphas = [torch.rand(shape, dtype=torch.float64) for shape in rates]
    own = [theta[0][:1], *theta[1:], *g, *alphas, *m, *(t.square() for t in v), *none]
    cotangents = [None, *lam[1:], mu[0], None, mu[2], *mu, *none]  # some tensors have none
    kept, wants = [True] * (3 * n) + [False] * n, [True] * (4 * n) + [False] * n + [True] * (n + 1)
    with watched() as watch:
        after = check("update.rule", given, *own, HYPER, wants=kept)
        assert watch.launches == -(-n // most)
        before = check("update.adjoint", given, *own, *cotangents, HYPER, wants=wants)
    assert not watch.conflicts
    for i in range(n):
        for name, operands, found, which in (
            ("update.rule", own[i::n], after, kept[i::n]),
            ("update.adjoint", [*own[i::n], *cotangents[i::n]], before, [*wants[i:-1:n], False]),
        ):
            alone = run(name, given, *operands, HYPER, wants=which)
            for got, expected in zip(alone, found[i::n], strict=False):
                assert got is None or got.ndim < 3 or (expected is not None and torch.equal(got, expected)), name


def test_blocks_that_are_taken_for_another_tensors_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative control: all blocks go to the first tensor, and the second is not written."""
    wrong = segments.Segments.of([20, 20], 1024)._replace(firsts=(0, 2))
    monkeypatch.setattr(segments.Segments, "of", lambda *_: wrong)
    operands = [*several([(2, 4, 5)] * 4), *[torch.tensor(0.1).double()] * 2, *[None] * 6]
    with pytest.raises(AssertionError, match="result 1"):
        check("update.rule", Rule(UpdateSpec("sgd", decayed=True), 0), *operands, HYPER, wants=[True] * 2 + [False] * 6)


@pytest.mark.parametrize("most", [24, 1])
@pytest.mark.parametrize("bound", [0.7, 1e3])
def test_clipping(bound: float, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(segments, "MOST", most)
    hyper = HYPER.clone()
    hyper[0] = bound
    gs, hs = ([scattered(*shape) for shape in [(T, 4, 5), (T, 1, 2)]] for _ in range(2))
    scale, *_ = check("update.clip", None, hyper, *gs, wants=[True] * 3)
    check("update.unclip", 2, hyper, scale, *hs, *gs, wants=[True] * 3)
    check("update.unclip", 2, hyper, scale, hs[0], None, *gs, wants=[True] * 3)


def test_clipping_of_nan_and_of_nothing() -> None:
    g = torch.zeros(3, 1, 2)
    g[1, 0, 0] = float("nan")
    scale, _ = check("update.clip", None, HYPER, g)
    check("update.unclip", 1, HYPER, scale, torch.ones_like(g), g, wants=(True, False))


# --- poolings and embeddings ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", POOLS)
def test_pool(name: str) -> None:
    kind, pairs, last = POOLS[name]
    given = Pooling(int(kind), (*(float(v) for pair in pairs for v in pair), float(last)))
    points, wants = pairs[0][0] * pairs[0][1], (True, kind == Pool.MAX)
    x, xt = (torch.randn(2, 1, points, 3, dtype=torch.float64).round(decimals=1) for _ in range(2))  # with ties
    x = x.permute(1, 0, 3, 2).contiguous().permute(1, 0, 3, 2)  # the channels of all tasks in a row
    x[0, 0, 3, 0], x[1, :, :, 1] = float("nan"), -torch.inf
    check("pool.forward", given, x, wants=wants)
    y, index = TORCH["pool.forward"](part_of("pool.forward", given, [x], wants), x)
    assert y is not None
    check("pool.backward", given, scattered(*y.shape), index)
    check("pool.tangent", given, xt, index)


def test_positions_of_16_bits_far_into_an_image() -> None:
    """Times the stride of a row they take more."""
    given = Pooling(int(Pool.MAX), (30.0, 20.0, 14.0, 9.0, 3.0, 3.0, 2.0, 2.0, 0.0, 0.0, 1.0, 1.0, 0.0))
    x, xt = (torch.randn(1, 1, 600, 64) for _ in range(2))
    y, index = TORCH["pool.forward"](part_of("pool.forward", given, [x]), x)
    assert y is not None and index is not None
    check("pool.tangent", given, xt, index.to(torch.int16))
    check("pool.backward", given, torch.randn(y.shape), index.to(torch.int16))


@pytest.mark.parametrize("padding", [-1, 2])
@pytest.mark.parametrize(("sets", "over"), [(2, False), (1, False), (1, True)])
def test_embedding(padding: int, sets: int, over: bool) -> None:
    ids, w, d = torch.randint(0, 7, (2, 3, 5)), scattered(sets, 7, 2), scattered(2, 3, 5, 2)
    ids[0] = 3  # more than are added up at a time
    given = Table(padding, 7, over)
    check("embedding.forward", given, ids, w)
    check("embedding.tangent", given, ids, w)
    with watched() as watch:
        check("embedding.backward", given, d, ids)
    assert not watch.conflicts


def test_ids_beyond_the_table_read_nothing() -> None:
    ids, w = torch.tensor([[[0, -1, 7, 10**9]]]), torch.randn(1, 7, 2)
    with watched() as watch:
        (y,) = run("embedding.forward", Table(-1, 7, False), ids, w)
        (dw,) = run("embedding.backward", Table(-1, 7, False), torch.ones(1, 1, 4, 2), ids)
    assert not watch.conflicts
    assert y is not None and y.isnan().any(3).tolist() == [[[False, True, True, True]]]
    assert dw is not None and dw.sum() == 2 and dw[0, 0].tolist() == [1, 1]


# --- whole meta-steps -------------------------------------------------------------------------------------------------


def convnet_step(backend: str) -> list[Tensor]:
    """Losses and gradients of two steps of a convolution with batch normalisation, pooling and a softmax loss."""
    torch.manual_seed(0)
    layers = [
        nn.Conv2d(1, 2, 3, padding=1),
        nn.BatchNorm2d(2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(8, 3),
    ]
    net = nn.Sequential(*layers).double()
    params = dict(net.named_parameters())
    x, query_x = (torch.randn(2, 3, 1, 4, 4, dtype=torch.float64) for _ in range(2))
    y, query_y = (torch.randint(0, 3, (2, 3)) for _ in range(2))
    sets = {"loss": "cross_entropy", "query_x": query_x, "query_y": query_y}
    result = inner_loop(trace(net, [(1, 4, 4)]), params, x, y, 0.1, steps=2, backend=backend, **sets)
    return [result.loss, *torch.autograd.grad(result.loss.sum(), list(params.values()))]


def adam_step(backend: str) -> list[Tensor]:
    """The same of a perceptron with Adam, clipping, weight decay and weights of samples."""
    rule = UpdateSpec("adam", clipped=True, decayed=True)
    problem = make_case(update=rule, masks=True, loss=LossSpec("huber"), lr="element").requiring_grad()
    loss, output, support_losses, adapted = problem.call(backend)
    whole = sum(t.square().sum() for t in (loss, output, support_losses, *adapted))
    assert isinstance(whole, Tensor)
    return [loss, *torch.autograd.grad(whole, problem.tensors())]


@pytest.mark.parametrize("step", [convnet_step, adam_step])
def test_whole_steps_equal_those_by_pytorch(step: Callable[[str], list[Tensor]]) -> None:
    for got, expected in zip(step("triton"), step("torch"), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-11)


# --- a negative control; those of the watch are in watch.py -----------------------------------------------------------


def test_dropping_a_term_is_noticed() -> None:
    given = Normalisation(int(Norm.BATCH), 1e-3, 1, 0, 1, False)
    (x, d, xt, dt), rstd, (w, wt), _ = norm_case(given, T, N, R, F, sets=T)
    right = run("norm.sums_tangent", given, d, dt, x, xt, rstd, w, wt)
    without = run("norm.sums_tangent", given, d, dt, x, None, rstd, w, wt)
    for at in (1, 2):
        with pytest.raises(AssertionError):
            torch.testing.assert_close(without[at], right[at])
