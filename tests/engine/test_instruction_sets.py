"""Every instruction set that this machine has computes what the reference does: a process each, for all ops.

The process chooses the kernels once, when it loads them.
"""

from __future__ import annotations

import itertools
import random

import pytest
import torch
from cases.engine import check, cotangents_of
from cases.engine_random import random_case
from cases.images import conv_block, headed, image_case, random_image_case
from cases.task_ops import error, with_gradients
from engine.test_engine_promises import LARGE, ones_of, script
from ops import test_linear_multihead_loss as linear_heads
from ops import test_task_conv2d as task_conv2d
from ops import test_task_linear as task_linear
from ops import test_task_update as task_update
from ops.test_multihead_loss import agree as heads_agree
from torch import nn

import mtml
import mtml_kernels as blocks
from mtml_kernels import native

PAIR = ("cpu", "reference")


def inner_loops_agree() -> None:
    """Programs of every layer, and what takes several vectors, panels, chunks and blocks."""
    for seed in range(60):
        rng = random.Random(seed)
        case = random_case(rng)
        check(case, cotangents_of(case, rng))
    for seed in range(25):
        check(case := random_image_case(seed), cotangents_of(case, random.Random(seed)))
    for width in (33, 65):
        layers = [*conv_block(2, width, nn.ReLU(), nn.MaxPool2d(2), padding=1), *conv_block(width, 3, nn.ReLU())]
        check(case := image_case(headed((2, 7, 6), *layers), (2, 7, 6)), ones_of(case))
    for name in ("chunks", "blocks"):
        check(LARGE[name], ones_of(LARGE[name]), threads=2)


def losses_of_heads_agree() -> None:
    """Heads of every kind; linear ones with their logits kept and by blocks."""
    for seed in range(60):
        heads_agree([seed, seed + 1])
    for seed in range(12):
        linear_heads.agree(seed, seed % 2 > 0)
    linear_heads.op.LARGE = 1000
    for seed in range(6):
        linear_heads.agree(seed, True)


def modules_agree() -> None:
    """A meta-step through the front door."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(2, 33), nn.Tanh(), nn.Linear(33, 1)).double()
    x = torch.randn(2, 3, 5, 2, dtype=torch.float64)
    y = x.sin().sum(-1, keepdim=True)
    found = []
    for backend in ("cpu", "reference"):
        loss = mtml.MAML(net, lr=0.1, steps=3, loss="mse", backend=backend).meta_loss(x[0], y[0], x[1], y[1])
        found.append([loss.detach(), *torch.autograd.grad(loss.mean(), list(net.parameters()))])
    torch.testing.assert_close(*found, rtol=1e-11, atol=1e-14)


def building_blocks_agree() -> None:
    """Tails of vectors, several panels and units, every activation; products that share a weight."""
    rng = random.Random(0)
    for seed, activation in itertools.product(range(4), task_linear.ACTS):
        sizes = (rng.choice([1, 3]), rng.choice([1, 7, 200]), rng.choice([1, 9, 300]), rng.choice([1, 17, 70]))
        case = task_linear.tensors(*sizes, shared=seed % 2 > 0, seed=seed)
        found = [with_gradients(blocks.task_linear, case, activation=activation, backend=b) for b in PAIR]
        assert error(*found) < 1e-8, (sizes, activation)
    for seed, window in itertools.product(range(6), task_conv2d.WINDOWS):
        groups = task_conv2d.WINDOWS[window].get("groups", 1)
        sizes = (2, rng.choice([1, 9]), groups * rng.choice([1, 5, 17]), groups * rng.choice([1, 5, 17]), (9, 11))
        case = task_conv2d.tensors(*sizes, groups=groups, shared=seed % 2 > 0, seed=seed)
        found = [with_gradients(blocks.task_conv2d, case, **task_conv2d.WINDOWS[window], backend=b) for b in PAIR]
        assert error(*found) < 1e-11, (sizes, window)
    for name in task_update.RULES:
        step = task_update.Case(name, [(7, 9), (), (3,)], rates="element")
        torch.testing.assert_close(*(with_gradients(step, step.tensors, backend=b) for b in PAIR))


def agree_on_everything() -> str:
    """The instruction set that ran."""
    inner_loops_agree()
    losses_of_heads_agree()
    modules_agree()
    building_blocks_agree()
    isa: str = native.info()["isa"]
    return isa


@pytest.mark.parametrize("isa", native.info()["available"] if native.availability() is None else [])
def test_every_instruction_set_agrees_with_the_reference(isa: str) -> None:
    assert script("agree_on_everything", module="engine.test_instruction_sets", MTML_CPU_ISA=isa) == isa
