"""torch.func: vmap of grad over the tasks. ``loop`` runs the tasks in turn (faster where vmap is slow).

Without a meta-gradient one step of all tasks is the function that is called (and compiled) once a step; an unrolled
graph of a hundred steps takes minutes to compile. ``checkpoint`` does the same for the goal ``expert``: a step and its
pullback.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.func import grad_and_value, vjp, vmap

from bench.providers.base import Prepared, Result
from bench.providers.inner import base
from bench.workloads.inner import InnerWorkload, Problem, Tensors

REQUIRES = ("torch",)
OPTIONS = ("loop", "checkpoint", "channels_last")
Wrap = Callable[..., Any]


def _stepper(w: InnerWorkload, p: Problem) -> Callable[..., tuple[Tensor, Tensors, Any]]:
    """step(theta, held, fixed, x, y, lr, scales) -> (loss before, parameters, moments) of one task."""
    loss = base.objective(w, p)

    def step(
        theta: Tensors, held: Any, fixed: Tensors, x: Tensor, y: Tensor, lr: Any, scales: Any
    ) -> tuple[Tensor, Tensors, Any]:
        grads, value = grad_and_value(loss)(theta, fixed, x, y)
        return value, *base.updated(w, theta, grads, held, lr, scales)

    return step


def _scales(p: Problem, k: int) -> tuple[Tensor, Tensor]:
    """Adam's corrections as tensors: a compiled step is not compiled again for each of them."""
    one, two = base.corrections(k)
    return torch.full_like(p.lr, one), torch.full_like(p.lr, two)


def _query(w: InnerWorkload, p: Problem, wrap: Wrap, in_turn: bool) -> Prepared:
    """The mean query loss and its gradient, in one function, or in one for each task."""
    step, loss = _stepper(w, p), base.objective(w, p)

    def task(trained: Tensors, sx: Tensor, sy: Tensor, qx: Tensor, qy: Tensor) -> Tensor:
        theta, fixed = ({n: trained.get(n, t) for n, t in part.items()} for part in (p.start, p.fixed))
        rates, held = {n: trained[n] for n in p.rates}, base.moments(w, theta)
        sx, qx = base.read(w, p, fixed, sx, qx)
        for k in range(w.steps):
            rate = base.rate_of(p.lr, rates, k)
            _, theta, held = step(theta, held, fixed, sx, sy, rate, base.corrections(k))
        return loss(theta, fixed, qx, qy)

    def meta(trained: Tensors, *batch: Tensor) -> Tensor:
        return vmap(task, (None, 0, 0, 0, 0))(trained, *batch).mean()

    fn, trained = wrap(grad_and_value(task if in_turn else meta)), p.trained
    batch = (p.sx, p.sy, p.qx, p.qy)

    def together() -> Result:
        grads, value = fn(trained, *batch)
        return value, list(grads.values())

    def one_by_one() -> Result:
        total, sums = 0 * p.lr, [torch.zeros_like(t) for t in trained.values()]
        for rows in zip(*batch, strict=True):
            grads, value = fn(trained, *rows)
            total += value / w.tasks
            torch._foreach_add_(sums, list(grads.values()), alpha=1 / w.tasks)
        return total, sums

    return Prepared(one_by_one if in_turn else together)


def _adapt(w: InnerWorkload, p: Problem, wrap: Wrap, in_turn: bool) -> Prepared:
    """All tasks' adapted weights: a step at a time, of all tasks or of one."""
    step = _stepper(w, p)
    fn = wrap(step if in_turn else vmap(step, (0, 0, None, 0, 0, None, None)))
    scales = [_scales(p, k) for k in range(w.steps)]

    def loop(theta: Tensors, sx: Tensor, sy: Tensor, axis: int) -> tuple[Tensor, Tensors]:
        value, held = 0 * p.lr, base.moments(w, theta)
        for k in range(w.steps):
            x, y = base.of_step(w, sx, k, axis), base.of_step(w, sy, k, axis)
            value, theta, held = fn(theta, held, p.fixed, x, y, p.lr, scales[k])
        return value, theta

    @torch.no_grad()
    def together() -> tuple[Tensor, Tensors]:
        start = p.start if w.own_starts else {n: t.expand(w.tasks, *t.shape) for n, t in p.start.items()}
        value, theta = loop(start, p.sx, p.sy, 1)
        return value.mean(), theta

    @torch.no_grad()
    def one_by_one() -> tuple[Tensor, Tensors]:
        rows = [loop(base.of_task(p.start, t, w.own_starts), p.sx[t], p.sy[t], 0) for t in range(w.tasks)]
        stacked = {n: torch.stack([theta[n] for _, theta in rows]) for n in p.start}
        return torch.stack([value for value, _ in rows]).mean(), stacked

    return Prepared(one_by_one if in_turn else together, lambda value: base.moved(p, value))


def _expert(w: InnerWorkload, p: Problem, wrap: Wrap, by_steps: bool) -> Prepared:
    """The distance to the expert and its gradient for the images and the rate: of one task, so without vmap."""
    step = _stepper(w, p)

    def moved(theta: Tensors, sx: Tensor, lr: Tensor) -> Tensors:
        return step(theta, (), p.fixed, sx, p.sy[0], lr, (1.0, 1.0))[1]

    def whole(sx: Tensor, lr: Tensor) -> Tensor:
        theta = p.start
        for _ in range(w.steps):
            theta = moved(theta, sx[0], lr)
        return base.distance(theta, p.start, p.expert)

    def pullback(theta: Tensors, sx: Tensor, lr: Tensor, grads: Tensors) -> tuple[Tensors, Tensor, Tensor]:
        pulled: tuple[Tensors, Tensor, Tensor] = vjp(moved, theta, sx, lr)[1](grads)
        return pulled

    if not by_steps:
        fn = wrap(grad_and_value(whole, argnums=(0, 1)))

        def at_once() -> Result:
            grads, value = fn(p.sx, p.lr)
            return value, list(grads)

        return Prepared(at_once)

    forward, backward = wrap(moved), wrap(pullback)

    @torch.no_grad()
    def in_reverse() -> Result:
        states, images, rate = [p.start], torch.zeros_like(p.sx), 0 * p.lr
        for _ in range(w.steps):
            states.append(forward(states[-1], p.sx[0], p.lr))
        grads, value = grad_and_value(base.distance)(states.pop(), p.start, p.expert)
        while states:
            grads, to_images, to_rate = backward(states.pop(), p.sx[0], p.lr, grads)
            images[0] += to_images
            rate += to_rate
        return value, [images, rate]

    return Prepared(in_reverse)


def build(w: InnerWorkload, p: Problem, options: frozenset[str], wrap: Wrap) -> Prepared:
    """The functional loop with ``wrap`` (identity, or torch.compile) around what is called."""
    p = base.channels_last(p) if "channels_last" in options else p
    if w.goal == "expert":
        return _expert(w, p, wrap, "checkpoint" in options)
    return (_adapt if w.goal == "adapt" else _query)(w, p, wrap, "loop" in options)


def prepare(w: InnerWorkload, p: Problem, options: frozenset[str]) -> Prepared:
    return build(w, p, options, lambda fn: fn)
