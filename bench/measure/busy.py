"""Processes that keep cores busy beside a measurement, and never longer than it."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

SCRIPT = Path(__file__).with_name("spin.py")


@contextlib.contextmanager
def busy(count: int) -> Iterator[list[int]]:
    """The process ids of ``count`` processes that spin; they are killed when the block ends, by an error or not.

    They share this process's session, so that the scheduler weighs them against it one by one, and its niceness.

    Raises:
        RuntimeError: one did not start, or was no longer there at the end: what was measured had less beside it.
    """
    processes: list[subprocess.Popen[bytes]] = []
    with contextlib.ExitStack() as stack:
        for _ in range(count):
            command = [sys.executable, "-I", "-S", str(SCRIPT)]
            process = stack.enter_context(
                subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0)
            )
            stack.callback(process.kill)  # before the Popen's own end, which waits for the process
            processes.append(process)
        for process in processes:
            assert process.stdout is not None
            if process.stdout.readline() != b"spinning\n":
                raise RuntimeError(f"busy process {process.pid}: expected it to spin, it ended with {process.wait()}")
        yield [process.pid for process in processes]
        for process in processes:
            if process.poll() is not None:
                raise RuntimeError(
                    f"busy process {process.pid}: expected it to spin until the end of the measurement, it ended with "
                    f"{process.returncode}; measure again"
                )
