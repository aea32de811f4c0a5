"""The gradients of several losses at shared tensors, and of everything that only the losses' own parts use.

g_h = dL_h / dshared, one for every loss; a leaf that is reached from the losses without passing a shared tensor is a
head's own and gets sum_h dL_h / dleaf along those routes. One backward pass a loss, that ends at the shared tensors.
Of losses made with ``separate=True`` every head read a copy of the features: one pass through the heads gives all g_h
there, and from there H passes go through the trunk where parameters are shared.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mtml.head_losses import HeadLosses
from mtml_kernels.checks import shown
from mtml_kernels.transforms import refuse_transforms

__all__ = ["Gradients", "Losses", "Shared", "gradients"]

Losses = HeadLosses | Mapping[str, Tensor] | Sequence[Tensor] | Tensor
Shared = Tensor | Iterable[Tensor] | None
Start = tuple[list[Tensor], list[Tensor] | None] | None  # where a pass begins, None for an absent head


class Gradients(NamedTuple):
    """shared: S tensors; rows[s]: [H, *shape]; own: the heads' own leaves; own_grads: theirs, None where unused."""

    shared: list[Tensor]
    rows: list[Tensor]
    own: list[Tensor]
    own_grads: list[Tensor | None]


def gradients(losses: Losses, shared: Shared, *, with_own: bool) -> Gradients:
    """All gradients of one batch; with_own: those of the heads' own leaves as well.

    Raises:
        ValueError, TypeError: no loss or shared tensor that requires grad, or (with_own) shared ones that depend on
            each other.
        RuntimeError: within a transform of torch.func.
    """
    refuse_transforms("balance", "call it, and make the losses, outside of them")
    given = _scalars(losses)
    sources = _sources(losses)
    tensors = sources if shared is None and sources else _tensors(shared)
    own, both = _own_leaves(given, tensors) if with_own else ([], [])
    found = None
    if isinstance(losses, HeadLosses) and sources:
        same = {id(x) for x in tensors} == {id(x) for x in sources}
        found = (_in_one_pass if same else _in_two_stages)(losses, given, tensors, own)
    if found is None:
        starts = [([loss], None) if loss.requires_grad else None for loss in given]
        found = _in_many_passes(starts, tensors, own)
    return _without_shared_route(found, both) if both else found


def _without_shared_route(found: Gradients, both: list[Tensor]) -> Gradients:
    """The same without what reached the leaves `both` (tied weights) through the shared tensors."""
    sums = [rows.sum(0) for rows in found.rows]
    routed = torch.autograd.grad(found.shared, both, sums, retain_graph=True, allow_unused=True)
    taken = {id(leaf): g for leaf, g in zip(both, routed, strict=True) if g is not None}
    own = [
        g - taken[id(leaf)] if g is not None and id(leaf) in taken else g
        for leaf, g in zip(found.own, found.own_grads, strict=True)
    ]
    return found._replace(own_grads=own)


def _in_many_passes(starts: Sequence[Start], shared: list[Tensor], own: list[Tensor]) -> Gradients:
    """One backward pass a loss, from its start (tensors and the loss's gradients there) to the shared tensors."""
    rows = [torch.zeros((len(starts), *x.shape), dtype=x.dtype, device=x.device) for x in shared]
    own_grads: list[Tensor | None] = [None] * len(own)
    for h, start in enumerate(starts):
        if start is None:  # an absent head
            continue
        # batching the passes (is_grads_batched) would send every cotangent through every head: H x H work
        grads = torch.autograd.grad(start[0], [*shared, *own], start[1], retain_graph=True, allow_unused=True)
        for row, g in zip(rows, grads[: len(shared)], strict=True):
            if g is not None:
                row[h] = g
        for i, g in enumerate(grads[len(shared) :]):
            if g is not None:
                sofar = own_grads[i]
                own_grads[i] = g if sofar is None else sofar + g
    return Gradients(shared, rows, own, own_grads)


def _in_one_pass(losses: HeadLosses, given: list[Tensor], shared: list[Tensor], own: list[Tensor]) -> Gradients:
    """One backward pass through all heads, to the copies that each of them read."""
    total = torch.stack(given).sum()
    grads = torch.autograd.grad(total, [*losses.copies.values(), *own], retain_graph=True, allow_unused=True)
    at = dict(zip(losses.copies, grads, strict=False))
    rows = []
    for x in shared:
        zero = torch.zeros_like(x)
        mine = [at.get(name) if losses.sources.get(name) is x else None for name in losses.per_head]
        rows.append(torch.stack([zero if g is None else g for g in mine]))
    return Gradients(shared, rows, own, list(grads[len(losses.copies) :]))


def _in_two_stages(
    losses: HeadLosses, given: list[Tensor], shared: list[Tensor], own: list[Tensor]
) -> Gradients | None:
    """One pass through all heads to the features, then one a loss through the trunk; None where both use a leaf."""
    sources = _sources(losses)
    edges = {_edge(x) for x in sources}
    of_heads = {id(x) for x in _leaves_from([_edge(loss) for loss in given if loss.requires_grad], edges, set())}
    of_trunk = {id(x) for x in [*_leaves_from(edges, set(), set()), *shared]}
    if of_heads & of_trunk:
        return None
    first = _in_one_pass(losses, given, sources, [leaf for leaf in own if id(leaf) in of_heads])
    place = {id(x): i for i, x in enumerate(sources)}
    starts: list[Start] = [
        ([losses.sources[name]], [first.rows[place[id(losses.sources[name])]][h]]) if name in losses.sources else None
        for h, name in enumerate(losses.per_head)
    ]
    second = _in_many_passes(starts, shared, [leaf for leaf in own if id(leaf) not in of_heads])
    return Gradients(shared, second.rows, [*first.own, *second.own], [*first.own_grads, *second.own_grads])


def _sources(losses: Losses) -> list[Tensor]:
    """The features that heads read copies of, each once; [] for losses that know none."""
    if not isinstance(losses, HeadLosses) or not losses.copies:
        return []
    sources = list({id(x): x for x in losses.sources.values()}.values())
    if not all(x.requires_grad for x in sources):
        raise ValueError("shared: expected features that require grad; is the trunk frozen?")
    return sources


def _scalars(losses: Losses) -> list[Tensor]:
    """The H losses, each a scalar."""
    if isinstance(losses, HeadLosses):
        losses = losses.per_head
    if isinstance(losses, Tensor):
        if losses.ndim != 1:
            raise ValueError(f"losses: expected [H], got {shown(losses)}")
        losses = losses.unbind()
    each = list(losses.values()) if isinstance(losses, Mapping) else list(losses)
    for loss in each:
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            raise ValueError(f"losses: expected scalars, one a head, got {shown(loss)}; reduce each with .mean()")
    if not any(loss.requires_grad for loss in each):
        raise ValueError("losses: expected at least one that requires grad, got none; was the model run under no_grad?")
    return [loss.reshape(()) for loss in each]


def _tensors(shared: Shared) -> list[Tensor]:
    """The shared tensors that require grad, each once."""
    if shared is None:
        raise ValueError(
            "shared: expected the shared parameters or features, got None; only losses of "
            "MultiHead.loss(..., separate=True) know their features"
        )
    given: list[Any] = [shared] if isinstance(shared, Tensor) else list(shared)
    for x in given:
        if not isinstance(x, Tensor):
            raise TypeError(f"shared: expected tensors (parameters, or features), got {shown(x)}")
    tensors = list({id(x): x for x in given if x.requires_grad}.values())
    if not tensors:
        raise ValueError(
            "shared: expected at least one tensor that requires grad, got none; an iterator runs only once"
        )
    return tensors


def _own_leaves(losses: list[Tensor], shared: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """The leaves that the losses reach without passing a shared tensor; those of them that lie before one as well."""
    edges = {_edge(x) for x in shared}
    own = _leaves_from([_edge(loss) for loss in losses if loss.requires_grad], edges, set())
    # what lies before a shared tensor gets its gradient from that tensor, so none may lie before another
    met: set[Any] = set()
    trunk = _leaves_from([e for x in shared if x.grad_fn is not None for e in x.grad_fn.next_functions], set(), met)
    if met & edges:
        raise ValueError(
            "shared: expected tensors that do not depend on each other; pass features or parameters, not both"
        )
    ids = {id(leaf) for leaf in trunk}
    return own, [leaf for leaf in own if id(leaf) in ids]


def _edge(x: Tensor) -> tuple[Any, int]:
    """Where a tensor comes out of the graph: its node and which output of it."""
    return torch.autograd.graph.get_gradient_edge(x)[:2]


def _leaves_from(edges: Iterable[tuple[Any, int]], stop: set[Any], met: set[Any]) -> list[Tensor]:
    """The leaves behind these edges of the graph, each once, not passing `stop`; edges passed go into `met`."""
    stack = list(edges)
    found: dict[int, Tensor] = {}
    while stack:
        edge = stack.pop()
        node = edge[0]
        if node is None or edge in met or edge in stop:
            continue
        met.add(edge)
        leaf = getattr(node, "variable", None)
        if leaf is not None:
            found[id(leaf)] = leaf
        stack.extend(node.next_functions)
    return list(found.values())
