"""Layer programs written node by node, random ones among them, and a call's results as two flat lists of tensors."""

from __future__ import annotations

import dataclasses
import os
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from cases.inner_loop import Case, encode, rates, target
from torch import Tensor

from mtml_kernels.losses import KINDS, LossSpec
from mtml_kernels.losses import LOSSES as LOSS_TABLE
from mtml_kernels.ops.inner_loop import InnerLoopSpec
from mtml_kernels.program import LAYOUT_IN_OUT, LAYOUT_LINEAR, Act, Op

# The backend under test: the tests of the compiled engine run over the schedule as well (tests/schedule).
ENGINE = os.environ.get("MTML_TEST_ENGINE", "cpu")
LINEAR = (LAYOUT_LINEAR, LAYOUT_IN_OUT)
ALL_FORMS = ["all", "all_per_step", "tensor", "tensor_per_step", "element", "element_per_step"]
LOSSES = [
    LossSpec(kind, **option)
    for kind in KINDS
    for option in {"label_smoothing": ({}, {"label_smoothing": 0.3}), "delta": ({"delta": 0.6},)}.get(
        LOSS_TABLE[kind].option, ({},)
    )
]
LOSSES += [dataclasses.replace(loss, reduction="sum") for loss in LOSSES]
# Of activations whose constants decide where they bend or end, numbers that random values meet.
_CHOSEN = {Act.LEAKY_RELU: (0.2, 0.0), Act.SOFTPLUS: (1.5, 2.0), Act.RSQRT: (9.0, 0.0)}  # few values are below -9


def constants(kind: Act) -> tuple[float, float] | None:
    """(c0, c1) that tell the activation's formula from its default, None where it has none."""
    default = kind.info.options()
    return _CHOSEN.get(kind, (1.5 * default[0], 1.5 * default[1]) if default else None)


@dataclasses.dataclass(frozen=True)
class Value:
    """A node's value: its index and its matrix."""

    index: int
    rows: int
    features: int
    batched: bool


class Draft:
    """A layer program under construction; every method appends a node and returns its value."""

    def __init__(self) -> None:
        self.inputs: list[int] = []
        self.params: list[tuple[int, int, int]] = []  # layout, rows, cols
        self.shapes: list[tuple[int, ...]] = []
        self.values: list[Value] = []
        self.consts: list[float] = []
        self._nodes: list[list[int]] = []

    def node(
        self, op: int, value: tuple[int, int, bool], *, consts: tuple[float, float] | None = None, **at: int
    ) -> Value:
        rows, features, batched = value
        operands = [at.get(name, -1) for name in ("a", "b", "weight", "bias")]
        self._nodes.append([op, *operands, rows, features, int(batched), -1 if consts is None else len(self.consts)])
        self.consts += consts or ()
        self.values.append(Value(len(self._nodes) - 1, rows, features, batched))
        return self.values[-1]

    def new_param(self, layout: int, *shape: int) -> int:
        """A parameter whose matrix has this shape; LAYOUT_IN_OUT stores its transpose."""
        rows, cols = (1, *shape)[-2:] if shape else (1, 1)
        self.params.append((layout, rows, cols))
        self.shapes.append(shape[::-1] if layout == LAYOUT_IN_OUT else shape)
        return len(self.params) - 1

    def input(self, rows: int, features: int, index: int | None = None) -> Value:
        """A new input, or another view of one."""
        if index is None:
            self.inputs.append(rows * features)
            index = len(self.inputs) - 1
        return self.node(Op.INPUT, (rows, features, True), a=index)

    def param(self, index: int) -> Value:
        _, rows, cols = self.params[index]
        return self.node(Op.PARAM, (rows, cols, False), weight=index)

    def linear(self, x: Value, out: int, weight: int | None = None, bias: int | None = None) -> Value:
        """`bias`: None makes a new one, -1 none."""
        if weight is None:
            weight = self.new_param(LAYOUT_LINEAR, out, x.features)
        bias = self.new_param(1, out) if bias is None else bias
        return self.node(Op.LINEAR, (x.rows, out, x.batched), a=x.index, weight=weight, bias=bias)

    def linear_back(self, x: Value, weight: int) -> Value:
        """By the transpose of a weight with as many outputs as x has features, with a bias of its own."""
        out = self.params[weight][2]
        bias = self.new_param(1, out)
        form = (x.rows, out, x.batched)
        return self.node(Op.LINEAR_TRANSPOSED, form, a=x.index, weight=weight, bias=bias)

    def act(self, x: Value, kind: Act, consts: tuple[float, float] | None = None) -> Value:
        consts = consts or constants(kind)
        return self.node(Op.ACT, (x.rows, x.features, x.batched), a=x.index, b=int(kind), consts=consts)

    def pair(self, op: Op, a: Value, b: Value) -> Value:
        """ADD or MUL of two values that broadcast."""
        form = max(a.rows, b.rows), max(a.features, b.features), a.batched or b.batched
        return self.node(op, form, a=a.index, b=b.index)

    def cat(self, a: Value, b: Value) -> Value:
        return self.node(Op.CAT, (a.rows, a.features + b.features, a.batched), a=a.index, b=b.index)

    def view(self, x: Value, rows: int) -> Value:
        return self.node(Op.VIEW, (rows, x.rows * x.features // rows, x.batched), a=x.index)

    def expand(self, x: Value, rows: int) -> Value:
        return self.node(Op.EXPAND, (rows, x.features, True), a=x.index)

    def affine(self, x: Value, c0: float, c1: float) -> Value:
        return self.node(Op.AFFINE, (x.rows, x.features, x.batched), a=x.index, consts=(c0, c1))

    def rows_op(self, op: int, x: Value, kind: int, consts: tuple[float, float] | None = None, **at: int) -> Value:
        """An operation over each row of x, which keeps its form: softmax, the normalisations of rows."""
        return self.node(op, (x.rows, x.features, x.batched), a=x.index, b=kind, consts=consts, **at)

    def ints(self, output: Value | None = None) -> list[int]:
        return encode(self.inputs, self.params, self._nodes, None if output is None else output.index)


def mlp(sizes: Sequence[int], kind: Act = Act.RELU, consts: tuple[float, float] | None = None, rows: int = 1) -> Draft:
    """Linear layers with activations between them."""
    draft = Draft()
    x = draft.input(rows, sizes[0])
    for out in sizes[1:-1]:
        x = draft.act(draft.linear(x, out), kind, consts)
    draft.linear(x, sizes[-1])
    return draft


def film(features: int, hidden: int, out: int, latent: int, rows: int = 1) -> Draft:
    """Layers whose hidden values are scaled and shifted by linear functions of a latent code (the first parameter)."""
    draft = Draft()
    code = draft.act(draft.param(draft.new_param(1, latent)), Act.TANH)
    x = draft.input(rows, features)
    for width in (hidden, hidden):
        x = draft.linear(x, width)
        x = draft.pair(Op.MUL, x, draft.affine(draft.linear(code, width), 0.3, 1.0))
        x = draft.act(draft.pair(Op.ADD, x, draft.linear(code, width)), Act.SIN, (2.0, 0.0))
    draft.linear(x, out)
    return draft


# --- problems ---------------------------------------------------------------------------------------------------------


def draft_case(draft: Draft, output: Value | None = None, **options: Any) -> Case:
    """`problem` with what a test does not choose drawn from a fixed seed."""
    return problem(random.Random(0), draft, output, **options)


def problem(
    rng: random.Random,
    draft: Draft,
    output: Value | None = None,
    *,
    adapted: Sequence[bool] | None = None,
    tasks: int = 2,
    support: int = 3,
    query: int | None = 2,
    steps: int = 2,
    loss: LossSpec = LOSSES[0],
    query_loss: LossSpec | None = None,
    targets: bool = True,
    lr: str = "all",
    lr_scale: float = 0.1,
    masks: Sequence[str] = ("none", "none"),
    ignored: bool = False,
    step_weights: bool = False,
    first_order: bool = False,
    keep: int = 0,
    dtype: torch.dtype = torch.float64,
    weight_scale: float = 1.0,
) -> Case:
    """A call with random tensors. query None: no query set; masks: none, some, or empty (a task with all weights 0)."""
    generator = torch.Generator().manual_seed(rng.randrange(1 << 30))
    torch.manual_seed(rng.randrange(1 << 30))
    like: dict[str, Any] = {"dtype": dtype}
    output = output or draft.values[-1]
    size = output.rows * output.features
    adapted = list(adapted) if adapted is not None else [True] * len(draft.params)
    query_loss = query_loss or loss
    codes = [loss.encode(), query_loss.encode()]
    spec = InnerLoopSpec(
        adapted,
        draft.ints(output),
        draft.consts,
        steps,
        list(codes[0][:2]),
        list(codes[1][:2]),
        [codes[0][2], codes[1][2]],
        first_order,
        keep,
    )
    params = [
        torch.randn(shape, generator=generator, **like) * weight_scale / (cols**0.5 if layout in LINEAR else 2.0)
        for shape, (layout, _, cols) in zip(draft.shapes, draft.params, strict=True)
    ]
    x = [[torch.randn(tasks, n or 0, width, **like) for width in draft.inputs] for n in (support, query)]
    y = [_target(s, (tasks, n or 0), size, ignored, like) for s, n in ((loss, support), (query_loss, query))]
    mask = [_mask(kind, tasks, n or 0, like) for kind, n in zip(masks, (support, query), strict=True)]
    return Case(
        spec=spec,
        params=params,
        support_x=x[0],
        support_y=y[0],
        query_x=[] if query is None else x[1],
        query_y=y[1] if targets and query is not None else None,
        support_mask=mask[0],
        query_mask=None if query is None else mask[1],
        lr=[lr_scale * t for t in rates(lr, draft.shapes, adapted, steps, **like)],
        step_weights=_step_weights(steps, like) if step_weights else None,
    )


def _target(loss: LossSpec, lead: tuple[int, int], size: int, ignored: bool, like: dict[str, Any]) -> Tensor:
    y = target(loss, lead, size, **like)
    if ignored and loss.kind == "cross_entropy":
        y[torch.rand(lead) < 0.4] = -100
    return y


def _mask(kind: str, tasks: int, samples: int, like: dict[str, Any]) -> Tensor | None:
    if kind == "none":
        return None
    mask = torch.rand(tasks, samples, **like) * (torch.rand(tasks, samples) < 0.7)
    if kind == "empty":
        mask[0] = 0
    return mask


def _step_weights(steps: int, like: dict[str, Any]) -> Tensor:
    weights = torch.randn(steps + 1, **like)
    weights[torch.rand(steps + 1) < 0.3] = 0
    return weights


# --- results ----------------------------------------------------------------------------------------------------------

Evaluated = tuple[list[Tensor], list[Tensor]]  # outputs, gradients
GROUPS = ("params", "lr", "support_x", "query_x")


def outputs_of(case: Case, backend: str) -> list[Tensor]:
    loss, output, support_losses, adapted = case.call(backend)
    return [loss, output, support_losses, *adapted]


def cotangents_of(case: Case, rng: random.Random, backend: str = ENGINE) -> list[Tensor | None]:
    """One per output: of any values, equal, zero, or absent."""
    generator = torch.Generator().manual_seed(rng.randrange(1 << 30))
    makers: dict[str, Callable[[Tensor], Tensor | None]] = {
        "any": lambda t: torch.randn(t.shape, dtype=t.dtype, generator=generator),
        "equal": lambda t: torch.full_like(t, 0.7),
        "zero": torch.zeros_like,
        "absent": lambda t: None,
    }
    outputs = outputs_of(case, backend)
    kinds = [rng.choice(["any", "any", "equal", "zero"])]  # of the loss
    kinds += [rng.choice(["absent", "absent", "any"]) for _ in outputs[1:]]
    return [makers[kind](t) for kind, t in zip(kinds, outputs, strict=True)]


@contextmanager
def on_threads(threads: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def evaluate(
    case: Case,
    backend: str,
    cotangents: Sequence[Tensor | None],
    wanted: Sequence[str] = GROUPS,
    threads: int = 1,
) -> Evaluated:
    """All outputs, and the gradients of the groups in `wanted` (zeros where nothing depends on a tensor)."""
    groups: dict[str, Any] = {
        name: [t.detach().requires_grad_(name in wanted) for t in getattr(case, name)] for name in GROUPS
    }
    leaves = [t for name in GROUPS for t in groups[name] if name in wanted]
    with on_threads(threads):
        outputs = outputs_of(dataclasses.replace(case, **groups), backend)
        pairs = [(o, c) for o, c in zip(outputs, cotangents, strict=True) if c is not None and o.requires_grad]
        grads: Sequence[Tensor] = [torch.zeros_like(t) for t in leaves]
        if pairs and leaves:
            ends, seeds = [o for o, _ in pairs], [c for _, c in pairs]
            grads = torch.autograd.grad(ends, leaves, seeds, allow_unused=True, materialize_grads=True)
    return [o.detach() for o in outputs], list(grads)


def worst_error(found: Evaluated, expected: Evaluated) -> float:
    """The largest error of a tensor relative to its norm; a norm below 1e-4 of the largest one counts as that."""
    worst = 0.0
    for ours, theirs in zip(found, expected, strict=True):
        norms = [float(t.norm()) for t in theirs]
        floor = 1e-4 * max([1.0, *norms])
        for a, b, norm in zip(ours, theirs, norms, strict=True):
            assert a.shape == b.shape
            error = float((a - b).norm()) / max(norm, floor) if a.numel() else 0.0
            worst = max(worst, error if error == error else float("inf"))
    return worst


def is_finite(results: Evaluated) -> bool:
    return all(bool(torch.isfinite(t).all()) for group in results for t in group)


def check(
    case: Case,
    cotangents: Sequence[Tensor | None],
    wanted: Sequence[str] = GROUPS,
    threads: int = 1,
    backend: str = ENGINE,
) -> None:
    """The backend agrees with the reference to 1e-9 (both in float64).

    Some random loops are chaotic: where rounding the parameters by 1e-14 moves the reference's own results by more
    than 1e-9, ten times that much is allowed, and anything where it moves them by more than a hundredth.
    """
    expected = evaluate(case, "reference", cotangents, wanted)
    if not is_finite(expected):
        return
    error = worst_error(evaluate(case, backend, cotangents, wanted, threads), expected)
    if error > 1e-9:
        nudged = dataclasses.replace(case, params=[p * (1 + 1e-14) for p in case.params])
        moved = worst_error(evaluate(nudged, "reference", cotangents, wanted), expected)
        assert error <= 10 * moved or moved > 1e-2, f"error {error:.2g}"


def strided(t: Tensor) -> Tensor:
    """The same values in memory with gaps and, from two dimensions on, with the last two swapped."""
    gaps = torch.stack([t, torch.full_like(t, 7)], -1)[..., 0]
    if t.dim() < 2:
        return gaps
    return gaps.transpose(-1, -2).clone(memory_format=torch.contiguous_format).transpose(-1, -2)


def mapped(case: Case, change: Callable[[Tensor], Tensor]) -> Case:
    """The case with every tensor of it replaced by `change(tensor)`."""
    changes: dict[str, Any] = {name: [change(t) for t in getattr(case, name)] for name in GROUPS}
    for name in ("support_y", "query_y", "support_mask", "query_mask", "step_weights"):
        tensor = getattr(case, name)
        changes[name] = None if tensor is None else change(tensor)
    return dataclasses.replace(case, **changes)


def converted(case: Case, dtype: torch.dtype) -> Case:
    return mapped(case, lambda t: t.to(dtype) if t.is_floating_point() else t)


def same_bits(found: Evaluated, expected: Evaluated) -> bool:
    """Equal everywhere; NaN equals NaN."""
    pairs = [pair for groups in zip(found, expected, strict=True) for pair in zip(*groups, strict=True)]
    return all(torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in pairs)
