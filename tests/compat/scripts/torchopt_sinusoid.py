"""Few-shot regression as people write it with TorchOpt: meta-trains on sinusoids, a task at a time."""

import argparse
import math

import torch
import torch.nn.functional as F
import torchopt
from torch import nn


def tasks(count, generator):
    """Support and query sets of sin(x + phase) * amplitude."""
    for _ in range(count):
        amplitude = 0.5 + 2.0 * torch.rand(1, generator=generator)
        phase = math.pi * torch.rand(1, generator=generator)
        x = 10.0 * torch.rand(2, 10, 1, generator=generator) - 5.0
        y = amplitude * torch.sin(x + phase)
        yield x[0], y[0], x[1], y[1]


def evaluate(net, inner, generator):
    """The mean query loss over tasks, nothing learnt."""
    state = torchopt.extract_state_dict(net, by="reference", detach_buffers=True)
    states = torchopt.extract_state_dict(inner, by="reference")
    total = 0.0
    for sx, sy, qx, qy in tasks(40, generator):
        inner.step(F.mse_loss(net(sx), sy))
        total += F.mse_loss(net(qx), qy).item()
        torchopt.recover_state_dict(net, state)
        torchopt.recover_state_dict(inner, states)
    return total / 40


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--iterations", type=int, default=150)
    args = parser.parse_args()
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(1, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 1))
    meta_opt = torchopt.Adam(net.parameters(), lr=1e-2)
    inner = torchopt.MetaSGD(net, lr=0.02)
    before = evaluate(net, inner, torch.Generator().manual_seed(1))
    generator = torch.Generator().manual_seed(2)
    for _ in range(args.iterations):
        meta_opt.zero_grad()
        state = torchopt.extract_state_dict(net, by="reference", detach_buffers=True)
        states = torchopt.extract_state_dict(inner, by="reference")
        losses = []
        for sx, sy, qx, qy in tasks(4, generator):
            inner.step(F.mse_loss(net(sx), sy))
            losses.append(F.mse_loss(net(qx), qy))
            torchopt.recover_state_dict(net, state)
            torchopt.recover_state_dict(inner, states)
        torch.stack(losses).mean().backward()
        meta_opt.step()
    after = evaluate(net, inner, torch.Generator().manual_seed(1))
    print(f"{torchopt.__name__}: loss {before:.3f} before, {after:.3f} after")


if __name__ == "__main__":
    main()
