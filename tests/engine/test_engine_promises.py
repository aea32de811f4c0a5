"""What the compiled CPU engine promises beside accuracy: the same bits, tasks that do not touch each other, any number
of threads and processes, any instruction set, little memory.
"""

from __future__ import annotations

import dataclasses
import json
import os
import random
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases.engine import (
    ENGINE,
    Evaluated,
    cotangents_of,
    draft_case,
    evaluate,
    film,
    mapped,
    mlp,
    outputs_of,
    same_bits,
)
from cases.engine_random import random_case
from cases.inner_loop import Case
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mtml_kernels import native
from mtml_kernels.errors import BackendUnavailable
from mtml_kernels.losses import LossSpec
from mtml_kernels.program import Act

seeds, sizes = st.integers(0, 2**40), st.integers(0, 10)


def ones_of(case: Case) -> list[Tensor | None]:
    return [torch.ones_like(t) for t in outputs_of(case, ENGINE)]


# Large enough for every internal path: see test_engine for what they hit.
LARGE: dict[str, Case] = {
    "chunks": draft_case(mlp([2, 33, 33, 3], Act.SIN), support=600, query=520, tasks=3, keep=2, lr="tensor"),
    "blocks": draft_case(film(3, 200, 5, latent=7), support=250, query=130, tasks=2, step_weights=True),
    "summed carry": draft_case(mlp([3, 100, 100, 5], Act.RELU), tasks=9, dtype=torch.float32, weight_scale=0.7),
    "segments": draft_case(mlp([5, 900, 900, 2], Act.TANH), tasks=2, steps=7, weight_scale=0.5, keep=1),
    "many rows": draft_case(film(2, 17, 1, latent=5, rows=300), support=17, query=3, lr="element", dtype=torch.float32),
}


# --- the same bits ----------------------------------------------------------------------------------------------------


def poisoned(case: Case) -> Case:
    """The same call on NaN."""
    return mapped(case, lambda t: torch.full_like(t, float("nan")) if t.is_floating_point() else t)


@settings(max_examples=150)
@given(seeds, sizes)
def test_random_calls_repeat_bit_by_bit(seed: int, nodes: int) -> None:
    """Also after a call on NaN has left its traces in the memory that the engine uses again, and on other threads."""
    rng = random.Random(seed)
    case = random_case(rng, nodes)
    cotangents = cotangents_of(case, rng)
    first = evaluate(case, ENGINE, cotangents)
    evaluate(poisoned(case), ENGINE, cotangents)
    assert same_bits(evaluate(case, ENGINE, cotangents), first)
    assert same_bits(evaluate(case, ENGINE, cotangents, threads=rng.choice([2, 3, 4])), first)


@pytest.mark.parametrize("name", LARGE)
def test_large_calls_repeat_bit_by_bit(name: str) -> None:
    case = LARGE[name]
    only_loss: list[Tensor | None] = [torch.ones(len(case.support_y), dtype=case.params[0].dtype)]
    only_loss += [None] * (len(outputs_of(case, ENGINE)) - 1)
    for cotangents in (only_loss, ones_of(case)):
        first = evaluate(case, ENGINE, cotangents)
        evaluate(poisoned(case), ENGINE, cotangents)
        for threads in (1, 2, 3, 4):
            assert same_bits(evaluate(case, ENGINE, cotangents, threads=threads), first), threads


def some_tasks(case: Case, order: Sequence[int]) -> Case:
    """The call for these tasks alone, in this order."""
    names = ("support_y", "query_y", "support_mask", "query_mask")
    rest: dict[str, Any] = {name: None if (t := getattr(case, name)) is None else t[list(order)] for name in names}
    xs: dict[str, Any] = {name: [x[list(order)] for x in getattr(case, name)] for name in ("support_x", "query_x")}
    return dataclasses.replace(case, **rest, **xs)


def of_task(case: Case, position: int, everything: bool, threads: int = 1) -> tuple[list[Tensor], list[Tensor]]:
    """What the outputs say about one task, and the gradients of a cotangent that is zero for the others (on the loss 1:
    another one may be multiplied in before or after the way back).
    """
    keep = case.spec.keep
    dims = [0, 0, 1] + [1 if keep == 2 else 0] * sum(case.spec.adapted) * (keep > 0)
    cotangents: list[Tensor | None] = []
    for index, (output, dim) in enumerate(zip(outputs_of(case, ENGINE), dims, strict=True)):
        one = torch.zeros_like(output)
        one.select(dim, position).fill_(1.0 if index == 0 else 1.25)
        cotangents.append(one if everything or index == 0 else None)
    outputs, grads = evaluate(case, ENGINE, cotangents, threads=threads)
    count = len(case.params) + len(case.lr)
    inputs = [g[position] for g in grads[count:]]
    return [o.select(dim, position) for o, dim in zip(outputs, dims, strict=True)], [*grads[:count], *inputs]


BATCHES: dict[str, dict[str, Any]] = {
    "small": {"draft": mlp([3, 17, 5], Act.GELU), "loss": LossSpec("cross_entropy"), "masks": ("some", "none")},
    "latent": {"draft": film(3, 17, 5, latent=4), "lr": "element_per_step", "keep": 2, "step_weights": True},
    "summed carry": {"draft": mlp([3, 100, 100, 5], Act.RELU), "lr": "tensor", "keep": 1},
    "chunks": {"draft": mlp([2, 9, 3], Act.SIN), "support": 520, "query": 30, "steps": 1},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", BATCHES)
def test_a_task_gives_the_same_bits_in_any_batch(name: str, dtype: torch.dtype) -> None:
    """Alone, first, in the middle and last of 2 to 9 tasks, on one to three threads."""
    pool = problem_of(BATCHES[name], dtype)
    alone = [of_task(some_tasks(pool, [4]), 0, everything) for everything in (False, True)]
    others = [0, 1, 2, 3, 5, 6, 7, 8]
    for size in range(2, 10):
        for position in sorted({0, size // 2, size - 1}):
            order = others[: size - 1]
            order.insert(position, 4)
            batch = some_tasks(pool, order)
            for everything in (False, True):
                found = of_task(batch, position, everything, threads=1 + size % 3)
                assert same_bits(found, alone[everything]), (size, position)


def problem_of(options: dict[str, Any], dtype: torch.dtype) -> Case:
    rest = {key: value for key, value in options.items() if key != "draft"}
    return draft_case(options["draft"], tasks=9, dtype=dtype, **rest)


# --- NaN --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("group", ["support_x", "query_x"])
@pytest.mark.parametrize("name", BATCHES)
def test_nan_stays_in_its_task(name: str, group: str) -> None:
    case = problem_of(BATCHES[name], torch.float64)
    cotangents = ones_of(case)
    clean = evaluate(case, ENGINE, cotangents)
    getattr(case, group)[0][3, 1] = float("nan")
    dirty = evaluate(case, ENGINE, cotangents)
    assert dirty[0][0].isnan().tolist() == [task == 3 for task in range(9)]
    others = [task for task in range(9) if task != 3]
    for ours, theirs in zip(per_task(case, dirty, others), per_task(case, clean, others), strict=True):
        assert torch.equal(ours, theirs)


def per_task(case: Case, results: Evaluated, tasks: list[int]) -> list[Tensor]:
    """Outputs and gradients of the inputs, of these tasks."""
    (loss, output, support_losses, *adapted), grads = results
    kept = [t[:, tasks] if case.spec.keep == 2 else t[tasks] for t in adapted]
    inputs = grads[len(case.params) + len(case.lr) :]
    return [loss[tasks], output[tasks], support_losses[:, tasks], *kept, *(g[tasks] for g in inputs)]


@pytest.mark.parametrize("kind", list(Act), ids=lambda kind: kind.name.lower())
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_activations_pass_nan(kind: Act, dtype: torch.dtype) -> None:
    """A NaN in one sample reaches that sample's output, as in PyTorch (relu included), and no other."""
    for sizes in ([3, 17, 2], [3, 2, 2]):
        case = draft_case(mlp(sizes, kind), tasks=1, query=5, steps=0, dtype=dtype)
        case.query_x[0][0, 2, 1] = float("nan")
        loss, output, *_ = outputs_of(case, ENGINE)
        assert output.isnan().any(-1).tolist() == [[False, False, True, False, False]]
        assert output[0, 2].isnan().all() and loss.isnan().all()


# --- threads and processes --------------------------------------------------------------------------------------------


def test_two_python_threads_at_once() -> None:
    """Different programs, each on two threads; a workspace is never shared."""
    names = ("chunks", "summed carry")
    alone = [evaluate(LARGE[name], ENGINE, ones_of(LARGE[name])) for name in names]
    found: dict[str, list[Evaluated]] = {name: [] for name in names}
    gate = threading.Barrier(2)

    def work(name: str) -> None:
        gate.wait()
        found[name] += [evaluate(LARGE[name], ENGINE, ones_of(LARGE[name]), threads=2) for _ in range(3)]

    threads = [threading.Thread(target=work, args=(name,)) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for name, expected in zip(names, alone, strict=True):
        assert len(found[name]) == 3 and all(same_bits(results, expected) for results in found[name])


def script(
    function: str, *arguments: object, seconds: float = 120, module: str = "test_engine_promises", **variables: str
) -> Any:
    """Runs a function of this file (or another) in a process of its own and returns what it returns, through JSON."""
    call = f"import json, {module} as t; print(json.dumps(t.{function}(*{arguments!r})))"
    folders = [str(Path(__file__).parent), str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, folders)), **variables}
    command = [sys.executable, "-c", call]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=seconds, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def in_forked_children() -> list[int]:
    """After a parallel region here, children by os.fork run the same call: exit status 0 where the bits agree."""
    case = LARGE["summed carry"]
    cotangents = ones_of(case)
    expected = evaluate(case, ENGINE, cotangents, threads=2)
    statuses = []
    for _ in range(2):
        child = os.fork()
        if child == 0:
            same = same_bits(evaluate(case, ENGINE, cotangents, threads=2), expected)
            os._exit(0 if same else 1)
        statuses.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    assert same_bits(evaluate(case, ENGINE, cotangents, threads=2), expected)
    return statuses


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork on this system")
def test_forked_children_do_not_hang() -> None:
    assert script("in_forked_children") == [0, 0]


# --- instruction sets: test_instruction_sets.py computes with each ----------------------------------------------------


def without_an_engine() -> list[str]:
    """The reason why the engine is not there, and the error of a call that insists on it."""
    case = draft_case(mlp([3, 5, 2]))
    try:
        case.call("cpu")
    except BackendUnavailable as error:
        return [native.availability() or "", str(error)]
    return []


def test_an_unknown_instruction_set_is_named() -> None:
    reasons = script("without_an_engine", MTML_CPU_ISA="avx9000")
    assert len(reasons) == 2
    for reason in reasons:
        assert "MTML_CPU_ISA=avx9000 is not available here" in reason and ",".join(native.info()["available"]) in reason


# --- memory -----------------------------------------------------------------------------------------------------------

LAYERS = [784, 256, 128, 64, 64, 5]


def peak_growth(which: str) -> float:
    """MiB by which a meta-gradient through 100 steps raises this process's peak; a first small one comes before."""
    torch.set_num_threads(2 if which == "engine" else 1)
    options: dict[str, Any] = {"support": 5, "query": 75, "loss": LossSpec("cross_entropy"), "dtype": torch.float32}
    draft, run = mlp(LAYERS), {"plain": _plain_gradient, "engine": _engine_gradient}[which]
    run(draft_case(draft, steps=1, tasks=1, **options))
    before = _peak()
    run(draft_case(draft, steps=100, tasks=6, lr_scale=0.01, **options))
    return _peak() - before


def _peak() -> float:
    """The high-water mark of this program alone (that of getrusage is inherited from the parent)."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def _engine_gradient(case: Case) -> None:
    case = case.with_tensors([t.requires_grad_() if i < 10 else t for i, t in enumerate(case.tensors())])
    case.call("cpu")[0].mean().backward()
    assert all(bool(p.grad.isfinite().all()) for p in case.params if p.grad is not None)


def _plain_gradient(case: Case) -> None:
    """The loop everybody writes: the tasks one after another, then one backward pass."""
    leaves = [p.requires_grad_() for p in case.params]
    assert case.query_y is not None

    def loss(theta: list[Tensor], x: Tensor, y: Tensor) -> Tensor:
        for weight, bias in zip(theta[0:8:2], theta[1:8:2], strict=True):
            x = F.relu(F.linear(x, weight, bias))
        return F.cross_entropy(F.linear(x, theta[8], theta[9]), y)

    total = torch.zeros(())
    for sx, sy, qx, qy in zip(case.support_x[0], case.support_y, case.query_x[0], case.query_y, strict=True):
        theta = leaves
        for _ in range(case.spec.steps):
            grads = torch.autograd.grad(loss(theta, sx, sy), theta, create_graph=True)
            theta = [p - case.lr[0] * g for p, g in zip(theta, grads, strict=True)]
        total = total + loss(theta, qx, qy)
    torch.autograd.grad(total, leaves)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak is read from /proc")
def test_a_hundred_steps_take_a_fifth_of_the_unrolled_graph() -> None:
    """Six tasks on two threads. The graph grows with every further task, the engine's memory does not."""
    ours, theirs = script("peak_growth", "engine"), script("peak_growth", "plain")
    print(f"peak growth, 100 steps of 6 tasks: engine {ours:.0f} MiB, unrolled graph {theirs:.0f} MiB")
    assert 0 < ours <= theirs / 5
