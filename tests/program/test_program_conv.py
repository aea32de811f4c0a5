"""Tracing of convolutions, poolings and normalisations: equal to the modules, and images stay images."""

from __future__ import annotations

import pytest
import torch
from cases.conv_models import NORMED, SPATIAL, UNFUSED, conv4, resnet12, three_convs
from cases.conv_random import conv_net
from cases.program import assert_equal, check_encoding
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from mtml_kernels.batch_norm import PerStepBatchNorm, batch_norm_mode, step_row
from mtml_kernels.program import LAYOUT_STEPS, Act, Norm, Op, Program, Unfusable, trace


def operations(program: Program) -> list[str]:
    return [str(record["op"]) for record in program.describe()]


@pytest.mark.parametrize("name", SPATIAL)
def test_program_equals_its_module(name: str) -> None:
    make, shapes = SPATIAL[name]
    model = make().double()
    program = trace(model, shapes)
    check_encoding(program)
    for n in (1, 4):
        assert_equal(model, program, shapes, n, second=True)


@pytest.mark.parametrize("name", NORMED)
def test_normalised_program_equals_its_module(name: str) -> None:
    make, shapes = NORMED[name]
    model = make().double()
    before = {k: b.clone() for k, b in model.named_buffers()}
    program = trace(model, shapes)
    torch.testing.assert_close(dict(model.named_buffers()), before, rtol=0, atol=0)
    check_encoding(program)
    assert_equal(model, program, shapes, 9, second=True)


@pytest.mark.parametrize("name", UNFUSED)
def test_obstacles_are_named(name: str) -> None:
    (make, shapes), reasons = UNFUSED[name]
    with pytest.raises(Unfusable) as caught:
        trace(make(), shapes)
    for reason in reasons:
        assert any(reason in found for found in caught.value.reasons), caught.value.reasons


@settings(max_examples=60)
@given(st.integers(0, 10**6), st.sampled_from(["module", "running", "eval"]))
def test_random_networks(seed: int, mode: str) -> None:
    model, shape = conv_net(seed)
    mode = "module" if any(_untracked(m) for m in model.modules()) and mode == "running" else mode
    model.train(mode != "eval")
    mode = "module" if mode == "eval" else mode
    program = trace(model, [shape], batch_norm=mode)
    check_encoding(program)
    with batch_norm_mode(model, mode):
        assert_equal(model, program, [shape], 6, second=True)


def _untracked(module: nn.Module) -> bool:
    return isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d) and module.running_mean is None


def test_random_networks_repeat() -> None:
    torch.manual_seed(1)
    first, shape = conv_net(7)
    torch.manual_seed(2)
    again, same = conv_net(7)
    assert str(first) == str(again) and shape == same
    torch.testing.assert_close(first.state_dict(), again.state_dict(), rtol=0, atol=0)


# Images stay images


def test_conv4_has_one_node_per_layer() -> None:
    block = ["conv2d 3x3", "batch_norm", "relu", "max_pool"]
    program = trace(conv4(), [(1, 16, 16)])
    assert operations(program) == ["input", *block * 4, "linear"]
    assert [r["path"] for r in program.describe()][1:4] == ["0 (Conv2d)", "1 (BatchNorm2d)", "2 (ReLU)"]
    strided = ["conv2d 3x3 /2", "batch_norm", "relu"]
    assert operations(trace(conv4(pooled=False), [(1, 16, 16)])) == ["input", *strided * 4, "linear"]


def test_three_convs() -> None:
    block = ["conv2d 3x3", "batch_norm", "relu", "max_pool"]
    assert operations(trace(three_convs(), [(1, 28, 28)])) == ["input", *block * 3, "linear"]


def test_flattening_converts_once() -> None:
    assert operations(trace(conv4(3, size=32), [(3, 32, 32)])).count("transpose") == 2  # the input and the flattening


def test_resnet12_converts_its_input_alone() -> None:
    found = operations(trace(resnet12(3, 4, 5, 6), [(3, 16, 16)]))
    assert found[:2] == ["input", "transpose"] and found.count("transpose") == 1 and "view" not in found
    assert found.count("add") == 4 and found.count("batch_norm") == 16 and found[-2:] == ["adaptive_avg_pool", "linear"]


@pytest.mark.parametrize("name", ["residual", "channelwise", "cat of channels", "one channel meets many", "in place"])
def test_images_are_not_converted_between_layers(name: str) -> None:
    make, shapes = SPATIAL[name]
    found = operations(trace(nn.Sequential(make(), nn.AdaptiveAvgPool2d(1), nn.Flatten()), shapes))
    assert found.count("transpose") == 1  # the input


def test_channels_last_is_how_images_are_held() -> None:
    make, shapes = SPATIAL["channels last"]
    assert operations(trace(make(), shapes)).count("transpose") == 2  # the input and the flattening


def test_names_of_convolutions() -> None:
    model = nn.Sequential(
        nn.Conv2d(2, 4, (3, 2), (2, 1)), nn.Conv2d(4, 4, 1, groups=4), nn.Conv2d(4, 4, 2, dilation=2), nn.Flatten(2),
        nn.Conv1d(4, 2, 3, 2), nn.Flatten(),
    )  # fmt: skip
    names = [name for name in operations(trace(model, [(2, 9, 8)])) if "conv" in name]
    assert names == ["conv2d 3x2 /2x1", "conv2d 1x1 groups 4", "conv2d 2x2 dilated", "conv1d 3 /2"]


# Batch normalisation


def test_modes_of_batch_norm() -> None:
    model = nn.Sequential(nn.Conv2d(1, 3, 2), nn.BatchNorm2d(3), nn.Flatten())
    by_batch, by_running = ["batch_norm"], []

    def norms(mode: str = "module") -> list[str]:
        return [name for name in operations(trace(model, [(1, 4, 4)], batch_norm=mode)) if "norm" in name]

    assert norms() == norms("batch") == norms("per_step") == by_batch and norms("running") == by_running
    with pytest.raises(Unfusable, match=r"1 \(BatchNorm2d\): batch_norm='track'"):
        norms("track")
    model.eval()
    assert norms() == norms("track") == norms("running") == by_running and norms("batch") == by_batch
    assert not model[1].training and model[1].track_running_stats
    with pytest.raises(ValueError, match="batch_norm: expected one of"):
        norms("never")


def test_running_statistics_are_computed_from_parameters_alone() -> None:
    program = trace(nn.Sequential(nn.Conv2d(1, 3, 2), nn.BatchNorm2d(3)).eval(), [(1, 4, 4)])
    roots = [node for node in program.nodes if node.op == Op.ACT and node.b == Act.RSQRT]
    assert len(roots) == 1 and not roots[0].batched and program.consts[roots[0].const] == 1e-5
    assert program.statistics == ("1.running_mean", "1.running_var")
    batched = [Op(n.op) for n in program.nodes if n.batched]
    assert batched == [Op.INPUT, Op.CONV, Op.ADD, Op.MUL, Op.ADD, Op.TRANSPOSE, Op.VIEW]


def test_layers_that_are_frozen_in_part() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 3), nn.BatchNorm1d(3).eval())
    assert operations(trace(model, [(2,)])).count("batch_norm") == 1


def test_per_step_layers() -> None:
    model = nn.Sequential(nn.Conv2d(1, 3, 2), PerStepBatchNorm(3, steps=4), nn.Flatten()).double()
    for rows in (model[1].weight, model[1].bias):
        nn.init.normal_(rows)
    program = trace(model, [(1, 4, 4)])
    check_encoding(program)
    assert_equal(model, program, [(1, 4, 4)], 5, second=True)
    layouts = {p.name: (p.layout, p.rows, p.cols) for p in program.params}
    assert layouts["1.weight"] == layouts["1.bias"] == (LAYOUT_STEPS, 4, 3)
    node = next(node for node in program.nodes if node.op == Op.NORM)
    assert node.b == Norm.BATCH and program.params[node.weight].name == "1.weight"


def test_rows_of_the_steps() -> None:
    assert [step_row(3, k, False) for k in range(5)] == [0, 1, 2, 2, 2]
    assert [step_row(3, k, True) for k in range(6)] == [0, 0, 1, 2, 2, 2]
    assert step_row(3, None, False) == step_row(3, None, True) == 2


def test_tracing_writes_to_no_buffer() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm2d(2)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(x).flatten(1)

    model = Counting()
    trace(model, [(2, 3, 3)])
    with pytest.raises(Unfusable):
        trace(model, [(2, 3, 3)], batch_norm="track")
    assert model.norm.num_batches_tracked == 0 and not model.norm.running_mean.any()
