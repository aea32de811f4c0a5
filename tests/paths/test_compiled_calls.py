"""Calls in functions that torch.compile compiles: one graph, whatever is asked for, equal to eager code."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases.compiled import assert_as_eager, copies_traced, results, whole_graph
from torch import Tensor, nn

import mtml
from mtml import ANIL, MAML, InnerLR, MetaSGD, TaskBatch, inner


def mlp(*extra: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 8), *extra, nn.Tanh(), nn.Linear(8, 2)).double()


def batch(tasks: int = 3, ids: bool = False, masks: bool = False, steps: tuple[int, ...] = ()) -> TaskBatch:
    """steps: (K,) for a support set of each step."""

    def target(*lead: int) -> Tensor:
        return torch.randint(2, lead) if ids else torch.randn(*lead, 2, dtype=torch.float64)

    sx, qx = torch.randn(tasks, *steps, 4, 3, dtype=torch.float64), torch.randn(tasks, 5, 3, dtype=torch.float64)
    weights = [torch.rand(tasks, n, dtype=torch.float64) for n in (4, 5)] if masks else [None, None]
    return TaskBatch(sx, target(tasks, *steps, 4), qx, target(tasks, 5), *weights)


def maml(lr: Any = 0.1, model: nn.Module | None = None, **options: Any) -> MAML:
    return MAML(mlp() if model is None else model, lr, **{"steps": 2, "loss": "mse", **options})


def anil(lr: Any = 0.1, **options: Any) -> ANIL:
    trunk, head = nn.Sequential(nn.Linear(3, 8), nn.Tanh()).double(), nn.Linear(8, 2).double()
    return ANIL(trunk, head, lr(head) if callable(lr) else lr, **{"steps": 2, "loss": "mse", **options})


def with_rate(per: str, **options: Any) -> MAML:
    model = mlp()
    return maml(InnerLR(model, 0.1, per=per, **options), model)


def written(output: Tensor, target: Tensor) -> Tensor:
    return 0.5 * ((output - target) ** 2).mean()


def ids_written(output: Tensor, target: Tensor) -> Tensor:
    return -torch.log_softmax(output, -1)[torch.arange(len(target)), target].mean()


def of_each_tensor() -> dict[str, Any]:
    return {"0.weight": 0.1, "0.bias": torch.tensor(0.2, dtype=torch.float64), "2.weight": 0.3, "2.bias": 0.1}


PLAIN = ("meta_loss", {}, {})
# what makes the learner; the method, its arguments, those of the batch
CALLS: dict[str, tuple[Callable[[], Any], tuple[str, dict[str, Any], dict[str, Any]]]] = {
    "plain": (maml, PLAIN),
    "meta_forward": (maml, ("meta_forward", {}, {})),
    "masks": (maml, ("meta_loss", {}, {"masks": True})),
    "class ids": (lambda: maml(loss="cross_entropy"), ("meta_forward", {}, {"ids": True})),
    "a loss module": (lambda: maml(loss=nn.CrossEntropyLoss(label_smoothing=0.1)), ("meta_loss", {}, {"ids": True})),
    "a written loss": (lambda: maml(loss=written), PLAIN),
    "a written loss of ids": (lambda: maml(loss=ids_written), ("meta_loss", {}, {"ids": True})),
    "rate, a tensor": (lambda: maml(torch.tensor(0.1, dtype=torch.float64, requires_grad=True)), PLAIN),
    "rates by name": (lambda: maml(of_each_tensor()), PLAIN),
    "InnerLR": (lambda: with_rate("all"), PLAIN),
    "InnerLR of tensors and steps": (lambda: with_rate("tensor", steps=3, min=0.0), PLAIN),
    "MetaSGD": (lambda: MetaSGD(mlp(), 0.1, steps=2, loss="mse"), PLAIN),
    "first order": (lambda: maml(first_order=True), PLAIN),
    "step weights": (maml, ("meta_loss", {"step_weights": [0.3, 0.7]}, {})),
    "step weights, a tensor": (maml, ("meta_loss", {"step_weights": torch.tensor([0.3, 0.7])}, {})),
    "query steps": (maml, ("meta_forward", {"query_steps": True}, {})),
    "a set for every step": (maml, ("meta_loss", {"per_step": True}, {"steps": (2,)})),
    "own starts": (maml, ("meta_loss", {"start": {"0.bias": torch.ones(3, 8, dtype=torch.float64)}}, {})),
    "Adam": (lambda: maml(0.01, update=inner.Adam(clip_norm=1.0)), PLAIN),
    "Adam, learned": (
        lambda: maml(0.01, update=inner.Adam((nn.Parameter(torch.tensor(0.9, dtype=torch.float64)), 0.99))),
        PLAIN,
    ),
    "the head alone": (lambda: maml(params="2.*", steps=10), PLAIN),
    "one linear layer": (lambda: maml(model=nn.Linear(3, 2).double(), steps=10), PLAIN),
    "batch statistics": (lambda: maml(model=mlp(nn.BatchNorm1d(8))), PLAIN),
    "norms of every step": (lambda: maml(model=mlp(nn.BatchNorm1d(8)), batch_norm="per_step"), PLAIN),
    "the reference": (lambda: maml(backend="reference", loss="cross_entropy"), ("meta_loss", {}, {"ids": True})),
    "the schedule": (lambda: maml(backend="torch", loss="cross_entropy"), ("meta_loss", {}, {"ids": True})),
    "ANIL": (anil, ("meta_forward", {}, {})),
    "ANIL, Gram form": (lambda: anil(steps=30, loss="cross_entropy"), ("meta_loss", {}, {"ids": True, "masks": True})),
    "ANIL, learned rate": (lambda: anil(lambda head: InnerLR(head, 0.1)), PLAIN),
    "ANIL, terms": (lambda: anil(weight_decay=0.1, proximal=0.2), PLAIN),
}


def call(learner: Any, method: str, options: dict[str, Any]) -> Callable[..., Any]:
    return lambda data: getattr(learner, method)(data, **options)


@pytest.mark.parametrize("name", CALLS)
def test_every_call_is_one_graph(name: str) -> None:
    make, (method, options, form) = CALLS[name]
    learner = make()
    step = call(learner, method, options)
    compiled, graphs = whole_graph(step)
    rates = [learner.lr] if isinstance(learner.lr, Tensor) else []
    assert_as_eager(compiled, step, [batch(**form)], [*learner.parameters(), *rates])
    for _ in range(2):  # new data of these sizes, after eager calls
        assert_as_eager(compiled, step, [batch(**form)], [*learner.parameters(), *rates])
    assert graphs() == 1


@pytest.mark.parametrize("name", ["a written loss", "the head alone", "one linear layer", "Adam", "the schedule"])
def test_rates_are_inputs_on_every_path(name: str) -> None:
    make, (method, options, form) = CALLS[name]
    learner = make()
    step = call(learner, method, options)
    compiled, graphs = whole_graph(step, "eager")
    for _ in range(3):
        assert_as_eager(compiled, step, [batch(**form)], list(learner.parameters()))
        learner.lr *= 0.9
    assert graphs() == 1


def test_second_order_is_in_the_graph() -> None:
    """The control: without it the gradient is another."""
    data, gradients = batch(), []
    learner = maml(1.0)
    for first_order in (False, True):
        compiled, _ = whole_graph(lambda data, order=first_order: learner.meta_loss(data, first_order=order))
        gradients.append(results(compiled, [data], list(learner.parameters()))[1][0])
    assert not torch.allclose(*gradients, rtol=1e-2)


def adapted(learner: Any) -> Callable[..., Any]:
    def step(data: TaskBatch) -> Any:
        found = learner.adapt_tasks(data.sx, data.sy)
        return found.params, found.support_losses, found(data.qx), found.loss(data.qx, data.qy)

    return step


def gone_on(learner: Any) -> Callable[..., Any]:
    def step(data: TaskBatch) -> Any:
        return learner.adapt_tasks(data.sx, data.sy, start=learner.adapt_tasks(data.sx, data.sy)).params

    return step


@pytest.mark.parametrize(
    ("make", "steps"),
    [
        pytest.param(maml, adapted, marks=copies_traced),
        (anil, adapted),
        (lambda: maml(0.01, update=inner.Adam()), gone_on),
    ],
    ids=["MAML", "ANIL", "further"],
)
def test_adapted_models_within_a_graph(make: Any, steps: Any) -> None:
    learner = make()
    compiled, graphs = whole_graph(steps(learner))
    assert_as_eager(compiled, steps(learner), [batch()], list(learner.parameters()))
    assert graphs() == 1


def test_adapted_models_come_out_of_a_graph() -> None:
    learner, data = maml(), batch()
    compiled, _ = whole_graph(lambda data: learner.adapt_tasks(data.sx, data.sy, keep_steps=True))
    found, expected = compiled(data), learner.adapt_tasks(data.sx, data.sy, keep_steps=True)
    assert isinstance(found, mtml.Adapted) and found.steps == 2
    torch.testing.assert_close(found.params, expected.params)
    torch.testing.assert_close(found(data.qx, step=1), expected(data.qx, step=1))


def test_gradients_of_tasks() -> None:
    learner, data = maml(), batch()
    compiled, _ = whole_graph(learner.task_gradients)
    torch.testing.assert_close(compiled(data), learner.task_gradients(data))


@pytest.mark.parametrize(
    "weighting",
    ["uncertainty", "sum", "dwa", "gls", "rlw", "famo", "stch", "imtl_l", "cosmos", {"kind": 1.0, "size": 2.0}],
)
def test_multi_head(weighting: Any) -> None:
    def make() -> tuple[nn.Module, mtml.MultiHead]:
        torch.manual_seed(1)
        heads = {"kind": mtml.Classification(3), "size": mtml.Regression(2)}
        return mlp(), mtml.MultiHead(2, heads, weighting).double()

    def step_of(trunk: nn.Module, heads: mtml.MultiHead) -> Callable[..., Any]:
        def step(x: Tensor, kind: Tensor, size: Tensor, mask: Tensor) -> Any:
            found = heads.loss(trunk(x), {"kind": kind, "size": size}, masks={"size": mask})
            return found.total, found.per_head

        return step

    (trunk, heads), (same_trunk, same_heads) = make(), make()  # weightings remember what they have seen
    compiled, graphs = whole_graph(step_of(trunk, heads))
    for _ in range(4):
        data = (
            torch.randn(6, 3, dtype=torch.float64), torch.randint(3, (6,)), torch.randn(6, 2, dtype=torch.float64),
            torch.rand(6, dtype=torch.float64),
        )  # fmt: skip
        found = results(compiled, data, [*trunk.parameters(), *heads.parameters()])
        expected = results(step_of(same_trunk, same_heads), data, [*same_trunk.parameters(), *same_heads.parameters()])
        torch.testing.assert_close(found, expected)
    assert graphs() == 1


def test_gradnorm_runs_between_graphs() -> None:
    """It takes gradients itself."""

    def make() -> tuple[nn.Module, mtml.MultiHead]:
        torch.manual_seed(1)
        return mlp(), mtml.MultiHead(2, {"a": mtml.Regression(2), "b": mtml.Regression(3)}, "gradnorm").double()

    def step_of(trunk: nn.Module, heads: mtml.MultiHead) -> Callable[..., Any]:
        return lambda x, a, b: 2 * heads.loss(trunk(x), {"a": a, "b": b}).total

    pairs = [make(), make()]
    data = [torch.randn(6, n, dtype=torch.float64) for n in (3, 2, 3)]
    with pytest.raises(Exception, match=r"gradnorm.*Way out: another weighting"):
        whole_graph(step_of(*pairs[0]))[0](*data)
    torch._dynamo.reset()
    compiled = torch.compile(step_of(*pairs[0]), backend="aot_eager")
    for _ in range(3):
        leaves = [[*trunk.parameters(), *heads.parameters()] for trunk, heads in pairs]
        expected = results(step_of(*pairs[1]), data, leaves[1])
        torch.testing.assert_close(results(compiled, data, leaves[0]), expected)
        data = [torch.randn_like(t) for t in data]


@pytest.mark.parametrize("make", [maml, pytest.param(anil, marks=pytest.mark.slow)])
def test_inductor(make: Any) -> None:
    learner = make()
    compiled, _ = whole_graph(learner.meta_loss, "inductor")
    assert_as_eager(compiled, learner.meta_loss, [batch()], list(learner.parameters()))


def test_without_gradients() -> None:
    learner, data = maml(), batch()
    compiled, graphs = whole_graph(learner.meta_loss)
    with torch.no_grad():
        torch.testing.assert_close(compiled(data), learner.meta_loss(data))
        assert not compiled(data).requires_grad
    assert compiled(data).requires_grad
    assert graphs() == 2
    with torch.inference_mode():
        torch.testing.assert_close(compiled(data), learner.meta_loss(data))


def test_a_graph_takes_tensors_that_it_computes() -> None:
    """Gradients reach what made the inputs."""
    learner, trunk, data = maml(), nn.Linear(3, 3).double(), batch()

    def step(data: TaskBatch) -> Tensor:
        return learner.meta_loss(trunk(data.sx), data.sy, trunk(data.qx).sin(), data.qy)

    assert_as_eager(whole_graph(step)[0], step, [data], [*trunk.parameters(), *learner.parameters()])
