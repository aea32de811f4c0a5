"""Few-shot classification as a script for learn2learn trains it: its only library is learn2learn."""

import argparse

import learn2learn as l2l
import torch
from torch import nn, optim


def sample(ways: int, shots: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A task: images of 28 x 28 around a pattern for each class, [2 * ways * shots, 1, 28, 28], and labels."""
    patterns = torch.rand(ways, 1, 28, 28)
    labels = torch.arange(ways).repeat_interleave(2 * shots)
    return (patterns[labels] + 0.3 * torch.randn(len(labels), 1, 28, 28)), labels


def fast_adapt(batch, learner, loss, steps):
    data, labels = batch
    support = torch.zeros(len(data), dtype=torch.bool)
    support[::2] = True
    for _ in range(steps):
        learner.adapt(loss(learner(data[support]), labels[support]))
    predictions = learner(data[~support])
    return loss(predictions, labels[~support]), l2l.utils.accuracy(predictions, labels[~support])


def learners(ways):
    model = l2l.vision.models.OmniglotFC(28 * 28, ways, sizes=[32, 16])
    yield "maml", l2l.algorithms.MAML(model, lr=0.5, first_order=False)
    model = l2l.vision.models.OmniglotCNN(ways, hidden_size=8)
    yield "meta_sgd", l2l.algorithms.MetaSGD(model, lr=0.1)
    model = l2l.vision.models.OmniglotCNN(ways, hidden_size=8)
    transform = l2l.optim.KroneckerTransform(l2l.nn.KroneckerLinear)
    yield "gbml", l2l.algorithms.GBML(model, transform=transform, lr=0.1)


def main(iterations: int, tasks: int = 2, ways: int = 3, shots: int = 1) -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    loss = nn.CrossEntropyLoss(reduction="mean")
    for name, learner in learners(ways):
        optimizer = optim.Adam(learner.parameters(), 0.01)
        errors = []
        for _ in range(iterations):
            optimizer.zero_grad()
            total = 0.0
            for _ in range(tasks):
                error, _ = fast_adapt(sample(ways, shots), learner.clone(), loss, steps=1)
                error.backward()
                total += error.item() / tasks
            for p in learner.parameters():
                p.grad.data.mul_(1.0 / tasks)
            optimizer.step()
            errors.append(total)
        print(name, sum(errors[:5]) / 5, sum(errors[-5:]) / 5)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--iterations", type=int, default=25)
    main(parser.parse_args().iterations)
