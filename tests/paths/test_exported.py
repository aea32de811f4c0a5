"""torch.export of adapted models, of adapting, and of meta-losses, with and without Dynamo."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from cases.compiled import copies_traced
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram, export

import mtml
from mtml import MAML, Adapted, TaskBatch

strictness = pytest.mark.parametrize("strict", [False, True])


def batch(tasks: int = 3) -> TaskBatch:
    sizes = ((4, 3), (4, 2), (5, 3), (5, 2))
    return TaskBatch(*(torch.randn(tasks, *size, dtype=torch.float64) for size in sizes))


def learner(**options: Any) -> MAML:
    model = nn.Sequential(nn.Linear(3, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 2)).double()
    return MAML(model, 0.1, **{"steps": 2, "loss": "mse", **options})


class Predicts(nn.Module):
    """Adapted models, with what they were adapted to as constants."""

    def __init__(self, adapted: Adapted) -> None:
        super().__init__()
        self.adapted = adapted.detach()

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.adapted(x)
        return found


class Adapts(nn.Module):
    """Support sets and query inputs in, predictions out."""

    def __init__(self, maml: MAML) -> None:
        super().__init__()
        self.maml = maml

    def forward(self, sx: Tensor, sy: Tensor, qx: Tensor) -> Tensor:
        found: Tensor = self.maml.adapt_tasks(sx, sy)(qx)
        return found


class Loses(nn.Module):
    def __init__(self, maml: Any) -> None:
        super().__init__()
        self.maml = maml

    def forward(self, *data: Tensor) -> Tensor:
        found: Tensor = self.maml.meta_loss(*data)
        return found


def loaded(program: ExportedProgram) -> nn.Module:
    """As another process would have it."""
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    return torch.export.load(file).module()


def ops_of(program: ExportedProgram) -> str:
    return " ".join(str(node.target) for node in program.graph.nodes)


@strictness
def test_the_model_of_one_task_is_plain_pytorch(strict: bool) -> None:
    data = batch()
    model = learner().adapt_tasks(data.sx, data.sy).task(1)
    program = export(model, (data.qx[1],), dynamic_shapes=({0: Dim("n")},), strict=strict)
    assert "mtml" not in ops_of(program)
    more = torch.randn(11, 3, dtype=torch.float64)
    torch.testing.assert_close(loaded(program)(more), model(more))


@copies_traced
@strictness
def test_models_of_all_tasks(strict: bool) -> None:
    data = batch()
    adapted = learner().adapt_tasks(data.sx, data.sy)
    program = export(Predicts(adapted), (data.qx,), strict=strict)
    torch.testing.assert_close(program.module()(2 * data.qx), adapted(2 * data.qx))


@copies_traced
@strictness
def test_adapting_for_any_number_of_tasks(strict: bool) -> None:
    module, data = Adapts(learner()), batch()
    tasks = ({0: Dim("tasks")},) * 3
    program = export(module, tuple(data[:3]), dynamic_shapes=tasks, strict=strict)
    assert "mtml.inner_loop" in ops_of(program)
    assert "maml.module.0.weight" in program.state_dict  # the meta-parameters are the program's
    for count in (3, 7):
        data = batch(count)
        torch.testing.assert_close(program.module()(*data[:3]), module(*data[:3]))


def anil() -> mtml.ANIL:
    trunk = nn.Sequential(nn.Linear(3, 8), nn.Tanh()).double()
    return mtml.ANIL(trunk, nn.Linear(8, 2).double(), 0.1, steps=2, loss="mse")


@strictness
@pytest.mark.parametrize("make", [learner, lambda: learner(params="3.*", steps=10), anil], ids=["MAML", "head", "ANIL"])
@pytest.mark.parametrize("warm", [False, True])
def test_meta_losses(make: Any, warm: bool, strict: bool) -> None:
    data = batch()
    module = Loses(make())
    if warm:
        module(*data[:4])
    program = export(module, tuple(data[:4]), strict=strict)
    other = batch()
    torch.testing.assert_close(program.module()(*other[:4]), module(*other[:4]))


@copies_traced
@strictness
def test_a_saved_program_adapts(strict: bool) -> None:
    module, data = Adapts(learner()), batch()
    program = export(module, tuple(data[:3]), strict=strict)
    torch.testing.assert_close(loaded(program)(*data[:3]), module(*data[:3]))


def test_exporting_leaves_nothing_of_itself_behind() -> None:
    """Its tensors have no memory: a path that held one would be of no use to the next call."""
    maml = learner(update=mtml.inner.SGD(momentum=0.9))
    module, data = Loses(maml), batch()
    export(module, tuple(data[:4]))
    loss = maml.meta_loss(data)
    loss.sum().backward()
    fresh = MAML(maml.module, 0.1, steps=2, loss="mse", update=mtml.inner.SGD(momentum=0.9))
    torch.testing.assert_close(loss, fresh.meta_loss(data))
