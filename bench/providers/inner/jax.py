"""JAX: jit of vmap over the tasks; ``map`` runs them in turn. Many steps are a scan, up to five are unrolled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from bench.providers.base import Prepared, Result
from bench.providers.inner import base
from bench.providers.jax import layer, ready
from bench.workloads.inner import InnerWorkload, Problem
from bench.workloads.networks import ModulatedSiren

REQUIRES = ("jax",)
OPTIONS = ("map",)
UNROLLED = 5


def _forward(net: nn.Module, tensors: dict[str, Any], x: Any) -> Any:
    """The network's outputs; its tensors by name."""
    import jax.numpy as jnp

    def run(name: str, m: nn.Module, x: Any) -> Any:
        return layer(m, iter([tensors[f"{name}.{own}"] for own, _ in m.named_parameters()]), x)

    if isinstance(net, ModulatedSiren):
        for i, (linear, shift) in enumerate(zip(net.layers, net.shifts, strict=True)):
            shifted = run(f"layers.{i}", linear, x) + run(f"shifts.{i}", shift, tensors["latent"])
            x = jnp.sin(net.w0 * shifted)
        return run("last", net.last, x)
    for name, m in net.named_children():
        x = run(name, m, x)
    return x


def _of_head(theta: dict[str, Any], x: Any) -> Any:
    """The logits of a linear layer's weight and bias, which JAX sorts by name."""
    bias, weight = (theta[name] for name in sorted(theta))
    return x @ weight.T + bias


def _read(w: InnerWorkload, net: nn.Module, fixed: dict[str, Any], sx: Any, qx: Any) -> tuple[Any, Any]:
    """As ``base.read``."""
    import jax.numpy as jnp

    if not w.head:
        return sx, qx
    assert isinstance(net, nn.Sequential)
    rows = _forward(net[:-1], fixed, jnp.concatenate((sx, qx)))
    return rows[: len(sx)], rows[len(sx) :]


def _objective(w: InnerWorkload, net: nn.Module) -> Callable[..., Any]:
    import jax
    import jax.numpy as jnp

    def loss(theta: dict[str, Any], fixed: dict[str, Any], x: Any, y: Any) -> Any:
        out = _of_head(theta, x) if w.head else _forward(net, fixed | theta, x)
        if w.loss == "mse":
            return ((out - y) ** 2).mean()
        return -jnp.take_along_axis(jax.nn.log_softmax(out), y[:, None].astype(jnp.int32), 1).mean()

    return loss


def _adapt(w: InnerWorkload, loss: Callable[..., Any]) -> Callable[..., Any]:
    """adapt(start, fixed, sx, sy, lr, rates) -> (loss before the last step, parameters) of one task."""
    import jax
    import jax.numpy as jnp

    def adapt(
        start: dict[str, Any], fixed: dict[str, Any], sx: Any, sy: Any, lr: Any, rates: Any = None
    ) -> tuple[Any, Any]:
        def step(carry: Any, given: Any) -> tuple[Any, Any]:
            (theta, held), (k, x, y, own) = carry, given
            x, y = (x, y) if w.per_step else (sx, sy)
            value, grads = jax.value_and_grad(loss)(theta, fixed, x, y)
            return base.updated(w, theta, grads, held, own if rates else lr, base.corrections(k)), value

        data = (sx, sy) if w.per_step else (None, None)
        own = {n.removeprefix("lr."): rows for n, rows in rates.items()} if rates else None
        steps = (jnp.arange(w.steps, dtype=lr.dtype), *data, own)
        unroll = w.steps if w.steps <= UNROLLED else 1
        (theta, _), values = jax.lax.scan(step, (start, base.moments(w, start)), steps, unroll=unroll)
        return values[-1], theta

    return adapt


def _over_tasks(w: InnerWorkload, fn: Callable[..., Any], start: Any, batch: tuple[Any, ...], in_turn: bool) -> Any:
    """fn(start, *row) of every task, stacked."""
    import jax

    if in_turn and w.own_starts:
        return jax.lax.map(lambda rows: fn(*rows), (start, *batch))
    if in_turn:
        return jax.lax.map(lambda rows: fn(start, *rows), batch)
    return jax.vmap(fn, (0 if w.own_starts else None, *[0] * len(batch)))(start, *batch)


def _function(w: InnerWorkload, a: Any, net: nn.Module, in_turn: bool) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """What is compiled and its arguments, from the arrays of a problem by name."""
    import jax

    loss = _objective(w, net)
    adapt = _adapt(w, loss)

    def weights(start: Any, fixed: Any, sx: Any, sy: Any, lr: Any) -> Any:
        value, theta = _over_tasks(w, lambda s, x, y: adapt(s, fixed, x, y, lr), start, (sx, sy), in_turn)
        return value.mean(), theta

    def query(trained: Any, *batch: Any) -> Any:
        start, fixed = ({n: trained.get(n, t) for n, t in part.items()} for part in (a["start"], a["fixed"]))
        rates = {n: trained[n] for n in a["rates"]}

        def task(start: Any, sx: Any, sy: Any, qx: Any, qy: Any) -> Any:
            sx, qx = _read(w, net, fixed, sx, qx)
            return loss(adapt(start, fixed, sx, sy, a["lr"], rates)[1], fixed, qx, qy)

        return _over_tasks(w, task, start, batch, in_turn).mean()

    def expert(sx: Any, lr: Any, sy: Any) -> Any:
        theta = adapt(a["start"], a["fixed"], sx[0], sy[0], lr)[1]

        def squared(t: Any) -> Any:
            return sum(((t[n] - a["expert"][n]) ** 2).sum() for n in t)

        return squared(theta) / squared(a["start"])

    if w.goal == "adapt":
        return weights, (a["start"], a["fixed"], a["sx"], a["sy"], a["lr"])
    if w.goal == "expert":
        return jax.value_and_grad(expert, argnums=(0, 1)), (a["sx"], a["lr"], a["sy"])
    trained = a["trained"]
    return jax.value_and_grad(query), (trained, a["sx"], a["sy"], a["qx"], a["qy"])


def prepare(w: InnerWorkload, p: Problem, options: frozenset[str]) -> Prepared:
    import jax
    import numpy as np

    ready(p.sx)

    def array(value: Any) -> Any:
        return {n: array(t) for n, t in value.items()} if isinstance(value, dict) else jax.numpy.asarray(value.numpy())

    arrays = {n: array(value) for n, value in p._asdict().items() if n != "net"} | {"trained": array(p.trained)}
    function, given = _function(w, arrays, p.net, "map" in options)
    compiled = jax.jit(function)

    def tensor(value: Any) -> Tensor:
        return torch.from_numpy(np.array(value))

    def result(value: Any) -> Result:
        loss, tree = value
        if w.goal == "adapt":
            return base.moved(p, (tensor(loss), {n: tensor(t) for n, t in tree.items()}))
        order = [tree[n] for n in p.trained] if w.goal == "query" else tree
        return tensor(loss), [tensor(t) for t in order]

    return Prepared(lambda: jax.block_until_ready(compiled(*given)), result)
