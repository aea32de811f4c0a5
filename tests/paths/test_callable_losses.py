"""Losses as people write them, on batches of tasks: fused where they can be, always what the callable computes."""

from __future__ import annotations

import copy
import functools
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import callable_losses
from cases.callable_losses import IDS, LIVE, NUMBERS, OTHERS, WEIGHTS, Own
from cases.maml_oracle import assert_same, classification, gradients, mlp, oracle, regression
from torch import Tensor, nn

import mtml
from mtml import MAML
from mtml.paths import cache as _cache
from mtml.paths import loss_reads as _reads
from mtml.paths.as_written import AsWritten
from mtml.paths.fused import Fused
from mtml_kernels.errors import BackendUnavailable

KNOWN = {**{f"ids: {name}": k for name, k in IDS.items()}, **{f"numbers: {name}": k for name, k in NUMBERS.items()}}
STRANGE = {
    **{name: (loss, "class" in name) for name, (loss, _) in LIVE.items()},
    **{
        name: (loss, ids)
        for name, (loss, ids, _) in OTHERS.items()
        if name not in ("raises", "transposed", "unreduced", "cast unseen")
    },
}


@pytest.fixture(autouse=True)
def _quietly() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def data(ids: bool, tasks: int = 3) -> tuple[Tensor, ...]:
    return classification(tasks, 6, 5) if ids else regression(tasks, 6, 5, outputs=4)


def results(maml: MAML, batch: Any, **options: Any) -> list[Any]:
    found = maml.meta_forward(*batch, **options)
    tensors = [p for p in maml.parameters() if p.requires_grad]
    return [*found, *gradients(found.loss, tensors), *gradients(found.support_losses.sum(0), tensors)]


def same_as_general(maml: MAML, batch: Any, **options: Any) -> None:
    kept = {n: getattr(maml, n) for n in ("first_order", "steps", "loss", "query_loss", "params")}
    general = MAML(maml.module, maml.lr, **kept, backend="general")
    assert_same(results(maml, batch, **options), results(general, batch, **options))


def path_of(maml: MAML, batch: Any) -> Any:
    return maml._paths.find(mtml.paths.batch.Batch(*batch), maml.steps, maml.first_order, 0, quiet=True)


FIRST_ORDER = [(f"numbers: {name}", True) for name in ("square", "half", "norm of each")]


@pytest.mark.parametrize(("name", "first_order"), [*((name, False) for name in KNOWN), *FIRST_ORDER])
def test_every_spelling_is_fused_and_right(name: str, first_order: bool) -> None:
    batch = data(name.startswith("ids"))
    maml = MAML(mlp(3, 6, 4), 0.05, steps=2, loss=KNOWN[name].loss, first_order=first_order)
    explained = maml.explain(*batch)
    assert explained.path == "fused" and KNOWN[name].spec.kind in explained.loss and "recognised" in explained.loss
    same_as_general(maml, batch)


@pytest.mark.parametrize("name", STRANGE)
def test_whatever_else_runs_live(name: str) -> None:
    loss, ids = STRANGE[name]
    batch, maml = data(ids), MAML(mlp(3, 6, 4), 0.05, steps=2, loss=loss)
    if name == "random":
        torch.manual_seed(0)
    explained = maml.explain(*batch)
    assert explained.path == "general" and "is not fused: it" in explained.reasons[0], explained
    if name not in ("cast", "bce unguarded", "in place"):  # what is wrong to 1e-9, or cannot run twice
        same_as_general(maml, batch)


@pytest.mark.parametrize("name", [name for name, known in KNOWN.items() if known.weighs])
def test_masks_weigh_the_samples(name: str) -> None:
    batch = data(name.startswith("ids"))
    masks = {"support_mask": torch.rand(3, 6).double(), "query_mask": torch.randint(2, (3, 5)).bool()}
    masks["support_mask"][1, 2:] = 0.0
    maml = MAML(mlp(3, 6, 4), 0.05, steps=2, loss=KNOWN[name].loss)
    same_as_general(maml, batch, **masks)
    assert isinstance(next(iter(maml._paths.now.calls.values())), Fused | AsWritten)  # type: ignore[union-attr]


def test_a_scalar_is_not_weighed_by_a_mask() -> None:
    maml, batch = MAML(mlp(3, 6, 4), 0.05, loss=lambda o, t: F.cross_entropy(o, t)), data(True)
    with pytest.raises(ValueError, match="returned a scalar"):
        maml.meta_loss(*batch, query_mask=torch.ones(3, 5))


def test_ignored_ids() -> None:
    """Where the callable passes over them as the engine does, and where each is a loss of zero that counts."""
    batch = data(True)
    batch[1][:, ::2], batch[3][1, 3] = -100, -100
    for name in ("cross_entropy", "nll_loss", "sum", "mixed", "per sample"):
        same_as_general(MAML(mlp(3, 6, 4), 0.05, steps=2, loss=IDS[name].loss), batch)
    maml = MAML(mlp(3, 6, 4), 0.05, steps=2, loss=IDS["per sample"].loss)
    same_as_general(maml, data(True))
    assert path_of(maml, batch).live is None
    same_as_general(maml, batch, support_mask=torch.rand(3, 6).double())
    maml.meta_loss(*batch)
    assert path_of(maml, batch).live is not None
    same_as_general(maml, data(True))
    by_name = MAML(mlp(3, 6, 4), 0.05, loss=IDS["per sample"].loss, backend="reference")
    by_name.meta_loss(*data(True))
    with pytest.raises(BackendUnavailable, match="class ids below 0"):
        by_name.meta_loss(*batch)


def test_the_first_batch_with_other_ids_is_told_of() -> None:
    maml, batch = MAML(mlp(3, 6, 4), 0.05, loss=IDS["per sample"].loss), data(True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        maml.meta_loss(*batch)
        batch[1][0, 0] = -100
        maml.meta_loss(*batch)
    with pytest.warns(mtml.FallbackWarning, match="class ids below 0"):
        maml.meta_loss(*batch)


@pytest.mark.parametrize("rate", ["number", "tensor", "each", "learned"])
def test_factors_and_rates(rate: str) -> None:
    model, batch = mlp(3, 6, 4), data(False)
    lr: Any = {
        "number": 0.05,
        "tensor": torch.tensor([0.05, 0.03], dtype=torch.float64, requires_grad=True),
        "each": {name: 0.04 for name, _ in model.named_parameters()},
        "learned": mtml.InnerLR(model, 0.05, per="tensor", steps=2),
    }[rate]
    half, each = NUMBERS["half"].loss, NUMBERS["norm of each"].loss
    maml = MAML(model, lr, steps=2, loss=half, query_loss=each)
    explained = maml.explain(*batch)
    assert (explained.loss, explained.query_loss) == (
        "0.5 x mse (recognised: <lambda>)",
        "4 x mse (recognised: <lambda>)",
    )
    same_as_general(maml, batch)
    same_as_general(maml, batch, step_weights=[0.1, 0.2, 0.7])
    if rate == "tensor":
        loss = maml.meta_loss(*batch)
        general = MAML(model, lr, steps=2, loss=half, query_loss=each, backend="general").meta_loss(*batch)
        assert_same(gradients(loss, [lr]), gradients(general, [lr]))
    adapted = maml.adapt_tasks(*batch[:2])
    trajectory = oracle(model, batch, half, 0.05, 2).trajectory if rate == "number" else None
    if trajectory is not None:
        assert_same(list(adapted.params.values()), list(trajectory[-1].values()))
        assert_same(adapted.loss(*batch[2:]), maml.meta_loss(*batch))


def test_one_loss_by_name_and_one_as_written() -> None:
    batch = data(False)
    for loss, query in (
        ("mse", NUMBERS["half"].loss),
        (NUMBERS["half"].loss, nn.L1Loss()),
        ("mse", NUMBERS["l1"].loss),
    ):
        maml = MAML(mlp(3, 6, 4), 0.05, steps=2, loss=loss, query_loss=query)
        assert maml.explain(*batch).path == "fused"
        same_as_general(maml, batch)


def test_flat_targets() -> None:
    sx, _, qx, _ = regression(3, 6, 5, outputs=1)
    batch = (sx, torch.randn(3, 6, dtype=torch.float64), qx, torch.randn(3, 5, dtype=torch.float64))
    maml = MAML(mlp(3, 6, 1), 0.05, steps=2, loss=lambda o, t: F.mse_loss(o.squeeze(-1), t))
    assert maml.explain(*batch).path == "fused"
    same_as_general(maml, batch)
    maml = MAML(mlp(3, 6, 1), 0.05, steps=2, loss=lambda o, t: ((o - t) ** 2).mean())  # [N, 1] and [N]: every pair
    assert maml.explain(*batch).path == "general"
    same_as_general(maml, batch)


def test_a_head_alone_and_a_trunk_once() -> None:
    batch = data(True)
    for model, params in ((nn.Linear(3, 4).double(), None), (mlp(3, 6, 4), "2.*")):
        for name in ("cross_entropy", "in bits", "per sample"):
            maml = MAML(model, 0.05, steps=3, loss=IDS[name].loss, params=params)
            assert maml.explain(*batch).path == "fused"
            same_as_general(maml, batch)


def test_float_ids_run_live() -> None:
    sx, sy, qx, qy = data(True)
    maml = MAML(mlp(3, 6, 4), 0.05, steps=2, loss=lambda o, t: F.cross_entropy(o, t.long()))
    batch = (sx, sy.double(), qx, qy.double())
    assert maml.explain(*batch).path == "general"
    same_as_general(maml, batch)
    assert maml.explain(sx, sy.int(), qx, qy.short()).path == "fused"
    same_as_general(maml, (sx, sy.int(), qx, qy.short()))


def test_targets_that_require_grad_are_fused() -> None:
    """The gradient in the target is compared as well before a callable counts as recognised."""
    sx, sy, qx, qy = data(False)
    maml = MAML(mlp(3, 6, 4), 0.05, steps=2, loss=NUMBERS["half"].loss)
    general = MAML(maml.module, 0.05, steps=2, loss=NUMBERS["half"].loss, backend="general")
    targets = [sy.requires_grad_(), qy.requires_grad_()]
    assert maml.explain(sx, sy, qx, qy).path == "fused"
    found, expected = (torch.autograd.grad(m.meta_loss(sx, sy, qx, qy).sum(), targets) for m in (maml, general))
    assert_same(found[0], expected[0])
    assert_same(found[1], expected[1])


def test_float32_and_targets_of_another_dtype() -> None:
    batch = tuple(t.float() for t in data(False))
    maml = MAML(mlp(3, 6, 4).float(), 0.05, steps=2, loss=NUMBERS["half"].loss)
    assert maml.explain(*batch).path == "fused"
    general = MAML(maml.module, 0.05, steps=2, loss=NUMBERS["half"].loss, backend="general")
    assert_same(maml.meta_loss(*batch), general.meta_loss(*batch), rtol=1e-5, atol=1e-6)
    wide = (batch[0], batch[1].double(), batch[2], batch[3].double())
    assert_same(maml.meta_loss(*wide), general.meta_loss(*wide), rtol=1e-5, atol=1e-6)  # PyTorch promotes them
    assert maml.explain(*wide).path == "general"


def test_each_size_has_its_own_verdict() -> None:
    """A loss may look at shapes."""
    maml = MAML(mlp(3, 6, 4), 0.05, loss=lambda o, t: F.mse_loss(o, t) if len(o) == 6 else 3.0 * F.l1_loss(o, t))
    batch = data(False)
    explained = maml.explain(*batch)
    assert (explained.loss, explained.query_loss) == ("mse (recognised: <lambda>)", "3 x l1 (recognised: <lambda>)")
    same_as_general(maml, batch)
    swapped = (*batch[2:], *batch[:2])
    assert maml.explain(*swapped).loss == "3 x l1 (recognised: <lambda>)"
    same_as_general(maml, swapped)


def test_a_backend_by_name_says_why() -> None:
    maml = MAML(mlp(3, 6, 4), 0.05, loss=lambda o, t: F.mse_loss(o, t).clamp(max=1.0), backend="reference")
    with pytest.raises(BackendUnavailable, match="it uses 'clamp', which no fused loss is made of"):
        maml.meta_loss(*data(False))


# --- changes ----------------------------------------------------------------------------------------------------------

FACTOR = 1.0


def helper(output: Tensor, target: Tensor) -> Tensor:
    return FACTOR * F.mse_loss(output, target)


def _closure() -> tuple[Callable[..., Any], Callable[[float], None]]:
    factor = 1.0

    def loss(output: Tensor, target: Tensor) -> Tensor:
        return factor * F.mse_loss(output, target)

    def write(value: float) -> None:
        nonlocal factor
        factor = value

    return loss, write


def _default() -> Callable[..., Any]:
    def loss(output: Tensor, target: Tensor, factor: float = 1.0) -> Tensor:
        return factor * F.mse_loss(output, target)

    return loss


def _keyword() -> Callable[..., Any]:
    def loss(output: Tensor, target: Tensor, *, factor: float = 1.0) -> Tensor:
        return factor * F.mse_loss(output, target)

    return loss


class Setting(nn.Module):
    shared = 1.0

    def __init__(self) -> None:
        super().__init__()
        self.factor, self.inner = 1.0, nn.HuberLoss()

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        return self.factor * self.shared * (self.inner(output, target) if self.training else output.sum())


huber = nn.HuberLoss()


def changes() -> dict[str, tuple[Callable[..., Any], Callable[[pytest.MonkeyPatch], Any]]]:
    """A loss, and what changes it."""
    here, own = sys.modules[__name__], [Setting() for _ in range(5)]
    closed, write = _closure()
    default, keyword, coded = _default(), _keyword(), _default()
    partial = functools.partial(_default(), factor=1.0)
    kind = type("Own", (Setting,), {})()
    other = lambda o, t: 5.0 * (o - t).abs().mean()  # noqa: E731
    return {
        "global": (lambda o, t: FACTOR * F.mse_loss(o, t), lambda m: m.setattr(here, "FACTOR", 3.0)),
        "global of a helper": (lambda o, t: helper(o, t), lambda m: m.setattr(here, "FACTOR", 3.0)),
        "helper": (lambda o, t: helper(o, t), lambda m: m.setattr(here, "helper", other)),
        "cell": (closed, lambda m: write(3.0)),
        "default": (default, lambda m: m.setattr(default, "__defaults__", (3.0,))),
        "keyword's default": (keyword, lambda m: keyword.__kwdefaults__.update(factor=3.0)),
        "code": (coded, lambda m: m.setattr(coded, "__code__", other.__code__)),
        "partial": (partial, lambda m: partial.keywords.update(factor=3.0)),
        "attribute": (own[0], lambda m: setattr(own[0], "factor", 3.0)),
        "part's attribute": (own[1], lambda m: setattr(own[1].inner, "delta", 0.2)),
        "part": (own[2], lambda m: setattr(own[2], "inner", nn.MSELoss())),
        "mode": (own[3], lambda m: own[3].eval()),
        "hook": (own[4], lambda m: own[4].register_forward_hook(lambda n, a, out: 3.0 * out)),
        "class attribute": (kind, lambda m: m.setattr(type(kind), "shared", 3.0)),
        "forward": (kind, lambda m: m.setattr(type(kind), "forward", lambda s, o, t: other(o, t), raising=False)),
        "module in a global": (lambda o, t: huber(o, t), lambda m: m.setattr(huber, "delta", 0.2)),
        "module in a global replaced": (lambda o, t: huber(o, t), lambda m: m.setattr(here, "huber", nn.MSELoss())),
        "PyTorch's function": (lambda o, t: F.mse_loss(o, t), lambda m: m.setattr(F, "mse_loss", other)),
        "PyTorch's layer": (lambda o, t: nn.L1Loss()(o, t), lambda m: m.setattr(nn.L1Loss, "forward", _forward)),
        "PyTorch's function within a module": (
            lambda o, t: nn.L1Loss()(o, t),
            lambda m: m.setattr(F, "l1_loss", _patched),
        ),
    }


def _forward(self: Any, output: Tensor, target: Tensor) -> Tensor:
    return _patched(output, target)


def _patched(output: Tensor, target: Tensor, **_: Any) -> Tensor:
    return 5.0 * (output - target).square().mean()


@pytest.mark.parametrize("name", changes())
def test_a_change_is_followed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    loss, change = changes()[name]
    maml, batch = MAML(mlp(3, 6, 4), 0.05, steps=2, loss=loss), data(False)
    assert maml.explain(*batch).path == "fused"
    before = results(maml, batch)
    same_as_general(maml, batch)
    change(monkeypatch)
    assert not torch.allclose(results(maml, batch)[0], before[0]), "the change must show"
    same_as_general(maml, batch)
    same_as_general(maml, batch)  # from the cache


def test_a_constant_that_changes_at_every_call_is_no_longer_prepared_for(monkeypatch: pytest.MonkeyPatch) -> None:
    loss, write = _closure()
    maml, batch = MAML(mlp(3, 6, 4), 0.05, steps=2, loss=loss), data(False)
    for step in range(_reads.CHANGES + 2):
        write(1.0 + step)
        same_as_general(maml, batch)
    assert "changes from call to call" in maml.explain(*batch).reasons[0]
    live = MAML(maml.module, 0.05, steps=2, loss=loss, backend="general")
    live.meta_loss(*batch)
    monkeypatch.setattr(_cache, "PathFinder", lambda *_: pytest.fail("prepared again"))
    for step in range(3):
        write(0.1 * step)
        assert_same(maml.meta_loss(*batch), live.meta_loss(*batch))


mean = 0.0


def test_a_global_of_the_same_name_as_a_method_is_not_what_the_loss_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    global mean
    maml, batch = MAML(mlp(3, 6, 4), 0.05, loss=lambda o, t: (o - t).square().mean()), data(False)
    maml.meta_loss(*batch)
    monkeypatch.setattr(_cache.PathCache, "finder", lambda *_: pytest.fail("prepared again"))
    for _ in range(3):
        mean = mean + 1.0
        maml.meta_loss(*batch)


def test_a_loss_set_later_and_a_copy() -> None:
    maml, batch = MAML(mlp(3, 6, 4), 0.05, steps=2, loss="mse"), data(False)
    same_as_general(maml, batch)
    maml.loss = lambda o, t: 2.0 * F.l1_loss(o, t)
    same_as_general(maml, batch)
    assert maml.explain(*batch).loss == "2 x l1 (recognised: <lambda>)"
    twin = copy.deepcopy(maml)
    same_as_general(twin, batch)


def test_live_losses_are_called_at_every_call() -> None:
    for name in ("list", "counter"):
        callable_losses.log.clear()
        callable_losses.count = 0
        maml, batch = MAML(mlp(3, 6, 4), 0.05, steps=2, loss=LIVE[name][0]), data(False)
        maml.meta_loss(*batch)
        for _ in range(2):
            before = len(callable_losses.log) + callable_losses.count
            maml.meta_loss(*batch)
            assert len(callable_losses.log) + callable_losses.count > before


def test_anything_that_is_looked_into_is_left_as_it_was() -> None:
    weights = WEIGHTS.clone()
    own = Own()
    state = dict(vars(own))
    MAML(mlp(3, 6, 4), 0.05, loss=own).explain(*data(True))
    assert torch.equal(WEIGHTS, weights) and vars(own) == state
