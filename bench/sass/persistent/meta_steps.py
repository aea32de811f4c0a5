"""Workloads' meta-steps with data, as calls of the engine."""

from __future__ import annotations

import dataclasses

import torch

from bench.report.predict import meta_step
from bench.workloads import Workload, make_data, make_network, mlp
from mtml_kernels.schema.inner_loop import InnerLoopArgs

__all__ = ["POLICY", "call_of"]

# The policy of the reinforcement-learning examples of the MAML paper, as regression: 20 tasks of a point to be reached.
POLICY = Workload(
    "policy", "MLP 2-100-100-2, ReLU", lambda: mlp(2, 100, 100, 2), 20, 20, 20, (2,), 2, 1, 0.1, "mse"
)  # fmt: skip
TASKS = 2  # that are there: enough for all that is one a task to be told from what is shared


def call_of(w: Workload, tasks: int = TASKS) -> InnerLoopArgs:
    """The workload's meta-step of a few tasks, of float32 from a fixed seed."""
    small = dataclasses.replace(w, tasks=tasks)
    net, (sx, sy, qx, qy) = make_network(small), make_data(small)
    like, params = meta_step(small), [p.detach() for p in net.parameters()]
    assert [tuple(p.shape) for p in params] == [tuple(p.shape) for p in like.params]
    return like._replace(
        params=params,
        lr=[torch.tensor([w.lr])],
        support_x=[sx],
        query_x=[qx],
        support_y=sy,
        query_y=qy,
    )
