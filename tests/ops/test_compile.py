"""The inner loop under torch.compile (one graph, no break), torch.export and other tracers."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from cases.inner_loop import BACKEND_NAMES, Case, latent, make_case
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

every_backend = pytest.mark.parametrize("backend", BACKEND_NAMES)


@pytest.fixture(autouse=True)
def fresh_dynamo() -> None:
    torch._dynamo.reset()


def meta_loss(case: Case, backend: str) -> Tensor:
    loss, output, support_losses, adapted = case.call(backend)
    return (2 * loss).sum() + output.square().sum() + support_losses.sum() + sum(t.mean() for t in adapted)


def loss_and_gradients(case: Case, backend: str, function: object = meta_loss) -> tuple[Tensor, ...]:
    case = case.requiring_grad()
    loss = function(case, backend)  # type: ignore[operator]
    return (loss, *torch.autograd.grad(loss, case.tensors(), allow_unused=True, materialize_grads=True))


@every_backend
@pytest.mark.parametrize(
    "options",
    [
        {"keep": 2, "masks": True, "step_weights": True},
        {"program": latent(), "adapted": [False, False, False, False, True], "keep": 1, "lr": "element_per_step"},
        {"query": 0, "keep": 1},
        {"first_order": True},
    ],
    ids=["everything", "latent", "adapt_only", "first_order"],
)
def test_one_graph_equals_eager(options: dict[str, object], backend: str) -> None:
    case = make_case(**options)  # type: ignore[arg-type]
    compiled = torch.compile(meta_loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(
        loss_and_gradients(case, backend, compiled), loss_and_gradients(case, backend), rtol=1e-12, atol=1e-14
    )


@every_backend
def test_inductor_equals_eager(backend: str) -> None:
    case = make_case(keep=1, lr="tensor")
    compiled = torch.compile(meta_loss, fullgraph=True)
    torch.testing.assert_close(
        loss_and_gradients(case, backend, compiled), loss_and_gradients(case, backend), rtol=1e-12, atol=1e-14
    )


@every_backend
def test_sizes_may_change_without_a_graph_each(backend: str) -> None:
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(meta_loss, fullgraph=True, backend=counter, dynamic=True)
    for tasks, support in ((8, 10), (12, 14), (5, 7)):  # no size that occurs twice: equal symbols would be guarded
        case = make_case(tasks=tasks, support=support, query=6)
        torch.testing.assert_close(loss_and_gradients(case, backend, compiled), loss_and_gradients(case, backend))
    assert counter.frame_count == 1


@every_backend
def test_a_trunk_before_the_inner_loop(backend: str) -> None:
    """Gradients with respect to the inputs reach what computed them."""
    trunk = nn.Linear(5, 3, dtype=torch.float64)
    case = make_case()
    raw = torch.randn(2, 3, 5, dtype=torch.float64)

    def step(raw: Tensor) -> Tensor:
        return dataclasses.replace(case, support_x=[trunk(raw).tanh()]).call(backend)[0].mean()

    expected = torch.autograd.grad(step(raw), trunk.parameters())
    found = torch.autograd.grad(torch.compile(step, fullgraph=True, backend="aot_eager")(raw), trunk.parameters())
    torch.testing.assert_close(found, expected)
    assert expected[0].norm() > 0


@every_backend
def test_compiled_without_gradients(backend: str) -> None:
    case = make_case(keep=1).requiring_grad()
    compiled = torch.compile(meta_loss, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(case, backend), meta_loss(case, backend))


def test_the_variable_chooses_under_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MTML_BACKEND", "reference")
    graphs: list[str] = []

    def record(graph: torch.fx.GraphModule, _: object) -> object:
        graphs.append(graph.code)
        return graph.forward

    case = make_case()
    torch.compile(lambda: case.call("auto")[0], fullgraph=True, backend=record)()
    assert "mtml.inner_loop" in graphs[0] and "'reference'" in graphs[0]


@every_backend
def test_fake_tensors_and_make_fx_take_the_op(backend: str) -> None:
    case = make_case(keep=2)
    loss, output, support_losses, adapted = case.call(backend)
    with FakeTensorMode() as mode:
        fake = Case(**{f.name: getattr(case, f.name) for f in dataclasses.fields(case)})
        for name in ("support_y", "query_y"):
            setattr(fake, name, mode.from_tensor(getattr(case, name)))
        fake = fake.with_tensors([mode.from_tensor(t) for t in case.tensors()])
        found = fake.call(backend)
    assert [t.shape for t in (*found[:3], *found[3])] == [t.shape for t in (loss, output, support_losses, *adapted)]
    traced = make_fx(lambda p: case.with_tensors([p, *case.tensors()[1:]]).call(backend)[0])(case.params[0])
    assert "mtml.inner_loop" in traced.code
    torch.testing.assert_close(traced(case.params[0]), loss)


@every_backend
def test_export(backend: str) -> None:
    case = make_case()

    class Model(nn.Module):
        def forward(self, raw: Tensor) -> Tensor:
            return dataclasses.replace(case, support_x=[raw]).call(backend)[0]

    program = torch.export.export(Model(), (case.support_x[0],))
    torch.testing.assert_close(program.module()(case.support_x[0]), case.call(backend)[0])
