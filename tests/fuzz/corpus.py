"""Real calls of every op, to be mutated: programs of all kinds, with every option, and their backward calls."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable
from typing import Any

import torch
from cases.engine import cotangents_of, draft_case, film, mlp
from cases.engine_random import random_case
from cases.head_inner_loop import make_head_case
from cases.images import Both, Traced, conv_block, headed, image_case, random_image_case
from cases.inner_loop import Case
from cases.multihead_loss import arguments, random_head
from torch import nn

import mtml_kernels.functional
from mtml_kernels.losses import LossSpec
from mtml_kernels.program import Act, trace
from mtml_kernels.schema.multihead_loss import encode
from mtml_kernels.schema.update import UpdateSpec

OPS = torch.ops.mtml


@dataclasses.dataclass
class Call:
    """One call; `function(*args)`."""

    name: str
    function: Callable[..., Any]
    args: list[Any]


def _cases() -> list[Case]:
    cases = [random_case(random.Random(seed), 7) for seed in range(60)]
    cases += [random_image_case(seed, samples=3) for seed in range(25)]
    cases += [draft_case(mlp([3, 5, 4], Act.RELU), steps=2, masks=("some", "some"), keep=2)]
    cases += [draft_case(film(2, 5, 1, latent=3), steps=2, step_weights=True, lr="element")]
    cases += [draft_case(mlp([2, 7, 7, 2], Act.SIN), lr="tensor_per_step", rows=2) for _ in ()]
    pool = headed((2, 6, 6), *conv_block(2, 4, nn.ReLU(), nn.MaxPool2d(2), padding=1))
    groups = headed((4, 5, 5), nn.Conv2d(4, 4, 3, groups=2), nn.GroupNorm(2, 4), nn.AdaptiveAvgPool2d(2))
    residual = headed((3, 4, 4), Both(nn.Conv2d(3, 3, 3, padding=1), nn.Identity()), nn.AvgPool2d(2, padding=1))
    depthwise = headed((5, 6, 4), nn.Conv2d(5, 5, 3, groups=5, stride=2), nn.LeakyReLU(), nn.LayerNorm([2, 1]))
    pairs = headed((16, 6, 8), nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16))
    loss = LossSpec("cross_entropy")
    for net, shape in ((pool, (2, 6, 6)), (groups, (4, 5, 5)), (residual, (3, 4, 4)), (pairs, (16, 6, 8))):
        cases.append(image_case(net, shape, steps=2, loss=loss))
    cases.append(image_case(depthwise, (5, 6, 4), steps=1, lr="element_per_step"))
    return [*cases, *[_words()] * 6]  # so that it is drawn often


def _words() -> Case:
    """Ids beside numbers: two tables over the same ids, of which a linear layer reads one as well."""

    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Embedding(6, 3, padding_idx=1), nn.Embedding(5, 2)
            self.mid, self.tied = nn.Linear(4 * (3 + 3 + 2) + 2, 3), nn.Linear(3, 6)
            self.tied.weight = self.first.weight

        def forward(self, ids: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
            parts = [self.first(ids).sin(), self.first(ids), self.second(ids)]
            mid: torch.Tensor = self.mid(torch.cat([*(p.flatten(1) for p in parts), x], 1))
            out: torch.Tensor = self.tied(mid.tanh())
            return out

    program = trace(Words(), [(4,), (2,)])
    case = draft_case(Traced(program), steps=2, loss=LossSpec("cross_entropy"))
    inputs = ([torch.randint(5, xs[0].shape), xs[1]] for xs in (case.support_x, case.query_x))
    return dataclasses.replace(case, support_x=next(inputs), query_x=next(inputs))


def _inner_loop(case: Case, rng: random.Random) -> list[Call]:
    backend = rng.choice(["cpu", "cpu", "cpu:weights"])
    args = list(case.op_arguments(rng.choice([0, 1, 15, 1023])))
    out = OPS.inner_loop(*args, backend)
    forward = Call("inner_loop", OPS.inner_loop, [*args, backend])
    cotangents = cotangents_of(case, rng)
    given = [c is not None for c in cotangents[3:]]
    adapted = [c for c in cotangents[3:] if c is not None]
    carry = out[4] if rng.random() < 0.8 else []
    backward = [*cotangents[:3], adapted, given, *args, carry, backend]
    return [forward, Call("inner_loop_backward", OPS.inner_loop_backward, backward)]


def _head(seed: int) -> list[Call]:
    rng = random.Random(seed)
    kinds = [LossSpec(k) for k in ("cross_entropy", "mse", "bce_with_logits")]
    bias = rng.random() < 0.7
    case = make_head_case(
        support=rng.randint(1, 5), query=rng.randint(0, 4), features=rng.randint(1, 20), classes=rng.randint(1, 7),
        steps=rng.randint(0, 3), loss=rng.choice(kinds), query_loss=rng.choice(kinds), groups=1 + (bias and seed % 2),
        bias=bias, masks=rng.random() < 0.5, targets=rng.random() < 0.8, decay=rng.choice([0.0, 0.1]), seed=seed,
    )  # fmt: skip
    needs = sum(1 << i for i, t in enumerate(case.args[:5]) if t is not None)
    args = [*case.args._replace(needs=needs)]
    loss, logits, support, coefficients, carry = OPS.head_inner_loop(*args, "cpu")
    grads = [torch.ones_like(t) if rng.random() < p else None for t, p in ((loss, 0.9), (logits, 0.4))]
    grads += [torch.ones_like(t) if rng.random() < 0.3 else None for t in (support, coefficients)]
    backward = [*grads, *args, carry, "cpu"]
    return [
        Call("head_inner_loop", OPS.head_inner_loop, [*args, "cpu"]),
        Call("head_inner_loop_backward", OPS.head_inner_loop_backward, backward),
    ]


def _multihead(seed: int) -> list[Call]:
    heads = [random_head(seed * 10 + i) for i in range(1 + seed % 3)]
    logits, columns = [h.logits for h in heads], [[getattr(h, n) for h in heads] for n in WEIGHTS]
    others = [t for column in columns for t in column]
    places = [i for i, t in enumerate(others) if t is not None]
    text = encode([h.spec for h in heads], [False] * len(heads))
    targets = [h.target for h in heads]
    args = [logits, targets, [t for t in others if t is not None], places, text, True, "cpu"]
    losses, gradients = OPS.multihead_loss(*args)
    back = [torch.ones_like(losses), gradients, logits, [1] * len(heads), "cpu"]
    plain = [[h.logits for h in heads], *arguments(heads)[:2]]
    return [
        Call("multihead_loss", OPS.multihead_loss, args),
        Call("multihead_loss_backward", OPS.multihead_loss_backward, back),
        Call("multihead_loss()", _differentiated(mtml_kernels.multihead_loss), plain),
    ]


WEIGHTS = ("sample_weights", "class_weights", "pos_weights")


def _linear(seed: int) -> Call:
    rng = random.Random(seed)
    rows, features = rng.choice([1, 5, 30]), rng.choice([1, 7, 33])
    kinds = [rng.choice(["cross_entropy", "mse", "gaussian_nll", "kl", "huber"]) for _ in range(1 + seed % 3)]
    heads = [random_head(seed * 7 + i, kind, (rows, 2 * rng.randint(1, 9))) for i, kind in enumerate(kinds)]
    weights = [torch.randn(h.logits.shape[1], features, dtype=torch.float64) for h in heads]
    biases = [torch.randn(len(w), dtype=torch.float64) if rng.random() < 0.7 else None for w in weights]
    targets, specs, _ = arguments(heads)
    x = torch.randn(rows, features, dtype=torch.float64)
    return Call("linear_multihead_loss()", _differentiated(_linear_losses), [x, weights, biases, targets, specs])


def _linear_losses(*args: Any) -> Any:
    return mtml_kernels.linear_multihead_loss(*args, backend="cpu")


def _blocks(seed: int) -> list[Call]:
    """The building blocks, of one weight for all tasks or of one each."""
    rng = random.Random(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, dtype=torch.float64)

    tasks, rows, outputs = rng.randint(1, 3), rng.randint(1, 4), rng.choice([1, 2, 6, 9])
    own, ours = rng.choice([1, tasks]), rng.choice([1, tasks])
    inputs, code = rng.choice([1, 3, 17]), rng.choice([-1, *map(int, Act)])
    bias = draw(ours, outputs) if rng.random() < 0.7 else None
    linear = [draw(tasks, rows, inputs), draw(own, outputs, inputs), bias, code, 1.0, rng.choice([0.0, 20.0])]
    groups, channels = rng.choice([(1, 3), (2, 4), (3, 3)])
    kernel, window = [rng.randint(1, 3), rng.randint(1, 2)], [[rng.randint(low, 2) for _ in "hw"] for low in (1, 0, 1)]
    weight = draw(own, groups * outputs, channels // groups, *kernel)
    biases = draw(ours, groups * outputs) if rng.random() < 0.7 else None
    conv = [draw(tasks, rows, channels, rng.randint(5, 7), rng.randint(3, 6)), weight, biases, *window, groups]
    return [*_layer(OPS.task_linear, linear, rng), *_layer(OPS.task_conv2d, conv, rng), *_update(rng, tasks)]


def _layer(op: Any, args: list[Any], rng: random.Random) -> list[Call]:
    name = op.__name__.rpartition(".")[2]
    y, backward = op(*args, "cpu"), getattr(OPS, f"{name}_backward")
    back = [torch.ones_like(y), y, *args, rng.choice([7, 3, rng.randint(0, 7)]), "cpu"]
    return [Call(name, op, [*args, "cpu"]), Call(f"{name}_backward", backward, back)]


def _update(rng: random.Random, tasks: int) -> list[Call]:
    rules = [("sgd", False, False), ("sgd", True, False), ("adam", False, False), ("rmsprop", True, True)]
    rule, momentum, centered = rng.choice(rules)
    options = {name: rng.random() < 0.5 for name in ("clipped", "decayed", "decoupled")}
    spec = UpdateSpec(rule, momentum=momentum, centered=centered, **options)
    shapes = [rng.choice([(3,), (), (2, 9), (0, 2)]) for _ in range(rng.randint(1, 3))]
    params, grads = ([torch.rand(tasks, *s, dtype=torch.float64) for s in shapes] for _ in range(2))
    lead = [rng.choice([1, tasks]) for _ in shapes]
    rates = [
        torch.rand(n, *(s if rng.random() < 0.5 else [1] * len(s)), dtype=torch.float64)
        for n, s in zip(lead, shapes, strict=True)
    ]
    step = rng.choice([0, 1, 5])
    moments = [torch.rand_like(p) for _ in spec.moments for p in params] if step else []
    args = [params, grads, rates, moments, torch.rand(8, dtype=torch.float64), spec.encode(), step, "cpu"]
    results = OPS.task_update(*args)
    back = [[torch.ones_like(t) for t in results], *args]
    return [Call("task_update", OPS.task_update, args), Call("task_update_backward", OPS.task_update_backward, back)]


def _differentiated(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, and the gradients at its first list of tensors."""

    def run(first: Any, *rest: Any) -> Any:
        tensors = [t for t in ([first] if isinstance(first, torch.Tensor) else first) if isinstance(t, torch.Tensor)]
        wanted = [t for t in tensors if t.is_floating_point() and t.is_leaf]
        for t in wanted:
            t.requires_grad_()
        try:
            losses = function(first, *rest)
            return losses, torch.autograd.grad(losses.sum(), wanted, allow_unused=True) if wanted else None
        finally:
            for t in wanted:
                t.requires_grad_(False)

    return run


def corpus() -> list[Call]:
    """The calls, in an order that is always the same."""
    rng = random.Random(0)
    calls = [call for case in _cases() for call in _inner_loop(case, rng)]
    calls += [call for seed in range(24) for call in _head(seed)]
    calls += [call for seed in range(20) for call in _multihead(seed)]
    calls += [_linear(seed) for seed in range(20)]
    return calls + [call for seed in range(40) for call in _blocks(seed)]
