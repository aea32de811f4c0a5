"""The provider ``mixflow``: the reference's meta-gradient, in memory that hardly grows with the steps."""

from __future__ import annotations

import sys
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT))  # bench/ is not installed; last, so that the installed packages are the ones under test

from bench import providers  # noqa: E402
from bench.measure import memory, runner  # noqa: E402
from bench.providers.base import Result  # noqa: E402
from bench.workloads import WORKLOADS, Workload, convnet  # noqa: E402
from bench.workloads.inner import WORKLOADS as INNER  # noqa: E402

IMAGES = {"tasks": 2, "support": 6, "query": 7, "steps": 2}
SMALL = {
    **{name: WORKLOADS[name] for name in ("tiny", "tiny_mlp", "sinusoid")},
    "no_steps": replace(WORKLOADS["tiny"], steps=0, inputs=True),
    "one_task": replace(WORKLOADS["tiny"], tasks=1, inputs=True),
    "inputs": replace(WORKLOADS["tiny"], steps=5, inputs=True),
    "siren_sine": replace(WORKLOADS["siren_sine"], tasks=2, support=9, query=7),
    "anil_head": replace(WORKLOADS["anil_head"], tasks=2),
    "strided": replace(WORKLOADS["omniglot_conv"], build=lambda: convnet(1, 4, 16, 5, stride=2, pool=False), **IMAGES),
    "pooled": replace(
        WORKLOADS["l2l_higher_omniglot"], build=lambda: convnet(1, 4, 4, 5, depth=3, pad=0), lr=0.1, **IMAGES
    ),
}


def outcome(w: Workload, provider: str) -> Result:
    return runner.outcome(runner.prepare(w, provider, torch.float64, "cpu"))


@pytest.mark.parametrize("provider", ["mixflow", "mixflow:loop"])
@pytest.mark.parametrize("name", SMALL)
def test_the_meta_gradient_is_the_references(name: str, provider: str) -> None:
    (loss, grads), (expected_loss, expected) = outcome(SMALL[name], provider), outcome(SMALL[name], "mtml:reference")
    assert float(loss) == pytest.approx(float(expected_loss), rel=1e-9)
    size = max(float(g.abs().max()) for g in expected)
    for got, want in zip(grads, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-9 * size)


class Alive(TorchDispatchMode):
    """The most bytes that were alive at one time among what operations returned."""

    def __init__(self) -> None:
        super().__init__()
        self.peak, self.seen = 0, list[weakref.ref[torch.Tensor]]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = [t for t in tree_leaves(out) if isinstance(t, torch.Tensor) and not t._is_zerotensor()]
        self.seen += map(weakref.ref, given)
        alive = [t for ref in self.seen if (t := ref()) is not None]
        self.seen = list(map(weakref.ref, alive))
        self.peak = max(self.peak, sum({(s := t.untyped_storage()).data_ptr(): s.nbytes() for t in alive}.values()))
        return out


def growth_in_bytes(provider: str) -> float:
    """Of the peak, by an inner step of ``tiny`` where there are many: the block decides then."""
    peaks = []
    for steps in (12, 22):
        prepared = runner.prepare(replace(SMALL["tiny"], steps=steps), provider, torch.float64, "cpu")
        with Alive() as alive:
            prepared.run()
        peaks.append(alive.peak)
    return (peaks[1] - peaks[0]) / 10


def test_what_is_kept_of_a_step_is_its_parameters() -> None:
    tasks, parameters = SMALL["tiny"].tasks, 3 * 8 + 8 + 8 * 2 + 2
    assert growth_in_bytes("mixflow") == 8 * tasks * parameters
    assert growth_in_bytes("mixflow:loop") == 8 * parameters
    assert growth_in_bytes("vmap") > 4 * 8 * tasks * parameters  # the graph, which this way of counting sees


def test_it_runs_where_nothing_is_asked_for() -> None:
    assert {"mixflow"} <= set(providers.default(WORKLOADS["sinusoid"])) & set(providers.default(WORKLOADS["mini_conv"]))
    assert {"mixflow", "mixflow:loop"} <= set(memory.default(WORKLOADS["sinusoid"]))
    assert memory.default(INNER["functa"]) == ("mtml", "loop")  # these are inner loops of other kinds


@pytest.mark.slow
def test_memory_of_30_more_steps_beside_the_plain_loops() -> None:
    """Of siren: 8.3 MB of parameters for its 8 tasks took 19 MB, one task's 1 MB 3; the loop's graph 460."""

    def growth(provider: str) -> float:
        few, many = (memory.measure("siren", provider, steps, 1) for steps in (1, 31))
        assert not few.error and not many.error, few.error + many.error
        return many.megabytes - few.megabytes

    loop = growth("loop")
    assert growth("mixflow") < loop / 5 and growth("mixflow:loop") < loop / 50
