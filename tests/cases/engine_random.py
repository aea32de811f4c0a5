"""Random layer programs over the whole vocabulary, and random calls of them."""

from __future__ import annotations

import random

from cases.engine import ALL_FORMS, LINEAR, LOSSES, Draft, Value, problem
from cases.inner_loop import Case

from mtml_kernels.program import LAYOUT_IN_OUT, Act, Norm, Op
from mtml_kernels.program.layers.slicing import SLICE
from mtml_kernels.program.layers.softmax import SOFTMAX, Softmax

WIDTHS = [1, 2, 3, 5, 16, 17, 33, 40, 65]


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, min(n, 8) + 1) if n % d == 0]


def _fits(a: Value, b: Value) -> bool:
    """Whether ADD and MUL take the two: every operand has the result's rows or is one row for all samples."""
    rows, features, batched = max(a.rows, b.rows), max(a.features, b.features), a.batched or b.batched
    return all(
        (v.rows == rows or (v.rows == 1 and not v.batched)) and v.features in (1, features) for v in (a, b)
    ) and (batched or rows * features <= 400)


def _random_pair(rng: random.Random, draft: Draft, op: Op) -> None:
    a = rng.choice(draft.values)
    others = [v for v in draft.values if _fits(a, v)]
    if rng.random() < 0.5:
        rows, features = rng.choice([1, a.rows]), rng.choice([1, a.features])
        shape = (features,) if rows == 1 else (rows, features)
        others = [draft.param(draft.new_param(1, *shape))]
    if others:
        draft.pair(op, *rng.sample([a, rng.choice(others)], 2))


def _random_linear(rng: random.Random, draft: Draft) -> None:
    x = rng.choice(draft.values)
    shared = [i for i, (layout, _, cols) in enumerate(draft.params) if layout in LINEAR and cols == x.features]
    weight = rng.choice(shared) if shared and rng.random() < 0.5 else None
    out = rng.choice(WIDTHS) if weight is None else draft.params[weight][1]
    tied = [i for i, (layout, rows, _) in enumerate(draft.params) if layout in LINEAR and rows == x.features]
    if tied and rng.random() < 0.4:
        draft.linear_back(x, rng.choice(tied))
        return
    if weight is None and rng.random() < 0.3:
        weight = draft.new_param(LAYOUT_IN_OUT, out, x.features)
    same = [i for i, param in enumerate(draft.params) if param == (1, 1, out)]
    draft.linear(x, out, weight, rng.choice([None, -1, *same]))


def _random_node(rng: random.Random, draft: Draft) -> None:
    rest = ["cat", "view", "expand", "affine", "leaf", "slice", "slice", "softmax", "norm"]
    kind = rng.choice(["linear"] * 4 + ["act"] * 4 + ["add", "mul"] * 2 + rest)
    x = rng.choice(draft.values)
    if kind == "linear":
        _random_linear(rng, draft)
    elif kind == "act":
        draft.act(x, rng.choice(list(Act)))
    elif kind in ("add", "mul"):
        _random_pair(rng, draft, Op.ADD if kind == "add" else Op.MUL)
    elif kind == "cat":
        others = [v for v in draft.values if (v.rows, v.batched) == (x.rows, x.batched)]
        draft.cat(x, rng.choice(others))
    elif kind == "slice":
        start = rng.randrange(x.features)
        sliced(draft, x, start, rng.randint(start + 1, x.features))
    elif kind == "softmax":
        draft.rows_op(SOFTMAX, x, rng.choice(list(Softmax)))
    elif kind == "norm":
        _random_norm(rng, draft)
    elif kind == "view":
        draft.view(x, rng.choice(_divisors(x.rows * x.features)))
    elif kind == "expand":
        rows = [v for v in draft.values if not v.batched and v.rows == 1]
        if rows:
            draft.expand(rng.choice(rows), rng.choice([v.rows for v in draft.values if v.batched]))
    elif kind == "affine":
        draft.affine(x, rng.choice([-1.0, 0.5, 2.0]), rng.choice([0.0, 0.7]))
    else:
        _random_leaf(rng, draft)


def sliced(draft: Draft, x: Value, start: int, stop: int) -> Value:
    """Features [start, stop) of every row."""
    return draft.node(SLICE, (x.rows, stop - start, x.batched), a=x.index, consts=(float(start), float(stop)))


def _random_norm(rng: random.Random, draft: Draft) -> None:
    """Of rows; eps is of their size, so that some are shorter than it."""
    x = rng.choice([v for v in draft.values if v.batched])
    affine = {name: draft.new_param(1, x.features) for name in ("weight", "bias") if rng.random() < 0.5}
    draft.rows_op(Op.NORM, x, rng.choice([Norm.LAYER, Norm.RMS, Norm.UNIT]), (rng.choice([0.1, 0.7]), 1.0), **affine)


def _random_leaf(rng: random.Random, draft: Draft) -> None:
    choice = rng.choice(["input", "again", "param", "again_param"])
    rows = [i for i, (layout, *_) in enumerate(draft.params) if layout == 1]
    if choice == "input":
        draft.input(rng.choice([1, 1, 2, 3]), rng.choice(WIDTHS))
    elif choice == "again":
        index = rng.randrange(len(draft.inputs))
        count = rng.choice(_divisors(draft.inputs[index]))
        draft.input(count, draft.inputs[index] // count, index)
    elif choice == "again_param" and rows:
        draft.param(rng.choice(rows))
    else:
        draft.param(draft.new_param(1, *rng.choice([(), (3,), (17,), (2, 5)])))


def random_draft(rng: random.Random, nodes: int, classes: bool) -> tuple[Draft, Value]:
    """A program of about `nodes` nodes and its output, one row per sample where it has to name a class."""
    draft = Draft()
    draft.input(rng.choice([1, 1, 1, 2, 3]), rng.choice(WIDTHS))
    for _ in range(nodes):
        if draft.values[-1].rows * draft.values[-1].features < 300:
            _random_node(rng, draft)
    if rng.random() < 0.2:
        draft.new_param(rng.choice([0, 1]), 3, 2)  # nothing uses it
    return draft, _random_output(rng, draft, classes)


def _random_output(rng: random.Random, draft: Draft, classes: bool) -> Value:
    x = draft.values[-1]
    batched = [v for v in draft.values if v.batched]
    if not x.batched and x.rows == 1:  # a value of parameters alone: it meets a batched one
        y = batched[-1]
        x = draft.pair(Op.MUL, x, y) if _fits(x, y) else draft.cat(draft.expand(x, y.rows), y)
    elif not x.batched:
        x = batched[-1]
    if classes and x.rows > 1:
        x = draft.view(x, 1)
    if not draft.params or rng.random() < 0.5:
        x = draft.linear(x, rng.choice([2, 3, 17]) if classes else rng.choice(WIDTHS))
    return x


def random_case(rng: random.Random, nodes: int = 8) -> Case:
    """Any program with any combination of the call's options."""
    loss, query_loss = rng.choice(LOSSES), rng.choice(LOSSES)
    classes = "cross_entropy" in (loss.kind, query_loss.kind)
    draft, output = random_draft(rng, nodes, classes)
    steps = rng.choice([0, 1, 1, 2, 2, 3, 5, 10])
    adapted = [rng.random() < 0.75 for _ in draft.params]
    forms = ALL_FORMS[:2] if not any(adapted) else ALL_FORMS
    return problem(
        rng,
        draft,
        output,
        adapted=adapted,
        tasks=rng.choice([1, 2, 3]),
        support=rng.choice([1, 2, 5]),
        query=rng.choice([None, 0, 1, 3, 3]),
        steps=steps,
        loss=loss,
        query_loss=query_loss,
        targets=rng.random() < 0.85,
        lr=rng.choice(forms),
        lr_scale=rng.choice([0.02, 0.2]),
        masks=[rng.choice(["none", "some", "empty"]), rng.choice(["none", "some", "empty"])],
        ignored=rng.random() < 0.3,
        step_weights=rng.random() < 0.4,
        first_order=rng.random() < 0.25,
        keep=rng.choice([0, 1, 2]),
    )
