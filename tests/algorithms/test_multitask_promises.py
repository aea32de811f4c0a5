"""mtml.MultiTaskMAML: weightings, balancing, rates, rules, transfer, checkpoints, and what is refused."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from cases import multitask as cases
from cases.ranks import together
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import mtml
from mtml.distributed import shard_tasks
from mtml.weighting.make import NAMED

pytestmark = pytest.mark.filterwarnings("ignore::mtml.FallbackWarning")
VECTORS = ("class", "value", "label")
HEADS = {name: cases.HEADS[name] for name in VECTORS}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def made(**options: Any) -> mtml.MultiTaskMAML:
    return mtml.MultiTaskMAML(cases.dense(), HEADS, **({"lr": 0.3, "steps": 2} | options))


def data() -> dict[str, mtml.TaskBatch]:
    return {name: batch for name, batch in cases.batches().items() if name in VECTORS}


@pytest.mark.parametrize("weighting", [*NAMED, {"value": 0.5}], ids=str)
def test_a_weighting_makes_the_groups_losses_one(weighting: Any) -> None:
    model = made(weighting=weighting)
    found = model.meta_loss(data())
    twin = mtml.MultiHead(3, HEADS, weighting).weighting
    if weighting == "gradnorm":
        norms = mtml.balance.gram(found.per_group, model.trunk.parameters()).diagonal().sqrt()
    else:
        norms = None
    losses = torch.stack(list(found.per_group.values()))
    torch.testing.assert_close(found.total, twin(losses, losses != 0, norms))
    found.total.backward()
    assert all(p.grad is not None for p in model.parameters())


def test_an_absent_group_moves_nothing() -> None:
    model, some = made(weighting="uncertainty"), data()
    del some["value"]
    found = model.meta_loss(some)
    found.total.backward()
    assert found.per_group["value"] == 0 and "value" not in found.per_task
    assert model.weighting.log_vars.grad[1] == 0 and model.heads["value"].weight.grad is None


@pytest.mark.parametrize("method", sorted(mtml.balance.METHODS))
def test_gradients_are_balanced_at_the_trunk(method: str) -> None:
    pytest.importorskip("scipy")
    model = made()
    found = model.meta_loss(data())
    trunk = list(model.trunk.parameters())
    rows = [torch.autograd.grad(loss, trunk, retain_graph=True) for loss in found.per_group.values()]
    own = torch.autograd.grad(found.per_group["value"], model.heads["value"].weight, retain_graph=True)[0]
    options = {"generator": torch.Generator().manual_seed(1)} if method == "pcgrad" else {}
    result = mtml.balance.backward(found.per_group, method=method, shared=trunk, **options)
    weights = result.weights.float()
    for i, p in enumerate(trunk):
        torch.testing.assert_close(p.grad, sum(w * row[i] for w, row in zip(weights, rows, strict=True)))
    torch.testing.assert_close(model.heads["value"].weight.grad, own)


def test_rates_are_learned_for_each_group_or_for_all() -> None:
    each = made(lr=lambda model: mtml.InnerLR(model, 0.3, per="tensor", params="head.*"))
    one = made(lr=mtml.InnerLR(cases.dense(), 0.3))
    fixed = made()
    one.load_state_dict(fixed.state_dict(), strict=False)
    each.load_state_dict(fixed.state_dict(), strict=False)
    assert [key for key in each.state_dict() if key.startswith("lr.")][:2] == ["lr.class.rates.0", "lr.class.rates.1"]
    assert [key for key in one.state_dict() if key.startswith("lr.")] == ["lr.rates.0"]
    some = data()
    losses = [model.meta_loss(some).total for model in (fixed, one, each)]
    torch.testing.assert_close(losses[0], losses[1])
    torch.testing.assert_close(losses[0], losses[2])
    losses[2].backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in each.lr.parameters())


def test_groups_may_have_rates_and_adapted_tensors_of_their_own() -> None:
    rates = {"class": 0.1, "value": 0.0, "label": 0.2}
    model = made(lr=rates, params={"class": "*", "value": None, "label": "head.bias"})
    names = {name: found.adapted for name, found in model.explain(data()).items()}
    assert "trunk.0.weight" in names["class"] and names["value"] == ["head.weight", "head.bias"]
    assert names["label"] == ["head.bias"]
    some = data()
    unmoved = model.meta_loss(some, steps=0).per_task["value"]
    torch.testing.assert_close(model.meta_loss(some).per_task["value"], unmoved)  # its rate is 0


@pytest.mark.parametrize("rule", [mtml.inner.SGD(momentum=0.9), mtml.inner.Adam()], ids=["momentum", "adam"])
def test_update_rules_are_those_of_maml(rule: Any) -> None:
    model, some = made(update=rule, lr=0.05), data()
    head = nn.Linear(cases.WIDTH, 3)
    head.load_state_dict(model.heads["class"].state_dict())
    maml = mtml.MAML(head, 0.05, steps=2, update=rule)
    batch = some["class"]
    expected = maml.meta_loss(model.trunk(batch.sx), batch.sy, model.trunk(batch.qx), batch.qy)
    torch.testing.assert_close(model.meta_loss(some).per_task["class"], expected)


def test_a_task_has_the_bits_that_it_has_alone() -> None:
    """Of the inner loop: the same features in, the trunk being PyTorch's."""
    heads = {"a": mtml.Classification(3), "b": mtml.Classification(3)}
    model = mtml.MultiTaskMAML(nn.Identity(), heads, lr=0.3, steps=4, in_features=6)
    batches = {name: mtml.TaskBatch(torch.randn(5, 7, 6), torch.randint(3, (5, 7)), torch.randn(5, 4, 6),
                                    torch.randint(3, (5, 4))) for name in heads}  # fmt: skip
    whole = model.meta_loss(batches).per_task
    for name, batch in batches.items():
        for t in range(5):
            one = mtml.TaskBatch(*(None if part is None else part[t : t + 1] for part in batch))
            assert torch.equal(model.meta_loss({name: one}).per_task[name], whole[name][t : t + 1])


def test_transfer_goes_on_from_the_meta_learned_start() -> None:
    model, batch = made(), data()["class"]
    adapted = model.transfer("class", None, batch.sx, batch.sy, steps=2)
    torch.testing.assert_close(adapted.loss(batch), model.meta_loss({"class": batch}).per_task["class"])
    assert adapted(batch.qx).shape == (3, 4, 3) and adapted.support_losses.shape == (2, 3)
    kept = model.transfer("class", None, batch.sx, batch.sy, steps=4, keep_steps=True)
    torch.testing.assert_close(kept(batch.qx, step=2), adapted(batch.qx))
    one = kept.detach().some(slice(1, 2))
    torch.testing.assert_close(one.loss(batch.qx[1:2], batch.qy[1:2]), kept.loss(batch)[1:2].detach())


@pytest.mark.parametrize("params", [None, "*"])
@pytest.mark.parametrize("name", ["class", "pixel", "token"])
def test_adapted_weights_save_and_load(name: str, params: Any, tmp_path: Path) -> None:
    model = mtml.MultiTaskMAML(cases.trunks(), cases.HEADS, lr=0.1, params=params)
    batch = cases.batches()[name]
    head = mtml.Tokens(5) if name == "token" else type(cases.HEADS[name])(5)
    adapted = model.transfer("new", head, batch.sx, batch.sy % 5, steps=3, trunk=name)
    assert adapted.support_losses[-1].mean() < adapted.support_losses[0].mean()
    torch.save(adapted.detach(), tmp_path / "adapted.pt")
    again = torch.load(tmp_path / "adapted.pt", weights_only=False)
    torch.testing.assert_close(again(batch.qx), adapted(batch.qx).detach())
    torch.save(adapted.task(1).state_dict(), tmp_path / "task.pt")
    other = mtml.MultiTaskMAML(cases.trunks(), cases.HEADS, lr=0.1).transfer(
        "new", head, batch.sx, batch.sy % 5, steps=0, trunk=name, lr=0.1
    )
    module = other.task(0)
    module.load_state_dict(torch.load(tmp_path / "task.pt"))
    torch.testing.assert_close(module(batch.qx[1]), adapted(batch.qx)[1])


def test_a_checkpoint_restores_everything() -> None:
    model, some = made(weighting="rlw", lr=lambda m: mtml.InnerLR(m, 0.1, params="head.*")), data()
    model.meta_loss(some)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other = made(weighting="rlw", lr=lambda m: mtml.InnerLR(m, 0.2, params="head.*"))
    other.load_state_dict(torch.load(file))
    assert torch.equal(model.meta_loss(some).total, other.meta_loss(some).total)
    keys = list(made(weighting="uncertainty").state_dict())
    assert keys[:1] == ["trunk.0.weight"] and keys[4:6] == ["heads.class.weight", "heads.class.bias"]
    assert keys[-1] == "weighting.log_vars"


def test_changes_between_calls_are_followed() -> None:
    model, some = made(), data()
    first = model.meta_loss(some)
    model.lr = 0.0
    unmoved = model.meta_loss(some)
    torch.testing.assert_close(unmoved.total, model.meta_loss(some, steps=0).total)
    assert not torch.allclose(first.total, unmoved.total)
    model.lr, model.params = 0.3, "*"
    whole = model.meta_loss(some).total
    assert not torch.allclose(first.total, whole)
    model.params, model.trunk = None, nn.Linear(4, cases.WIDTH)
    model.meta_loss(some).total.backward()
    assert model.trunk.weight.grad is not None
    model.heads["class"].weight.data.zero_()
    model.heads["class"].bias.data.zero_()
    torch.testing.assert_close(model.meta_loss(some, steps=0).per_group["class"], torch.tensor(3.0).log())


def test_rates_by_name_are_those_of_all_groups() -> None:
    model, some = made(lr={"head.weight": 0.0, "head.bias": 0.3}), data()
    adapted = model.transfer("new", mtml.Classification(3), some["class"].sx, some["class"].sy)
    assert adapted.params["head.weight"].abs().max() == 0 and adapted.params["head.bias"].abs().max() > 0


def test_copies_are_their_own() -> None:
    model, some = made(), data()
    before = model.meta_loss(some).total
    other = copy.deepcopy(model)
    with torch.no_grad():
        for p in other.parameters():
            p.add_(1.0)
    assert torch.equal(model.meta_loss(some).total, before) and not torch.equal(other.meta_loss(some).total, before)
    exact = other.double().meta_loss({name: batch.to(torch.float64) for name, batch in some.items()})
    assert exact.total.dtype == torch.float64 and exact.total.isfinite()


def test_batch_norm_trunks_take_statistics_over_all_samples() -> None:
    trunk = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6))
    model, batch = mtml.MultiTaskMAML(trunk, {"class": mtml.Classification(3)}, lr=0.1), data()["class"]
    seen = trunk[1].num_batches_tracked.clone()
    model.meta_loss({"class": batch}).total.backward()
    assert trunk[1].num_batches_tracked == seen + 1
    model.eval()
    model.meta_loss({"class": batch})
    assert trunk[1].num_batches_tracked == seen + 1


def test_one_trunk_may_serve_pixels_and_samples() -> None:
    """Heads of one prediction a sample read the mean over pixels."""
    heads = {"pixel": mtml.Segmentation(3), "class": mtml.Classification(3)}
    model = mtml.MultiTaskMAML(cases.conv(), heads, lr=0.1)
    x = torch.randn(2, 3, 1, 4, 3)
    pixels, ids = torch.randint(3, (2, 3, 4, 3)), torch.randint(3, (2, 3))
    model.meta_loss({"pixel": mtml.TaskBatch(x, pixels, x, pixels), "class": mtml.TaskBatch(x, ids, x, ids)})
    adapted = model.transfer("class", None, x, ids)
    torch.testing.assert_close(adapted(x)[0], adapted.task(0)(x[0]))


def test_explain_has_a_line_a_group(capsys: pytest.CaptureFixture[str]) -> None:
    model = mtml.MultiTaskMAML(cases.trunks(), cases.HEADS, lr=0.1)
    found = model.explain(cases.batches())
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == list(cases.HEADS) == list(found)
    assert all(explanation.path == "fused" for explanation in found.values())


@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("params", [None, "*"])
def test_autocast_is_near_float32(steps: int, params: Any) -> None:
    model = mtml.MultiTaskMAML(cases.trunks(), cases.HEADS, lr=0.1, steps=steps, params=params)
    some = cases.batches(masks=True)
    expected = model.meta_loss(some).per_group
    with torch.autocast("cpu", torch.bfloat16):
        found = model.meta_loss(some)
    found.total.backward()
    for name, loss in found.per_group.items():
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss, expected[name], rtol=0.05, atol=0.02)


def test_no_grad_adapts_and_saves_nothing() -> None:
    model, some = made(), data()
    expected = model.meta_loss(some)
    with torch.no_grad():
        found = model.meta_loss(some)
    torch.testing.assert_close(found.total, expected.total.detach())
    assert not found.total.requires_grad


def test_torch_compile_gives_the_same() -> None:
    model, some = made(), data()
    expected = model.meta_loss(some).total
    expected.backward()
    grads = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    found = torch.compile(lambda batches: model.meta_loss(batches).total, fullgraph=True, backend="aot_eager")(some)
    found.backward()
    torch.testing.assert_close(found, expected)
    for p, grad in zip(model.parameters(), grads, strict=True):
        torch.testing.assert_close(p.grad, grad)


def test_torch_compile_names_what_no_graph_does() -> None:
    model, some = made(weighting="gradnorm"), data()
    with pytest.raises(Exception, match="no graph does that"):
        torch.compile(lambda batches: model.meta_loss(batches).total, fullgraph=True, backend="eager")(some)


def test_explaining_changes_nothing() -> None:
    trunk = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.5))
    model = mtml.MultiTaskMAML(trunk, {"class": mtml.Classification(3)}, lr=0.1)
    before, some = copy.deepcopy(model.state_dict()), data()
    drawn = torch.get_rng_state()
    model.explain({"class": some["class"]})
    assert all(torch.equal(before[name], now) for name, now in model.state_dict().items())
    assert torch.equal(drawn, torch.get_rng_state())


def _shared(folder: Path) -> list[Tensor]:
    """Gradients of this rank, its tasks being a share of those that all have."""
    torch.manual_seed(0)
    model, some = made(), data()
    dist.init_process_group("gloo")
    wrapped = DistributedDataParallel(model)
    shares = {name: shard_tasks(batch) for name, batch in some.items()}
    wrapped(shares, tasks={name: batch.tasks for name, batch in some.items()}).total.backward()
    dist.destroy_process_group()
    return [p.grad for p in model.parameters()]


@pytest.mark.parametrize("weights", [None, [1.0, 2.0, 3.0]])
def test_the_usual_ignored_id_is_none_where_another_is_ignored(weights: Any) -> None:
    head = mtml.Classification(3, ignore_index=0, class_weights=weights)
    model = mtml.MultiTaskMAML(nn.Identity(), {"label": head}, lr=0.1, in_features=4)
    x, y = torch.randn(2, 5, 4), torch.randint(3, (2, 5))
    wrong = y.clone()
    wrong[1, 2] = -100
    with pytest.raises(ValueError, match="label"):
        model.meta_loss({"label": mtml.TaskBatch(x, wrong, x, y)})


@pytest.mark.slow
def test_ranks_average_to_the_whole(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, some = made(), data()  # 3, 2 and 1 tasks: one rank has none of the last group
    model.meta_loss(some).total.backward()
    for grads in together(_shared, tmp_path):
        for p, grad in zip(model.parameters(), grads, strict=True):
            torch.testing.assert_close(grad, p.grad)


X, IDS = torch.randn(2, 3, 4), torch.randint(3, (2, 3))
BATCH = mtml.TaskBatch(X, IDS, X, IDS)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: mtml.MultiTaskMAML(cases.dense(), {}, 0.1), ValueError, "heads: expected at least one"),
        (lambda: mtml.MultiTaskMAML(cases.dense(), {"a": nn.Linear(1, 1)}, 0.1), TypeError, "heads\\['a'\\]"),
        (lambda: mtml.MultiTaskMAML({"b": cases.dense()}, {"a": mtml.Regression(1)}, 0.1), ValueError, "trunk"),
        (lambda: mtml.MultiTaskMAML({}, {"a": mtml.Regression(1)}, 0.1), ValueError, "trunk: expected one for each"),
        (lambda: mtml.MultiTaskMAML(3, {"a": mtml.Regression(1)}, 0.1), TypeError, "trunk: expected an nn.Module"),
        (lambda: mtml.MultiTaskMAML(nn.Identity(), {"a": mtml.Regression(1)}, 0.1), ValueError, "in_features"),
        (lambda: made(lr={"class": 0.1}), ValueError, "lr: expected {group"),
        (lambda: made(params="nothing.*"), ValueError, "params: 'nothing"),
        (lambda: made(weighting="best"), ValueError, "weighting"),
        (lambda: made(steps=-1), ValueError, "steps"),
        (lambda: made(backend="none"), ValueError, "backend"),
        (lambda: made().meta_loss(BATCH), TypeError, "batches: expected {group: TaskBatch}"),
        (lambda: made().meta_loss({}), TypeError, "batches"),
        (lambda: made().meta_loss({"other": BATCH}), ValueError, "batches: expected a group out of class, value"),
        (lambda: made().meta_loss({"class": (X, IDS)}), TypeError, "batches\\['class'\\]: expected a TaskBatch"),
        (lambda: made().meta_loss({"class": BATCH._replace(qx=X[:1], qy=IDS[:1])}), ValueError, "the same T"),
        (lambda: made().meta_loss({"class": BATCH._replace(sy=IDS[:, :2])}), ValueError, "class.sy: expected targets"),
        (lambda: made().meta_loss({"class": BATCH._replace(sx=X[..., :3])}), RuntimeError, "shapes"),
        (lambda: made().meta_loss({"class": BATCH._replace(support_mask=torch.ones(2))}), ValueError, "mask of"),
        (lambda: made().meta_loss({"value": BATCH}), ValueError, "value.sy"),
        (lambda: made(params="*").meta_loss({"value": BATCH}), ValueError, "value.sy"),
        (lambda: made().meta_loss({"class": BATCH._replace(sy=IDS + 9)}), ValueError, "sy"),
        (lambda: mtml.MultiTaskMAML(nn.Linear(4, 6), {"class": mtml.Segmentation(3)}, 0.1).meta_loss({"class": BATCH}),
         ValueError, "trunk: expected features \\[N, D, H, W\\]"),
        (lambda: mtml.MultiTaskMAML(nn.GRU(4, 6), {"class": mtml.Tokens(3)}, 0.1).meta_loss({"class": BATCH._replace(
            sx=X[:, :, None], qx=X[:, :, None], sy=IDS[:, :, None], qy=IDS[:, :, None])}), TypeError, "output\\[0\\]"),
        (lambda: made().transfer("new", None, X, IDS), ValueError, "name: expected a group"),
        (lambda: made().transfer("class", None, X[0, 0], IDS), ValueError, "sx: expected inputs \\[T, N"),
        (lambda: made().meta_loss({"class": BATCH}, tasks={}), ValueError, "tasks: expected"),
        (lambda: made().meta_loss({"class": BATCH}, tasks=3), TypeError, "tasks: expected {group: number of tasks}"),
        (lambda: made().meta_loss({"class": BATCH}, tasks={"class": "3"}), TypeError, "tasks: expected an int"),
        (lambda: made().transfer("new", 3, X, IDS), TypeError, "heads\\['new'\\]"),
        (lambda: made(lr=dict.fromkeys(VECTORS, 0.1)).transfer("new", HEADS["class"], X, IDS), ValueError, "lr"),
        (lambda: mtml.MultiTaskMAML(cases.trunks(), cases.HEADS, 0.1).transfer("new", mtml.Classification(3), X, IDS),
         ValueError, "trunk: expected the group whose trunk 'new' reads"),
    ],
)  # fmt: skip
def test_bad_input_is_named(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
