"""What `MultiTaskMAML` is given, by group, and checked."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from mtml.multihead.heads import Head, HeadLayer
from mtml.multitask.features import trunk_width
from mtml.tasks.task_batch import TaskBatch
from mtml.wrappers import refuse_data_parallel
from mtml_kernels.checks import check_steps, leaves, shown
from mtml_kernels.precision import first_floating

__all__ = ["by_group", "check_inputs", "check_sets", "layers_of", "trunks_of"]


def check_inputs(label: str, x: Any) -> dict[str, int]:
    """{leaf: T} of inputs [T, N, ...]. Raises ValueError where one has no such shape."""
    found = {}
    for leaf, tensor in leaves(label, x):
        if tensor.ndim < 2:
            raise ValueError(f"{leaf}: expected inputs [T, N, ...] of T tasks, got {shown(tensor)}")
        found[leaf] = tensor.shape[0]
    return found


def check_sets(name: str, batch: TaskBatch) -> None:
    """Raise where the sets of a batch differ in T."""
    counts: dict[str, int] = {}
    for label, x in (("sx", batch.sx), ("qx", batch.qx)):
        counts |= check_inputs(f"batches[{name!r}].{label}", x)
    if len(set(counts.values())) > 1:
        raise ValueError(f"batches[{name!r}]: expected the same T in both sets, got {counts}")


def trunks_of(trunk: Any, heads: Mapping[str, Head]) -> dict[str, nn.Module]:
    """The trunk of every group."""
    given = dict(trunk) if isinstance(trunk, Mapping) else dict.fromkeys(heads, trunk)
    for name, module in given.items():
        label = f"trunk[{name!r}]" if isinstance(trunk, Mapping) else "trunk"
        if not isinstance(module, nn.Module):
            raise TypeError(f"{label}: expected an nn.Module, got {shown(module)}")
        refuse_data_parallel(label, module)
    if set(given) != set(heads):
        raise ValueError(f"trunk: expected one for each of {', '.join(heads)}, got {', '.join(given) or 'none'}")
    return {name: given[name] for name in heads}


def layers_of(trunks: Mapping[str, nn.Module], heads: Mapping[str, Head], in_features: Any) -> dict[str, HeadLayer]:
    """The heads' layers, of their trunks' dtype and device."""
    widths = by_group("in_features", in_features, heads)
    found = {}
    for name, head in heads.items():
        width = trunk_width(name, trunks[name]) if widths[name] is None else check_steps(widths[name], "in_features")
        found[name] = HeadLayer(width, head).to(first_floating(trunks[name].parameters()))
    return found


def by_group(argument: str, value: Any, names: Iterable[str]) -> dict[str, Any]:
    """One value for every group, of {group: value} or of one for all. Raises ValueError for other names."""
    names = list(names)
    if not isinstance(value, Mapping) or not set(value) & set(names):
        return dict.fromkeys(names, value)
    if set(value) != set(names):
        raise ValueError(
            f"{argument}: expected {{group: ...}} for {', '.join(names)}, got {', '.join(map(str, value))}"
        )
    return {name: value[name] for name in names}
