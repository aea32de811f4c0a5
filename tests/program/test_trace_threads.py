"""Threads that run a module while another one traces it, and what tracing may share with them."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_trace_private import OmniglotCNN, Twice, batch, dense, parts
from torch import Tensor, nn

from mtml import MAML
from mtml_kernels.program import Unfusable, trace


def in_threads(*work: Callable[[], None]) -> list[Exception]:
    errors: list[Exception] = []

    def guarded(function: Callable[[], None]) -> None:
        try:
            function()
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(function,)) for function in work]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return errors


@pytest.mark.parametrize("make", [dense, lambda: Twice("sequential"), OmniglotCNN], ids=["dense", "shared", "conv"])
def test_threads_that_run_the_model_notice_nothing(make: Callable[[], nn.Module]) -> None:
    for _ in range(3):
        model, done, outputs = make(), threading.Event(), []
        images = isinstance(model, OmniglotCNN)
        data = batch(torch.float32)
        if images:
            labels = torch.arange(3).repeat(2, 2)
            data = torch.randn(2, 6, 8, 8), labels, torch.randn(2, 6, 8, 8), labels
        x, maml = data[0][0], MAML(model, 0.1, loss="cross_entropy" if images else "mse")
        want, before = model(x), parts(model)

        def run(model: nn.Module = model, x: Tensor = x, done: Any = done, outputs: Any = outputs) -> None:
            while not done.is_set():
                outputs.append(model(x))

        def first(maml: MAML = maml, data: Any = data, done: Any = done) -> None:
            try:
                assert maml.explain(*data).path == "fused"
            finally:
                done.set()

        losses: list[Tensor] = []
        more = [lambda losses=losses, maml=maml, data=data: losses.append(maml.meta_loss(*data)) for _ in range(3)]
        assert not in_threads(run, run, *more, first)
        assert outputs and all(output.dtype is torch.float32 and torch.equal(output, want) for output in outputs)
        assert all(torch.equal(loss, losses[0]) for loss in losses) and parts(model) == before


def test_threads_trace_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    real = trace

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return real(*args, **kwargs)

    maml, data = MAML(dense(), 0.1, loss="mse"), batch(torch.float32)
    planner = maml._paths.finder()
    monkeypatch.setattr("mtml.paths.finder.trace", counted)
    assert not in_threads(*[lambda: planner._trace(_as_batch(data))] * 4)
    assert len(calls) == 1


def _as_batch(data: tuple[Tensor, ...]) -> Any:
    from mtml.paths.batch import Batch

    return Batch(*data)


def test_nothing_that_all_modules_share_is_replaced() -> None:
    seen: set[Any] = set()

    class Looks(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            tracing = torch.fx._symbolic_trace.is_fx_symbolic_tracing()
            seen.add((nn.Module.__call__, nn.Module.__getattr__, tracing))
            return super().forward(x)

    trace(Looks(3, 2), [(3,)])
    assert seen == {(nn.Module.__call__, nn.Module.__getattr__, False)}


def test_a_model_that_traces_another_model_does_not_wait_for_itself() -> None:
    class Nested(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            trace(nn.Linear(4, 1), [(4,)])
            return super().forward(x)

    assert len(trace(Nested(3, 2), [(3,)]).params) == 2


def test_functions_that_torch_compile_wrapped_are_not_compiled_for_the_tracer() -> None:
    compiled: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        compiled.append(graph)
        return graph.forward

    act = torch.compile(lambda x: torch.tanh(2.0 * x), backend=backend)

    class Net(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return act(super().forward(x))

    assert [record["op"] for record in trace(Net(3, 2), [(3,)]).describe()] == ["input", "linear", "affine", "tanh"]
    assert not compiled
    with pytest.raises(Unfusable, match=r"torch\.compile"):
        trace(torch.compile(nn.Linear(3, 2), backend=backend), [(3,)])
