"""Checks of what the user passes in. Every message names the argument, what was expected, what came, the way out."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.nn.parameter import is_lazy

from mtml_kernels.memory import in_memory, lost

__all__ = [
    "NAMES",
    "Sizes",
    "check_batch",
    "check_choice",
    "check_class_ids",
    "check_devices",
    "check_dtypes",
    "check_finite",
    "check_flag",
    "check_ids",
    "check_in_graph",
    "check_initialised",
    "check_leading",
    "check_number",
    "check_steps",
    "check_target",
    "leaves",
    "shown",
    "widened",
]

# integers that hold class ids as well as int64, which kernels take
NARROW = frozenset({torch.int8, torch.int16, torch.int32, torch.uint8, torch.uint16, torch.uint32, torch.uint64})
NAMES = ("sx", "sy", "qx", "qy", "support_mask", "query_mask")


_RELABEL = "relabel the classes of each task from 0, and weigh padding out with a mask instead of a negative label"
_LOWER = "lower the outer learning rate or bound the inner one"


class Sizes(NamedTuple):
    """T tasks, S support samples, Q query samples (0 where there is no query set)."""

    tasks: int
    support: int
    query: int


def shown(value: Any) -> str:
    """`value` as an error message shows it: dtype, shape and device of a tensor, the repr of anything small."""
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)} on {value.device}"
    text = repr(value)
    return text if len(text) <= 80 else f"{type(value).__name__} ({text[:60]}...)"


def leaves(name: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of an input (a tensor, or a tuple, list or dict of such) with the name to call it by."""
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from leaves(f"{name}[{key!r}]", item)
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from leaves(f"{name}[{index}]", item)
    else:
        raise TypeError(f"{name}: expected a tensor, or a tuple or dict of tensors; got {shown(value)}")


def check_choice(name: str, value: Any, allowed: Sequence[str], extra: str = "") -> None:
    """Raise ValueError unless `value` is one of `allowed`; `extra` is a further way out."""
    if value not in allowed:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, allowed))}{extra}; got {shown(value)}")


def check_steps(steps: Any, name: str = "steps") -> int:
    """`steps` as an int; TypeError or ValueError where it is not a whole number >= 0."""
    if isinstance(steps, bool) or not isinstance(steps, int):
        raise TypeError(f"{name}: expected an int >= 0, got {shown(steps)}")
    if steps < 0:
        raise ValueError(f"{name}: expected an int >= 0, got {steps}")
    return steps


def check_initialised(model: nn.Module) -> None:
    """Raise ValueError where the model has lazy parameters that no forward has given a shape yet."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if is_lazy(tensor):
            raise ValueError(f"model: expected initialised parameters, but {name!r} is lazy; run the model once before")


def check_finite(name: str, value: Any) -> None:
    """Raise ValueError where a rate (a number or a tensor) is NaN or infinite, TypeError where it is no number."""
    if isinstance(value, Tensor):
        if value.is_meta:
            return
        if is_compiling():
            check_in_graph(torch.isfinite(value.detach()).all(), f"{name}: expected finite rates; {_LOWER}")
            return
        if lost(value):
            in_memory(name, value)
        # a sum is one small kernel; it may overflow where every element is finite, hence the second look
        if math.isfinite(value.detach().sum().item()) or bool(torch.isfinite(value.detach()).all()):
            return
        bad = value.detach()[~torch.isfinite(value.detach())].flatten()[0].item()
    elif isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name}: expected a number or a tensor, got {shown(value)}")
    elif -math.inf < value < math.inf:  # which torch.compile traces, unlike math.isfinite of a number that changes
        return
    else:
        bad = float(value)
    raise ValueError(f"{name}: expected finite rates, got {bad}; {_LOWER}")


def check_number(
    name: str,
    value: Any,
    *,
    above: float = -math.inf,
    least: float = -math.inf,
    most: float = math.inf,
    below: float = math.inf,
) -> float:
    """A number, or a tensor of one, as a float; ValueError where it is not finite or not in range, else TypeError.

    >>> check_number("mu", 1, above=0)
    1.0
    """
    number = value.detach().item() if isinstance(value, Tensor) and value.numel() == 1 else value
    if isinstance(number, bool) or not isinstance(number, Real):
        raise TypeError(f"{name}: expected a number, got {shown(value)}")
    found = float(number)
    finite = -math.inf < found < math.inf  # as in check_finite
    if finite and above < found < below and least <= found <= most:
        return found
    if most < math.inf or below < math.inf:
        wanted = f"in [{least:g}, {most:g}]" if most < math.inf else f"in [{least:g}, {below:g})"
    else:
        bound = f"above {above:g}" if above > -math.inf else f"at least {least:g}"
        wanted = bound if finite else f"a finite number {bound}".removesuffix(" at least -inf")
    raise ValueError(f"{name}: expected {wanted}, got {number}")


def check_flag(name: str, value: Any) -> bool:
    """A switch; TypeError for what is none, since every word is true, "no" and "False" as well."""
    found = value.item() if getattr(value, "ndim", -1) == 0 else value  # of numpy, or a tensor
    if not isinstance(found, int):
        raise TypeError(f"{name}: expected True or False, got {shown(value)}")
    return bool(found)


def check_in_graph(right: Tensor, message: str) -> None:
    """The check of a value by a graph that is being traced: RuntimeError, or on a GPU an assertion, when it runs."""
    torch._assert_async(right, message)


def check_leading(name: str, tensor: Tensor, expected: tuple[int, ...], letters: str) -> None:
    """`tensor` must start with the dimensions `expected`, called e.g. "[T, S]"."""
    if tuple(tensor.shape[: len(expected)]) != expected:
        raise ValueError(
            f"{name}: expected its first dimensions to be {letters} = {list(expected)}, got {list(tensor.shape)}; "
            "every tensor of a batch has the tasks first, then the samples of a task"
        )


def _check_inputs_of_a_model(names: Sequence[str], letter: str, x: Sequence[Any], y: Any) -> None:
    """A list or tuple is several inputs of the model. Raise ValueError where it is the tasks of a batch, one by one."""
    if not x or not all(isinstance(t, Tensor) and t.ndim for t in x):
        return
    targets = [] if y is None else [t for _, t in leaves(names[1], y)]
    uneven = len({tuple(t.shape[:2]) for t in x}) > 1
    fitting = all(t.shape[:2] == x[0].shape[:2] for t in targets)
    if fitting and (targets or not uneven):
        return
    several = isinstance(y, list | tuple) and len(y) == len(x)  # targets, task by task as well
    stacked = isinstance(y, Tensor) and y.shape[:1] == (len(x),)
    if uneven or several or stacked:
        raise ValueError(
            f"{names[0]}: expected tensors [T, {letter}, ...], one for each input of the model, got a "
            f"{type(x).__name__} of {_sizes(x)}; tasks that stand one by one become a batch by "
            "mtml.tasks.collate(tasks), which pads those of fewer samples and weighs padding out with support_mask and "
            "query_mask"
        )


def _sizes(tensors: Sequence[Tensor]) -> str:
    shapes = ", ".join(str(list(t.shape)) for t in tensors[:4])
    return shapes + (f" and {len(tensors) - 4} more" if len(tensors) > 4 else "")


def _check_set(names: Sequence[str], letter: str, parts: Sequence[Any], tasks: int | None) -> tuple[int, int]:
    """One of the two sets of a batch, (x, y, mask); returns (T, number of samples)."""
    x, y, mask = parts
    if isinstance(x, list | tuple):
        _check_inputs_of_a_model(names, letter, x, y)
    tensors = list(leaves(names[0], x))
    if not tensors:
        raise ValueError(f"{names[0]}: expected at least one tensor, got {shown(x)}")
    first, head = tensors[0]
    if head.ndim < 2:
        raise ValueError(f"{first}: expected [T, {letter}, ...] (tasks, samples, features), got {list(head.shape)}")
    size = (head.shape[0] if tasks is None else tasks, head.shape[1])
    for name, tensor in tensors:
        check_leading(name, tensor, size, f"[T, {letter}]")
    if y is not None:
        for name, tensor in leaves(names[1], y):
            check_leading(name, tensor, size, f"[T, {letter}]")
    if mask is not None:
        if not isinstance(mask, Tensor):
            raise TypeError(f"{names[2]}: expected a tensor [T, {letter}] or None, got {shown(mask)}")
        if tuple(mask.shape) != size:
            raise ValueError(f"{names[2]}: expected [T, {letter}] = {list(size)}, got {list(mask.shape)}")
    return size


def _form(x: Any) -> str:
    """Tensor, tuple or dict, as words: what a support set and its query set must share."""
    if isinstance(x, Mapping):
        return f"a dict of {', '.join(sorted(map(str, x)))}"
    return f"a tuple of {len(x)} inputs" if isinstance(x, list | tuple) else "one tensor"


def check_batch(
    sx: Any,
    sy: Any,
    qx: Any = None,
    qy: Any = None,
    support_mask: Any = None,
    query_mask: Any = None,
    steps: int = 1,
    names: Sequence[str] = NAMES,
) -> Sizes:
    """The sizes of a batch; ValueError or TypeError where its tensors disagree or hold nothing to learn from.

    Shapes: sx, sy ``[T, S, ...]``; qx, qy ``[T, Q, ...]``; masks ``[T, S]``, ``[T, Q]``. `names` are what the messages
    call them.
    """
    tasks, support = _check_set((names[0], names[1], names[4]), "S", (sx, sy, support_mask), None)
    if tasks == 0:
        raise ValueError(f"{names[0]}: expected at least one task, got T = 0; skip empty meta-batches")
    if support == 0 and steps > 0:
        raise ValueError(
            f"{names[0]}: expected at least one support sample per task for steps={steps}, got S = 0; "
            f"pass steps=0 to evaluate without adapting, or a {names[4]} where only some tasks are empty"
        )
    query = 0
    if qx is not None:
        if _form(sx) != _form(qx):
            raise TypeError(f"{names[2]}: expected the form of {names[0]}, {_form(sx)}; got {_form(qx)}")
        query = _check_set((names[2], names[3], names[5]), "Q", (qx, qy, query_mask), tasks)[1]
        if query == 0:
            raise ValueError(f"{names[2]}: expected at least one query sample per task, got Q = 0; pass no query set")
    return Sizes(tasks, support, query)


def check_devices(expected: torch.device, tensors: Iterator[tuple[str, Tensor]]) -> None:
    """Raise ValueError where a tensor lies on another device than the model."""
    for name, tensor in tensors:
        if tensor.device != expected:
            raise ValueError(
                f"{name}: expected the model's device {expected}, got {tensor.device}; "
                "move the batch (batch.to(device)) or the model"
            )


def check_dtypes(expected: torch.dtype, tensors: Iterator[tuple[str, Tensor]], why: str) -> None:
    """Raise TypeError where a tensor has another dtype than the model; `why` says what needs it."""
    for name, tensor in tensors:
        if tensor.dtype != expected:
            wanted, got = (str(d).removeprefix("torch.") for d in (expected, tensor.dtype))
            raise TypeError(
                f"{name}: expected {wanted} ({why}), got {got}; convert it with .to(torch.{wanted}) or the model"
            )


def check_class_ids(name: str, target: Tensor, classes: int, ignored: int | None = None) -> None:
    """Raise where class ids are no integers (TypeError) or neither `ignored` nor in [0, classes) (ValueError)."""
    _check_integers(name, target)
    if target.numel() == 0 or target.is_meta:
        return
    target = widened(target)
    if is_compiling():
        inside = (target >= 0) & (target < classes)
        right = inside if ignored is None else inside | (target == ignored)
        check_in_graph(right.all(), f"{name}: expected class ids in [0, {classes}), the model's outputs; {_RELABEL}")
        return
    low, high = (int(bound) for bound in target.aminmax())
    if low == ignored:  # look again without them; rare, and only then
        check_class_ids(name, target[target != ignored], classes)
    elif low < 0 or high >= classes:
        bad = low if low < 0 else high
        raise ValueError(
            f"{name}: expected class ids in [0, {classes}) because the model has {classes} outputs, got {bad}; "
            f"{_RELABEL}"
        )


def _check_integers(name: str, target: Tensor) -> None:
    if target.is_floating_point() or target.is_complex() or target.dtype == torch.bool:
        raise TypeError(
            f"{name}: expected integer class ids [T, N] for cross_entropy, got {shown(target)}; use .long()"
        )


def widened(target: Any) -> Any:
    """Class ids of a narrower integer type as int64, anything else as it is."""
    return target.long() if isinstance(target, Tensor) and target.dtype in NARROW else target


def check_ids(name: str, ids: Tensor, rows: int | None = None) -> None:
    """Raise where an embedding's ids are no integers (TypeError) or not in [0, rows) (ValueError)."""
    if ids.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{name}: expected integer ids, which an embedding reads, got {shown(ids)}; use .long()")
    if rows is None or ids.numel() == 0 or ids.is_meta:
        return
    low, high = (int(bound) for bound in ids.aminmax())
    if low < 0 or high >= rows:
        raise ValueError(id_message(name, low if low < 0 else high, rows))


def id_message(name: str, found: int, rows: int, where: str = "") -> str:
    """What is wrong with an id of an embedding."""
    return (
        f"{name}: expected ids in [0, {rows}) because the embedding has {rows} rows, got {found}{where}; look at the "
        "vocabulary that made the ids, or give nn.Embedding more rows"
    )


def label_message(name: str, row: int, label: int, classes: int, ignored: int) -> str:
    """What is wrong with a class id of a head."""
    return (
        f"{name}: expected class ids in [0, {classes}), as the logits have classes, or ignore_index = {ignored}; got "
        f"{label} in row {row}; relabel the classes from 0, or pass a HeadLoss whose ignore_index is that id"
    )


def check_target(name: str, kind: str, target: Any, output: tuple[int, ...]) -> None:
    """The form of a target: integer class ids, or exactly the output's shape [T, N, *out] and floating point."""
    if not isinstance(target, Tensor):
        raise TypeError(f"{name}: expected a tensor for loss {kind!r}, got {shown(target)}")
    if kind == "cross_entropy":
        expected = (*output[:2], *output[3:])
        if target.is_floating_point() and tuple(target.shape) == tuple(output):
            return  # class probabilities
        if tuple(target.shape) == expected:
            _check_integers(name, target)
            return
        raise ValueError(
            f"{name}: expected class ids of shape {list(expected)}, got {shown(target)}; the shape is the output's "
            f"{list(output)} without its classes (of one-hot labels: .argmax(2); without a last 1: .squeeze(-1))"
        )
    if tuple(target.shape) != tuple(output):
        raise ValueError(
            f"{name}: expected the shape of the model's output {list(output)} for loss {kind!r}, got "
            f"{list(target.shape)}; reshape it (a missing last dimension broadcasts to a wrong loss)"
        )
    if not target.is_floating_point():
        raise TypeError(f"{name}: expected floating-point targets for loss {kind!r}, got {shown(target)}; use .float()")
