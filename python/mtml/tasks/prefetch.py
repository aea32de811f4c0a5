"""Make the next meta-batches in a background thread while the current one is trained on."""

from __future__ import annotations

import queue
import threading
from typing import Any

from mtml.tasks.stream import TaskStream
from mtml.tasks.task_batch import TaskBatch

__all__ = ["Prefetch"]


class Prefetch(TaskStream):
    """The same stream as `source`, up to `depth` batches ahead of its reader.

    Order, content and position are those of `source`, whatever the thread has already prepared: resuming is exact.
    An error in the thread is raised by the `next` that would have returned its batch. Call `close`, or use it as a
    context manager, to end the thread; it also ends with the process.

    The thread only helps where the source releases the GIL while it works, as numpy's gathers do.

    Raises:
        ValueError: where depth is not a positive int.

    Example:
        >>> from mtml.tasks import Prefetch, Sinusoids
        >>> with Prefetch(Sinusoids(tasks=2)) as stream:
        ...     print(next(stream).sx.shape[0], stream.position)
        2 1
    """

    def __init__(self, source: TaskStream, depth: int = 4) -> None:
        if depth < 1:
            raise ValueError(f"depth: expected a positive int, got {depth!r}")
        self.source, self.depth = source, depth
        self.position = source.position
        self._thread: threading.Thread | None = None
        self._stop = threading.Event()
        self._ready: queue.Queue[TaskBatch | BaseException] = queue.Queue(depth)

    def _work(self, first: int, ready: queue.Queue[TaskBatch | BaseException], stop: threading.Event) -> None:
        index = first
        while not stop.is_set():
            item: TaskBatch | BaseException
            try:
                item = self.source.batch(index)
            except Exception as error:  # handed to the reader, who raises it
                item = error
            index += 1
            while not stop.is_set():  # a plain put would never notice close()
                try:
                    ready.put(item, timeout=0.1)
                    break
                except queue.Full:
                    continue
            if isinstance(item, BaseException):
                return

    def _start(self) -> None:
        self._stop, self._ready = threading.Event(), queue.Queue(self.depth)
        arguments = (self.position, self._ready, self._stop)
        self._thread = threading.Thread(target=self._work, args=arguments, name="mtml-prefetch", daemon=True)
        self._thread.start()

    def __next__(self) -> TaskBatch:
        if self._thread is None:
            self._start()
        item = self._ready.get()
        if isinstance(item, BaseException):
            self.close()
            raise item
        self.position += 1
        return item

    def batch(self, index: int) -> TaskBatch:
        """Batch `index` of the source, made in this thread."""
        return self.source.batch(index)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue at another position; what was prepared for the old one is dropped."""
        self.close()
        super().load_state_dict(state)

    def close(self) -> None:
        """End the thread. Iterating again starts a new one at the current position."""
        thread, self._thread = self._thread, None
        if thread is not None:
            self._stop.set()
            thread.join()

    def __enter__(self) -> Prefetch:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
