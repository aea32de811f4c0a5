"""What must hold around tracing: plain modules without hooks, a forward without side effects, a trace that is right."""

from __future__ import annotations

import builtins
import contextlib
import inspect
import sys
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules import module as module_hooks
from torch.nn.utils import parametrize

from mtml_kernels.program.encoding import InputInfo, Program, Shape, decode
from mtml_kernels.program.execution import run_program
from mtml_kernels.program.obstacles import Unfusable
from mtml_kernels.program.ops import OPS

__all__ = ["SIDE_EFFECTS", "check_module", "checked_trace", "guarded", "in_words", "inputs_of", "raise_if_passing"]

_GLOBAL_HOOKS = (
    "_global_forward_hooks",
    "_global_forward_pre_hooks",
    "_global_backward_hooks",
    "_global_backward_pre_hooks",
)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
SIDE_EFFECTS = "side effects are not fused"
_SAMPLES = 2  # samples on which a finished trace is compared with its module
_BATCH_VALUES = 8  # at least so many values in every batch statistic: those of two samples are ill-conditioned
_TOLERANCE = 1e-6  # in float64, relative: a wrong trace is off by far more, a chaotic network by less


def inputs_of(model: nn.Module, shapes: Sequence[Shape] | Mapping[str, Shape]) -> list[InputInfo]:
    """The inputs with their names: the mapping's keys, or the names in forward's signature."""
    if isinstance(shapes, Mapping):
        named = list(shapes.items())
    else:
        named = list(zip(_argument_names(model, len(shapes)), shapes, strict=True))
    inputs = [InputInfo(name, tuple(int(size) for size in shape)) for name, shape in named]
    if not inputs:
        raise Unfusable(["inputs: the model is called without any"])
    empty = [info for info in inputs if info.size < 1]
    if empty:
        raise Unfusable([f"input {info.name}: a sample of shape {info.shape} has no elements" for info in empty])
    return inputs


def _argument_names(model: nn.Module, count: int) -> list[str]:
    names: list[str] = []
    with contextlib.suppress(TypeError, ValueError):
        kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        names = [p.name for p in inspect.signature(model.forward).parameters.values() if p.kind in kinds][:count]
    return names + [f"input_{i}" for i in range(len(names), count)]


def in_words(error: Exception) -> str:
    """The error in one line of bounded length."""
    return f"{type(error).__name__}: {textwrap.shorten(str(error), 200, placeholder=' ...')}"


def raise_if_passing(error: Exception) -> None:
    """Raise what says nothing about the module: a verdict made of it would be kept for ever."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or "allocate memory" in str(error):
        raise error


def check_module(m: nn.Module, leaf: bool) -> str | None:
    """Why a call of this module may do something else than its forward, or None. torch.fx would drop the difference."""
    if any(getattr(module_hooks, name) for name in _GLOBAL_HOOKS):
        return "global module hooks are registered"
    if any(getattr(m, name, None) for name in _HOOKS):
        return "it has hooks (weight_norm and spectral_norm of older PyTorch are hooks as well)"
    if type(m).__module__ == "torch._dynamo.eval_frame":
        return "it is dynamo-optimized (torch.compile); use the module that was compiled"
    if parametrize.is_parametrized(m) or isinstance(m, parametrize.ParametrizationList):
        return "it has parametrizations"
    if leaf and "forward" in vars(m):
        return "its forward was replaced on the instance"
    return None


@contextlib.contextmanager
def guarded(model: nn.Module) -> Iterator[list[str]]:
    """The surroundings of a trace: `len(x)` recorded, changes that forward made to the modules reported."""
    problems: list[str] = []
    before = [(path, m, _state(m)) for path, m in model.named_modules()]
    with _symbolic_len(model):
        yield problems
    for path, m, state in before:
        changed = _changed(m, state)
        if changed:
            names = ", ".join(sorted(changed))
            problems.append(f"{path or 'forward'}: forward sets {names} on the module; {SIDE_EFFECTS}")


_TABLES = ("_parameters", "_buffers", "_modules")


def _state(m: nn.Module) -> dict[str, dict[str, Any]]:
    return {"": dict(vars(m)), **{table: dict(vars(m)[table]) for table in _TABLES if table in vars(m)}}


def _changed(m: nn.Module, state: dict[str, dict[str, Any]]) -> set[str]:
    """Names of the module's attributes that have changed."""
    now = _state(m)
    names = ((table, name) for table, old in state.items() for name in {*old, *now.get(table, {})})
    return {name for table, name in names if state[table].get(name, _state) is not now[table].get(name, _state)}


def _length(value: Any) -> Any:
    return value.size(0) if isinstance(value, fx.Proxy) else builtins.len(value)


@contextlib.contextmanager
def _symbolic_len(model: nn.Module) -> Iterator[None]:
    """`len(x)` must return an integer, which the batch size is not while tracing: forward sees another `len`."""
    classes = {cls for m in model.modules() for cls in type(m).__mro__}
    names = {cls.__module__ for cls in classes if cls.__module__.partition(".")[0] not in ("torch", "builtins")}
    spaces = [vars(sys.modules[name]) for name in names if name in sys.modules]
    patched = [space for space in spaces if "len" not in space]
    for space in patched:
        space["len"] = _length
    try:
        yield
    finally:
        for space in patched:
            del space["len"]


def checked_trace(model: nn.Module, program: Program, keywords: bool) -> Program:
    """The program, after one comparison with the module in float64: output and gradients on random inputs.

    `model` is a private copy in float64.

    Python code can look at more than torch.fx sees (the type of an argument, a random number, a global), and a custom
    autograd Function need not leave a mark in the graph. Such a trace must not pass for the module.
    """
    try:
        expected, found = _both(model, program, keywords)
    except Exception as error:
        raise_if_passing(error)
        raise Unfusable([f"forward: it fails on random inputs: {in_words(error)}"]) from error
    if not _close(expected[0], found[0]):
        raise Unfusable(["forward: it computes something else than its trace: it depends on more than its tensors"])
    if not all(map(_close, expected, found)):
        raise Unfusable(["forward: its gradients are not those of its operations (a custom autograd Function?)"])
    return program


def _both(model: nn.Module, program: Program, keywords: bool) -> tuple[list[Tensor], list[Tensor]]:
    """Output and gradients of the module, and of its program, at the same random input."""
    learned = {p.name for p in program.params} - set(program.statistics)
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for name, tensor in tensors.items():
        tensor.requires_grad_(name in learned and tensor.is_floating_point())
    samples = _samples(program)
    device = next((t.device for t in tensors.values()), torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(device)

    rows = decode(program.ints).tables
    inputs = {info.name: random(samples, *info.shape).requires_grad_() for info in program.inputs}
    for at, info in enumerate(program.inputs):
        if info.ids:
            below = min(count for i, count in rows if i == at)
            inputs[info.name] = torch.randint(below, (samples, *info.shape), generator=generator).to(device)
    direction = random(samples, *program.output_shape)
    params = [tensors[param.name].clone() for param in program.params]  # forward may write to its buffers
    leaves = [
        *(tensors[param.name] for param in program.params if param.name in learned),
        *(x for x in inputs.values() if x.requires_grad),
    ]
    expected = model(**inputs) if keywords else model(*inputs.values())
    found = run_program(program.ints, program.consts, params, list(inputs.values())).reshape(direction.shape)
    if expected.shape != found.shape:
        return [expected.detach()], [found.detach()]
    return _with_gradients(expected, direction, leaves), _with_gradients(found, direction, leaves)


def _samples(program: Program) -> int:
    rows = [node.rows for node in program.nodes if node.b in OPS[node.op].mixing]
    return max(_SAMPLES, -(-_BATCH_VALUES // min(rows))) if rows else _SAMPLES


def _with_gradients(output: Tensor, direction: Tensor, leaves: Sequence[Tensor]) -> list[Tensor]:
    found: Sequence[Tensor | None] = [None] * len(leaves)
    if output.requires_grad:
        found = torch.autograd.grad((output * direction).sum(), leaves, allow_unused=True)
    return [output.detach(), *(torch.zeros_like(t) if g is None else g for t, g in zip(leaves, found, strict=True))]


def _close(expected: Tensor, found: Tensor) -> bool:
    if expected.shape != found.shape:
        return False
    both_broken = ~expected.isfinite() & ~found.isfinite()
    scale = expected.nan_to_num(0.0, 0.0, 0.0).abs().max()
    agree = (expected - found).abs() <= _TOLERANCE * (1.0 + scale)
    return bool((agree | both_broken).all())
