"""The features of a trunk that runs once: in the engine or in PyTorch, over all samples or over each task's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils import _pytree as pytree

from mtml.paths.batch import Batch
from mtml.paths.cache import PathCache
from mtml.paths.explain import Explanation, Subject
from mtml.paths.finder import GENERAL, PathFinder
from mtml.paths.inputs import input_names
from mtml.paths.path import Options, Outcome, Path
from mtml.paths.trunk import TrunkPass
from mtml.wrappers import is_sharded
from mtml_kernels.checks import Sizes, leaves, shown
from mtml_kernels.general.private import Private
from mtml_kernels.ops.inner_loop import BACKENDS
from mtml_kernels.program import Op, Program
from mtml_kernels.program.split import mixes_samples
from mtml_kernels.transforms import under_transform

__all__ = ["BATCH_NORMS", "TrunkFeatures", "features_of", "fold", "rows_of"]

BATCH_NORMS = ("module", "task")


class TrunkFeatures:
    """A learner's trunk on the support and query sets of a batch of tasks.

    Its `batch_norm` "module": one batch of all samples, as PyTorch runs the trunk. "task": what mixes samples, as batch
    statistics do, mixes those of one task, of both its sets together; running statistics stay as they are.

    Convolutions run in the engine where it computes the same: not where samples of all tasks mix. CNN4 of 64 on 400
    images of 32 x 32, forward and backward, one thread (AVX-512): 170 ms in the engine, 420 in PyTorch task by task,
    620 all at once. Dense layers alone are faster in PyTorch, to which they are one product (`TrunkOnce`).
    """

    def __init__(self, owner: Any) -> None:
        self.cache: PathCache | None = None
        if owner is not None and owner.batch_norm == "task":
            self._cache(owner)  # which torch.compile finds made

    def __call__(self, owner: Any, sx: Any, qx: Any = None) -> tuple[Tensor, Tensor]:
        """[T, S, D] and [T, Q, D]; Q = 0 without queries."""
        if self._as_ever(owner):
            return features_of(owner.features, sx, qx)
        x = sx if qx is None else pytree.tree_map(lambda s, q: torch.cat((s, q), 1), sx, qx)
        batch = _only(x)
        rows: Tensor = self._path(owner, batch)(batch).output
        samples = pytree.tree_leaves(sx)[0].shape[1]
        return rows[:, :samples], rows[:, samples:]

    def how(self, owner: Any, sx: Any) -> str:
        """How the trunk runs on such samples, for `explain`; "" where nothing else came into question."""
        if self._as_ever(owner):
            return ""
        path = self._path(owner, _only(sx))
        assert isinstance(path, InEngine | InTorch)
        return path.how

    def _as_ever(self, owner: Any) -> bool:
        """Whether all samples are one batch and the engine is not worth a look."""
        if owner.batch_norm == "task":
            return False
        blind = torch.compiler.is_compiling() or under_transform()
        return blind or not any(isinstance(m, nn.Conv2d) for m in owner.features.modules())

    def _path(self, owner: Any, batch: Batch) -> Path:
        if not torch.compiler.is_compiling() and (why := _never_traced(owner.features)):
            return InTorch(owner.features, why, owner.batch_norm == "task")
        return self._cache(owner).find(batch, 0, False, 1, quiet=True)

    def _cache(self, owner: Any) -> PathCache:
        """The paths of the trunk that the learner has now."""
        trunk, mode, backend = owner.features, owner.batch_norm, owner.backend
        found = self.cache
        if found is not None:
            known = found.owner
            if known.module is trunk and known.mode == mode and known.backend == backend:
                return found
        self.cache = found = TrunkCache(Trunk(trunk, mode, backend))
        return found


class Trunk(nn.Module):
    """A trunk with what a `PathCache` asks of a learner; it adapts nothing."""

    lr, update, loss, query_loss = 0.0, None, "mse", None
    batch_norm, allow_unused, steps, first_order = "module", True, 0, False

    def __init__(self, module: nn.Module, mode: str, backend: str) -> None:
        super().__init__()
        self.module, self.mode, self.backend = module, mode, backend

    @staticmethod
    def params(name: str, tensor: Tensor) -> bool:
        """The finder knows all tensors, frozen ones too."""
        return True


class TrunkFinder(PathFinder):
    """Finds how a `Trunk` runs."""

    def __init__(self, owner: Trunk) -> None:
        super().__init__(owner)
        self.apart = owner.mode == "task"

    def _prepare(self, batch: Batch, options: Options) -> Path:
        traced = self._trace(batch)
        if traced.program is None:
            return InTorch(self.model, traced.reasons[0], self.apart)
        mixes = mixes_samples(traced.program.nodes)
        why = self._unfit(traced.program, batch)
        if not why and mixes and not self.apart:
            why = "its batch statistics are those of all tasks, with batch_norm='task' each task's own"
        elif not why and not mixes and all(node.op != Op.CONV for node in traced.program.nodes):
            why = "dense layers are faster there"
        if why:
            return InTorch(self.model, why, self.apart and mixes)
        trunk = TrunkPass(traced.program, self.tensors, "cpu", self._dtype(traced.program))
        return InEngine(trunk, input_names(traced.program, batch.sx))

    def _unfit(self, program: Program, batch: Batch) -> str:
        """Why the engine does not take such a call; "" where it does."""
        if self.requested() not in ("auto", "cpu"):
            return f"backend {self.requested()!r} is the head's"
        if under_transform() or self.autocast() is not None:
            return "the call is under autocast or a transform"
        kinds = {(t.dtype, t.device.type) for t in (*pytree.tree_leaves(batch.sx), *self.tensors_of(program))}
        if len(kinds) > 1 or not kinds <= {(torch.float32, "cpu"), (torch.float64, "cpu")}:
            return "its tensors are not all float32 or float64 on the CPU"
        if BACKENDS.resolve("auto", "cpu", self._dtype(program)).name != "cpu":
            return "there is no compiled engine"
        return "; ".join(self._unfused_tensors(program))

    def tensors_of(self, program: Program) -> list[Tensor]:
        """What the program reads."""
        return [self.tensors[p.name] for p in program.params]


class TrunkCache(PathCache):
    """The prepared paths of a `Trunk`."""

    finds = TrunkFinder

    def _warn(self, finder: PathFinder) -> None:
        """Nothing: statistics are the trunk's affair, which runs in PyTorch as well."""


class InEngine:
    """The engine's pass of a trunk over all samples of a task, for every task."""

    kind = "fused"
    how = ", in the engine"
    notice: tuple[str, str] | None = None

    def __init__(self, trunk: TrunkPass, names: list[Any] | None) -> None:
        self.trunk, self.names = trunk, names

    def __call__(self, batch: Batch) -> Outcome:
        x = batch.sx
        return _features(self.trunk([x] if self.names is None else [x[name] for name in self.names]))

    def shaped(self, output: Any) -> Any:
        """As it is."""
        return output

    def explain(self, subject: Subject, sizes: Sizes) -> Explanation:
        """Of a part of a learner: that one explains."""
        raise NotImplementedError


class InTorch(InEngine):
    """PyTorch's forward: of all samples together, or of a task's with running statistics left as they are."""

    kind = "torch"

    def __init__(self, model: nn.Module, why: str, apart: bool) -> None:
        self.model, self.private = model, None
        if apart:  # by a copy, which no graph has
            self.private, self.kind, self.notice = Private(model, "module"), GENERAL, ("loop", why)
        self.how = f", in PyTorch{' task by task' if apart else ''}: {why}"

    def __call__(self, batch: Batch) -> Outcome:
        if self.private is None:
            return _features(fold(self.model, batch.sx))
        run = self.private
        tasks = [pytree.tree_map(lambda t, i=i: t[i], batch.sx) for i in range(batch.tasks)]
        rows = [_flat(run({}, task)) for task in tasks]
        return _features(torch.stack(rows))


def _only(x: Any) -> Batch:
    """Inputs [T, N, ...] as a batch, whose targets nobody reads."""
    first = next(leaves("sx", x))[1]
    return Batch(x, first.new_empty(first.shape[0], 0))


def _features(rows: Tensor) -> Outcome:
    """Features [T, N, D] as what a path returns."""
    return Outcome(None, rows, rows.new_empty(0, rows.shape[0]), {})


def _never_traced(trunk: nn.Module) -> str:
    """What keeps a finder from a look at the trunk; "" where nothing does."""
    tensors = [*trunk.parameters(), *trunk.buffers()]
    if any(map(is_lazy, tensors)):
        return "it has lazy parameters"
    if any(map(is_sharded, tensors)):
        return "its parameters are divided among ranks"
    return "" if any(t.is_floating_point() for t in trunk.parameters()) else "it has no parameters"


def features_of(trunk: nn.Module, sx: Any, qx: Any) -> tuple[Tensor, Tensor]:
    """Features [T, S, D] and [T, Q, D] of one pass of the trunk over both sets; Q = 0 without queries."""
    if qx is None:
        support = fold(trunk, sx)
        return support, support[:, :0]
    lead = [pytree.tree_leaves(x)[0].shape[:2] for x in (sx, qx)]
    cut = lead[0].numel()
    both = pytree.tree_map(lambda s, q: torch.cat((s.flatten(0, 1), q.flatten(0, 1))), sx, qx)
    rows = rows_of(trunk, both)
    return rows[:cut].unflatten(0, lead[0]), rows[cut:].unflatten(0, lead[1])


def fold(trunk: nn.Module, x: Any) -> Tensor:
    """Features [T, N, D] of one set x [T, N, ...]."""
    lead = pytree.tree_leaves(x)[0].shape[:2]
    return rows_of(trunk, pytree.tree_map(lambda t: t.flatten(0, 1), x)).unflatten(0, lead)


def rows_of(trunk: nn.Module, x: Any) -> Tensor:
    """Features [N, D] of a tensor, or of a tuple (several arguments) or dict (keyword arguments) of such.

    Raises TypeError where the trunk returns anything else.
    """
    args, named = ((), x) if isinstance(x, Mapping) else (x if isinstance(x, list | tuple) else (x,), {})
    return _flat(trunk(*args, **named))


def _flat(found: Any) -> Tensor:
    if not isinstance(found, Tensor) or found.ndim < 2:
        raise TypeError(f"features: expected the trunk to return a tensor [N, D], got {shown(found)}")
    return found.flatten(1)
