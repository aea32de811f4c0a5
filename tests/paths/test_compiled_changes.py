"""Graphs of torch.compile follow what eager calls follow, and are made anew only where they have to be."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases.compiled import assert_as_eager, whole_graph
from torch import Tensor, nn

import mtml
from mtml import ANIL, MAML, FallbackWarning, InnerLR, TaskBatch, inner
from mtml.paths.form import form_of


class Net(nn.Module):
    """What forward reads lies under names of all kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.act, self.last = nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2)
        self.norm = nn.BatchNorm1d(8)
        self.settings = {"scale": 2.0}
        self.shifts = [0.5]

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.act(self.norm(self.first(x)) * self.settings["scale"] + self.shifts[0]))


def batch(tasks: int = 3, support: int = 4) -> TaskBatch:
    sizes = ((support, 3), (support, 2), (5, 3), (5, 2))
    return TaskBatch(*(torch.randn(tasks, *size, dtype=torch.float64) for size in sizes))


def maml(lr: Any = 0.1, **options: Any) -> MAML:
    learner = MAML(Net().double(), lr, **{"steps": 2, "loss": "mse", **options})
    learner.module.norm.running_mean.normal_()
    return learner


def anil() -> ANIL:
    trunk = nn.Sequential(nn.Linear(3, 8), nn.Tanh()).double()
    return ANIL(trunk, nn.Linear(8, 2).double(), 0.1, steps=2, loss="mse")


def check(compiled: Callable[..., Any], learner: Any, data: TaskBatch) -> None:
    assert_as_eager(compiled, learner.meta_loss, [data], list(learner.parameters()))


@pytest.mark.parametrize("make", [maml, anil])
def test_another_number_of_tasks_needs_one_graph_more_and_then_none(make: Any) -> None:
    learner = make()
    compiled, graphs = whole_graph(learner.meta_loss, "eager")
    found = []
    for tasks in (3, 3, 4, 7, 9, 3):
        check(compiled, learner, batch(tasks))
        found.append(graphs())
    assert found == [1, 1, 2, 2, 2, 2]
    compiled, graphs = whole_graph(learner.meta_loss, "eager", dynamic=True)
    for tasks in (6, 4, 7):
        check(compiled, learner, batch(tasks))
    assert graphs() == 1


def test_sizes_of_a_task_make_graphs_of_their_own() -> None:
    """The path may depend on them."""
    learner = maml()
    compiled, graphs = whole_graph(learner.meta_loss, "eager", dynamic=True)
    for support in (4, 6, 4, 6):
        check(compiled, learner, batch(support=support))
    assert graphs() == 2


def _with(learner: Any, **values: Any) -> None:
    for name, value in values.items():
        setattr(learner, name, value)


def _parameter(net: Net) -> None:
    net.first.weight = nn.Parameter(torch.randn(8, 3, dtype=torch.float64))


def _values(net: Net) -> None:
    with torch.no_grad():
        net.first.weight.mul_(2.0)


# changes that a graph follows: how many graphs there are after each, beginning with one
FREE: dict[str, Callable[[MAML], Any]] = {
    "a rate": lambda m: _with(m, lr=m.lr / 2),
    "values of parameters": lambda m: _values(m.module),
    "parameters": lambda m: _parameter(m.module),
    "a layer": lambda m: _with(m.module, first=nn.Linear(3, 8).double()),
    "a state_dict": lambda m: m.load_state_dict(maml().state_dict()),
}
REMADE: dict[str, Callable[[MAML], Any]] = {
    "an activation": lambda m: _with(m.module, act=nn.ReLU()),
    "a setting": lambda m: m.module.settings.update(scale=3.0),
    "an element of a list": lambda m: m.module.shifts.__setitem__(0, 1.5),
    "eval()": lambda m: m.eval(),
    "a frozen parameter": lambda m: m.module.first.weight.requires_grad_(False),
    "a hook": lambda m: m.module.act.register_forward_pre_hook(lambda module, args: (args[0] * 2,)),
    "the steps": lambda m: _with(m, steps=3),
    "the order": lambda m: _with(m, first_order=True),
    "the loss": lambda m: _with(m, loss="huber"),
    "the loss's option": lambda m: _with(m, loss=nn.HuberLoss(delta=0.3)),
    "the statistics": lambda m: _with(m, batch_norm="running"),
    "learned rates": lambda m: _with(m, lr=InnerLR(m.module, 0.2)),
    "a rule": lambda m: _with(m, update=inner.SGD(momentum=0.9), lr=0.01),
    "the layer's width": lambda m: _with(
        m.module, first=nn.Linear(3, 6).double(), norm=nn.BatchNorm1d(6).double(), last=nn.Linear(6, 2).double()
    ),
}
FALLS_BACK = ("a hook",)  # no graph has the general path


@pytest.mark.parametrize("name", FREE)
def test_changes_that_need_no_graph(name: str) -> None:
    learner, data = maml(), batch()
    compiled, graphs = whole_graph(learner.meta_loss, "eager")
    check(compiled, learner, data)
    before = compiled(data)
    for _ in range(10):  # more often than torch.compile makes graphs of one function
        FREE[name](learner)
        check(compiled, learner, data)
    assert graphs() == 1
    assert not torch.equal(compiled(data), before)


@pytest.mark.parametrize("name", [name for name in REMADE if name not in FALLS_BACK])
def test_changes_that_need_a_graph(name: str) -> None:
    learner, data = maml(), batch()
    compiled, graphs = whole_graph(learner.meta_loss, "eager")
    check(compiled, learner, data)
    before = compiled(data)
    REMADE[name](learner)
    check(compiled, learner, data)
    check(compiled, learner, data)
    assert graphs() == 2
    assert name in ("a frozen parameter", "the order") or not torch.equal(compiled(data), before)


def test_a_change_to_what_is_not_fused_is_named() -> None:
    learner, data = maml(), batch()
    compiled, _ = whole_graph(learner.meta_loss, "eager")
    compiled(data)
    REMADE["a hook"](learner)
    with pytest.raises(Exception, match=r"general path.*hook"):
        compiled(data)


def test_switching_back_needs_no_graph() -> None:
    learner, data = maml(), batch()
    compiled, graphs = whole_graph(learner.meta_loss, "eager")
    for _ in range(3):
        check(compiled, learner.train(), data)
        check(compiled, learner.eval(), data)
    assert graphs() == 2


def test_changes_are_followed_after_many_runs() -> None:
    """Dynamo leaves out guards of modules that have not changed for a while: ours it must not."""

    class Trainer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.learner = maml()

        def forward(self, data: TaskBatch) -> Tensor:
            return self.learner.meta_loss(data)

    trainer, data = Trainer(), batch()
    compiled, _ = whole_graph(trainer, "eager")
    for _ in range(100):
        before = compiled(data)
    trainer.learner.module.settings["scale"] = 3.0
    assert not torch.equal(compiled(data), before)
    torch.testing.assert_close(compiled(data), trainer(data))


def test_learned_rates_and_numbers_of_rules_are_inputs() -> None:
    net = Net().double()
    for learner, change in (
        (MAML(net, InnerLR(net, 0.1), steps=2, loss="mse"), lambda m: m.lr.rates[0].data.mul_(0.9)),
        (maml(torch.tensor(0.1, dtype=torch.float64)), lambda m: m.lr.mul_(0.9)),
        (maml(0.01, update=inner.SGD(momentum=0.9)), lambda m: _with(m.update, momentum=m.update.momentum * 0.9)),
        (anil(), lambda m: _with(m, lr=m.lr * 0.9)),
    ):
        compiled, graphs = whole_graph(learner.meta_loss, "eager")
        found = []
        for _ in range(5):
            check(compiled, learner, batch())
            found.append(graphs())
            change(learner)
        assert found[0] == 1 and found[2:] == [found[1]] * 3, learner  # a second graph, where a number is first changed


def test_one_tensor_in_two_places_is_not_two_tensors() -> None:
    """A graph has one input for both; it is no graph for two."""
    one, two = torch.ones(2), torch.zeros(2)
    assert form_of([one, one]) == form_of([two, two]) != form_of([one, two]) == form_of([two, one])
    data, rates = batch(), [torch.tensor(rate, dtype=torch.float64) for rate in (0.1, 0.2)]
    learner = maml({name: rates[0] for name, _ in Net().named_parameters()})
    compiled, _ = whole_graph(learner.meta_loss, "eager")
    check(compiled, learner, data)
    learner.lr = {**learner.lr, "last.weight": rates[1]}
    check(compiled, learner, data)


def test_anil_follows_its_model() -> None:
    learner, data = anil(), batch()
    compiled, _ = whole_graph(learner.meta_loss, "eager")
    for change in (
        lambda: _with(learner.head, weight=nn.Parameter(torch.randn(2, 8, dtype=torch.float64))),
        lambda: learner.features.__setitem__(1, nn.ReLU()),
        lambda: learner.head.bias.requires_grad_(False),
        lambda: _with(learner, steps=3),
        lambda: _with(learner, loss="huber"),
    ):
        check(compiled, learner, data)
        change()
        check(compiled, learner, data)


INSIDE: list[tuple[str, Callable[[MAML], Any]]] = [
    ("training", lambda m: m.eval()),
    ("lr", lambda m: _with(m, lr=0.5)),
    ("steps", lambda m: _with(m, steps=3)),
    ("settings", lambda m: _with(m.module, settings={"scale": 3.0})),
    ("model", lambda m: m.module.settings.__setitem__("scale", 3.0)),
    ("model", lambda m: m.module.shifts.__setitem__(0, 1.5)),
    ("model", lambda m: _with(m.module, act=nn.ReLU())),
]


@pytest.mark.parametrize(("named", "change"), INSIDE)
def test_a_change_within_the_function_is_refused(named: str, change: Callable[[MAML], Any]) -> None:
    """The graph's path is found before the function runs: what it changes itself would come too late."""
    learner, data = maml(), batch()

    def step(data: TaskBatch) -> Tensor:
        change(learner)
        return learner.meta_loss(data)

    with pytest.raises(Exception, match=rf"{named}: expected no change.*change it before the compiled function"):
        whole_graph(step, "eager")[0](data)
    torch._dynamo.reset()
    found = torch.compile(step, backend="eager")(data)  # without fullgraph it runs as it is written
    torch.testing.assert_close(found, step(data))


def test_what_changes_nothing_may_stand_within() -> None:
    learner, data = maml(), batch()

    def step(data: TaskBatch) -> Tensor:
        learner.train()
        return learner.meta_loss(data)

    torch.testing.assert_close(whole_graph(step, "eager")[0](data), step(data))


def test_copies_have_graphs_of_their_own() -> None:
    learner, data = maml(), batch()
    for copied in (copy.deepcopy(learner), pickle.loads(pickle.dumps(learner))):
        compiled, _ = whole_graph(copied.meta_loss, "eager")
        check(compiled, copied, data)
        _values(copied.module)
        check(compiled, copied, data)
        assert not torch.equal(compiled(data), learner.meta_loss(data))


def test_modes_within_the_function_are_those_of_its_call() -> None:
    """The guard runs outside: under autocast, or with gradients, that the call does not have."""
    learner, data = maml(), batch()

    def without(data: TaskBatch) -> Tensor:
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            return learner.meta_loss(data)

    compiled, graphs = whole_graph(without, "eager")
    for _ in range(3):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert not compiled(data).requires_grad
    torch.testing.assert_close(compiled(data), without(data))
    assert graphs() == 2  # around it autocast is on, and off


def test_what_others_do_meanwhile_needs_no_graph() -> None:
    """Tables that calls are remembered in grow by the calls of others."""

    def of_heads(n: int) -> Callable[[], Tensor]:
        heads = mtml.MultiHead(3, {"a": mtml.Regression(n), "b": mtml.Segmentation(n)}).double()
        features = {"a": torch.ones(2, 3, dtype=torch.float64), "b": torch.ones(2, 3, 2, 2, dtype=torch.float64)}
        targets = {"a": torch.zeros(2, n, dtype=torch.float64), "b": torch.zeros(2, 2, 2, dtype=torch.long)}
        return lambda: heads.loss(features, targets).total

    def of_learner(learner: Any, n: int) -> Callable[[], Tensor]:
        data = batch(3, n + 1)
        return lambda: learner.meta_loss(data, steps=n)

    makers = (of_heads, lambda n: of_learner(maml(), n), lambda n: of_learner(anil(), n))
    for make in makers:
        make(1)()
        compiled, graphs = whole_graph(make(2), "eager")
        compiled()
        for n in (3, 4):
            make(n)()
        torch.compile(make(5), backend="eager", fullgraph=True)()
        compiled()
        assert graphs() == 2  # its own, and the one of the other


def test_several_learners_in_one_function() -> None:
    learners = [maml(), maml(0.3, steps=1)]
    data = batch()

    def step(data: TaskBatch) -> Tensor:
        return learners[0].meta_loss(data) + learners[1].meta_loss(data)

    compiled, graphs = whole_graph(step, "eager")
    leaves = [p for learner in learners for p in learner.parameters()]
    for lr in (0.3, 0.2, 0.1):
        learners[1].lr = lr
        assert_as_eager(compiled, step, [data], leaves)
    assert graphs() == 1


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"qx": torch.randn(4, 5, 3, dtype=torch.float64)}, r"qx: .*\[T, Q\] = \[3, 5\]"),
        ({"sy": torch.randn(3, 4, 3, dtype=torch.float64)}, r"sy: .*\[3, 4, 2\]"),
        ({"sx": torch.randn(3, 4, 3)}, r"sx: expected float64"),
        ({n: torch.zeros(0, 4, w, dtype=torch.float64) for n, w in (("sx", 3), ("sy", 2))}, "T = 0"),
        (dict.fromkeys(("sx", "sy", "qx", "qy"), 1.0), "sx: expected a tensor"),
    ],
    ids=["tasks", "targets", "dtype", "none", "numbers"],
)
def test_bad_input_is_named(wrong: dict[str, Any], message: str) -> None:
    learner, data = maml(), batch()._replace(**wrong)
    with pytest.raises(Exception, match=message):
        whole_graph(learner.meta_loss, "eager")[0](data)
    with pytest.raises((ValueError, TypeError), match=message):  # as eager code does
        torch.compile(learner.meta_loss, backend="eager")(data)


def test_missing_targets() -> None:
    """A loss of the output alone goes without them, on the general path; any other names them."""
    data, alone = batch(), maml(loss=lambda output: output.square().mean())
    cases = ((alone, "general path.*output alone"), (maml(), "sy: expected"), (anil(), "sy: expected"))
    for learner, message in (*cases, (maml(loss=nn.MSELoss()), "sy: expected")):
        compiled, _ = whole_graph(lambda x, learner=learner: learner.meta_loss(x, None, x, None), "eager")
        with pytest.raises(Exception, match=message):
            compiled(data.sx)


def test_values_are_checked_when_a_graph_runs() -> None:
    rate = torch.tensor(0.1, dtype=torch.float64)
    learner, data = maml(rate), batch()
    compiled, _ = whole_graph(learner.meta_loss, "eager")
    compiled(data)
    rate.fill_(float("nan"))
    with pytest.raises(RuntimeError, match="lr: expected finite rates"):
        compiled(data)
    for backend in ("cpu", "reference", "torch"):
        learner = maml(loss="cross_entropy", backend=backend)
        ids = torch.zeros(3, 4, dtype=torch.long)
        data = TaskBatch(data.sx, ids, data.qx, torch.zeros(3, 5, dtype=torch.long))
        compiled, _ = whole_graph(learner.meta_loss, "eager")
        compiled(data)
        ids[1, 2] = 7
        with pytest.raises((RuntimeError, ValueError), match=r"(sy|support_y): expected class ids"):
            compiled(data)


def test_the_general_path_is_no_graph() -> None:
    learner = MAML(nn.Sequential(nn.Linear(3, 2), nn.Mish()).double(), 0.1, steps=2, loss="mse")
    with pytest.raises(Exception, match=r"general path.*Mish.*Way out"):
        whole_graph(learner.meta_loss, "eager")[0](batch())
    torch._dynamo.reset()
    compiled = torch.compile(lambda data: 2 * learner.meta_loss(data), backend="aot_eager")  # between two graphs
    with pytest.warns(FallbackWarning, match="Mish"):
        compiled(batch())
    for tasks in (3, 4):
        data = batch(tasks)
        assert_as_eager(compiled, lambda data: 2 * learner.meta_loss(data), [data], list(learner.parameters()))


@pytest.mark.parametrize("transform", [torch.func.grad, torch.func.vmap])
def test_compiled_transforms_are_no_graph(transform: Any) -> None:
    learner, data = maml(), batch()
    function = transform(lambda x: learner.meta_loss(x, data.sy, data.qx, data.qy).sum())
    x = torch.stack([data.sx, data.sx]) if transform is torch.func.vmap else data.sx
    with pytest.raises(Exception, match=r"inside a transform.*Way out: the transform outside torch\.compile"):
        whole_graph(function, "eager")[0](x)


def test_adapting_on_the_general_path_between_graphs() -> None:
    learner = MAML(nn.Sequential(nn.Linear(3, 2), nn.Mish()).double(), 0.1, loss="mse", backend="general")

    def step(data: TaskBatch) -> Any:
        return learner.adapt_tasks(data.sx, data.sy)(data.qx)

    torch._dynamo.reset()
    assert_as_eager(torch.compile(step, backend="aot_eager"), step, [batch()], list(learner.parameters()))


def test_a_loss_that_reads_other_ids_is_checked() -> None:
    def loss(output: Tensor, target: Tensor) -> Tensor:
        return -torch.log_softmax(output, -1)[torch.arange(len(target)), target].mean()

    learner, data = maml(loss=loss), batch()
    ids = [torch.randint(2, (3, n)) for n in (4, 5)]
    data = TaskBatch(data.sx, ids[0], data.qx, ids[1])
    compiled, _ = whole_graph(learner.meta_loss, "eager")
    check(compiled, learner, data)
    ids[0][0, 0] = -1  # the last class, to indexing
    with pytest.raises(RuntimeError, match=r"class ids below 0.*outside torch\.compile"):
        compiled(data)
    assert isinstance(learner, mtml.MAML)
