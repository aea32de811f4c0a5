"""Calls of the inner loop on traced image networks: modules with a head, their tensors as parameters, and options."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable
from typing import Any

import torch
from cases.conv_random import conv_net
from cases.engine import ALL_FORMS, LOSSES, Draft, Value, problem
from cases.inner_loop import Case
from torch import Tensor, nn

from mtml_kernels.program import LAYOUT_STEPS, Program, trace

Shape = tuple[int, ...]
Adapt = Callable[[str], bool]


class Traced(Draft):
    """A module's program in the form that `problem` takes."""

    def __init__(self, program: Program) -> None:
        super().__init__()
        self.program, self.consts = program, list(program.consts)
        self.inputs = [info.size for info in program.inputs]
        self.params = [(p.layout, p.rows, p.cols) for p in program.params]
        self.shapes = [p.shape for p in program.params]
        nodes = enumerate(program.nodes)
        self.values = [Value(i, node.rows, node.features, bool(node.batched)) for i, node in nodes]

    def ints(self, output: Value | None = None) -> list[int]:
        return list(self.program.ints)


def image_case(
    model: nn.Module,
    shape: Shape,
    *,
    adapt: Adapt = lambda name: True,
    batch_norm: str = "module",
    rng: random.Random | None = None,
    dtype: torch.dtype = torch.float64,
    **options: Any,
) -> Case:
    """`problem` on a module's program with the module's own tensors; `adapt` says by name which the loop changes."""
    program = trace(model, [shape], batch_norm=batch_norm)
    draft = Traced(program)
    adapted = [adapt(p.name) and p.layout != LAYOUT_STEPS for p in program.params]
    output = draft.values[program.output]
    case = problem(rng or random.Random(0), draft, output, adapted=adapted, dtype=dtype, **options)
    tensors = dict(model.named_buffers()) | dict(model.named_parameters())
    return dataclasses.replace(case, params=[tensors[p.name].detach().to(dtype, copy=True) for p in program.params])


def random_image_case(seed: int, *, samples: int = 7, dtype: torch.dtype = torch.float64) -> Case:
    """A random network with any combination of the call's options."""
    rng = random.Random(seed)
    model, shape = conv_net(seed)
    steps = rng.choice([0, 1, 1, 2, 3])
    some = rng.random() < 0.4
    names = {p.name for p in trace(model, [shape]).params if not some or rng.random() < 0.5}
    forms = ALL_FORMS if names else ALL_FORMS[:2]
    return image_case(
        model,
        shape,
        adapt=names.__contains__,
        rng=rng,
        dtype=dtype,
        tasks=rng.choice([1, 1, 2]),
        support=rng.randint(1, samples),
        query=rng.choice([None, 0, *[rng.randint(1, samples) for _ in range(4)]]),
        steps=steps,
        loss=rng.choice(LOSSES),
        query_loss=rng.choice(LOSSES),
        targets=rng.random() < 0.85,
        lr=rng.choice(forms),
        lr_scale=rng.choice([0.02, 0.2]),
        masks=[rng.choice(["none", "some", "empty"]), rng.choice(["none", "some", "empty"])],
        ignored=rng.random() < 0.3,
        step_weights=rng.random() < 0.4,
        first_order=rng.random() < 0.25,
        keep=rng.choice([0, 1, 2]),
    )


# --- networks ---------------------------------------------------------------------------------------------------------


def headed(shape: Shape, *layers: nn.Module, out: int = 3, seed: int = 0) -> nn.Sequential:
    """The layers and a linear one over all that they give, in float64, with no tensor at a round value."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        trunk = nn.Sequential(*layers, nn.Flatten())
        with torch.no_grad():
            size = trunk.double()(torch.randn(2, *shape, dtype=torch.float64)).shape[1]
        model = nn.Sequential(*trunk, nn.Linear(size, out)).double()
        shake(model)
    return model


def shake(model: nn.Module) -> None:
    """Weights of normalisations of both signs, biases away from 0."""
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if tensor.ndim == 1:
                tensor.copy_(torch.randn_like(tensor) if name.endswith("weight") else 0.5 * torch.randn_like(tensor))


def conv_block(channels: int, width: int, *tail: nn.Module, kernel: int = 3, **options: Any) -> list[nn.Module]:
    return [nn.Conv2d(channels, width, kernel, **options), nn.BatchNorm2d(width), *tail]


class Both(nn.Module):
    """The sum of what several branches make of one value."""

    def __init__(self, *branches: nn.Module) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, x: Tensor) -> Tensor:
        total = self.branches[0](x)
        for branch in list(self.branches)[1:]:
            total = total + branch(x)
        return total
