"""JAX: jit of value_and_grad of vmap over the tasks; the option ``map`` runs the tasks in turn (jax.lax.map)."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from bench.providers.base import Prepared, Result, Unavailable
from bench.workloads import Data, Sine, Workload

REQUIRES = ("jax",)
OPTIONS = ("map",)


@contextlib.contextmanager
def only(threads: int) -> Iterator[None]:
    """Let this process see ``threads`` processors: XLA sizes its pool by that when its client is created."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(before)[:threads])
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def ready(x: Tensor) -> None:
    """Let JAX compute in the dtype of ``x``, with these threads and in full precision: on GPUs its default is TF32.

    Raises Unavailable where ``x`` lies on a GPU and JAX has none.
    """
    import jax

    jax.config.update("jax_enable_x64", x.dtype == torch.float64)
    jax.config.update("jax_default_matmul_precision", "highest")
    with only(torch.get_num_threads()):
        jax.devices()
    if x.is_cuda and jax.default_backend() != "gpu":
        raise Unavailable(f"this JAX runs on {jax.default_backend()}, no GPU (pip install 'jax[cuda13]')")


def layer(m: nn.Module, p: Iterator[Any], x: Any) -> Any:
    """One layer of the workloads' networks; takes its parameters from ``p``."""
    import jax
    import jax.numpy as jnp

    match m:
        case nn.Linear():
            return x @ next(p).T + next(p)
        case nn.ReLU():
            return jax.nn.relu(x)
        case nn.Tanh():
            return jnp.tanh(x)
        case Sine():
            return jnp.sin(m.w0 * x)
        case nn.Conv2d():
            y = jax.lax.conv_general_dilated(
                x, next(p), m.stride, [(int(q), int(q)) for q in m.padding], dimension_numbers=("NCHW", "OIHW", "NCHW")
            )
            return y + next(p)[None, :, None, None]
        case nn.BatchNorm2d() | nn.InstanceNorm2d():
            axes = (0, 2, 3) if isinstance(m, nn.BatchNorm2d) else (2, 3)
            mean = x.mean(axes, keepdims=True)
            var = ((x - mean) ** 2).mean(axes, keepdims=True)
            x = (x - mean) * jax.lax.rsqrt(var + m.eps)
            return x * next(p)[None, :, None, None] + next(p)[None, :, None, None]
        case nn.MaxPool2d():
            return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 1, 2, 2), (1, 1, 2, 2), "VALID")
        case nn.AvgPool2d():
            return jax.lax.reduce_window(x, 0.0, jax.lax.add, (1, 1, 2, 2), (1, 1, 2, 2), "VALID") / 4
        case nn.Flatten():
            return x.reshape(x.shape[0], -1)
        case _:
            raise NotImplementedError(f"the jax provider has no {type(m).__name__}")


def _loss(w: Workload, net: nn.Module) -> Callable[..., Any]:
    import jax
    import jax.numpy as jnp

    def loss(params: list[Any], x: Any, y: Any) -> Any:
        p = iter(params)
        for m in net.children():
            x = layer(m, p, x)
        if w.loss == "mse":
            return ((x - y) ** 2).mean()
        return -jnp.take_along_axis(jax.nn.log_softmax(x), y[:, None].astype(jnp.int32), 1).mean()

    return loss


def _meta(w: Workload, net: nn.Module, in_turn: bool) -> Callable[..., Any]:
    """jit of meta(params, sx, sy, qx, qy) -> (mean query loss, gradients)."""
    import jax

    loss = _loss(w, net)

    def task(p: list[Any], sx: Any, sy: Any, qx: Any, qy: Any) -> Any:
        for _ in range(w.steps):
            p = [a - w.lr * b for a, b in zip(p, jax.grad(loss)(p, sx, sy), strict=True)]
        return loss(p, qx, qy)

    def meta(p: list[Any], *batch: Any) -> Any:
        if in_turn:
            return jax.lax.map(lambda one: task(p, *one), batch).mean()
        return jax.vmap(task, (None, 0, 0, 0, 0))(p, *batch).mean()

    argnums = (0, 1, 3) if w.inputs else (0,)
    compiled: Callable[..., Any] = jax.jit(jax.value_and_grad(meta, argnums=argnums))
    return compiled


def prepare(w: Workload, net: nn.Module, data: Data, options: frozenset[str]) -> Prepared:
    import jax
    import jax.numpy as jnp
    import numpy as np

    ready(data[0])
    batch = [jnp.asarray(part.detach().cpu().numpy()) for part in data]
    params = [jnp.asarray(p.detach().cpu().numpy()) for p in net.parameters()]
    fn = _meta(w, net, in_turn="map" in options)

    def run() -> Any:
        return jax.block_until_ready(fn(params, *batch))

    def result(value: Any) -> Result:
        loss, grads = value
        return torch.tensor(float(loss), dtype=torch.float64), [
            torch.from_numpy(np.array(g)) for g in jax.tree.leaves(grads)
        ]

    return Prepared(run, result)
