"""Adapted parameters that the inner loss leaves out: refused by name, or left as they are where that is allowed."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases.maml_oracle import assert_same, gradients, regression
from torch import Tensor, nn

from mtml import MAML, FallbackWarning, MetaSGD
from mtml_kernels.ops.inner_loop import BACKENDS

every_path = pytest.mark.parametrize("backend", ["general", *BACKENDS.available()])
pytestmark = pytest.mark.filterwarnings("ignore::mtml.FallbackWarning")


class Heads(nn.Module):
    """Two heads, and what forward gives of them: a tuple, a dict, both in one tensor, or the first alone."""

    def __init__(self, form: str, out: int = 2) -> None:
        super().__init__()
        self.form, self.trunk = form, nn.Linear(3, 4)
        self.left, self.right = nn.Linear(4, out), nn.Linear(4, out)

    def forward(self, x: Tensor) -> Any:
        h = torch.tanh(self.trunk(x))
        left, right = self.left(h), self.right(h)
        forms = {"tuple": (left, right), "dict": {0: left, 1: right}, "tensor": torch.stack((left, right), 1)}
        return forms.get(self.form, left)


def reads(form: str, head: int) -> Callable[[Any, Tensor], Tensor]:
    """The loss of one head's output."""
    return lambda output, y: F.mse_loss(output[:, head] if form == "tensor" else output[head], y)


several = pytest.mark.parametrize("form", ["tuple", "dict"])
tasks = pytest.mark.parametrize("tasks", [1, 3])  # a loop, and whichever is faster
LEFT = ["trunk.weight", "trunk.bias", "left.weight", "left.bias"]
NAMES = r"'right.weight', 'right.bias'.*allow_unused=True.*params="


def plain_loop(model: nn.Module, batch: Any, inner: Any, outer: Any, **options: Any) -> Tensor:
    """The per-task loop, as it runs unchanged from learn2learn."""
    maml, losses = MAML(model, 0.2, **options), []
    for sx, sy, qx, qy in zip(*batch, strict=True):
        learner = maml.clone()
        for _ in range(2):
            learner.adapt(inner(learner(sx), sy))
        losses.append(outer(learner(qx), qy))
    return torch.stack(losses)


@several
@tasks
@pytest.mark.parametrize("first_order", [False, True])
def test_a_head_that_the_inner_loss_leaves_out(form: str, tasks: int, first_order: bool) -> None:
    model, batch = Heads(form).double(), regression(tasks)
    inner, outer = reads(form, 0), reads(form, 1)
    maml = MAML(model, 0.2, first_order, steps=2, loss=inner, query_loss=outer)
    with pytest.raises(RuntimeError, match=NAMES):
        maml.meta_loss(*batch)
    with pytest.raises(RuntimeError, match=NAMES):
        maml.adapt_tasks(*batch[:2])
    with pytest.raises(RuntimeError, match=r"'right.weight', 'right.bias'"):  # the same loop, task by task
        plain_loop(model, batch, inner, outer, first_order=first_order)

    maml.allow_unused = True  # noticed, like every setting
    want = plain_loop(model, batch, inner, outer, first_order=first_order, allow_unused=True)
    got = maml.meta_loss(*batch)
    assert_same(got, want)
    assert_same(gradients(got, list(model.parameters())), gradients(want, list(model.parameters())))
    adapted = maml.adapt_tasks(*batch[:2], keep_steps=True)
    assert_same(adapted.params["right.weight"], model.right.weight.expand(tasks, 2, 4))
    assert_same(adapted.params_at(1)["right.bias"], model.right.bias.expand(tasks, 2))
    assert not torch.equal(adapted.params["left.bias"][0], model.left.bias)
    assert_same(adapted.loss(*batch[2:]), want)

    maml.allow_unused = False
    with pytest.raises(RuntimeError, match=NAMES):
        maml.meta_loss(*batch)


@several
def test_params_is_the_other_way_out(form: str) -> None:
    model, batch = Heads(form).double(), regression()
    inner, outer = reads(form, 0), reads(form, 1)
    got = MAML(model, 0.2, steps=2, loss=inner, query_loss=outer, params=LEFT).meta_loss(*batch)
    assert_same(got, plain_loop(model, batch, inner, outer, params=LEFT))
    with pytest.raises(RuntimeError, match=NAMES):  # named or not
        MAML(model, 0.2, loss=inner, query_loss=outer, params="*").meta_loss(*batch)


def test_a_loss_that_reads_nothing() -> None:
    model, batch = Heads("first").double(), regression()
    for constant in (lambda output, y: output.detach().square().mean(), lambda output, y: y.square().mean()):
        with pytest.raises(RuntimeError, match=r"'trunk.weight', 'trunk.bias', 'left.weight', 'left.bias', though"):
            MAML(model, 0.2, loss=constant).meta_loss(*batch)
        got = MAML(model, 0.2, loss=constant, query_loss="mse", allow_unused=True).meta_loss(*batch)
        assert_same(got, torch.stack([F.mse_loss(model(x), y) for x, y in zip(*batch[2:], strict=True)]))


def test_a_part_of_one_tensor_is_a_gradient_of_zero() -> None:
    """As to autograd, which sees that the whole tensor goes into the loss."""
    model, batch = Heads("tensor").double(), regression()
    inner, outer = reads("tensor", 0), reads("tensor", 1)
    got = MAML(model, 0.2, steps=2, loss=inner, query_loss=outer).meta_loss(*batch)
    assert_same(got, plain_loop(model, batch, inner, outer))


@every_path
@pytest.mark.parametrize("allow", [False, True])
def test_what_no_output_depends_on_stays_as_it_is(backend: str, allow: bool) -> None:
    """On every path, for forward computes the second head and drops it; the loop task by task sees its loss alone."""
    model, batch = Heads("first").double(), regression()
    maml = MAML(model, 0.2, steps=2, loss="mse", backend=backend, allow_unused=allow)
    loss = F.mse_loss
    want = plain_loop(model, batch, loss, loss, allow_unused=True)
    got = maml.meta_loss(*batch)
    assert_same(got, want)
    assert_same(gradients(got, list(model.parameters())), gradients(want, list(model.parameters())))
    adapted = maml.adapt_tasks(*batch[:2]).params
    assert list(adapted) == [name for name, _ in model.named_parameters()]
    assert_same(adapted["right.weight"], model.right.weight.expand(3, 2, 4))


@every_path
def test_nothing_is_refused_without_steps(backend: str) -> None:
    batch = regression()
    assert MAML(Heads("first").double(), 0.2, steps=0, loss="mse", backend=backend).meta_loss(*batch).shape == (3,)
    maml = MAML(Heads("tuple").double(), 0.2, steps=0, loss=reads("tuple", 0))
    assert maml.meta_loss(*batch).shape == (3,)


def test_looking_leaves_no_trace() -> None:
    """The first call, which looks, takes no more random numbers and writes no more statistics than the second."""
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 2)).double()
    maml = MAML(model, 0.2, loss=lambda output, y: F.mse_loss(output, y), batch_norm="track", backend="general")
    batch, start, ends = regression(), [b.clone() for b in model.buffers()], []
    for _ in range(2):
        torch.manual_seed(3)
        for buffer, value in zip(model.buffers(), start, strict=True):
            buffer.copy_(value)
        loss = maml.meta_loss(*batch)
        ends.append([loss, torch.get_rng_state(), *(b.clone() for b in model.buffers())])
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))
    assert all(p.grad is None for p in model.parameters())


def test_without_gradients() -> None:
    model, batch = Heads("tuple").double(), regression()
    maml = MAML(model, 0.2, loss=reads("tuple", 0))
    with torch.no_grad(), pytest.raises(RuntimeError, match=NAMES):
        maml.meta_loss(*batch)
    maml.allow_unused = True
    with torch.no_grad():
        assert not maml.meta_loss(*batch).requires_grad


def test_a_rule_of_the_callers_sees_zeros() -> None:
    model, batch, seen = Heads("tuple").double(), regression(1), []

    def update(params: Any, grads: Any, lr: Any, step: int) -> Any:
        seen.append(grads["right.weight"])
        return {name: value - 0.2 * grads[name] for name, value in params.items()}

    losses = {"loss": reads("tuple", 0), "query_loss": reads("tuple", 1)}
    got = MAML(model, 0.2, steps=2, update=update, allow_unused=True, **losses).meta_loss(*batch)
    assert_same(got, plain_loop(model, batch, *losses.values(), allow_unused=True))
    assert seen and not any(grad.any() for grad in seen)


def test_frozen_parameters_need_no_permission_in_a_batch() -> None:
    """By default what requires grad is adapted; named ones are, frozen or not. `allow_nograd` is for `adapt`."""
    model, batch = Heads("first").double(), regression()
    model.trunk.requires_grad_(False)
    want = plain_loop(model, batch, F.mse_loss, F.mse_loss, allow_nograd=True)
    for allow in (False, True):
        assert_same(MAML(model, 0.2, steps=2, loss="mse", allow_nograd=allow).meta_loss(*batch), want)
    named = ["trunk.weight", "left.*"]
    want = plain_loop(model, batch, F.mse_loss, F.mse_loss, params=named)
    for allow in (False, True):
        maml = MAML(model, 0.2, steps=2, loss="mse", params=named, allow_nograd=allow)
        assert_same(maml.meta_loss(*batch), want)
        assert not torch.equal(maml.adapt_tasks(*batch[:2]).params["trunk.weight"][0], model.trunk.weight)


def test_permission_passes_through_subclasses() -> None:
    model, batch, inner = Heads("tuple").double(), regression(1), reads("tuple", 0)
    with pytest.raises(RuntimeError, match=NAMES):
        MetaSGD(model, 0.2, loss=inner).meta_loss(*batch)
    for options in ({"allow_unused": True}, {"allow_nograd": True}):  # learn2learn's default
        assert MetaSGD(model, 0.2, loss=inner, **options).meta_loss(*batch).isfinite().all()


def test_the_error_comes_before_the_warning() -> None:
    with warnings.catch_warnings(), pytest.raises(RuntimeError, match=NAMES):
        warnings.simplefilter("error", FallbackWarning)
        MAML(Heads("tuple").double(), 0.2, loss=reads("tuple", 0)).meta_loss(*regression())
