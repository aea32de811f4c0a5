"""Losses of the output alone need no targets, and what is missing or stands in another form is called by its name."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases.maml_oracle import assert_same, gradients, mlp, oracle, regression
from torch import Tensor, nn

import mtml
from mtml import ANIL, MAML
from mtml.tasks import TaskBatch, collate

pytestmark = pytest.mark.filterwarnings("ignore::mtml.FallbackWarning")
CLASSES = 4


def entropy(output: Tensor) -> Tensor:
    """Of each sample [N]."""
    return -(output.softmax(-1) * output.log_softmax(-1)).sum(-1)


class Entropy(nn.Module):
    def forward(self, output: Tensor) -> Tensor:
        return entropy(output).mean()


def either(output: Tensor, target: Tensor | None = None) -> Tensor:
    return entropy(output).mean() if target is None else F.cross_entropy(output, target)


ALONE: dict[str, Any] = {
    "function": lambda output: entropy(output).mean(),
    "samples": entropy,
    "module": Entropy(),
    "partial": functools.partial(torch.mean, dim=(0, 1)),
    "optional": either,
    "any": lambda *args: entropy(args[0]).mean() if len(args) == 1 else F.cross_entropy(*args),
}
OTHERS: list[Any] = ["cross_entropy", F.cross_entropy, lambda output, y: F.cross_entropy(output, y)]
# one task runs in a loop, three as is faster


def data(tasks: int = 3) -> tuple[Tensor, ...]:
    sx, _, qx, _ = regression(tasks)
    return sx, torch.randint(CLASSES, sx.shape[:2]), qx, torch.randint(CLASSES, qx.shape[:2])


def want(model: nn.Module, batch: Any, inner: Any, outer: Any) -> Any:
    """The oracle, whose losses take a target: which of the two sets it is shows by the number of samples."""

    def loss(output: Tensor, target: Tensor) -> Tensor:
        own = inner if len(output) == batch[0].shape[1] else outer
        value = own(output) if own in ALONE.values() else own(output, target)
        return value.mean()

    return oracle(model, batch, loss, 0.2, 2)


def check(maml: MAML, model: nn.Module, given: tuple[Any, ...], expected: Any, every_door: bool) -> None:
    got = maml.meta_loss(*given)
    assert_same(got, expected.loss)
    assert_same(gradients(got, list(model.parameters())), gradients(expected.loss, list(model.parameters())))
    if not every_door:
        return
    assert_same(maml.meta_loss(TaskBatch(*given)), expected.loss)
    assert_same(maml.meta_loss(given), expected.loss)
    found = maml.meta_forward(*given)
    assert_same(found, (expected.loss, expected.output, expected.support_losses))
    for adapted in (maml.adapt_tasks(*given[:2]), maml.adapt_tasks(given), maml.adapt_tasks(TaskBatch(*given))):
        assert_same(list(adapted.params.values()), list(expected.trajectory[-1].values()))
        assert_same(adapted.loss(*given[2:]), expected.loss)
        assert_same(adapted.loss(TaskBatch(*given)), expected.loss)
    assert maml.explain(*given).path == "general" == maml.explain(*given[:2]).path == maml.explain(given).path


@pytest.mark.parametrize(("loss", "tasks"), [*((loss, 1) for loss in ALONE), ("function", 3), ("samples", 3)])
def test_neither_set_has_targets(loss: str, tasks: int) -> None:
    model, (sx, sy, qx, qy) = mlp(3, 6, CLASSES), data(tasks)
    expected = want(model, (sx, sy, qx, qy), ALONE[loss], ALONE[loss])
    check(MAML(model, 0.2, steps=2, loss=ALONE[loss]), model, (sx, None, qx, None), expected, loss == "function")


@pytest.mark.parametrize(("loss", "other"), [*((loss, OTHERS[0]) for loss in ALONE), *(("any", o) for o in OTHERS[1:])])
def test_one_set_has_targets(loss: str, other: Any) -> None:
    model, (sx, sy, qx, qy) = mlp(3, 6, CLASSES), data(1)
    plain = F.cross_entropy
    expected = want(model, (sx, sy, qx, qy), ALONE[loss], plain)
    maml = MAML(model, 0.2, steps=2, loss=ALONE[loss], query_loss=other)
    check(maml, model, (sx, None, qx, qy), expected, loss == "any")
    expected = want(model, (sx, sy, qx, qy), plain, ALONE[loss])
    maml = MAML(model, 0.2, steps=2, loss=other, query_loss=ALONE[loss])
    check(maml, model, (sx, sy, qx, None), expected, loss == "any")


def test_targets_that_a_loss_cannot_take_are_not_given_to_it() -> None:
    """A batch may have labels for the query set's sake."""
    model, batch = mlp(3, 6, CLASSES), data(1)
    expected = want(model, batch, entropy, F.cross_entropy)
    maml = MAML(model, 0.2, steps=2, loss=entropy, query_loss="cross_entropy")
    assert_same(maml.meta_loss(TaskBatch(*batch)), expected.loss)
    maml = MAML(model, 0.2, steps=2, loss=either)  # one that can, gets them
    assert_same(maml.meta_loss(*batch), oracle(model, batch, F.cross_entropy, 0.2, 2).loss)


def test_masks_and_step_weights() -> None:
    model, (sx, sy, qx, qy) = mlp(3, 6, CLASSES), data()
    masks = torch.rand(3, 5, dtype=torch.float64), torch.rand(3, 4, dtype=torch.float64)
    weights = [0.5, 0.2, 0.3]
    expected = oracle(
        model, (sx, sy, qx, qy), lambda o, y: entropy(o).mean(), 0.2, 2, masks=masks, step_weights=weights
    )
    maml = MAML(model, 0.2, steps=2, loss=entropy)
    named = {"support_mask": masks[0], "query_mask": masks[1]}
    assert_same(maml.meta_loss(sx, None, qx, None, step_weights=weights, **named), expected.loss)
    assert_same(maml.meta_loss(TaskBatch(sx, None, qx, None, *masks), step_weights=weights), expected.loss)


def test_several_inputs_without_targets() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = mlp(3, 6, CLASSES)

        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return self.net(a) * self.net(b)

    model, (sx, _, qx, _) = Two(), data(1)
    loss = ALONE["function"]
    expected = oracle(model, ((sx, -sx), sx, (qx, -qx), qx), lambda output, _: loss(output), 0.2, 2)
    maml = MAML(model, 0.2, steps=2, loss=loss)
    assert_same(maml.meta_loss((sx, -sx), None, (qx, -qx), None), expected.loss)
    named = ({"a": sx, "b": -sx}, {"a": qx, "b": -qx})
    assert_same(maml.meta_loss(named[0], None, named[1], None), expected.loss)
    for adapted in (maml.adapt_tasks(named[0]), maml.adapt_tasks(((sx, -sx), None))):
        assert_same(adapted.loss((qx, -qx)), expected.loss)


@pytest.mark.parametrize("loss", ["mse", F.mse_loss, nn.MSELoss(), lambda output, y: F.mse_loss(output, y)])
def test_missing_targets_are_named(loss: Any) -> None:
    sx, sy, qx, qy = regression()
    maml = MAML(mlp(3, 6, 2), 0.1, loss=loss)
    with pytest.raises(TypeError, match=r"^sy: expected targets .*loss\(output\)"):
        maml.meta_loss(sx, None, qx, qy)
    with pytest.raises(TypeError, match=r"^sy: expected targets .*loss\(output\)"):
        maml.meta_loss(TaskBatch(sx, None, qx, qy))
    with pytest.raises(TypeError, match=r"^qx, qy: expected .*loss\(output\)"):
        maml.meta_loss(sx, sy, qx)
    with pytest.raises(TypeError, match=r"^qx, qy: expected the query sets"):
        maml.meta_loss(sx, sy)
    with pytest.raises(TypeError, match=r"^sy: expected targets"):
        maml.adapt_tasks(sx)
    with pytest.raises(TypeError, match=r"^sy: expected targets"):
        maml.explain(sx)
    with pytest.raises(TypeError, match=r"^qy: expected targets for this loss"):
        maml.adapt_tasks(sx, sy).loss(qx)
    anil = ANIL(nn.Tanh(), nn.Linear(3, 2).double(), 0.1, loss="mse")
    with pytest.raises(TypeError, match=r"^sy: expected targets"):
        anil.meta_loss(sx, None, qx, qy)


# --- losses by name, and outputs of several tensors -------------------------------------------------------------------


class Several(nn.Module):
    def __init__(self, form: str) -> None:
        super().__init__()
        self.net, self.form = mlp(3, 6, 2), form

    def forward(self, x: Tensor) -> Any:
        y = self.net(x)
        return {"tuple": (y, 2 * y), "list": [y, 2 * y], "dict": {0: y, 1: 2 * y}}[self.form]


@pytest.mark.parametrize(("form", "tasks"), [("tuple", 1), ("list", 1), ("dict", 1), ("tuple", 3)])
def test_losses_by_name_take_one_tensor(form: str, tasks: int) -> None:
    model, batch = Several(form), regression(tasks)
    words = f"^loss: expected the model to return one tensor for 'mse', got a {form}; pass a callable .*output\\[0\\]"
    pick = lambda output, y: F.mse_loss(output[0], y)  # noqa: E731
    for loss, query_loss in (("mse", None), (pick, "mse"), (nn.MSELoss(), pick)):
        with pytest.raises(TypeError, match=words):
            MAML(model, 0.2, loss=loss, query_loss=query_loss).meta_loss(*batch)
    with pytest.raises(TypeError, match=words):
        MAML(model, 0.2, loss=pick, query_loss="mse").adapt_tasks(*batch[:2]).loss(*batch[2:])
    with pytest.raises(mtml.BackendUnavailable, match="only a single tensor is fused"):
        MAML(model, 0.2, loss="mse", backend="cpu").meta_loss(*batch)
    expected = oracle(model.net, batch, F.mse_loss, 0.2, 2).loss  # the way out
    assert_same(MAML(model, 0.2, steps=2, loss=pick).meta_loss(*batch), expected)


# --- tasks that stand one by one --------------------------------------------------------------------------------------


def uneven() -> list[TaskBatch]:
    rows = [regression(1, support, query) for support, query in ((2, 4), (5, 3), (3, 3))]
    return [TaskBatch(*(part[0] for part in row)) for row in rows]


def even() -> list[TaskBatch]:
    return [TaskBatch(*parts) for parts in zip(*regression(), strict=True)]


LISTS: dict[str, Any] = {
    "of_parts": lambda t: [[getattr(task, name) for task in t] for name in ("sx", "sy", "qx", "qy")],
    "tuples_of_parts": lambda t: [tuple(getattr(task, name) for task in t) for name in ("sx", "sy", "qx", "qy")],
    "of_batches": lambda t: [t],
    "of_tuples": lambda t: [[tuple(task[:4]) for task in t]],
    "of_four_tuples": lambda t: [[tuple(task[:4]) for task in (*t, t[0])]],
    "of_pairs": lambda t: [[(task.sx, task.sy) for task in t]],
    "of_pairs_twice": lambda t: [[(task.sx, task.sy) for task in (*t, *t)]],
    "inputs_alone": lambda t: [[task.sx for task in t], collate(t).sy, [task.qx for task in t], collate(t).qy],
    "queries_alone": lambda t: [collate(t).sx, collate(t).sy, [task.qx for task in t], [task.qy for task in t]],
}


@pytest.mark.parametrize("form", LISTS)
@pytest.mark.parametrize("make", [uneven, even])
@pytest.mark.parametrize("which", ["maml", "anil"])
def test_lists_of_tasks_are_told_of_collate(form: str, make: Any, which: str) -> None:
    given = LISTS[form](make())
    maml: Any = MAML(mlp(3, 6, 2), 0.1, loss="mse")
    if which == "anil":
        maml = ANIL(nn.Tanh(), nn.Linear(3, 2).double(), 0.1, loss="mse")
    words = r"^[sq]x: .*mtml\.tasks\.collate.*support_mask"
    if form == "queries_alone":
        words += r"|^qx: expected the form of sx"
    with pytest.raises((TypeError, ValueError), match=words):
        maml.meta_loss(*given)
    with pytest.raises((TypeError, ValueError), match=words):
        if form == "queries_alone":
            maml.meta_loss(given)
        else:
            maml.adapt_tasks(*given[:2])


def test_what_the_error_says_works() -> None:
    tasks, model = uneven(), mlp(3, 6, 2)
    got = MAML(model, 0.2, steps=2, loss="mse").meta_loss(collate(tasks))
    rows = [oracle(model, tuple(part[None] for part in task[:4]), F.mse_loss, 0.2, 2).loss for task in tasks]
    assert_same(got, torch.cat(rows))


def test_several_inputs_that_disagree_are_no_list_of_tasks() -> None:
    sx, sy, qx, qy = regression()
    maml = MAML(mlp(3, 6, 2), 0.1, loss="mse")
    with pytest.raises(ValueError, match=r"^sx\[1\]: expected its first dimensions to be \[T, S\] = \[3, 5\]"):
        maml.meta_loss((sx, sx[:, 1:]), sy, (qx, qx), qy)
    with pytest.raises(ValueError, match=r"^qx\[1\]: expected its first dimensions to be \[T, Q\] = \[3, 4\]"):
        maml.meta_loss((sx, sx), sy, (qx, qx[:, 1:]), qy)
