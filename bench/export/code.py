"""Reference programs as text: plain PyTorch that needs nothing of this project."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import nn

from bench.workloads import Sine, Workload

META_STEP = """import torch
import torch.nn.functional as F

STEPS = {steps}


def forward(p, x):
{forward}
    return x


def loss(p, x, y):
    return F.{loss}(forward(p, x), y)


def run({arguments}):
    start = [t.detach().requires_grad_() for t in ({params},)]
    sets = [t.detach().requires_grad_() for t in (support_x, query_x)]
    wanted = start{inputs}
    tasks = support_x.shape[0]
    losses, sums = [], [torch.zeros_like(t) for t in wanted]
    with torch.enable_grad():
        for task in range(tasks):
            theta = start
            for _ in range(STEPS):
                grads = torch.autograd.grad(loss(theta, sets[0][task], support_y[task]), theta, create_graph=True)
                theta = [t - lr * g for t, g in zip(theta, grads)]
            value = loss(theta, sets[1][task], query_y[task])
            for total, g in zip(sums, torch.autograd.grad(value / tasks, wanted)):
                total += g
            losses.append(value.detach())
    return (torch.stack(losses), *sums)
"""

LOGITS = """import torch
import torch.nn.functional as F


def run(logits, labels):
    z = logits.detach().requires_grad_()
    with torch.enable_grad():
        loss = F.cross_entropy(z, labels, ignore_index={ignored})
        (grad,) = torch.autograd.grad(loss, [z])
    return loss.detach().reshape(1), grad
"""

LINEAR = """import torch
import torch.nn.functional as F


def run({arguments}):
    x = features.detach().requires_grad_()
    weights = [w.detach().requires_grad_() for w in ({weights},)]
    with torch.enable_grad():
        each = [F.cross_entropy(F.linear(x, w), y) for w, y in zip(weights, ({labels},))]
        losses = torch.stack(each)
        grads = torch.autograd.grad(losses.sum(), [x, *weights])
    return (losses.detach(), *grads)
"""


def _layer(m: nn.Module, first: int) -> str:
    """What a layer does to x; its parameters are p[first] and the next."""
    w, b = f"p[{first}]", f"p[{first + 1}]"
    match m:
        case nn.Linear():
            return f"F.linear(x, {w}, {b})"
        case nn.Conv2d():
            return f"F.conv2d(x, {w}, {b}, stride={tuple(m.stride)}, padding={tuple(m.padding)})"
        case nn.BatchNorm2d() if not m.track_running_stats:
            return f"F.batch_norm(x, None, None, {w}, {b}, training=True, eps={m.eps})"
        case nn.MaxPool2d():
            return f"F.max_pool2d(x, {m.kernel_size})"
        case nn.Flatten():
            return "x.flatten(1)"
        case nn.ReLU():
            return "torch.relu(x)"
        case nn.Tanh():
            return "torch.tanh(x)"
        case Sine():
            return f"torch.sin({m.w0} * x)"
        case _:
            raise ValueError(f"network: no reference text for a layer {type(m).__name__}")


def _forward(net: nn.Module) -> Iterator[str]:
    seen = 0
    for m in net.children():
        yield f"    x = {_layer(m, seen)}"
        seen += len(list(m.parameters(recurse=False)))


def meta_step(w: Workload, net: nn.Module, params: Sequence[str], arguments: Sequence[str]) -> str:
    """One task after another: query losses, and the gradient of their mean for parameters (and for the inputs)."""
    return META_STEP.format(
        steps=w.steps,
        forward="\n".join(_forward(net)),
        loss="mse_loss" if w.loss == "mse" else "cross_entropy",
        arguments=", ".join(arguments),
        params=", ".join(params),
        inputs=" + sets" if w.inputs else "",
    )
