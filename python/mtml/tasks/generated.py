"""Generated tasks with many predictions a sample: languages of tokens, and images whose pixels have classes."""

from __future__ import annotations

import torch
from torch import Tensor

from mtml.tasks.stream import TaskStream, check_counts, entropy
from mtml.tasks.task_batch import TaskBatch
from mtml_kernels.checks import check_number

__all__ = ["Languages", "Regions"]


class _Generated(TaskStream):
    """Counts, and a generator for every batch."""

    def __init__(self, shots: int, queries: int | None, tasks: int, seed: int, stream: int) -> None:
        queries = shots if queries is None else queries
        check_counts(shots=shots, queries=queries, tasks=tasks)
        self.shots, self.queries, self.tasks, self.seed, self.stream = shots, queries, tasks, seed, stream

    def _generator(self, index: int) -> torch.Generator:
        return torch.Generator().manual_seed(int(entropy(self.seed, self.stream, index).generate_state(1)[0]))

    def _parted(self, x: Tensor, y: Tensor) -> TaskBatch:
        """Samples [T, S + Q, ...] as the two sets."""
        sx, qx = x.split([self.shots, self.queries], 1)
        sy, qy = y.split([self.shots, self.queries], 1)
        return TaskBatch(sx.contiguous(), sy.contiguous(), qx.contiguous(), qy.contiguous())


class Languages(_Generated):
    """An endless, seeded stream of languages: sx [T, shots, length] token ids, sy the token after each of them.

    A language has its own order of the tokens: after each comes the one that follows it there, in a share `order` of
    all cases, and any token otherwise. So the best prediction is right in ``order + (1 - order) / vocabulary`` of them.

    Args:
        shots, queries: sequences to adapt on, and to be judged on (as many by default), per task.
        tasks: T. length: of a sequence. vocabulary: how many tokens there are. order: in [0, 1].
        seed, stream: as of `Sinusoids`.

    Raises:
        ValueError: where a count is not a positive int, or `order` is out of range.

    Example:
        >>> from mtml.tasks import Languages
        >>> batch = next(Languages(shots=3, tasks=2, length=5))
        >>> tuple(batch.sx.shape), bool((batch.sx[..., 1:] == batch.sy[..., :-1]).all())
        ((2, 3, 5), True)
    """

    def __init__(
        self,
        shots: int = 4,
        queries: int | None = None,
        tasks: int = 16,
        seed: int = 0,
        *,
        length: int = 8,
        vocabulary: int = 8,
        order: float = 0.9,
        stream: int = 0,
    ) -> None:
        super().__init__(shots, queries, tasks, seed, stream)
        check_counts(length=length, vocabulary=vocabulary)
        self.length, self.vocabulary = length, vocabulary
        self.order = check_number("order", order, least=0, most=1)

    def batch(self, index: int) -> TaskBatch:
        """Meta-batch number `index`."""
        generator = self._generator(index)
        shape = (self.tasks, self.shots + self.queries)
        ranks = torch.rand(self.tasks, self.vocabulary, generator=generator).argsort(1)  # a token's place in the order
        tokens_at = ranks.argsort(1)
        after = tokens_at.gather(1, (ranks + 1) % self.vocabulary)  # [T, V]
        text = [torch.randint(self.vocabulary, shape, generator=generator)]
        for _ in range(self.length):
            free = torch.randint(self.vocabulary, shape, generator=generator)
            ordered = torch.rand(shape, generator=generator) < self.order
            text.append(torch.where(ordered, after.gather(1, text[-1]), free))
        tokens = torch.stack(text, -1)  # [T, S + Q, L + 1]
        return self._parted(tokens[..., :-1], tokens[..., 1:])


class Regions(_Generated):
    """An endless, seeded stream of images to segment: sx [T, shots, 1, side, side], sy [T, shots, side, side].

    An image is a rectangle on a background, each of one of `classes` shades, and noise. Which shade is which class is
    a task's own.

    Args:
        shots, queries: images to adapt on, and to be judged on (as many by default), per task.
        tasks: T. side: pixels along an edge. classes: as many as shades. noise: its standard deviation, beside shades
            that are 1 apart.
        seed, stream: as of `Sinusoids`.

    Raises:
        ValueError: where a count is not a positive int, or the noise is negative.

    Example:
        >>> from mtml.tasks import Regions
        >>> batch = next(Regions(shots=3, tasks=2, side=6))
        >>> tuple(batch.sx.shape), tuple(batch.sy.shape)
        ((2, 3, 1, 6, 6), (2, 3, 6, 6))
    """

    def __init__(
        self,
        shots: int = 2,
        queries: int | None = None,
        tasks: int = 16,
        seed: int = 0,
        *,
        side: int = 8,
        classes: int = 3,
        noise: float = 0.4,
        stream: int = 0,
    ) -> None:
        super().__init__(shots, queries, tasks, seed, stream)
        check_counts(side=side, classes=classes)
        self.side, self.classes, self.noise = side, classes, check_number("noise", noise, least=0)

    def batch(self, index: int) -> TaskBatch:
        """Meta-batch number `index`."""
        generator = self._generator(index)
        shape = (self.tasks, self.shots + self.queries)
        first, last = torch.randint(self.side, (2, 2, *shape, 1), generator=generator).sort(0).values
        places = torch.arange(self.side)
        down, across = (places >= first) & (places <= last)  # [T, N, side] each
        inside = down.unsqueeze(-1) & across.unsqueeze(-2)
        shades = torch.randint(self.classes, (2, *shape, 1, 1), generator=generator)
        shade = torch.where(inside, shades[0], shades[1])  # [T, N, side, side]
        called = torch.rand(self.tasks, self.classes, generator=generator).argsort(1)
        y = called.gather(1, shade.flatten(1)).view_as(shade)
        x = shade - (self.classes - 1) / 2 + self.noise * torch.randn(shade.shape, generator=generator)
        return self._parted(x.unsqueeze(2), y)
