"""The trunk of an ANIL: in the engine or in PyTorch, statistics of all tasks or of each, against a plain loop."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mtml
from mtml.tasks import TaskBatch

TASKS, SUPPORT, QUERY, STEPS, LR = 3, 5, 7, 4, 0.1
ENGINE = "it runs once over both sets, in the engine"
Layer = Callable[[int], nn.Module]
NORMS: dict[str, Layer] = {"batch": nn.BatchNorm2d, "group": lambda c: nn.GroupNorm(2, c)}


def parts(norm: Layer = nn.BatchNorm2d, dtype: torch.dtype = torch.float64) -> tuple[nn.Sequential, nn.Linear]:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for channels in (3, 4):
        layers += [nn.Conv2d(channels, 4, 3, padding=1), norm(4), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten()).to(dtype), nn.Linear(16, 5).to(dtype)


def batch(dtype: torch.dtype = torch.float64, tasks: int = TASKS) -> TaskBatch:
    torch.manual_seed(1)
    sx, qx = (torch.randn(tasks, n, 3, 8, 8, dtype=dtype) for n in (SUPPORT, QUERY))
    return TaskBatch(sx, torch.randint(5, (tasks, SUPPORT)), qx, torch.randint(5, (tasks, QUERY)))


def by_loop(trunk: nn.Module, head: nn.Linear, data: TaskBatch, apart: bool) -> tuple[Tensor, ...]:
    """Losses [T] and gradients: features of a task's two sets together (or of all), the head's steps with a graph."""
    both = torch.cat((data.sx, data.qx), 1)
    rows = torch.stack([trunk(x) for x in both]) if apart else trunk(both.flatten(0, 1)).unflatten(0, both.shape[:2])
    losses = []
    for features, sy, qy in zip(rows, data.sy, data.qy, strict=True):
        w, b = head.weight, head.bias
        for _ in range(STEPS):
            loss = F.cross_entropy(F.linear(features[:SUPPORT], w, b), sy)
            gw, gb = torch.autograd.grad(loss, [w, b], create_graph=True)
            w, b = w - LR * gw, b - LR * gb  # type: ignore[assignment]
        losses.append(F.cross_entropy(F.linear(features[SUPPORT:], w, b), qy))
    found = torch.stack(losses)
    return found.detach(), *torch.autograd.grad(found.mean(), [*trunk.parameters(), *head.parameters()])


def by_anil(anil: mtml.ANIL, data: TaskBatch) -> tuple[Tensor, ...]:
    loss = anil.meta_loss(data)
    return loss.detach(), *torch.autograd.grad(loss.mean(), [*anil.features.parameters(), *anil.head.parameters()])


def trunk_of(anil: mtml.ANIL, data: TaskBatch) -> str:
    return anil.explain(data).trunk


def close(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    """Biases before a normalisation have gradients of zero, which rounding alone fills."""
    largest = max(float(t.abs().max()) for t in expected)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9 * largest)


@pytest.mark.parametrize("hooked", [False, True])
@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("mode", ["module", "task"])
@pytest.mark.parametrize("norm", NORMS)
def test_equal_to_the_plain_loop(norm: str, mode: str, train: bool, hooked: bool) -> None:
    trunk, head = parts(NORMS[norm])
    trunk.train(train)
    if hooked:  # which the engine does not take
        trunk.register_forward_hook(lambda module, args, output: output * 1)
    data, mixes = batch(), norm == "batch" and train
    expected = by_loop(copy.deepcopy(trunk), head, data, mode == "task")
    anil = mtml.ANIL(trunk, head, LR, steps=STEPS, batch_norm=mode)
    close(by_anil(anil, data), expected)
    assert (trunk_of(anil, data) == ENGINE) == (not hooked and not (mixes and mode == "module"))


@pytest.mark.parametrize("hooked", [False, True])
def test_running_statistics(hooked: bool) -> None:
    for mode in ("module", "task"):
        trunk, head = parts()
        if hooked:
            trunk.register_forward_hook(lambda module, args, output: output * 1)
        before = [b.clone() for b in trunk.buffers()]
        mtml.ANIL(trunk, head, LR, batch_norm=mode).meta_loss(batch())
        moved = [not torch.equal(a, b) for a, b in zip(before, trunk.buffers(), strict=True)]
        assert all(moved) if mode == "module" else not any(moved)


def test_statistics_of_tasks_and_of_all_differ() -> None:
    trunk, head = parts()
    task, every = (mtml.ANIL(trunk, head, LR, steps=STEPS, batch_norm=mode) for mode in ("task", "module"))
    assert not torch.allclose(task.meta_loss(batch()), every.meta_loss(batch()), rtol=1e-3)


def test_a_task_does_not_depend_on_those_beside_it() -> None:
    trunk, head = parts(dtype=torch.float32)
    data = batch(torch.float32)
    anil = mtml.ANIL(trunk, head, LR, steps=STEPS, batch_norm="task")
    alone = anil.meta_loss(*(t[1:2] for t in data[:4]))
    torch.testing.assert_close(anil.meta_loss(data)[1:2], alone, rtol=1e-6, atol=1e-7)


def test_changes_of_the_trunk_are_followed() -> None:
    trunk, head = parts()
    data, anil = batch(), mtml.ANIL(trunk, head, LR, steps=STEPS, batch_norm="task")
    close(by_anil(anil, data), by_loop(copy.deepcopy(trunk), head, data, True))
    trunk.eval()
    close(by_anil(anil, data), by_loop(copy.deepcopy(trunk), head, data, True))
    trunk[2] = nn.Tanh()
    close(by_anil(anil, data), by_loop(copy.deepcopy(trunk), head, data, True))
    trunk.train()
    anil.batch_norm = "module"
    close(by_anil(anil, data), by_loop(copy.deepcopy(trunk), head, data, False))
    anil.features, _ = parts(NORMS["group"])
    close(by_anil(anil, data), by_loop(anil.features, head, data, False))


def test_adapted_models_take_the_statistics_of_their_task() -> None:
    trunk, head = parts()
    data, anil = batch(), mtml.ANIL(trunk, head, LR, steps=STEPS, batch_norm="task")
    adapted = anil.adapt_tasks(data.sx, data.sy)
    features = torch.stack([copy.deepcopy(trunk)(x) for x in data.qx])
    expected = features @ adapted.params["head.weight"].mT + adapted.params["head.bias"][:, None]
    torch.testing.assert_close(adapted(data.qx), expected, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(
        adapted.task(1).eval()(data.qx[1]),
        trunk.eval()(data.qx[1]) @ adapted.params["head.weight"][1].mT + adapted.params["head.bias"][1],
    )


def test_copies() -> None:
    trunk, head = parts()
    data, anil = batch(), mtml.ANIL(trunk, head, LR, steps=STEPS, batch_norm="task")
    expected = anil.meta_loss(data)
    for copied in (copy.deepcopy(anil), pickle.loads(pickle.dumps(anil))):
        assert torch.equal(copied.meta_loss(data), expected)
        copied.meta_loss(data).sum().backward()
        assert copied.features[0].weight.grad is not None and trunk[0].weight.grad is None


def test_gradients_of_images_and_frozen_trunks() -> None:
    trunk, head = parts()
    data, anil = batch(), mtml.ANIL(trunk.requires_grad_(False), head, LR, steps=STEPS, batch_norm="task")
    loss = anil.meta_loss(data)
    loss.sum().backward()
    assert trunk[0].weight.grad is None and head.weight.grad is not None
    images = data.sx.clone().requires_grad_()
    (found,) = torch.autograd.grad(anil.meta_loss(images, *data[1:4]).sum(), images)
    trunk.register_forward_hook(lambda module, args, output: output * 1)
    (expected,) = torch.autograd.grad(anil.meta_loss(images, *data[1:4]).sum(), images)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    with torch.no_grad():
        torch.testing.assert_close(anil.meta_loss(data), loss, rtol=1e-9, atol=1e-12)


def test_what_the_engine_does_not_take_runs_in_pytorch() -> None:
    data = batch(torch.float32)
    for trunk in (
        nn.Sequential(nn.Conv2d(3, 4, 8), nn.Dropout(0.0), nn.Flatten()),
        nn.Sequential(nn.LazyConv2d(4, 8), nn.Flatten()),
        nn.Sequential(nn.AvgPool2d(4), nn.Flatten(), nn.Linear(12, 4)),
        nn.Sequential(nn.AvgPool2d(4), nn.Flatten()),
    ):
        width = trunk(data.sx[0]).shape[1]
        for mode in ("module", "task"):
            anil = mtml.ANIL(trunk, nn.Linear(width, 5), LR, batch_norm=mode)
            anil.meta_loss(data).mean().backward()
            assert trunk_of(anil, data) != ENGINE or isinstance(trunk[0], nn.LazyConv2d | nn.Conv2d)
    trunk, head = parts(NORMS["group"], torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        anil = mtml.ANIL(trunk, head, LR)
        anil.meta_loss(data).mean().backward()
        assert "autocast" in trunk_of(anil, data)
    assert "head's" in trunk_of(mtml.ANIL(trunk, head, LR, backend="reference"), data)


def test_lazy_trunks_are_made_by_the_first_call() -> None:
    trunk, data = nn.Sequential(nn.LazyConv2d(4, 8), nn.Flatten()), batch(torch.float32)
    anil = mtml.ANIL(trunk, nn.Linear(4, 5), LR)
    assert anil.meta_loss(data).shape == (TASKS,)
    assert trunk_of(anil, data) == ENGINE


@pytest.mark.parametrize("norm", NORMS)
def test_compiled_calls(norm: str) -> None:
    trunk, head = parts(NORMS[norm])
    data = batch()
    for mode in ("module", "task"):
        anil = mtml.ANIL(trunk, head, LR, steps=STEPS, batch_norm=mode)
        compiled = torch.compile(anil.meta_loss, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(*data[:4]), anil.meta_loss(*data[:4]), rtol=1e-9, atol=1e-11)


def test_an_unknown_mode_is_named() -> None:
    with pytest.raises(ValueError, match="batch_norm: expected one of"):
        mtml.ANIL(*parts(), LR, batch_norm="running")
