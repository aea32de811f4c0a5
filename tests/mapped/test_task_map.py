"""task_map: every way gives what the loop gives; the loop where nothing else is right; errors; transforms."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from cases.task_bodies import batch, by_autograd, by_func, gradients, network, way_of
from torch import Tensor, nn

import mtml


def in_turn(fn: Any, *data: Any) -> Tensor:
    return torch.stack([fn(*row) for row in zip(*data, strict=True)])


@pytest.mark.parametrize("way", ["auto", "vmap", "loop"])
def test_any_function_of_tensors(way: str) -> None:
    scale = nn.Parameter(torch.tensor(3.0))

    def fn(x: dict[str, Tensor], factor: float, shared: Tensor) -> dict[str, Any]:
        return {"sum": scale * factor * x["a"].sum() + shared[0], "pair": (x["b"] ** 2, shared)}

    x = {"a": torch.randn(5, 3), "b": torch.randn(5, 2)}
    shared = torch.randn(4)
    found = mtml.task_map(fn, (0, None, None), way=way)(x, 2.0, shared)
    assert torch.allclose(found["sum"], 6.0 * x["a"].sum(1) + shared[0])
    assert torch.equal(found["pair"][0], x["b"] ** 2) and torch.equal(found["pair"][1], shared.expand(5, 4))
    assert torch.allclose(torch.autograd.grad(found["sum"].sum(), scale)[0], 2.0 * x["a"].sum())


def test_task_batch_and_keywords() -> None:
    model, data = network(), batch()
    task = by_func(model)
    named = mtml.task_map(lambda *, given, extra: task(*given[:4]) + extra)
    extra = torch.arange(4.0)
    found = named(given=mtml.TaskBatch(*data), extra=extra)
    assert torch.allclose(found, in_turn(task, *data) + extra)


def test_vmap_where_it_is_right_and_faster() -> None:
    model, data = network(), batch(64)
    task = by_func(model, loss=lambda output, target: (output - target).abs().clamp(max=1.0).mean())
    mapped = mtml.task_map(task)
    explained = mapped.explain(*data)
    assert explained.way == "vmap" and "clamp" in explained.not_fused and "vmap" in str(explained)
    leaves = list(model.parameters())
    for found, expected in zip(gradients(mapped(*data), leaves), gradients(in_turn(task, *data), leaves), strict=True):
        assert torch.allclose(found, expected, rtol=1e-9, atol=1e-12)


def test_vmap_that_is_wrong_is_not_taken() -> None:
    """A function whose result depends on whether it is vmapped: what a silent fault of vmap's looks like."""

    def fn(x: Tensor) -> Tensor:
        batched = torch._C._functorch.is_batchedtensor(x)
        return x.sum() + float(batched)

    mapped, x = mtml.task_map(fn), torch.randn(6, 2)
    explained = mapped.explain(x)
    assert explained.way == "loop" and explained.not_vmap == "its results differ"
    assert torch.allclose(mapped(x), x.sum(1))


def test_wrong_gradients_of_vmap_are_not_taken() -> None:
    class Halved(torch.autograd.Function):
        generate_vmap_rule = False

        @staticmethod
        def forward(x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
            pass

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Tensor:
            return g

        @staticmethod
        def vmap(info: Any, dims: Any, x: Tensor) -> tuple[Tensor, int | None]:
            return x.detach() + 0.5 * (x - x.detach()), dims[0]

    weight = nn.Parameter(torch.ones(2))
    mapped, x = mtml.task_map(lambda x: Halved.apply(weight * x).sum()), torch.randn(6, 2)
    assert mapped.explain(x).not_vmap == "its gradients differ"
    assert torch.allclose(torch.autograd.grad(mapped(x).sum(), weight)[0], x.sum(0))


def test_data_decides() -> None:
    def fn(x: Tensor) -> Tensor:
        while x.norm() > 1.0:
            x = x / 2
        return x

    x = torch.randn(6, 3) * torch.arange(1.0, 7.0)[:, None]
    mapped = mtml.task_map(fn)
    assert way_of(mapped, x) == "loop"
    assert torch.equal(mapped(x), in_turn(fn, x))


def test_counting_and_printing_happen_once_for_every_task(capsys: pytest.CaptureFixture[str]) -> None:
    model, data, count = network(), batch(5), 0
    inner = by_func(model)

    def counts(*row: Tensor) -> Tensor:
        nonlocal count
        count += 1
        return inner(*row)

    def prints(*row: Tensor) -> Tensor:
        print("x", end="")
        return inner(*row)

    for calls, fn in ((5, counts), (5, prints)):
        mapped = mtml.task_map(fn)
        assert torch.allclose(mapped(*data), in_turn(inner, *data))
        assert torch.allclose(mapped(*data), in_turn(inner, *data))
        seen = capsys.readouterr().out.count("x") if fn is prints else count
        assert seen == 2 * calls
        assert "so it runs for every task" in mapped.explain(*data).reason
        capsys.readouterr()


@pytest.mark.parametrize("kind", ["list", "attribute", "tensor"])
def test_state_that_only_a_run_shows(kind: str) -> None:
    log, holder = list[float](), nn.Module()
    holder.count, total = 0, torch.zeros(())

    def fn(x: Tensor) -> Tensor:
        if kind == "list":
            log.append(1.0)
        elif kind == "attribute":
            holder.count += 1
        else:
            total.add_(1.0)
        return x.sum()

    mapped = mtml.task_map(fn)
    mapped(torch.randn(5, 2))
    explained = mapped.explain(torch.randn(5, 2))
    assert "changes what it reads" in explained.reason
    assert len(log) + holder.count + int(total) == 5


def test_running_statistics_are_updated_by_every_task() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)).double()
    count = model[1].num_batches_tracked
    task, data = by_autograd(model, steps=1), batch()
    mtml.task_map(task)(*data)
    assert count == 8
    model.eval()
    assert way_of(mtml.task_map(task), *data) == "fused" and count == 8


def test_randomness() -> None:
    def fn(x: Tensor) -> Tensor:
        return x + torch.randn(())

    x = torch.zeros(8)
    with pytest.raises(RuntimeError, match=r"randomness: the function draws.*'different'"):
        mtml.task_map(fn)(x)
    for way in ("auto", "loop", "vmap"):
        assert mtml.task_map(fn, randomness="same", way=way)(x).unique().numel() == 1
        assert mtml.task_map(fn, randomness="different", way=way)(x).unique().numel() == 8
    torch.manual_seed(3)
    expected = in_turn(fn, x)
    torch.manual_seed(3)
    assert torch.equal(mtml.task_map(fn, randomness="different")(x), expected)


def test_signatures_choose_for_themselves() -> None:
    model = network()
    mapped = mtml.task_map(by_func(model))
    for tasks in (3, 7, 1):
        data = batch(tasks)
        assert mapped(*data).shape == (tasks,)
    assert len(mapped._choices) == 2  # of one task, and of any other number
    model.float()
    narrow = [t.float() for t in batch()]
    assert mapped(*narrow).dtype == torch.float32
    with torch.no_grad():
        assert not mapped(*narrow).requires_grad
    assert mapped(*narrow).requires_grad


def test_transforms_around() -> None:
    model, data = network(), batch()
    task = by_func(model)
    mapped = mtml.task_map(task)
    expected = mapped(*data)
    twice = torch.func.vmap(mapped)(*(torch.stack([t, t]) for t in data))
    assert torch.allclose(twice, torch.stack([expected, expected]))
    found = torch.func.grad(lambda qx: mapped(*data[:2], qx, data[3]).sum())(data[2])
    given = data[2].clone().requires_grad_()
    assert torch.allclose(found, torch.autograd.grad(mapped(*data[:2], given, data[3]).sum(), given)[0])


def test_autocast_does_what_the_loop_does() -> None:
    model, data = network().float(), [t.float() for t in batch()]
    task = by_func(model)
    mapped = mtml.task_map(task)
    mapped(*data)
    with torch.autocast("cpu", torch.bfloat16):
        assert mapped.explain(*data).way in ("vmap", "loop")
        assert torch.allclose(mapped(*data), in_turn(task, *data), rtol=2e-2)
    assert way_of(mapped, *data) == "fused"


def test_compiled_calls_end_the_graph() -> None:
    model, data = network(), batch()
    mapped = mtml.task_map(by_autograd(model))

    def step(*data: Tensor) -> Tensor:
        return 2.0 * mapped(*data).mean()

    counter = torch._dynamo.testing.CompileCounter()
    assert torch.equal(torch.compile(step, backend=counter)(*data), step(*data))
    assert counter.frame_count == 1  # what comes after the call
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"Way out: torch.compile without fullgraph"):
        torch.compile(step, backend="eager", fullgraph=True)(*data)


def test_functions_that_are_no_python_functions() -> None:
    x = torch.randn(4, 3)
    layer = nn.Linear(3, 2)
    assert torch.allclose(mtml.task_map(layer)(x), layer(x))
    assert torch.allclose(mtml.task_map(torch.sin)(x), x.sin())
    assert mtml.task_map(by_func).__name__ == "by_func"


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: mtml.task_map(3), TypeError, "fn: expected a function"),  # type: ignore[arg-type]
        (lambda: mtml.task_map(torch.sin, 1), ValueError, "in_dims: expected 0 or None.*movedim"),
        (lambda: mtml.task_map(torch.sin, way="quick"), ValueError, "way: expected one of"),
        (lambda: mtml.task_map(torch.sin, randomness="some"), ValueError, "randomness: expected one of"),
        (lambda: mtml.task_map(torch.add, (0,))(torch.ones(2), torch.ones(2)), ValueError, "in_dims: expected 2 "),
        (lambda: mtml.task_map(torch.sin)(torch.tensor(1.0)), ValueError, "argument 0: expected a tensor .T, ...."),
        (lambda: mtml.task_map(torch.sin)(3.0), ValueError, "expected an argument with tensors"),
        (lambda: mtml.task_map(torch.sin)(torch.ones(0, 2)), ValueError, "argument 0: expected at least one task"),
        (
            lambda: mtml.task_map(lambda a, b: a)({"x": torch.ones(2)}, [torch.ones(3)]),
            ValueError,
            r"argument 1\[0\]: expected 2 tasks as in argument 0\['x'\]",
        ),
        (lambda: mtml.task_map(lambda x: (x, x.item()))(torch.ones(2)), TypeError, r"result\[1\]: expected a tensor"),
        (
            lambda: mtml.task_map(lambda x: x[: int(x.sum())])(torch.eye(3).cumsum(0)),
            ValueError,
            "result: expected the shape of task 0's, .1., for all tasks, got .2. for task 1",
        ),
    ],
)  # fmt: skip
def test_errors_name_what_is_wrong(make: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        make()


def test_asking_for_fused_where_it_cannot_be() -> None:
    with pytest.raises(mtml.BackendUnavailable, match=r"way='fused': the function is not fused: .*; way='auto'"):
        mtml.task_map(torch.sin, way="fused")(torch.ones(2, 2))


def test_errors_of_the_function_are_its_own() -> None:
    def fn(x: Tensor) -> Tensor:
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        mtml.task_map(fn)(torch.ones(2))


def test_a_mapped_function_can_be_part_of_another() -> None:
    model, data = network(), batch()
    inner = mtml.task_map(by_func(model))
    outer = mtml.task_map(lambda *rows: inner(*rows).mean())
    stacked = [torch.stack([t, 2.0 * t]) for t in data]
    expected = [inner(*(t[at] for t in stacked)).mean() for at in range(2)]
    assert torch.allclose(outer(*stacked), torch.stack(expected))


def test_losses_can_be_of_any_kind() -> None:
    model, data = network(), batch(classes=3)
    task = by_autograd(model, loss=F.cross_entropy)
    assert torch.allclose(mtml.task_map(task)(*data), in_turn(task, *data), rtol=1e-9)


def test_arguments_that_are_changed_in_place() -> None:
    x = torch.randn(5, 3)
    before = x.clone()
    mapped = mtml.task_map(lambda x: x.add_(1.0).sum())
    assert torch.allclose(mapped(x), (before + 1.0).sum(1)) and torch.equal(x, before + 1.0)
    assert "changes what it reads or is given" in mapped.explain(x).reason


def test_what_has_no_derivative_runs_where_none_is_asked_for() -> None:
    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Tensor:
            raise RuntimeError("no derivative")

    weight, x = nn.Parameter(torch.ones(2)), torch.randn(4, 2)
    assert torch.allclose(mtml.task_map(lambda x: Once.apply(weight * x).sum())(x), x.sum(1))


def test_vmap_that_fails_later() -> None:
    limit = torch.zeros(())

    def fn(x: Tensor) -> Tensor:
        if limit > 1.0:  # of a tensor that all tasks share: vmap takes it
            x = x * float(x.sum())
        return (x.sin() + x).sum()

    x = torch.randn(256, 2)
    mapped = mtml.task_map(fn)
    assert way_of(mapped, x) == "vmap"
    limit.fill_(2.0)
    for _ in range(2):
        assert torch.allclose(mapped(x), in_turn(fn, x))
    assert mapped.explain(x).reason == "a call by torch.func.vmap failed"
