"""Digits as images and as misspelt words: two trunks, a head each, the sum of their cross-entropies, one optimiser.

    python examples/image_and_text.py [--steps 300] [--out image_and_text.png]

A convolutional trunk reads scikit-learn's handwritten digits, a recurrent one names of digits in four languages with
a sixth of the letters wrong; one `MultiHead` computes both losses in one call. Expect the recurrent head 6 points above
a linear classifier of letter counts (order helps), the convolutional one a point above a linear one of pixels.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, confusion_matrix, f1_score
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from tqdm import tqdm

import mtml

NAMES = (
    *("zero one two three four five six seven eight nine", "null eins zwei drei vier fuenf sechs sieben acht neun"),
    *("zero un deux trois quatre cinq six sept huit neuf", "cero uno dos tres cuatro cinco seis siete ocho nueve"),
)
LETTERS, LONGEST = 26, 6


def misspelt(labels: Tensor, generator: torch.Generator) -> Tensor:
    """Names [N, LONGEST] of the digits [N] as letters 1..26, 0 behind the end, every sixth letter another one."""
    table = torch.zeros(len(NAMES), 10, LONGEST, dtype=torch.long)
    for language, line in enumerate(NAMES):
        for digit, name in enumerate(line.split()):
            table[language, digit, : len(name)] = torch.tensor([ord(letter) - 96 for letter in name])
    words = table[torch.randint(len(NAMES), labels.shape, generator=generator), labels]
    wrong = (torch.rand(words.shape, generator=generator) < 1 / 6) & (words > 0)
    return torch.where(wrong, torch.randint(1, LETTERS + 1, words.shape, generator=generator), words)


class Reader(nn.Module):
    """Words [N, L] -> features [N, width]: letters through a GRU, which is read at its end."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.letters, self.gru = nn.Embedding(LETTERS + 1, 16), nn.GRU(16, width, batch_first=True)

    def forward(self, words: Tensor) -> Tensor:
        return self.gru(self.letters(words))[1][0]


def looker(width: int = 64) -> nn.Sequential:
    """Images [N, 1, 8, 8] -> features [N, width]."""
    return nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(32 * 16, width), nn.ReLU()),
    )


def linear(train: Tensor, labels: Tensor, test: Tensor, test_labels: Tensor) -> float:
    """The accuracy of a linear classifier of pixels, or of how often each letter stands in a word: the baseline."""
    if not train.is_floating_point():
        train, test = (nn.functional.one_hot(words, LETTERS + 1).sum(1) for words in (train, test))
    return LogisticRegression(max_iter=1000).fit(train.flatten(1), labels).score(test.flatten(1), test_labels)


def plot(history: list[list[float]], truth: dict[str, Tensor], found: dict[str, Tensor], out: Path) -> None:
    """Both losses over the steps, and who is taken for whom."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(11, 3.6), layout="constrained")
    axes[0].set(xlabel="step", title="cross-entropy of a batch", yscale="log")
    axes[0].legend(axes[0].plot(history), list(truth))
    for ax, (name, y) in zip(axes[1:], truth.items(), strict=True):
        ax.imshow(confusion_matrix(y, found[name], normalize="true"), cmap="Blues")
        ax.set(title=name, xlabel="taken for", ylabel="digit", xticks=range(10), yticks=range(10))
    figure.savefig(out, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300, help="steps of the optimiser (default %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("image_and_text.png"))
    args = parser.parse_args()
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    digits = load_digits()
    images, labels = torch.tensor(digits.images[:, None] / 16, dtype=torch.float32), torch.from_numpy(digits.target)
    train_x, test_x, train_y, test_y = train_test_split(images, labels, test_size=0.3, random_state=0)
    text_y, text_test_y = (torch.randint(10, (n,), generator=generator) for n in (2000, 1000))
    words, test_words = misspelt(text_y, generator), misspelt(text_test_y, generator)
    look, read = looker(), Reader()
    heads = mtml.MultiHead(64, {"image": mtml.Classification(10), "text": mtml.Classification(10)}, weighting="sum")
    optimizer = torch.optim.Adam([*look.parameters(), *read.parameters(), *heads.parameters()], 3e-3)
    history: list[list[float]] = []
    for _ in (bar := tqdm(range(args.steps), unit="step")):
        i, t = (torch.randint(len(y), (64,), generator=generator) for y in (train_y, text_y))
        features = {"image": look(train_x[i]), "text": read(words[t])}
        losses = heads.loss(features, {"image": train_y[i], "text": text_y[t]})
        optimizer.zero_grad()
        losses.total.backward()
        optimizer.step()
        history.append([float(loss.detach()) for loss in losses.per_head.values()])
        bar.set_postfix(loss=f"{float(losses.total.detach()):.2f}", refresh=False)
    logits = heads({"image": look(test_x), "text": read(test_words)})
    truth = {"image": test_y, "text": text_test_y}
    found = {name: value.argmax(1) for name, value in logits.items()}
    bases = linear(train_x, train_y, test_x, test_y), linear(words, text_y, test_words, text_test_y)
    for (name, y), base in zip(truth.items(), bases, strict=True):
        f1 = f1_score(y, found[name], average="macro")
        print(f"{name}: accuracy {accuracy_score(y, found[name]):.1%} (linear {base:.1%}), macro F1 {f1:.3f}")
    plot(history, truth, found, args.out)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
