"""Few-shot classification with higher, as people write it: an inner loop a task, Adam outside, a test without tracking.

Images are generated: a class is one of a few patterns, a sample is that under noise; which is which differs.
"""

import argparse

import higher
import torch
import torch.nn.functional as F
from torch import nn

WAYS, SHOTS, QUERIES, TASKS = 3, 1, 5, 4
PATTERNS = torch.randn(6, 1, 8, 8, generator=torch.Generator().manual_seed(3))


def episode(generator):
    patterns = PATTERNS[torch.randperm(len(PATTERNS), generator=generator)[:WAYS]]
    labels = torch.arange(WAYS).repeat_interleave(SHOTS + QUERIES)
    images = patterns[labels] + 0.6 * torch.randn(len(labels), 1, 8, 8, generator=generator)
    support = torch.arange(len(labels)) % (SHOTS + QUERIES) < SHOTS
    return images[support], labels[support], images[~support], labels[~support]


def block(inputs, outputs):
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride=2, padding=1), nn.BatchNorm2d(outputs, momentum=1), nn.ReLU()
    )


def train(net, meta_opt, generator):
    net.train()
    inner_opt = torch.optim.SGD(net.parameters(), lr=0.03)
    total, correct = 0.0, 0
    meta_opt.zero_grad()
    for _ in range(TASKS):
        sx, sy, qx, qy = episode(generator)
        with higher.innerloop_ctx(net, inner_opt, copy_initial_weights=False) as (fnet, diffopt):
            for _ in range(2):
                diffopt.step(F.cross_entropy(fnet(sx), sy))
            logits = fnet(qx)
            loss = F.cross_entropy(logits, qy)
            total += loss.item() / TASKS
            correct += (logits.argmax(1) == qy).sum().item()
            loss.backward()
    meta_opt.step()
    return total, correct / (TASKS * WAYS * QUERIES)


def test(net):
    net.train()  # as published: statistics of the batch at hand
    generator = torch.Generator().manual_seed(2)  # the same tasks every time
    inner_opt = torch.optim.SGD(net.parameters(), lr=0.03)
    losses = []
    for _ in range(3 * TASKS):
        sx, sy, qx, qy = episode(generator)
        with higher.innerloop_ctx(net, inner_opt, track_higher_grads=False) as (fnet, diffopt):
            for _ in range(2):
                diffopt.step(F.cross_entropy(fnet(sx), sy))
            losses.append(F.cross_entropy(fnet(qx), qy).detach())
    return torch.stack(losses).mean().item()


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--iterations", type=int, default=30)
    args = parser.parse_args()
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    net = nn.Sequential(block(1, 8), nn.Flatten(), nn.Linear(128, WAYS))
    meta_opt = torch.optim.Adam(net.parameters(), lr=1e-2)
    print(f"test {test(net):.4f}")
    for iteration in range(args.iterations):
        loss, accuracy = train(net, meta_opt, generator)
        print(f"train {iteration} {loss:.4f} {accuracy:.3f}")
    print(f"test {test(net):.4f}")


if __name__ == "__main__":
    main()
