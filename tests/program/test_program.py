"""Tracing: the encoded program must equal its module, and what cannot be fused must be named."""

from __future__ import annotations

import sys
import threading
import time

import pytest
import torch
import torch.nn.functional as F
from cases.program import assert_equal, check_encoding
from cases.program_models import FUSED, UNFUSED, Net, Siren, mlp, weight
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from mtml_kernels.program import VERSION, Act, Op, Unfusable, decode, trace


@pytest.mark.parametrize("name", FUSED)
def test_program_equals_its_module(name: str) -> None:
    make, shapes = FUSED[name]
    model = make().double()
    program = trace(model, shapes)
    check_encoding(program)
    for n in (1, 5):
        assert_equal(model, program, shapes, n)


@pytest.mark.parametrize("name", UNFUSED)
def test_obstacles_are_named(name: str) -> None:
    (make, shapes), reasons = UNFUSED[name]
    model = make()
    with pytest.raises(Unfusable) as caught:
        trace(model, shapes)
    for reason in reasons:
        assert any(reason in found for found in caught.value.reasons), caught.value.reasons
    assert all(len(found) < 300 and "\n" not in found for found in caught.value.reasons)


def test_every_obstacle_is_reported_once() -> None:
    model = nn.Sequential(nn.Conv3d(1, 2, 3), nn.Mish(), nn.ReLU(), nn.Conv3d(2, 2, 1), nn.Flatten())
    with pytest.raises(Unfusable) as caught:
        trace(model, [(1, 5, 5, 5)])
    assert [r.split(":")[0] for r in caught.value.reasons] == ["0 (Conv3d)", "1 (Mish)", "3 (Conv3d)"]
    assert [record["fused"] for record in caught.value.nodes].count(True) == 1  # the input


def test_plain_layers_become_one_node_each() -> None:
    program = trace(nn.Sequential(nn.Flatten(), mlp(6, 4, 3)), [(2, 3)])
    assert [record["op"] for record in program.describe()] == ["input", "linear", "relu", "linear"]
    assert [record["path"] for record in program.describe()][1:] == ["1.0 (Linear)", "1.1 (ReLU)", "1.2 (Linear)"]
    assert (program.nodes[0].rows, program.nodes[0].features) == (1, 6)  # flattening is folded into the input
    assert [p.name for p in program.params] == ["1.0.weight", "1.0.bias", "1.2.weight", "1.2.bias"]
    assert program.output_shape == (3,)


def test_frequency_is_folded_into_the_sine() -> None:
    program = trace(Siren(), [(2,)])
    sines = [node for node in program.nodes if node.op == Op.ACT and node.b == Act.SIN]
    assert [program.consts[node.const] for node in sines] == [30.0, 30.0]
    assert not any(node.op == Op.AFFINE for node in program.nodes)


def test_shared_tensors_have_one_name() -> None:
    make, shapes = FUSED["tied weights"]
    program = trace(make(), shapes)
    assert [p.name for p in program.params] == ["0.weight", "0.bias", "2.bias"]


def test_unused_parameters_and_dead_code_are_left_out() -> None:
    make, shapes = FUSED["dead code"]
    program = trace(make(), shapes)
    assert [p.name for p in program.params] == ["a.weight", "a.bias"]
    assert len(program.nodes) == 2


def test_mode_decides_about_dropout() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5))
    with pytest.raises(Unfusable, match="dropout"):
        trace(model, [(3,)])
    assert len(trace(model.eval(), [(3,)]).nodes) == 2


def test_tracing_leaves_no_mark_on_the_module() -> None:
    model = Net(lambda m, x: setattr(m, "last", m.a(x)) or m.a(x), a=nn.Linear(3, 2), last=None)
    before, weights = dict(vars(model)), model.a.weight
    with pytest.raises(Unfusable, match="forward sets last on the module"):
        trace(model, [(3,)])
    assert vars(model) == before and model.a.weight is weights and model.last is None
    assert "len" not in vars(sys.modules["cases.program_models"])
    state = torch.get_rng_state()
    trace(model.a, [(3,)])
    assert torch.equal(state, torch.get_rng_state())


def test_global_hooks_stand_in_the_way() -> None:
    handle = nn.modules.module.register_module_forward_hook(lambda m, args, out: None)
    try:
        with pytest.raises(Unfusable, match="global module hooks"):
            trace(mlp(3, 4, 2), [(3,)])
    finally:
        handle.remove()
    trace(mlp(3, 4, 2), [(3,)])


def test_tracing_works_under_no_grad_and_inference_mode() -> None:
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            assert len(trace(mlp(3, 4, 2), [(3,)]).nodes) == 4


def test_threads_may_trace_at_once() -> None:
    checking = threading.Event()

    class Slow(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if isinstance(x, Tensor):  # not a tracer's stand-in: the check runs the model, its tensors exchanged
                checking.set()
                time.sleep(0.05)
            return x

    model, results = nn.Sequential(nn.Linear(3, 4), Slow()), []

    def work() -> None:
        results.append(trace(model, [(3,)]))

    workers = [threading.Thread(target=work) for _ in range(4)]
    workers[0].start()
    assert checking.wait(timeout=10)
    for worker in workers[1:]:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(results) == 4 and len(set(results)) == 1


def test_decode_refuses_what_it_did_not_encode() -> None:
    ints = trace(mlp(3, 4, 2), [(3,)]).ints
    with pytest.raises(ValueError, match="version"):
        decode((VERSION + 1, *ints[1:]))
    with pytest.raises(ValueError, match="its header asks for"):
        decode(ints[:-1])


def test_empty_inputs_are_refused() -> None:
    with pytest.raises(Unfusable, match="no elements"):
        trace(mlp(3, 4, 2), [(0,)])
    with pytest.raises(Unfusable, match="without any"):
        trace(mlp(3, 4, 2), [])


UNARY = {
    "relu": torch.relu, "tanh": torch.tanh, "sigmoid": torch.sigmoid, "gelu": F.gelu, "silu": F.silu,
    "softplus": F.softplus, "leaky": lambda x: F.leaky_relu(x, 0.1), "sin": lambda x: torch.sin(3.0 * x),
    "cos": torch.cos, "neg": lambda x: -x, "affine": lambda x: 0.5 * x - 1.0, "square": torch.square,
    "fold": lambda x: x.reshape(-1, *x.shape[2:]).view(x.shape) if x.ndim > 2 else x,
    "elu": F.elu, "softmax": lambda x: x.softmax(-1), "reversed": lambda x: torch.cat(x.split(1, -1)[::-1], -1),
    "unit": lambda x: x.unsqueeze(1).squeeze(1),
}  # fmt: skip
BINARY = {
    "add": lambda x, y: x + y, "sub": lambda x, y: x - y, "mul": lambda x, y: x * y,
    "iadd": lambda x, y: (x + 0.0).add_(y),
}  # fmt: skip


class RandomNet(nn.Module):
    """A network that follows a list of instructions; every instruction appends a value to those it may use."""

    def __init__(self, instructions: list[tuple[str, int, int, int]], features: int, points: int) -> None:
        super().__init__()
        self.instructions = instructions
        self.weights = nn.ParameterList()
        widths = [features]
        for kind, a, b, width in instructions:
            wide = widths[a % len(widths)]
            if kind == "linear":
                self.weights.append(weight(width, wide))
                wide = width
            elif kind == "shift":
                self.weights.append(weight(points if width % 2 else 1, wide) if points else weight(wide))
            elif kind == "latent":
                self.weights.append(weight(width))
                wide += width
            elif kind == "cat":
                wide += widths[b % len(widths)]
            elif kind in BINARY and wide != widths[b % len(widths)]:
                wide = widths[a % len(widths)]  # widths differ: the instruction does nothing
            widths.append(wide)

    def forward(self, x: Tensor) -> Tensor:
        values, weights = [x], iter(self.weights)
        for kind, i, j, width in self.instructions:
            a, b = values[i % len(values)], values[j % len(values)]
            if kind == "linear":
                values.append(F.linear(a, next(weights)))
            elif kind == "shift":
                values.append(a + next(weights) if width > 4 else a * next(weights))
            elif kind == "latent":
                values.append(torch.cat([a, next(weights).expand(*a.shape[:-1], -1)], dim=-1))
            elif kind == "cat":
                values.append(torch.cat([a, b], dim=-1))
            elif kind in BINARY:
                values.append(BINARY[kind](a, b) if a.shape == b.shape else a * 1.5)
            else:
                values.append(UNARY[kind](a))
        return values[-1]


KINDS = ["linear", "linear", "shift", "latent", "cat", *UNARY, *BINARY]
instructions = st.lists(
    st.tuples(st.sampled_from(KINDS), st.integers(0, 9), st.integers(0, 9), st.integers(1, 9)), min_size=1, max_size=9
)


@settings(max_examples=150)
@given(instructions, st.integers(1, 5), st.integers(0, 4), st.integers(1, 4))
def test_random_networks(steps: list[tuple[str, int, int, int]], features: int, points: int, n: int) -> None:
    torch.manual_seed(features)
    model = RandomNet(steps, features, points).double()
    shape = (points, features) if points else (features,)
    program = trace(model, [shape])
    check_encoding(program)
    assert_equal(model, program, [shape], n)
