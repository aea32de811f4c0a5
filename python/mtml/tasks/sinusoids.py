"""The sinusoid regression tasks of Finn, Abbeel and Levine (2017), section 5.1, generated many batches at a time."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from mtml.tasks.stream import TaskStream, check_counts, entropy
from mtml.tasks.task_batch import TaskBatch

__all__ = ["SinusoidTasks", "Sinusoids", "draw_sinusoids"]

AMPLITUDE = (0.1, 5.0)
PHASE = (0.0, math.pi)
INPUT = (-5.0, 5.0)


class SinusoidTasks(NamedTuple):
    """Points of many sinusoids: x, y [..., N, 1], and what they came from, [..., 1, 1] each."""

    x: Tensor
    y: Tensor
    amplitude: Tensor
    phase: Tensor
    frequency: Tensor

    def curve(self, x: Tensor) -> Tensor:
        """The sinusoids at other places x [..., N, 1]."""
        return self.amplitude * torch.sin(self.frequency * x - self.phase)


def draw_sinusoids(
    shape: tuple[int, ...],
    points: int,
    generator: torch.Generator,
    dtype: torch.dtype = torch.float32,
    *,
    frequency: tuple[float, float] = (1.0, 1.0),
) -> SinusoidTasks:
    """Draw ``shape`` tasks of ``points`` points each: y = A sin(w x - phase).

    A is uniform in [0.1, 5], phase in [0, pi], x in [-5, 5] and w between the two `frequency`. All randomness comes
    from `generator`.
    """

    def uniform(size: tuple[int, ...], bounds: tuple[float, float]) -> Tensor:
        return torch.empty(*size, dtype=dtype).uniform_(*bounds, generator=generator)

    amplitude = uniform((*shape, 1, 1), AMPLITUDE)
    phase = uniform((*shape, 1, 1), PHASE)
    x = uniform((*shape, points, 1), INPUT)
    if frequency[0] == frequency[1]:
        angle, frequencies = x.mul(frequency[0]) if frequency[0] != 1.0 else x, torch.full_like(phase, frequency[0])
    else:
        frequencies = uniform((*shape, 1, 1), frequency)
        angle = frequencies * x
    return SinusoidTasks(x, amplitude * torch.sin(angle - phase), amplitude, phase, frequencies)


class Sinusoids(TaskStream):
    """An endless, seeded stream of meta-batches of sinusoid tasks: sx, sy [T, shots, 1] and qx, qy [T, queries, 1].

    Batches are made `block` at a time by one vectorised call and handed out as views of it (a few microseconds each);
    write into a clone. Streams with the same seed and another `stream` number are independent: use one for testing.

    Args:
        shots: points to adapt on, per task.
        queries: points to be judged on, per task; as many as `shots` by default.
        tasks: T, tasks per meta-batch.
        seed: of all randomness.
        dtype: of the tensors.
        frequency: bounds of the angular frequency; (0.8, 1.2) makes the tasks of the Meta-SGD paper.
        stream: number of the independent stream under this seed.
        block: meta-batches generated at once. It is part of what defines the sequence of tasks.

    Raises:
        ValueError: where a count is not a positive int.

    Example:
        >>> from mtml.tasks import Sinusoids
        >>> batch = next(Sinusoids(shots=10, tasks=25, seed=0))
        >>> tuple(batch.sx.shape), tuple(batch.qy.shape)
        ((25, 10, 1), (25, 10, 1))

    Paper: Finn, Abbeel, Levine, "Model-Agnostic Meta-Learning for Fast Adaptation of Deep Networks", 2017.
    """

    def __init__(
        self,
        shots: int = 10,
        queries: int | None = None,
        tasks: int = 25,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
        *,
        frequency: tuple[float, float] = (1.0, 1.0),
        stream: int = 0,
        block: int = 512,
    ) -> None:
        queries = shots if queries is None else queries
        check_counts(shots=shots, queries=queries, tasks=tasks, block=block)
        self.shots, self.queries, self.tasks, self.seed, self.dtype = shots, queries, tasks, seed, dtype
        self.frequency, self.stream, self.block = frequency, stream, block
        self._held = -1
        self._batches: list[TaskBatch] = []

    def _make(self, number: int) -> list[TaskBatch]:
        """All batches of one block."""
        generator = torch.Generator()
        generator.manual_seed(int(entropy(self.seed, self.stream, number).generate_state(1)[0]))
        shape = (self.block, self.tasks)
        drawn = draw_sinusoids(shape, self.shots + self.queries, generator, self.dtype, frequency=self.frequency)
        # x, y [B, T, S + Q, 1]
        fields = []
        for value in (drawn.x, drawn.y):
            # one copy each here makes every batch contiguous, which its user would otherwise do batch by batch
            fields += [part.contiguous().unbind(0) for part in value.split([self.shots, self.queries], dim=2)]
        sx, qx, sy, qy = fields
        return [TaskBatch(*batch) for batch in zip(sx, sy, qx, qy, strict=True)]

    def batch(self, index: int) -> TaskBatch:
        """Meta-batch number `index`; cheap in order, a whole block's work out of order."""
        number, offset = divmod(index, self.block)
        if number != self._held:
            self._batches, self._held = self._make(number), number
        return self._batches[offset]
