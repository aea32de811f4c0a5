"""`task_map`: a function of one task as a function of a batch of tasks."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Hashable
from typing import Any

import torch

from mtml.mapped.arguments import Arguments, Dims, check_dims, flattened
from mtml.mapped.deciding import Choice, Decided, decide
from mtml.mapped.explain import TaskMapExplanation
from mtml.mapped.ways import in_turn, stacked, vmapped
from mtml_kernels.checks import check_choice, shown
from mtml_kernels.errors import BackendUnavailable
from mtml_kernels.neutral import exclusive, uncompiled
from mtml_kernels.transforms import under_transform

__all__ = ["TaskMap", "task_map"]

WAYS = ("auto", "fused", "vmap", "loop")
SIGNATURES = 64  # whose choices are kept
CHANGES = 4  # of what a function reads; more of them are a schedule, each value of which would cost a first call


def task_map(fn: Callable[..., Any], in_dims: Dims = 0, *, randomness: str = "error", way: str = "auto") -> TaskMap:
    """A function of one task, in plain PyTorch, as a function of a batch of tasks.

    The result takes the same arguments with a leading task dimension and returns what `fn` returns, stacked over the
    tasks and differentiable to all that `fn` is. It runs in one of three ways, in this order:

    - "fused": where the body is a known inner loop, all tasks run as one call of `mtml.MAML`. Known are bodies that
      take gradient steps on a module (torch.autograd.grad or torch.func.grad with torch.func.functional_call, or
      `MAML.clone` and `adapt`), with rates that are numbers or tensors, and return the query loss alone, where losses
      and module are of those that MAML fuses. They are recognised by what a run of them computes.
    - "vmap": torch.func.vmap, where it is faster. Bodies with torch.func.grad can, those with torch.autograd.grad
      cannot.
    - "loop": one task after another. Always right: data-dependent control flow, state, hooks, randomness.

    The first call of each signature (shapes, dtypes, grad mode, autocast; not the number of tasks) runs `fn` on up to
    three tasks in turn. The other ways are held against that: results, and gradients of all that they are
    differentiable to, must agree (the engine's on other numbers as well); in float64 to 1e-9, in float32 to 1e-3 of the
    largest number. Then vmap and loop are timed. What a function reads by name (globals, closures, attributes, the
    module) is watched, and a change makes the next call choose anew; what changes all the time is best a tensor, as an
    argument or changed in place. A function whose code or run shows effects (it prints, counts, logs, draws random
    numbers, updates running statistics), or that has such objects as loggers within reach, runs in the loop, and for
    each task once.

    Under torch.func transforms and in forward mode `fn` runs in the loop; under torch.compile a call ends the graph.

    Args:
        fn: of one task; its tensors lack the task dimension. It returns a tensor, or a tuple, list or dict of such.
        in_dims: 0 where all positional arguments have the task dimension first; or 0 or None for each, None for one
            that all tasks share. Arguments may be pytrees, a TaskBatch too, whose lists and dicts every task gets
            anew, as of torch.func.vmap; what is no tensor is shared, and keyword arguments have the task dimension.
        randomness: as of torch.func.vmap: "error" refuses random numbers, "different" draws for each task, "same" gives
            all tasks the same. Functions that draw run in the loop unless `way` says otherwise.
        way: one of the three by name, or "auto". "vmap" is not held against the loop then.

    Raises:
        ValueError: an unknown word; tensors that disagree on the number of tasks; no task; results of different shapes.
        TypeError: `fn` is no callable, or returns other things than tensors.
        BackendUnavailable: way="fused", and the function is not fused; the message says why.
        RuntimeError: `fn` draws random numbers with randomness="error".

    Example:
        >>> import torch, mtml
        >>> from torch.func import functional_call
        >>> model = torch.nn.Linear(2, 1)
        >>> def task(sx, sy, qx, qy):
        ...     params = dict(model.named_parameters())
        ...     loss = (functional_call(model, params, sx) - sy).square().mean()
        ...     grads = torch.autograd.grad(loss, params.values(), create_graph=True)
        ...     params = {n: p - 0.1 * g for (n, p), g in zip(params.items(), grads)}
        ...     return (functional_call(model, params, qx) - qy).square().mean()
        >>> meta_loss = mtml.task_map(task)
        >>> x, y = torch.randn(4, 8, 2), torch.randn(4, 8, 1)
        >>> losses = meta_loss(x, y, x, y)
        >>> losses.shape
        torch.Size([4])
        >>> losses.mean().backward()
    """
    return TaskMap(fn, in_dims, randomness=randomness, way=way)


class TaskMap:
    """What `task_map` returns, which says what the arguments mean."""

    def __init__(
        self, fn: Callable[..., Any], in_dims: Dims = 0, *, randomness: str = "error", way: str = "auto"
    ) -> None:
        if not callable(fn):
            raise TypeError(f"fn: expected a function of one task, got {shown(fn)}")
        check_choice("randomness", randomness, ("error", "different", "same"))
        check_choice("way", way, WAYS)
        self.fn, self.in_dims, self.randomness, self.way = fn, check_dims(in_dims), randomness, way
        self._choices: dict[Hashable, Choice] = {}
        self._changes: dict[Hashable, int] = {}
        functools.update_wrapper(self, fn, updated=())

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The results of all tasks, [T, ...]."""
        run = self._apart if "torch._dynamo" in sys.modules else self._run
        return run(args, kwargs)

    @functools.cached_property
    def _apart(self) -> Callable[..., Any]:
        """`_run`, into which torch.compile around a call does not look: it would hold on to what it finds there."""
        apart: Callable[..., Any] = sys.modules["torch._dynamo"].disable(self._run)
        return apart

    def _run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given = flattened(args, kwargs, self.in_dims)
        choice, done = self._decided(given)
        if choice.fused is not None:
            return choice.fused(given)
        if choice.way == "vmap":
            return self._vmapped(given)
        return stacked(in_turn(self.fn, given, self.randomness, done))

    def _vmapped(self, given: Arguments) -> Any:
        """By torch.func.vmap; where it fails at a later call than the first, in the loop from then on."""
        try:
            return vmapped(self.fn, given, self.randomness)
        except Exception as error:  # the function's own errors are raised once more below
            if self.way == "vmap":
                raise
            why = f"{type(error).__name__}: {error}"
        found = stacked(in_turn(self.fn, given, self.randomness))
        self._choices[_key(given)] = Choice(
            TaskMapExplanation("loop", "a call by torch.func.vmap failed", not_vmap=why)
        )
        return found

    def explain(self, *args: Any, **kwargs: Any) -> TaskMapExplanation:
        """Print and return how calls with such arguments run, and why; it runs the function on a few of the tasks."""
        explanation = uncompiled(self._decided, flattened(args, kwargs, self.in_dims)).choice.explanation
        print(explanation)
        return explanation

    def _decided(self, given: Arguments) -> Decided:
        if self.way in ("vmap", "loop"):
            return Decided(Choice(TaskMapExplanation(self.way, f"asked for by way={self.way!r}")))
        if under_transform():
            return Decided(
                self._checked(Choice(TaskMapExplanation("loop", "the call is inside a transform or a mode")))
            )
        key = _key(given)
        choice = self._choices.get(key)
        if choice is not None and choice.holds(given):
            return Decided(self._checked(choice))
        with exclusive():
            decided = self._decide(key, given)
        self._checked(decided.choice)
        return decided

    def _decide(self, key: Hashable, given: Arguments) -> Decided:
        changes = self._changes[key] = self._changes.get(key, -1) + 1
        decided = decide(self.fn, given, self.randomness, changes <= CHANGES, changes > CHANGES)
        while len(self._choices) >= SIGNATURES:
            oldest = next(iter(self._choices))
            del self._choices[oldest], self._changes[oldest]
        self._choices[key] = decided.choice
        return decided

    def _checked(self, choice: Choice) -> Choice:
        if self.way == "fused" and choice.fused is None:
            why = choice.explanation.not_fused or choice.explanation.reason
            raise BackendUnavailable(f"way='fused': the function is not fused: {why}; way='auto' takes another way")
        return choice


def _key(given: Arguments) -> Hashable:
    """What decides how a call is run."""
    return given.signature(), torch.is_grad_enabled(), torch.is_inference_mode_enabled(), _autocast()


def _autocast() -> Hashable:
    """What torch.autocast, where it is on, casts to."""
    if not torch._C._is_any_autocast_enabled():
        return None
    return tuple((torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in ("cpu", "cuda"))


TaskMap.__call__._torchdynamo_disable = True  # type: ignore[attr-defined]
TaskMap.__call__._torchdynamo_disable_msg = (  # type: ignore[attr-defined]
    "mtml.task_map runs a function in whatever way is right for it, which no graph holds. Way out: torch.compile "
    "without fullgraph=True, or mtml.MAML, which a graph takes"
)
