"""Embeddings in the fused path: equal to autograd in float64, ids checked before anything is indexed by them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases.engine import draft_case
from cases.images import Traced
from cases.inner_loop import Case
from cases.maml_oracle import assert_same, gradients, oracle
from test_tensors_without_memory import WITHOUT
from torch import Tensor, nn

import mtml
from mtml_kernels.functional import inner_loop
from mtml_kernels.ops.inner_loop import BACKENDS, InnerLoopSpec, inner_loop_call
from mtml_kernels.program import Op, Unfusable, trace
from mtml_kernels.schema.inner_loop import NEED_PARAMS

V, E, L, CLASSES = 11, 3, 4, 5
Batch = tuple[Any, Tensor, Any, Tensor]
cpu = pytest.mark.skipif("cpu" not in BACKENDS.available(), reason="needs the compiled engine")
backends = pytest.mark.parametrize("backend", [b for b in ("cpu", "torch", "reference") if b in BACKENDS.available()])


class Mean(nn.Module):
    """The mean of a sample's rows, with a padding id."""

    def __init__(self) -> None:
        super().__init__()
        self.emb, self.out = nn.Embedding(V, E, padding_idx=1), nn.Linear(E, CLASSES)

    def forward(self, ids: Tensor) -> Tensor:
        out: Tensor = self.out(torch.tanh(self.emb(ids).mean(1)))
        return out


class Tied(nn.Module):
    """The table is the last layer's weight as well, and has a padding row."""

    def __init__(self, rows: int = V, padding: int | None = 2) -> None:
        super().__init__()
        self.emb, self.mid = nn.Embedding(rows, E, padding_idx=padding), nn.Linear(L * E, E)
        self.out = nn.Linear(E, rows)
        self.out.weight = self.emb.weight

    def forward(self, ids: Tensor) -> Tensor:
        out: Tensor = self.out(torch.sigmoid(self.mid(self.emb(ids).flatten(1))))
        return out


class Beside(nn.Module):
    """Ids beside numbers; one table read twice, by F.embedding with a negative padding_idx as well."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.other = nn.Parameter(torch.randn(V, E)), nn.Embedding(7, 2)
        self.out = nn.Linear(2 * E + 2 + 2, CLASSES)

    def forward(self, ids: Tensor, x: Tensor) -> Tensor:
        first, second = F.embedding(ids, self.table, padding_idx=-1), F.embedding(ids, self.table)
        parts = [first.sin(), second, self.other(ids), x]
        out: Tensor = self.out(torch.cat(parts, 1))
        return out


class Words(nn.Module):
    """A convolution over the words, then a normalisation."""

    def __init__(self) -> None:
        super().__init__()
        self.emb, self.conv = nn.Embedding(V, E), nn.Conv1d(E, 4, 3)
        self.norm, self.out = nn.LayerNorm(4), nn.Linear(4, CLASSES)

    def forward(self, ids: Tensor) -> Tensor:
        out: Tensor = self.out(self.norm(F.relu(self.conv(self.emb(ids).transpose(1, 2))).mean(2)))
        return out


def flat(*lead: int) -> nn.Module:
    size = int(torch.Size(lead).numel()) * E
    return nn.Sequential(nn.Embedding(V, E), nn.Flatten(), nn.Linear(size, 6), nn.ReLU(), nn.Linear(6, CLASSES))


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "flat": (lambda: flat(L), (L,)),
    "grid": (lambda: flat(2, 3), (2, 3)),
    "one_id": (lambda: nn.Sequential(nn.Embedding(V, E), nn.ReLU(), nn.Linear(E, CLASSES)), ()),
    "mean": (Mean, (L,)),
    "tied": (Tied, (L,)),
    "words": (Words, (L,)),
}


def ids_of(shape: tuple[int, ...], rows: int = V) -> Tensor:
    """Many of them alike, also in one sample."""
    return torch.randint(rows, shape) * torch.randint(2, shape)


def batch_of(shape: tuple[int, ...], tasks: int = 3, support: int = 5, query: int = 4, rows: int = V) -> Batch:
    sx, qx = ids_of((tasks, support, *shape), rows), ids_of((tasks, query, *shape), rows)
    return sx, torch.randint(CLASSES, (tasks, support)), qx, torch.randint(CLASSES, (tasks, query))


def check(
    model: nn.Module, batch: Batch, backend: str, steps: int = 2, params: Any = None, lr: Any = 0.3, **options: Any
) -> None:
    """Losses, outputs, adapted parameters and meta-gradients beside plain autograd."""
    model = model.double()
    maml = mtml.MAML(
        model, lr, steps=steps, params=params, backend=backend, first_order=options.get("first_order", False)
    )
    masks = options.get("masks", (None, None))
    given = {"support_mask": masks[0], "query_mask": masks[1]}
    assert maml.explain(*batch).to_dict()["path"] == "fused"
    names = [n for n, p in model.named_parameters() if params is None or n in params]
    true = oracle(model, batch, F.cross_entropy, lr, steps, names, **options)
    found = maml.meta_forward(*batch, **given)
    assert_same((found.loss, found.support_losses), (true.loss, true.support_losses))
    assert_same(found.output, true.output)
    learned = list(model.parameters())
    assert_same(gradients(found.loss, learned), gradients(true.loss, learned))
    assert_same(
        gradients(found.output.square().sum((1, 2)), learned), gradients(true.output.square().sum((1, 2)), learned)
    )
    adapted = maml.adapt_tasks(batch[0], batch[1], support_mask=masks[0]).params
    for name in names:
        assert_same(adapted[name], true.trajectory[-1][name])
    once = adapted[names[0]].pow(3).sum((1, 2))
    assert_same(gradients(once, learned), gradients(true.trajectory[-1][names[0]].pow(3).sum((1, 2)), learned))


@backends
@pytest.mark.parametrize("name", MODELS)
def test_equal_to_autograd(name: str, backend: str) -> None:
    make, shape = MODELS[name]
    check(make(), batch_of(shape), backend)


@backends
@pytest.mark.parametrize(
    "options",
    [
        {"first_order": True},
        {"steps": 0},
        {"steps": 3, "masks": (torch.tensor([[1.0, 0, 2, 1, 1]] * 3), torch.tensor([[1.0, 1, 0, 0.5]] * 3))},
        {"params": ["emb.weight"]},
        {"params": ["mid.weight", "mid.bias"]},
    ],
    ids=["first_order", "no_steps", "masks", "table_adapted", "table_fixed"],
)
def test_options(options: dict[str, Any], backend: str) -> None:
    check(Tied(), batch_of((L,)), backend, **options)


@cpu
@pytest.mark.parametrize(("tasks", "support", "query"), [(1, 1, 1), (1, 600, 300)])
def test_sizes(tasks: int, support: int, query: int) -> None:
    """One of each; and so many samples that they are cut into chunks and blocks."""
    check(Mean(), batch_of((L,), tasks, support, query), "cpu", 1)


@backends
def test_ids_beside_numbers(backend: str) -> None:
    ids, sy, query_ids, qy = batch_of((), rows=7)
    numbers = [torch.randn(3, n, 2, dtype=torch.float64, requires_grad=True) for n in (5, 4)]
    model = Beside().double()
    batch = ((ids, numbers[0]), sy, (query_ids, numbers[1]), qy)
    check(model, batch, backend)
    found = mtml.MAML(model, 0.3, steps=2, backend=backend).meta_loss(*batch)
    true = oracle(model, batch, F.cross_entropy, 0.3, 2).loss
    assert_same(gradients(found, numbers), gradients(true, numbers))


@backends
def test_rates_of_elements_and_their_gradients(backend: str) -> None:
    model, batch = Tied().double(), batch_of((L,))
    rates = mtml.InnerLR(model, 0.3, per="element", steps=2)
    found = mtml.MAML(model, rates, steps=2, backend=backend).meta_loss(*batch)
    learned = [*model.parameters(), *rates.parameters()]
    true = oracle(model, batch, F.cross_entropy, lambda name, k: rates.read([name])[0][k], 2).loss
    assert_same(found, true)
    assert_same(gradients(found, learned), gradients(true, learned))


@cpu
@pytest.mark.parametrize("rows", [2, 40, 100])
def test_tables_in_a_layers_layout_in_float32(rows: int) -> None:
    """Of few, some and many rows: as plain rows and as panels."""
    model = Tied(rows, None)
    sx, sy, qx, qy = batch_of((L,), rows=rows)
    batch = (sx, sy % 2, qx, qy % 2)
    found = mtml.MAML(model, 0.3, steps=2, backend="cpu").meta_loss(*batch)
    slopes = gradients(found, list(model.parameters()))
    model.double()
    true = oracle(model, batch, F.cross_entropy, 0.3, 2).loss
    torch.testing.assert_close(found.double(), true, rtol=1e-5, atol=1e-6)
    for a, b in zip(slopes, gradients(true, list(model.parameters())), strict=True):
        assert a is not None and b is not None
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-5)


@cpu
def test_low_rank_form_leaves_the_table_in_weight_space() -> None:
    layers = [nn.Embedding(V, 8), nn.Flatten(), nn.Linear(8 * L, 64), nn.Tanh(), nn.Linear(64, CLASSES)]
    model, batch = nn.Sequential(*layers).double(), batch_of((L,))
    maml = mtml.MAML(model, 0.3, steps=2, backend="cpu:low_rank")
    assert maml.explain(*batch).to_dict()["low_rank"] == 2
    _same_meta_gradient(maml, model, batch, 2)


@cpu
def test_the_trunk_runs_once() -> None:
    model = nn.Sequential(nn.Embedding(V, 32), nn.Flatten(), nn.Linear(32 * L, 512), nn.ReLU(), nn.Linear(512, CLASSES))
    model, batch = model.double(), batch_of((L,), 2)
    maml = mtml.MAML(model, 0.3, steps=10, params=["4.*"])
    assert "once" in str(maml.explain(*batch).to_dict()["reason"])
    _same_meta_gradient(maml, model, batch, 10, ["4.weight", "4.bias"])


def _same_meta_gradient(maml: mtml.MAML, model: nn.Module, batch: Batch, steps: int, names: Any = None) -> None:
    found, true = maml.meta_loss(*batch), oracle(model, batch, F.cross_entropy, 0.3, steps, names).loss
    learned = list(model.parameters())
    assert_same((found, gradients(found, learned)), (true, gradients(true, learned)))


@cpu
def test_bits_do_not_depend_on_threads_or_on_the_dtype_of_ids() -> None:
    model, (sx, sy, qx, qy) = Tied(), batch_of((L,), 5, 40)
    maml = mtml.MAML(model, 0.3, steps=2, backend="cpu")
    before, found = torch.get_num_threads(), []
    try:
        for threads, dtype in ((1, torch.int64), (2, torch.int64), (3, torch.int32)):
            torch.set_num_threads(threads)
            loss = maml.meta_loss(sx.to(dtype), sy, qx.to(dtype), qy)
            found.append((loss, *torch.autograd.grad(loss.sum(), list(model.parameters()))))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@cpu
@pytest.mark.parametrize("value", [None, 3])
def test_another_padding_id_is_followed(value: int | None) -> None:
    model, batch = Mean(), batch_of((L,))
    maml = mtml.MAML(model.double(), 0.3, steps=2, backend="cpu")
    _same_meta_gradient(maml, model, batch, 2)
    model.emb.padding_idx = value
    _same_meta_gradient(maml, model, batch, 2)


# --- what is not taken ------------------------------------------------------------------------------------------------


@backends
@pytest.mark.parametrize("bad", [-1, V, 2**40])
@pytest.mark.parametrize("which", ["sx", "qx"])
def test_ids_out_of_range(which: str, bad: int, backend: str) -> None:
    sx, sy, qx, qy = batch_of((L,))
    (sx if which == "sx" else qx)[1, 2, 3] = bad
    message = rf"{which}.*\[0, {V}\).*{V} rows, got {bad}"
    maml = mtml.MAML(Mean(), 0.1, steps=1, backend=backend)
    with pytest.raises(ValueError, match=message):
        maml.meta_loss(sx, sy, qx, qy)
    model = Mean()
    program = trace(model, [(L,)])
    codes = ([1, 0], [1, 0], [0.0, 0.0])
    spec = InnerLoopSpec([True] * 3, list(program.ints), list(program.consts), 1, *codes, False, 0)
    params = [model.get_parameter(info.name).detach() for info in program.params]
    adapted, *rest = spec.values
    args = (params, adapted, [sx], sy, [qx], qy, None, None, [torch.tensor([0.1])], [], [], None, *rest, NEED_PARAMS)
    with pytest.raises(ValueError, match=message):
        torch.ops.mtml.inner_loop(*args, backend)
    with pytest.raises(ValueError, match=message):
        torch.ops.mtml.inner_loop_backward(None, torch.ones(3, 4, CLASSES), None, [], [], *args, [], backend)


@backends
def test_numbers_where_ids_belong(backend: str) -> None:
    sx, sy, qx, qy = batch_of((L,))
    with pytest.raises(TypeError, match=r"sx: expected integer ids"):
        mtml.MAML(Mean(), 0.1, backend=backend).meta_loss(sx.float(), sy, qx.float(), qy)
    program, params = trace(Mean(), [(L,)]), dict(Mean().named_parameters())
    with pytest.raises(TypeError, match=r"x: expected integer ids"):
        inner_loop(program, params, sx.float(), sy, 0.1, steps=1, loss="cross_entropy", backend=backend)


@pytest.mark.parametrize("option", [{"max_norm": 1.0}, {"scale_grad_by_freq": True}, {"sparse": True}])
def test_options_that_are_not_fused_are_named(option: dict[str, Any]) -> None:
    with pytest.raises(Unfusable, match=next(iter(option))):
        trace(nn.Sequential(nn.Embedding(V, E, **option), nn.Flatten(), nn.Linear(L * E, 2)), [(L,)])


def test_computed_ids_and_ids_used_as_numbers_are_not_fused() -> None:
    class Both(nn.Module):
        def __init__(self, computed: bool) -> None:
            super().__init__()
            self.emb, self.computed = nn.Embedding(V, E), computed

        def forward(self, x: Tensor) -> Tensor:
            return self.emb(x + 1) if self.computed else self.emb(x).flatten(1) + x.mean(1, keepdim=True)

    for computed, reason in ((True, "must be an input itself"), (False, "as ids and as a value")):
        with pytest.raises(Unfusable, match=reason):
            trace(Both(computed), [(L,)])


def test_the_program_says_which_inputs_are_ids() -> None:
    program = trace(Beside(), [(), (2,)])
    assert [info.ids for info in program.inputs] == [True, False]
    assert [record["op"] for record in program.describe()].count("embedding") == 3
    assert all(node.op != Op.INPUT or node.a == 1 for node in program.nodes)


# --- the op's own doors -----------------------------------------------------------------------------------------------


def _op_case() -> tuple[InnerLoopSpec, tuple[Any, ...]]:
    """Of the op, in float64. Without a padding row, whose derivative is not the function's."""
    model = Tied(V, None).double()
    program = trace(model, [(L,)])
    params = [model.get_parameter(info.name).detach().requires_grad_() for info in program.params]
    spec = InnerLoopSpec(
        [True] * len(params), list(program.ints), list(program.consts), 2, [1, 0], [1, 0], [0.0, 0.0], False, 1
    )
    sx, sy, qx, qy = batch_of((L,), 2, 3, 2)
    return spec, (params, [sx], sy, [qx], qy, None, None, [torch.tensor([0.3], dtype=torch.float64)], None)


def _op_arguments() -> tuple[Any, ...]:
    spec, (params, *tensors) = _op_case()
    adapted, *rest = spec.values
    *sets, step_weights = tensors
    return (params, adapted, *sets, [], [], step_weights, *rest, NEED_PARAMS)


@backends
def test_gradcheck(backend: str) -> None:
    args = _op_arguments()

    def function(*params: Tensor) -> tuple[Tensor, ...]:
        loss, output, support, adapted, _ = torch.ops.mtml.inner_loop(list(params), *args[1:], backend)
        return loss, output, support, *adapted

    assert torch.autograd.gradcheck(function, args[0], fast_mode=True)


@cpu
def test_opcheck() -> None:
    torch.library.opcheck(torch.ops.mtml.inner_loop.default, (*_op_arguments(), "cpu"))


@backends
@pytest.mark.parametrize("order", [(0, 1), (1, 0)], ids=["ids_first", "ids_last"])
def test_all_gradients_of_the_op(order: tuple[int, int], backend: str) -> None:
    """Those of numbers beside ids, by what the forward op carries and without; ids have none."""
    case = _beside(order)
    args = case.op_arguments(15)
    *out, carry = torch.ops.mtml.inner_loop(*args, backend)
    leaves = [t.detach().requires_grad_(t.is_floating_point()) for t in case.tensors()]
    wanted = [t for t in leaves if t.requires_grad]
    scale = torch.tensor([0.5, -2.0], dtype=torch.float64)
    true = case.with_tensors(leaves).call("reference")
    assert_same(out[0], true[0])
    expected = torch.autograd.grad((true[0] * scale).sum(), wanted)
    for carried in (carry, []):
        found = torch.ops.mtml.inner_loop_backward(scale, None, None, [], [], *args, carried, backend)
        groups = (case.params, case.lr, case.support_x, case.query_x)
        assert_same(list(found), list(expected))
        assert len(found) == sum(len(g) for g in groups) - 2
    found = case.with_tensors(leaves).call(backend)[0]
    assert_same(torch.autograd.grad((found * scale).sum(), wanted), expected)


def _beside(order: tuple[int, int]) -> Case:
    class Net(Beside):
        def forward(self, *inputs: Tensor) -> Tensor:
            return super().forward(inputs[order[0]], inputs[order[1]])

    shapes: list[tuple[int, ...]] = [(), (2,)]
    case = draft_case(Traced(trace(Net(), [shapes[i] for i in order])))
    swapped = {}
    for name in ("support_x", "query_x"):
        xs = getattr(case, name)
        swapped[name] = [torch.randint(7, x.shape) if at == 0 else x for at, x in zip(order, xs, strict=True)]
    return dataclasses.replace(case, **swapped)


@cpu
@pytest.mark.parametrize("kind", ["freed", "freed view", "cut view", "TwoTensor", "FakeTensor"])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
@pytest.mark.parametrize("which", [0, 2], ids=["sx", "qx"])
def test_ids_without_memory(kind: str, dtype: torch.dtype, which: int) -> None:
    batch = [*batch_of((L,))]
    maml = mtml.MAML(Mean(), 0.3, steps=2, backend="cpu")
    maml.meta_loss(*batch)
    batch[which] = WITHOUT[kind](batch[which].to(dtype))
    for _ in range(2):
        with pytest.raises(TypeError, match="memory of its own"):
            maml.meta_loss(*batch)


@cpu
def test_one_compiled_graph() -> None:
    spec, tensors = _op_case()

    def step(*tensors: Any) -> Tensor:
        return inner_loop_call(spec, *tensors, "cpu")[0].sum()

    expected, found = step(*tensors), torch.compile(step, fullgraph=True, backend="aot_eager")(*tensors)
    assert_same(found, expected)
    assert_same(torch.autograd.grad(found, tensors[0]), torch.autograd.grad(expected, tensors[0]))
