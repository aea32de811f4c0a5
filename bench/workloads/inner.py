"""Workloads of the inner loops that people run beyond plain MAML: Adam inside, new data at every step, own starts.

Others adapt a part of the network (a latent, or the head alone), or learn the rates of the inner loop.

Each has a goal. ``query``: the mean query loss and its gradient for all parameters, as the meta-steps of
``bench.workloads``. ``adapt``: no meta-gradient; the result is how far each task's weights moved. ``expert``: the
distance of the adapted weights to an expert's, relative to that of the start, and its gradient for the support inputs
and the rate (dataset distillation by matched trajectories).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import stack_module_state

from bench.workloads import Workload, convnet, make_network, mlp, sine_mlp
from bench.workloads.networks import ModulatedSiren, client, distilled

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class InnerWorkload(Workload):
    """One call of an inner loop.

    ``update``: gradient descent, or Adam with ``eps_root`` under the root (its derivative at 0 is infinite without).
    ``per_step``: every step has a support set of its own, sx [T, K, S, *x]. ``own_starts``: every task has weights of
    its own. ``adapted``: the one tensor that the inner loop changes; "" stands for all parameters. ``head``: it changes
    the last layer alone, on features that the rest gives once for both sets of a task together (ANIL). ``rates``: every
    element has a rate of its own for each step, which is trained as well. ``providers``: what runs when nothing is
    asked for. ``oracle``: the provider that tells the match gate the truth.
    """

    update: Literal["sgd", "adam"] = "sgd"
    eps_root: float = 0.0
    per_step: bool = False
    own_starts: bool = False
    adapted: str = ""
    head: bool = False
    rates: bool = False
    goal: Literal["query", "adapt", "expert"] = "query"
    providers: tuple[str, ...] = ("mtml", "loop", "vmap", "compile", "jax")
    oracle: str = "loop"


class Problem(NamedTuple):
    """A workload's tensors. ``start``: the adapted ones, [*shape], or [T, *shape] with own starts; ``fixed``: the rest
    of the network; ``expert``: what the adapted ones are to come near to, where that is the goal; ``lr``: a scalar;
    ``rates``: those of the elements, {"lr.NAME": [K, *shape]}, where every one has its own."""

    net: nn.Module
    sx: Tensor
    sy: Tensor
    qx: Tensor
    qy: Tensor
    start: Tensors
    fixed: Tensors
    expert: Tensors
    lr: Tensor
    rates: Tensors

    @property
    def trained(self) -> Tensors:
        """What a meta-gradient is taken for: the network's parameters, adapted or not, and the elements' rates."""
        held = self.start | self.fixed
        return {n: held[n] for n, _ in self.net.named_parameters()} | self.rates


WORKLOADS: dict[str, InnerWorkload] = {
    w.name: w
    for w in (
        InnerWorkload(
            "omniglot_mlp_adam",
            "MLP 784-256-128-64-64-5, ReLU; Adam",
            lambda: mlp(784, 256, 128, 64, 64, 5),
            tasks=32,
            support=5,
            query=75,
            x=(784,),
            out=5,
            steps=5,
            lr=0.001,
            update="adam",
            eps_root=1e-8,
            providers=("mtml", "loop:per_task", "compile", "compile:loop", "jax", "jax:map"),
            oracle="loop:per_task",
        ),
        InnerWorkload(
            "nef_fit",
            "SIREN 2-8-8-1; Adam, own starts, no meta-gradient",
            lambda: sine_mlp(2, 8, 8, 1),
            tasks=1000,
            support=784,
            query=0,
            x=(2,),
            out=1,
            steps=100,
            lr=0.001,
            loss="mse",
            update="adam",
            own_starts=True,
            goal="adapt",
            providers=("mtml", "vmap", "compile", "jax", "jax:map"),
            oracle="vmap",
        ),
        InnerWorkload(
            "fedavg",
            "conv 5x5-32, conv 5x5-64, fc 512, fc 10; new data at each step, no meta-gradient",
            client,
            tasks=20,
            support=10,
            query=0,
            x=(1, 28, 28),
            out=10,
            steps=10,
            lr=0.005,
            per_step=True,
            goal="adapt",
            providers=("mtml", "loop", "loop:channels_last", "vmap", "compile", "compile:loop", "jax:map"),
        ),
        InnerWorkload(
            "distill",
            "3 x conv 128, InstanceNorm, ReLU, avg-pool; linear 2048-10",
            distilled,
            tasks=1,
            support=50,
            query=0,
            x=(3, 32, 32),
            out=10,
            steps=20,
            lr=0.01,
            goal="expert",
            providers=("mtml", "loop", "loop:checkpoint", "loop:checkpoint+channels_last", "compile:checkpoint", "jax"),
            oracle="loop:checkpoint",
        ),
        InnerWorkload(
            "functa",
            "SIREN 6 x 256, latent 256 shifts every layer; the latent adapts",
            ModulatedSiren,
            tasks=32,
            support=1024,
            query=1024,
            x=(2,),
            out=3,
            steps=3,
            lr=0.01,
            loss="mse",
            adapted="latent",
            providers=("mtml", "loop:per_task", "compile", "compile:loop", "jax", "jax:map"),
            oracle="loop:per_task",
        ),
        InnerWorkload(
            "coinpp",
            "SIREN 10 x 512, latent 128 shifts every layer; the latent adapts",
            lambda: ModulatedSiren(512, 10, 128),
            tasks=2,
            support=1024,
            query=1024,
            x=(2,),
            out=3,
            steps=3,
            lr=0.01,
            loss="mse",
            adapted="latent",
            providers=("mtml", "loop", "loop:per_task", "compile:loop", "jax:map"),
        ),
        InnerWorkload(
            "anil_fc100",
            "4 x conv 64, BatchNorm, ReLU, max-pool; linear 256-5, which alone adapts",
            lambda: convnet(3, 64, 256, 5),
            tasks=8,
            support=25,
            query=25,
            x=(3, 32, 32),
            out=5,
            steps=5,
            lr=0.1,
            head=True,
            providers=("mtml", "loop", "loop:per_task", "loop:channels_last", "vmap:loop", "compile:loop"),
        ),
        InnerWorkload(
            "metasdf",
            "MLP 2-256-256-256-256-1, ReLU; a learned rate for every element and step",
            lambda: mlp(2, 256, 256, 256, 256, 1),
            tasks=8,
            support=512,
            query=512,
            x=(2,),
            out=1,
            steps=5,
            lr=0.005,
            loss="mse",
            rates=True,
            providers=("mtml", "loop", "loop:per_task", "vmap", "compile:loop", "jax:map"),
        ),
    )
}

_TINY = {
    "omniglot_mlp_adam": {"build": lambda: mlp(6, 8, 5, 3), "tasks": 3, "query": 4, "x": (6,), "out": 3, "steps": 3},
    "nef_fit": {"tasks": 4, "support": 9, "steps": 4},
    "fedavg": {"tasks": 2, "support": 3, "steps": 2},
    "distill": {"build": lambda: distilled(4, 8), "x": (3, 8, 8), "support": 3, "steps": 3},
    "functa": {"build": lambda: ModulatedSiren(8, 3, 4), "tasks": 3, "support": 5, "query": 6},
    "coinpp": {"build": lambda: ModulatedSiren(6, 4, 3), "support": 5, "query": 6},
    "anil_fc100": {
        "build": lambda: convnet(3, 4, 16, 5, depth=2),
        "x": (3, 8, 8),
        "tasks": 3,
        "support": 6,
        "query": 5,
        "steps": 3,
    },
    "metasdf": {"build": lambda: mlp(2, 6, 6, 6, 1), "tasks": 3, "support": 7, "query": 6, "steps": 3},
}


def tiny(name: str) -> InnerWorkload:
    """The same loop at a size for checking providers; not a measurement."""
    return replace(WORKLOADS[name], **_TINY[name])  # type: ignore[arg-type]


def make_problem(w: InnerWorkload, dtype: torch.dtype, device: str, seed: int = 0) -> Problem:
    """Network, starts and random data of a seed; equal values for equal seeds whatever the dtype."""
    net = make_network(w, dtype, device, seed)
    generator = torch.Generator().manual_seed(1 + seed)

    def real(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    def pair(*lead: int) -> tuple[Tensor, Tensor]:
        x = real(*lead, *w.x) if len(w.x) > 1 or w.x[0] > 2 else real(*lead, *w.x).tanh()  # points lie in [-1, 1]
        return x, real(*lead, w.out) if w.loss == "mse" else torch.randint(w.out, lead, generator=generator).to(device)

    sx, sy = pair(w.tasks, *([w.steps] if w.per_step else []), w.support)
    qx, qy = pair(w.tasks, w.query)
    held = {n: t.detach() for n, t in (*net.named_parameters(), *net.named_buffers())}
    start = {n: t for n, t in held.items() if _adapts(w, net, n)}
    if w.own_starts:
        nets = [w.build() for _ in range(w.tasks)]  # go on with the seed of make_network
        start = {n: t.detach().to(device, dtype) for n, t in stack_module_state(nets)[0].items()}
    expert = {n: t + 0.01 * real(*t.shape) for n, t in start.items()} if w.goal == "expert" else {}
    fixed = {n: t for n, t in held.items() if n not in start}
    lr = torch.tensor(w.lr, dtype=dtype, device=device)
    # unequal, so that a row or an element in another's place shows
    rates = {f"lr.{n}": lr * real(w.steps, *t.shape).sigmoid() for n, t in start.items()} if w.rates else {}
    return Problem(net, sx, sy, qx, qy, start, fixed, expert, lr, rates)


def _adapts(w: InnerWorkload, net: nn.Module, name: str) -> bool:
    """Whether the inner loop changes the tensor of this name."""
    if w.head:
        return name.startswith(f"{len(list(net.children())) - 1}.")
    return w.adapted in ("", name)
