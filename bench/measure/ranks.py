"""``python -m bench ranks``: meta-steps a second of several ranks beside those of one, with as many threads each.

One rank trains on all tasks, then all ranks on their shares, in turn, so that a machine whose speed drifts slows both
alike; where one trains, the others sleep. A meta-step is loss, exact gradient, its average over ranks, and Adam.
"""

from __future__ import annotations

import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import mtml
from bench.measure.gate import within
from bench.workloads import Workload, make_data, make_network, select
from mtml.distributed import MetaLoss, average_gradients, mean_over_tasks, shard_tasks
from mtml.train.adam import FlatAdam

ONE, AVERAGED, WRAPPED = "1 rank", "average_gradients", "DistributedDataParallel"
TOLERANCE = 1e-5  # of gradients in float32: tasks' own are the same bits, their sum has another order
BURST = 0.25  # seconds
WAIT = 3600.0  # for a rank to end, beside the seconds asked for


@dataclass(frozen=True)
class Scaling:
    """Milliseconds a meta-step by way, medians of `n` bursts, and the largest relative difference of gradients."""

    workload: Workload
    ranks: int
    threads: int
    ms: dict[str, float]
    n: int
    error: float

    @property
    def ok(self) -> bool:
        """Whether all ways have the same gradients."""
        return within(self.error, TOLERANCE)

    def lines(self) -> list[str]:
        """The report."""
        w, ranks = self.workload, f"{self.ranks} ranks"
        match = "match" if self.ok else f"THEY DIFFER (expected below {TOLERANCE:.0e})"
        found = [
            f"{w.name}: {w.tasks} tasks, {self.threads} thread(s) a rank, medians of {self.n} bursts in turn",
            f"gradients of all ways: relative difference {self.error:.1e}, {match}",
        ]
        for way, ms in self.ms.items():
            name = way if way == ONE else f"{ranks}, {way}"
            ratio = "" if way == ONE else f"  {self.ms[ONE] / ms:.2f}x"
            found.append(f"{name:<34} {ms:9.3f} ms a meta-step, {1e3 * w.tasks / ms:8.0f} tasks/s{ratio}")
        return found


def measure(workload: str, ranks: int, threads: int, seconds: float) -> Scaling:
    """Scaling of a workload from one rank to `ranks`; about `seconds` for each way.

    Raises:
        ValueError: an unknown workload, or fewer than two ranks.
        RuntimeError: a rank failed.
    """
    w = select([workload])[0]
    if ranks < 2:
        raise ValueError(f"ranks: expected at least 2, beside which one is measured; got {ranks}")
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        given = [(rank, ranks, threads, seconds, workload, folder) for rank in range(ranks)]
        processes = [context.Process(target=_run_rank, args=each) for each in given]
        for process in processes:
            process.start()
        try:
            for process in processes:
                process.join(3 * seconds + WAIT)
        finally:
            for process in processes:
                process.kill()
        if any(process.exitcode for process in processes):
            raise RuntimeError(f"ranks: exit statuses {[p.exitcode for p in processes]}; their errors stand above")
        ms, n, error = torch.load(Path(folder) / "found.pt")
    return Scaling(w, ranks, threads, ms, n, error)


def _run_rank(rank: int, ranks: int, threads: int, seconds: float, workload: str, folder: str) -> None:
    torch.set_num_threads(threads)
    dist.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=ranks)
    w = select([workload])[0]
    steps = {way: _Step(w, way) for way in (ONE, AVERAGED, WRAPPED)}
    gradients = {way: _together(step.gradient, way) for way, step in steps.items()}
    times = _in_turn({way: step.update for way, step in steps.items()}, seconds)
    if rank == 0:
        exact = gradients[ONE]
        errors = torch.stack([(found - exact).norm() / exact.norm() for found in gradients.values()])
        ms = {way: 1e3 * statistics.median(found) for way, found in times.items()}
        torch.save((ms, len(times[ONE]), float(errors.max())), Path(folder) / "found.pt")
    dist.barrier()
    dist.destroy_process_group()


class _Step:
    """A meta-step one way, on a network and an Adam of its own."""

    def __init__(self, w: Workload, way: str) -> None:
        net, self.batch = make_network(w), mtml.TaskBatch(*(t.detach() for t in make_data(w)))
        maml = mtml.MAML(net, lr=w.lr, steps=w.steps, loss=w.loss)
        self.way, self.params = way, list(maml.parameters())
        self.optimizer = FlatAdam(self.params, lr=1e-4)
        self.meta: nn.Module = MetaLoss(maml)
        if way == WRAPPED:
            self.meta = DistributedDataParallel(self.meta)

    def gradient(self) -> Tensor:
        """Of all tasks, in one row."""
        self.optimizer.zero_grad()
        if self.way == ONE:
            self.meta(self.batch).mean().backward()
        else:
            mean_over_tasks(self.meta(shard_tasks(self.batch)), self.batch.tasks).backward()
        if self.way == AVERAGED:
            average_gradients(self.params)
        return torch.cat([_gradient_of(p).reshape(-1) for p in self.params])

    def update(self) -> None:
        """The whole meta-step."""
        self.gradient()
        self.optimizer.step()


def _gradient_of(p: nn.Parameter) -> Tensor:
    if p.grad is None:
        raise RuntimeError("a gradient is missing: backward() left .grad of a parameter at None")
    return p.grad.clone()


def _together(run: Callable[[], Tensor], way: str) -> Tensor:
    """What `run` returns; where one rank alone runs, the others wait for it."""
    alone = way == ONE
    found = run() if not alone or dist.get_rank() == 0 else torch.empty(0)
    dist.barrier()
    return found


def _in_turn(runs: dict[str, Callable[[], None]], seconds: float) -> dict[str, list[float]]:
    """Seconds of a call each way, in bursts as long as rank 0 says; the other ranks' are those of their waiting."""
    counts = {way: _agreed(max(1, round(BURST / _burst(run, 1, way)))) for way, run in runs.items()}
    times: dict[str, list[float]] = {way: [] for way in runs}
    stop = time.perf_counter() + seconds * len(runs)
    while _agreed(int(time.perf_counter() < stop or len(times[ONE]) < 3)):
        for way, run in runs.items():
            times[way].append(_burst(run, counts[way], way) / counts[way])
    return times


def _agreed(value: int) -> int:
    """Rank 0's number."""
    number = torch.tensor([value])
    dist.broadcast(number, 0)
    return int(number)


def _burst(run: Callable[[], None], count: int, way: str) -> float:
    """Seconds that `count` calls take together, until all ranks have done theirs."""
    dist.barrier()
    start = time.perf_counter()
    if way != ONE or dist.get_rank() == 0:
        for _ in range(count):
            run()
    dist.barrier()
    return time.perf_counter() - start
