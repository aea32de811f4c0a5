"""What ``python -m bench gpu`` measures, and in which order: a killed run has measured what matters most.

Two turns through all workloads. The first holds what starts at once. The second holds what is compiled for a minute and
more; ours runs in it again, beside them in one process, for ratios are taken within a process only.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from bench.workloads import WORKLOADS

Turn = Literal["quick", "slow"]
TURNS: tuple[Turn, ...] = get_args(Turn)
META = ("sinusoid", "omniglot_mlp", "omniglot_conv", "mini_conv", "siren", "anil_head")
LOSSES = ("linear_vocab", "vocab", "segmentation", "many_small")
PREFIX = "loss_"
"""Before the names of losses, where they stand beside workloads."""
ORDER = (*META, *(PREFIX + name for name in LOSSES))

CUDA = "mtml:cuda"
OURS = ("mtml:torch", "mtml:triton", CUDA)  # last: a kernel that faults must not take the peers' rows with it
QUICK = ("loop", "vmap", *OURS)
SLOW = ("compile:graphs", "jax", "jax:map", "mtml:triton", CUDA)
SLOW_IMAGES = ("compile:graphs", "compile:loop+graphs", "jax:map", "mtml:triton")
QUICK_LOSSES = ("eager", "torch:chunked", "liger", "quack", "mtml")
SLOW_LOSSES = ("compile", "compile:graphs", "mtml")


@dataclass(frozen=True)
class Step:
    """One workload in one turn: a process of its own."""

    workload: str
    turn: Turn
    providers: tuple[str, ...]

    @property
    def loss(self) -> str | None:
        """The case of ``bench.gpu.multihead_loss``, or None for a meta-step."""
        return self.workload.removeprefix(PREFIX) if self.workload.startswith(PREFIX) else None

    @property
    def name(self) -> str:
        """As ``--step`` takes it."""
        return f"{self.workload}:{self.turn}"


def _providers(workload: str, turn: Turn) -> tuple[str, ...]:
    if workload.startswith(PREFIX):
        return QUICK_LOSSES if turn == "quick" else SLOW_LOSSES
    if turn == "quick":
        return QUICK
    return SLOW_IMAGES if len(WORKLOADS[workload].x) == 3 else SLOW


def steps(workloads: Sequence[str] = ()) -> Iterator[Step]:
    """All steps in their order, or those of some workloads. Raises ValueError naming an unknown one and the choices."""
    for name in workloads:
        if name not in ORDER:
            raise ValueError(f"workload: expected some of {', '.join(ORDER)}; got {name!r}")
    for turn in TURNS:
        for name in ORDER:
            if not workloads or name in workloads:
                yield Step(name, turn, _providers(name, turn))


def step_named(text: str) -> Step:
    """The step of a name such as ``sinusoid:quick``."""
    workload, _, turn = text.partition(":")
    for step in steps([workload]):
        if step.turn == turn:
            return step
    raise ValueError(f"step: expected a workload and one of {', '.join(TURNS)}, as sinusoid:quick; got {text!r}")


def describe(workloads: Sequence[str], device: str) -> Iterator[str]:
    """The plan in lines, each step with its prediction. Needs no GPU."""
    import torch

    from bench.gpu import work
    from mtml_kernels.schedule.devices import DEVICES

    gpu = DEVICES[device]
    yield f"in this order, each step a process of its own; predicted for {gpu.name}, float32 (losses: bfloat16)"
    for number, step in enumerate(steps(workloads), 1):
        todo = (
            work.of_losses(step.loss, torch.bfloat16, gpu)
            if step.loss
            else work.of_meta_step(WORKLOADS[step.workload], gpu)
        )
        yield f"{number:2d} {step.turn:5s} {step.workload:18s} {todo}  {', '.join(step.providers)}"
