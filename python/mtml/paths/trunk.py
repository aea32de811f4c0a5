"""A fused path for models of which only the last linear layer is adapted: what comes before it runs once."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mtml.paths.batch import Batch
from mtml.paths.explain import Explanation, Subject
from mtml.paths.fused import Fused
from mtml.paths.path import Outcome
from mtml_kernels.checks import Sizes
from mtml_kernels.losses import LossSpec
from mtml_kernels.ops.inner_loop import inner_loop_call
from mtml_kernels.program import Program
from mtml_kernels.program.split import Parts
from mtml_kernels.schema.inner_loop import InnerLoopSpec

__all__ = ["TrunkOnce", "TrunkPass"]


class TrunkPass:
    """The engine's forward of a trunk, which is an inner loop of no steps, and its gradient."""

    def __init__(self, trunk: Program, tensors: Mapping[str, Tensor], backend: str, dtype: torch.dtype) -> None:
        self.params, self.dtype, self.backend = [tensors[p.name] for p in trunk.params], dtype, backend
        losses = (LossSpec("mse"), LossSpec("mse"))  # of no samples and no targets
        self.spec = InnerLoopSpec.of(trunk, [False] * len(self.params), losses, steps=0)

    def __call__(self, inputs: Sequence[Tensor]) -> Tensor:
        """[T, N, elements of a sample's features] of inputs [T, N, ...]."""
        none = [x[:, :0] for x in inputs]
        params = [t if t.dtype is self.dtype else t.to(self.dtype) for t in self.params]
        like = params[0]  # inputs may be ids
        targets, rate = like.new_empty(inputs[0].shape[0], 0, 1), like.new_zeros(1)
        call = (self.spec, params, none, targets, list(inputs), None, None, None, [rate], None, self.backend)
        return inner_loop_call(*call)[1]


class TrunkOnce:
    """The engine's pass of the trunk over both sets of every task, and the path of the head on its features.

    PyTorch's own forward of all samples together would be faster for dense layers (1.2 to 1.7 times) and slower for
    convolutions (1.8 to 4 times); but its bits depend on the tasks beside a task and on the number of threads, and the
    fused path promises that they do not.
    """

    kind = "fused"
    trunk = "it runs once over both sets"  # what explain() says of it

    float32 = False  # as of `Fused`

    def __init__(self, parts: Parts, tensors: Mapping[str, Tensor], head: Fused, names: tuple[Any, Any]) -> None:
        trunk, self.joint = parts.trunk, parts.joint
        self.head, self.backend = head, head.backend
        self.notice: tuple[str, str] | None = None
        head.how = f", on the features of a trunk that runs once{head.how}"
        head.trunk = self.trunk
        self.features = TrunkPass(trunk, tensors, head.backend, head.dtype)
        self.support_names, self.query_names = names

    def __call__(self, batch: Batch) -> Outcome:
        if self.float32:
            batch = batch.in_float32()
        inputs = self.head.inputs(batch.sx, self.support_names)
        if batch.qx is None:
            return self.head(batch.over(self.features(inputs), None))
        queries = self.head.inputs(batch.qx, self.query_names)
        if not self.joint:
            return self.head(batch.over(self.features(inputs), self.features(queries)))
        both = self.features([torch.cat(pair, 1) for pair in zip(inputs, queries, strict=True)])
        return self.head(batch.over(*both.split([inputs[0].shape[1], queries[0].shape[1]], 1)))

    def explain(self, subject: Subject, sizes: Sizes) -> Explanation:
        found = self.head.explain(subject, sizes)
        more = "; the pass of the trunk is not among them" if found.predicted else ""
        launch = f"{found.launch}; the pass of the trunk is another" if found.launch else ""
        return dataclasses.replace(found, predicted=found.predicted + more, launch=launch)

    def shaped(self, output: Tensor) -> Tensor:
        """[T, Q, out] as [T, Q, *shape of the model's output]."""
        return self.head.shaped(output)
