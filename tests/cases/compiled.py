"""Functions under torch.compile beside themselves: the same values and gradients, and how many graphs they took."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch.utils import _pytree as pytree

Step = Callable[..., Any]
copies_traced = pytest.mark.skipif(
    tuple(map(int, torch.__version__.split(".")[:2])) < (2, 13), reason="Dynamo traces and saves no copies of modules"
)


def whole_graph(step: Step, backend: str = "aot_eager", **options: Any) -> tuple[Step, Callable[[], int]]:
    """The function as one graph, or an error; and how many graphs it has taken so far."""
    torch._dynamo.reset()
    counters["stats"].clear()
    return torch.compile(step, backend=backend, fullgraph=True, **options), lambda: counters["stats"]["unique_graphs"]


def results(step: Step, args: Sequence[Any], leaves: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor | None]]:
    """What comes out, and the gradients of its sum, each element with a factor of its own."""
    found = [t for t in pytree.tree_leaves(step(*args)) if isinstance(t, Tensor)]
    rising = [(t * torch.linspace(1, 2, t.numel(), dtype=t.dtype).reshape(t.shape)).sum() for t in found]
    asked = [t for t in leaves if t.requires_grad]
    return found, list(torch.autograd.grad(torch.stack(rising).sum(), asked, allow_unused=True))


def assert_as_eager(compiled: Step, step: Step, args: Sequence[Any], leaves: Sequence[Tensor]) -> None:
    """Equal values and equal gradients, or none where eager code has none."""
    found, expected = results(compiled, args, leaves), results(step, args, leaves)
    torch.testing.assert_close(found[0], expected[0], rtol=1e-11, atol=1e-13)
    assert [g is None for g in found[1]] == [g is None for g in expected[1]]
    for ours, theirs in zip(found[1], expected[1], strict=True):
        if theirs is not None:
            torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
    assert any(g is not None and g.abs().sum() > 0 for g in expected[1])  # else nothing was compared
