"""Launches of the persistent inner loop in files, for a program of their own: a sanitizer wants the whole process."""

from __future__ import annotations

import dataclasses
import struct
from collections.abc import Sequence
from pathlib import Path

import torch
from cases.call_random import weighed
from cases.cuda_engine import DTYPES, HostEngine, elements_of, registered
from cases.cuda_host import Run, build, run
from torch import Tensor

from mtml_kernels.cuda.inner_loop.program import BlockProgram
from mtml_kernels.ops.inner_loop_backends import BACKENDS
from mtml_kernels.schema.inner_loop import InnerLoopArgs

REPLAY = Path(__file__).parents[1] / "cuda" / "inner_loop" / "replay.cu"


@dataclasses.dataclass(frozen=True)
class Launch:
    """What a launch gets; tensors: their bytes and their stride from task to task."""

    dtype: torch.dtype
    full: bool
    tasks: int
    blocks: int
    threads: int
    words: list[int]
    chip_elements: int
    workspace_elements: int
    tensors: list[tuple[bytes | None, int]]

    def write(self, path: Path) -> None:
        """As tests/cuda/inner_loop/replay.cu reads it."""
        sizes = DTYPES[self.dtype], self.full, self.tasks, self.blocks, self.threads, self.words[0]
        head = (*sizes, self.chip_elements, self.workspace_elements, len(self.words))
        parts = [struct.pack("<9q", *head), struct.pack(f"<{len(self.words)}i", *self.words)]
        parts.append(struct.pack("<q", len(self.tensors)))
        for content, stride in self.tensors:
            parts += [struct.pack("<2q", -1 if content is None else len(content), stride), content or b""]
        path.write_bytes(b"".join(parts))


class Recorder(HostEngine):
    """Keeps every launch before it runs."""

    def __init__(self, threads: int, chip: int) -> None:
        super().__init__(threads, chip)
        self.launches: list[Launch] = []

    def run(
        self,
        program: BlockProgram,
        words: Tensor,
        workspace: Tensor | None,
        tensors: Sequence[Tensor | None],
        strides: Sequence[int],
        tasks: int,
        blocks: int,
    ) -> None:
        chip, each = elements_of(program)
        contents = [None if t is None else t.numpy().tobytes() for t in tensors]
        held = [*zip(contents, strides, strict=True)]
        self.launches.append(
            Launch(program.dtype, program.words.full, tasks, blocks, self.threads, words.tolist(), chip, each, held)
        )
        super().run(program, words, workspace, tensors, strides, tasks, blocks)


def recorded(a: InnerLoopArgs, threads: int, chip: int) -> Launch:
    """The launch of the way there and back, from cotangents on every output."""
    engine = Recorder(threads, chip)
    with registered(engine) as name:
        loss, output, support_losses, *adapted = weighed(a, name, False)
        BACKENDS.named(name).backward(loss, output, support_losses, adapted, a, [])
    return engine.launches[-1]


def replay(launch: Launch, folder: Path, flavour: str = "plain", order: int = 0) -> Run:
    path = folder / "launch"
    launch.write(path)
    return run(build(REPLAY, flavour), str(path), order=order)
