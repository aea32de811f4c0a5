"""`torch.ops.mtml.*` with malformed arguments, as exported or hand-made graphs give them: each kind has its words."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases.engine import Draft, draft_case, film
from cases.engine_random import sliced
from cases.head_inner_loop import make_head_case
from cases.images import conv_block, headed, image_case
from cases.inner_loop import Case, make_case
from cases.inner_loop import encode as encode_program
from torch import Tensor, nn

import mtml_kernels.ops.multihead_loss  # noqa: F401 - registers it
from mtml_kernels import HeadLoss, native
from mtml_kernels.losses import LossSpec
from mtml_kernels.program import HEADER_INTS, NODE_INTS, PARAM_INTS, Act, Norm, Op, Pool, decode
from mtml_kernels.program import OPS as OPERATIONS
from mtml_kernels.program.layers.slicing import SLICE
from mtml_kernels.program.layers.softmax import SOFTMAX, Softmax
from mtml_kernels.schema.inner_loop import ARGUMENTS as SCHEMA
from mtml_kernels.schema.multihead_loss import encode
from mtml_kernels.schema.update import UpdateSpec

OPS = torch.ops.mtml
HUGE = 2**62

# --- programs ---------------------------------------------------------------------------------------------------------


def conv_case() -> Case:
    net = headed((2, 6, 6), *conv_block(2, 4, nn.ReLU(), nn.MaxPool2d(2), padding=1))
    return image_case(net, (2, 6, 6), steps=1, loss=LossSpec("cross_entropy"))


def rows_case() -> Case:
    """A slice, and operations over rows, between a layer and its transpose."""
    draft = Draft()
    x = draft.input(1, 3)
    weight = draft.new_param(0, 4, 3)
    x = draft.rows_op(Op.NORM, draft.linear(x, 4, weight), Norm.UNIT, (1e-12, 1.0))
    y = draft.rows_op(SOFTMAX, draft.linear_back(x, weight), Softmax.SOFTMAX)
    draft.act(sliced(draft, y, 1, 3), Act.RELU)
    return draft_case(draft)


def words_case() -> Case:
    """Ids beside numbers."""
    nodes = [
        [Op.INPUT, 1, -1, -1, -1, 1, 3, 1, -1],
        [Op.EMBEDDING, 0, -1, 0, -1, 3, 2, 1, 0],
        [Op.VIEW, 1, -1, -1, -1, 1, 6, 1, -1],
        [Op.CAT, 2, 0, -1, -1, 1, 9, 1, -1],
        [Op.LINEAR, 3, -1, 1, 2, 1, 2, 1, -1],
    ]
    params, shapes = [(1, 5, 2), (0, 2, 9), (1, 1, 2)], [(5, 2), (2, 9), (2,)]
    case = make_case(program=(encode_program([3, 3], params, nodes), shapes), lr="all", dtype=torch.float64)
    spec = dataclasses.replace(case.spec, consts=[-1.0, 0.0])
    inputs = [[torch.randint(5, (2, n, 3)), torch.randn(2, n, 3, dtype=torch.float64)] for n in (3, 2)]
    return dataclasses.replace(case, spec=spec, support_x=inputs[0], query_x=inputs[1])


CASES: dict[str, Callable[[], Case]] = {
    "mlp": lambda: make_case(loss=LossSpec("mse"), dtype=torch.float64),
    "film": lambda: draft_case(film(2, 5, 1, latent=3)),
    "conv": conv_case,
    "words": words_case,
    "rows": rows_case,
}
FIELDS = ("op", "a", "b", "weight", "bias", "rows", "features", "batched", "const")


Arguments = collections.namedtuple("Arguments", [part.split()[-1] for part in SCHEMA.split(",")])  # type: ignore[misc]


def run(a: Arguments, backend: str = "cpu") -> None:
    OPS.inner_loop(*a, backend)


def arguments(name: str) -> Arguments:
    a = Arguments(*CASES[name]().op_arguments(15))
    run(a)
    return a._replace(program=list(a.program), consts=list(a.consts))


def node_at(program: list[int], node: int, field: str) -> int:
    start = HEADER_INTS + program[1] + PARAM_INTS * program[2]
    return start + NODE_INTS * node + FIELDS.index(field)


def first(program: list[int], op: int) -> int:
    return next(i for i, node in enumerate(decode(tuple(program)).nodes) if node.op == op)


# case, operation, field, values that cannot be right, what the message says
NODES: list[tuple[str, int, str, list[int], str]] = [
    ("mlp", Op.LINEAR, "op", [len(OPERATIONS), 99, -1], "operation|numbers"),
    ("mlp", Op.LINEAR, "weight", [-1, 4, 1, 2**31], "weight|numbers"),
    ("mlp", Op.LINEAR, "bias", [0, 4], "bias"),
    ("mlp", Op.LINEAR, "a", [-1, 1, 3, HUGE], "earlier node|numbers"),
    ("mlp", Op.LINEAR, "rows", [0, 2, HUGE], "rows|row|numbers"),
    ("mlp", Op.LINEAR, "features", [0, 3, 5, -7], "linear weight|features|numbers|feature"),
    ("mlp", Op.LINEAR, "batched", [0], "rows of a"),
    ("mlp", Op.INPUT, "a", [1, -1], "input"),
    ("mlp", Op.INPUT, "features", [2, 4], "elements"),
    ("mlp", Op.ACT, "b", [len(Act), -1], "activation"),
    ("mlp", Op.ACT, "const", [0, HUGE], "constants|numbers"),
    ("film", Op.PARAM, "weight", [-1, 1, 99], "parameter"),
    ("film", Op.MUL, "b", [-1, 90], "earlier node"),
    ("film", Op.MUL, "rows", [2], "broadcast"),
    ("film", Op.ADD, "features", [1, 6], "broadcast"),
    ("conv", Op.CONV, "weight", [-1, 1], "weight"),
    ("conv", Op.CONV, "const", [-1, 1, 10**6], "constants|window|weight|images"),
    ("conv", Op.NORM, "b", [len(Norm), -1], "normalisation"),
    ("conv", Op.NORM, "weight", [0], "weight"),
    ("conv", Op.POOL, "b", [len(Pool)], "pooling"),
    ("conv", Op.POOL, "rows", [8, 36], "images"),
    ("conv", Op.VIEW, "rows", [2], "elements"),
    ("words", Op.EMBEDDING, "a", [-1, 2, 99], "embedding.*an input of the program"),
    ("words", Op.EMBEDDING, "b", [0, 1], "embedding.*b to be"),
    ("words", Op.EMBEDDING, "weight", [-1, 3], "embedding.*a parameter"),
    ("words", Op.EMBEDDING, "weight", [1], "embedding.*a table of rows"),
    ("words", Op.EMBEDDING, "bias", [0], "embedding.*bias"),
    ("words", Op.EMBEDDING, "rows", [1, 4], "embedding.*a row for every id"),
    ("words", Op.EMBEDDING, "features", [1, 3], "embedding.*a table of rows"),
    ("words", Op.EMBEDDING, "batched", [0], "embedding.*a row for every id"),
    ("words", Op.EMBEDDING, "const", [-1, 1], "constants"),
    ("rows", Op.NORM, "features", [3, 5], "features of a"),
    ("rows", SOFTMAX, "b", [len(Softmax), -1], "unknown softmax"),
    ("rows", SOFTMAX, "features", [2, 4], "features of a"),
    ("rows", SLICE, "features", [1, 3, 4], "inside the features of a"),
    ("rows", SLICE, "rows", [2], "rows of a"),
    ("rows", SLICE, "const", [-1, 99], "constants"),
    ("rows", Op.LINEAR_TRANSPOSED, "features", [4, 2], "features of a, features"),
    ("rows", Op.LINEAR_TRANSPOSED, "weight", [-1, 1, 9], "weight"),
    ("rows", Op.LINEAR_TRANSPOSED, "bias", [0, 1], "bias"),
]


@pytest.mark.parametrize(
    "name, op, field, values, said", NODES, ids=[f"{OPERATIONS[o].name}-{f}" for _, o, f, _, _ in NODES]
)
def test_nodes(name: str, op: int, field: str, values: list[int], said: str) -> None:
    a = arguments(name)
    at = node_at(a.program, first(a.program, op), field)
    for value in values:
        program = [*a.program[:at], value, *a.program[at + 1 :]]
        with pytest.raises(ValueError, match=f"program: .*({said})"):
            run(a._replace(program=program))


@pytest.mark.parametrize("ends", [(-1.0, 1.0), (2.0, 4.0), (0.5, 2.5), (1.0, 2.0), (1e300, 1e300), (float("nan"), 3.0)])
def test_slices(ends: tuple[float, float]) -> None:
    a = arguments("rows")
    with pytest.raises(ValueError, match=r"program: .*slice.*inside the features of a"):
        run(a._replace(consts=[*a.consts[:-2], *ends]))


@pytest.mark.parametrize("value", [-2.0, 0.5, 5.0, 1e300, float("nan"), float("inf")])
def test_padding_ids(value: float) -> None:
    with pytest.raises(ValueError, match=r"program: .*embedding.*padding id"):
        run(arguments("words")._replace(consts=[value, 0.0]))


def test_an_input_of_ids_is_read_by_embeddings_alone() -> None:
    a = arguments("words")
    program = [*a.program]
    program[node_at(program, 0, "a")] = 0
    with pytest.raises(ValueError, match=r"program: node 0 \(input\): input 0 holds ids.* cannot be a value as well"):
        run(a._replace(program=program))


@pytest.mark.parametrize("backend", ["cpu", "torch", "reference"])
@pytest.mark.parametrize("name", ["support_x", "query_x"])
def test_inputs_of_ids_and_of_numbers_are_told_apart(name: str, backend: str) -> None:
    a = arguments("words")
    ids, numbers = getattr(a, name)
    for i, wrong in ((0, ids.double()), (0, ids.short()), (1, numbers.long()), (1, numbers.float())):
        xs = [wrong if at == i else x for at, x in enumerate((ids, numbers))]
        with pytest.raises(TypeError, match=rf"{name}\[{i}\]: expected torch.{'float64' if i else 'int64'}"):
            run(a._replace(**{name: xs}), backend)
    for bad in (-1, 5, 2**40):
        wrong = ids.clone()
        wrong[1, 1, 2] = bad
        with pytest.raises(ValueError, match=rf"{name}.*\[0, 5\).*got {bad}"):
            run(a._replace(**{name: [wrong, numbers]}), backend)


WINDOW = ("H", "W", "OH", "OW", "kh", "kw", "sh", "sw", "ph", "pw", "dh", "dw", "groups")


@pytest.mark.parametrize("field", WINDOW)
@pytest.mark.parametrize("value", [-1.0, 0.5, 1e300, float("nan"), float("inf"), 2.0**40])
def test_windows(field: str, value: float) -> None:
    a = arguments("conv")
    at = decode(tuple(a.program)).nodes[first(a.program, Op.CONV)].const + WINDOW.index(field)
    a.consts[at] = value
    with pytest.raises(ValueError, match=r"window|groups"):
        run(a)


@pytest.mark.parametrize("at, value", [(0, 3), (1, -1), (1, 2), (2, -1), (2, 5), (3, HUGE), (3, 0), (4, -1), (4, 4)])
def test_headers(at: int, value: int) -> None:
    a = arguments("mlp")
    a.program[at] = value
    with pytest.raises(ValueError, match="program"):
        run(a)


@pytest.mark.parametrize("size", [0, 1, 4])
def test_short_programs(size: int) -> None:
    a = arguments("mlp")
    with pytest.raises(ValueError, match="program"):
        run(a._replace(program=a.program[:size]))


def test_sizes_whose_product_overflows() -> None:
    """Each number is in range, what they give together is not."""
    nodes = [[Op.INPUT, 0, -1, -1, -1, 1, 1, 1, -1], [Op.PARAM, -1, -1, 0, -1, 1, 1, 0, -1]]
    nodes += [[Op.EXPAND, 1, -1, -1, -1, 2**31 - 1, 1, 1, -1], [Op.VIEW, 2, -1, -1, -1, 1, 2**31 - 1, 1, -1]]
    program = [2, 1, 1, len(nodes), 3, 1, 1, 1, 1, *(int(i) for node in nodes for i in node)]
    with pytest.raises(ValueError, match="elements a task"):
        plan_of(program, [True], samples=2**30, steps=5, needs=15, lr_steps=[1], lr_elements=[False])


def test_rates_of_elements_need_their_parameter() -> None:
    """One rate an element, for all parameters together: there is no such parameter."""
    program = CASES["mlp"]().spec.program
    with pytest.raises(ValueError, match="each element only where one parameter"):
        plan_of(program, [True] * 4, samples=3, steps=2, needs=15, lr_steps=[1], lr_elements=[True])


def plan_of(program: list[int], adapted: list[bool], samples: int, **options: Any) -> None:
    losses = {"support_loss": [0, 0], "query_loss": [0, 0], "loss_args": [0.0, 0.0]}
    sizes = {"support": samples, "query": samples}
    fixed = {"dtype": 1, "consts": [], "first_order": False, "keep": 0, "form": 0, "update": [0, 0, 0]}
    fixed |= dict.fromkeys(("starts", "per_step", "query_steps", "tasks_apart"), False)
    native.engine().Plan(program=program, adapted=adapted, **sizes, **losses, **fixed, **options)


# --- tensors and options ----------------------------------------------------------------------------------------------


def longer(t: Tensor) -> Tensor:
    return torch.cat([t, t])


ARGUMENTS: dict[str, list[Any]] = {
    "params": [[], "half", "longer", "single"],
    "adapted": [[], [True] * 9],
    "support_x": [[], "longer", "single", "narrow"],
    "support_y": ["longer", "single", "flat", "narrow"],
    "query_x": ["longer", "single", "double"],
    "query_y": ["longer", "single"],
    "support_mask": ["longer", "single", "narrow"],
    "query_mask": ["longer", "single"],
    "lr": [[], "half", "longer"],
    "step_weights": ["longer", "single"],
    "steps": [-1, 7, 2**40],
    "support_loss": [[], [9, 0], [0, 9], [-1, 0]],
    "query_loss": [[], [0]],
    "loss_args": [[], [0.0]],
    "keep": [-1, 3],
    "hyper": [[], "longer", "single", "double"],
    "moments": ["half", "longer", "single"],
    "update": [[], [9, 0, 0], [0, 64, 0], [1, 0, -1], [1, 1, 0]],
    "axes": [-1, 1 << 10],
    "needs": [-1, 1 << 12],
}


def changed(value: Any, how: Any) -> Any:
    """The argument with a fault; of a list, in its first tensor."""
    if not isinstance(how, str):
        return how
    if isinstance(value, list):
        if how in ("half", "double"):
            return value[: len(value) // 2] if how == "half" else value + value
        return [changed(value[0], how), *value[1:]]
    changes: dict[str, Callable[[Tensor], Tensor]] = {
        "longer": longer,
        "single": lambda t: t.float() if t.is_floating_point() else t.int(),
        "flat": lambda t: t.flatten(),
        "narrow": lambda t: t[:, :1],
    }
    return changes[how](value)


@pytest.mark.parametrize("backend", ["cpu", "torch", "reference"])
@pytest.mark.parametrize("name, how", [(n, how) for n, hows in ARGUMENTS.items() for how in hows])
def test_inner_loop_arguments(name: str, how: Any, backend: str) -> None:
    options = {"masks": True, "step_weights": True, "update": UpdateSpec("adam"), "moments": True}
    a = Arguments(*make_case(loss=LossSpec("mse"), lr="tensor_per_step", **options).op_arguments(63))
    run(a, backend)
    wrong = a._replace(**{name: changed(getattr(a, name), how)})
    named = {"support_y": "support_[xy]|moments", "steps": "steps|lr"}.get(
        name, name
    )  # either can be the wrong one of two
    with pytest.raises((ValueError, TypeError), match=rf"mtml::inner_loop: .*({named})"):
        run(wrong, backend)


@pytest.mark.parametrize("at, name", [(0, "grad_loss"), (1, "grad_output"), (2, "grad_support_losses")])
@pytest.mark.parametrize("how", ["longer", "single"])
def test_inner_loop_cotangents(at: int, name: str, how: str) -> None:
    a = Arguments(*make_case(keep=1, dtype=torch.float64).op_arguments(15))
    out = OPS.inner_loop(*a, "cpu")
    grads = [torch.ones_like(t) for t in out[:3]]
    kept = [torch.ones_like(t) for t in out[3]]
    OPS.inner_loop_backward(*grads, kept, [True] * len(kept), *a, out[4], "cpu")
    grads[at] = changed(grads[at], how)
    with pytest.raises((ValueError, TypeError), match=name):
        OPS.inner_loop_backward(*grads, kept, [True] * len(kept), *a, out[4], "cpu")


def test_inner_loop_carry_and_flags() -> None:
    a = Arguments(*make_case(keep=1, dtype=torch.float64).op_arguments(15))
    out = OPS.inner_loop(*a, "cpu")
    kept = [torch.ones_like(t) for t in out[3]]
    fixed = (torch.ones_like(out[0]), None, None)
    for grads, flags, carry, name in (
        (kept[1:], [True] * len(kept), out[4], "grad_adapted"),
        (kept, [True] * (len(kept) + 1), out[4], "grad_adapted_given"),
        ([longer(kept[0]), *kept[1:]], [True] * len(kept), out[4], r"grad_adapted\[0\]"),
        (kept, [True] * len(kept), out[4][1:], "carry"),
        (kept, [True] * len(kept), [t[..., :-1] for t in out[4]], r"carry\[0\]"),
    ):
        with pytest.raises((ValueError, TypeError), match=name):
            OPS.inner_loop_backward(*fixed, grads, flags, *a, carry, "cpu")


def test_carry_of_any_strides() -> None:
    """Read as a whole: here every element is the same one in memory."""
    a = Arguments(*make_case(dtype=torch.float64).op_arguments(1))
    out, grad = OPS.inner_loop(*a, "cpu"), torch.ones(2, dtype=torch.float64)
    carry = [torch.ones((), dtype=torch.float64).expand(t.shape) for t in out[4]]
    dense = OPS.inner_loop_backward(grad, None, None, [], [], *a, [t.contiguous() for t in carry], "cpu")
    for found, expected in zip(OPS.inner_loop_backward(grad, None, None, [], [], *a, carry, "cpu"), dense, strict=True):
        assert torch.equal(found, expected)
    head = make_head_case().args._replace(needs=31)
    *_, kept = OPS.head_inner_loop(*head, "cpu")
    ones, nones = torch.ones((), dtype=torch.float64).expand(kept.shape), (None, None, None)
    dense = OPS.head_inner_loop_backward(grad, *nones, *head, ones.contiguous(), "cpu")
    for found, expected in zip(OPS.head_inner_loop_backward(grad, *nones, *head, ones, "cpu"), dense, strict=True):
        assert torch.equal(found, expected)


def test_a_backward_call_that_wants_nothing_gets_nothing() -> None:
    """The plan of such a call has no room for tangents."""
    a = Arguments(*make_case(dtype=torch.float64).op_arguments(0))
    out = OPS.inner_loop(*a, "cpu")
    assert OPS.inner_loop_backward(torch.ones_like(out[0]), None, None, [], [], *a, out[4], "cpu") == []


# --- heads ------------------------------------------------------------------------------------------------------------

HEAD: dict[str, list[Any]] = {
    "support": ["longer", "single", "flat"],
    "query": ["longer", "single", "flat"],
    "weight": ["longer", "single", "flat"],
    "bias": ["longer", "single"],
    "rates": ["longer", "single", "flat"],
    "labels": ["longer", "single", "narrow"],
    "query_labels": ["longer", "single", "narrow"],
    "support_mask": ["longer", "single", "narrow"],
    "query_mask": ["longer", "single", "narrow"],
    "options": ["longer", "text", "kind"],
    "needs": [-1, 32],
}


@pytest.mark.parametrize("name, how", [(n, how) for n, hows in HEAD.items() for how in hows])
def test_head_inner_loop_arguments(name: str, how: Any) -> None:
    a = make_head_case(masks=True).args._replace(needs=31)
    OPS.head_inner_loop(*a, "cpu")
    value = getattr(a, name)
    texts = {"longer": f"{value} 1", "text": "x", "kind": "4" + str(value)[1:]}
    wrong = texts[how] if name == "options" else how if name == "needs" else changed(value, how)
    if name == "rates" and how == "longer":
        wrong = longer(longer(value))
    named = rf"mtml::head_inner_loop: ({name}|weight|query|{'support|bias' if name == 'weight' else name})"
    with pytest.raises((ValueError, TypeError), match=named):
        OPS.head_inner_loop(*a._replace(**{name: wrong}), "cpu")
    out = OPS.head_inner_loop(*a, "cpu")
    with pytest.raises((ValueError, TypeError), match=named):
        grads = (torch.ones_like(out[0]), None, None, None)
        OPS.head_inner_loop_backward(*grads, *a._replace(**{name: wrong}), out[4], "cpu")


def test_head_inner_loop_cotangents() -> None:
    a = make_head_case().args._replace(needs=31)
    *out, carry = OPS.head_inner_loop(*a, "cpu")
    names = ("grad_loss", "grad_logits", "grad_support_losses", "grad_coefficients")
    for i, name in enumerate(names):
        grads = [torch.ones_like(t) for t in out]
        grads[i] = longer(grads[i])
        with pytest.raises(ValueError, match=name):
            OPS.head_inner_loop_backward(*grads, *a, carry, "cpu")
    with pytest.raises(ValueError, match="carry"):
        OPS.head_inner_loop_backward(*(torch.ones_like(t) for t in out), *a, carry[:, :-1], "cpu")


def heads() -> tuple[Any, ...]:
    logits = [torch.randn(5, 3), torch.randn(5, 2)]
    text = encode([HeadLoss("cross_entropy"), HeadLoss("bce_with_logits")], [False, False])
    weights = [torch.rand(5), torch.rand(3), torch.rand(2)]  # of samples, of classes, of positives
    return logits, [torch.randint(3, (5,)), torch.rand(5, 2)], weights, [0, 2, 5], text, True


MULTIHEAD: dict[str, tuple[int, Any, str]] = {
    "logits": (0, lambda v: [longer(v[0]), v[1]], "targets"),
    "no logits": (0, lambda v: [], "logits|targets"),
    "targets": (1, lambda v: [v[0][:-1], v[1]], "targets"),
    "dtype of ids": (1, lambda v: [v[0].int(), v[1]], "targets"),
    "dtype of targets": (1, lambda v: [v[0], v[1].double()], "targets"),
    "count of targets": (1, lambda v: v[:1], "targets"),
    "sample weights": (2, lambda v: [longer(v[0]), *v[1:]], "sample_weights"),
    "class weights": (2, lambda v: [v[0], longer(v[1]), v[2]], "class_weights"),
    "pos weights": (2, lambda v: [*v[:2], v[2][:1]], "pos_weights"),
    "dtype of weights": (2, lambda v: [v[0].double(), *v[1:]], "sample_weights"),
    "count of weights": (2, lambda v: v[:2], "places"),
    "places": (3, lambda v: [0, 2, 6], "places"),
    "negative places": (3, lambda v: [0, 2, -1], "places"),
    "equal places": (3, lambda v: [0, 2, 2], "places"),
    "count of heads": (4, lambda v: v.split(";")[0], "heads"),
    "text": (4, lambda v: "x", "heads"),
    "stacks": (4, lambda v: v.replace(",0;", ",1;"), "targets|logits"),
}


@pytest.mark.parametrize("kind", MULTIHEAD)
def test_multihead_loss_arguments(kind: str) -> None:
    args = list(heads())
    OPS.multihead_loss(*args, "cpu")
    at, change, said = MULTIHEAD[kind]
    args[at] = change(args[at])
    with pytest.raises((ValueError, TypeError), match=said):
        OPS.multihead_loss(*args, "cpu")


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"counts": [1]}, "counts"),
        ({"counts": [1, 2]}, "counts"),
        ({"cotangent": torch.ones(3)}, "cotangent"),
        ({"gradients": [torch.ones(5, 3)]}, "gradients"),
        ({"gradients": [torch.ones(5, 3), torch.ones(4, 2)]}, r"gradients\[1\]"),
    ],
)
def test_multihead_loss_backward_arguments(changes: dict[str, Any], said: str) -> None:
    args = heads()
    losses, gradients = OPS.multihead_loss(*args, "cpu")
    given = {"cotangent": torch.ones_like(losses), "gradients": gradients, "logits": args[0], "counts": [1, 1]}
    OPS.multihead_loss_backward(*given.values(), "cpu")
    with pytest.raises((ValueError, TypeError), match=said):
        OPS.multihead_loss_backward(*(given | changes).values(), "cpu")


def test_sizes_that_no_machine_has() -> None:
    """More memory than there is raises; it is not tried, which would take the machine down."""
    for size in (2**50, 2**62, -1):
        with pytest.raises(MemoryError):
            native.engine().Memory(size)
