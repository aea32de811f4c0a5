"""What every path has: a call on a batch, an output in the model's shape, a notice, an explanation."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from mtml.paths.batch import Batch
from mtml.paths.explain import Explanation, Subject
from mtml_kernels.checks import Sizes

__all__ = ["Finder", "Options", "Outcome", "Path", "in_our_words"]


class Options(NamedTuple):
    """What a call asks for beside its data.

    keep: 0 no adapted tensors, 1 those after the last step, 2 of all steps. axes, taken: of its `Extras`.
    """

    steps: int
    first_order: bool
    keep: int
    axes: int = 0
    taken: int = 0


class Outcome(NamedTuple):
    """What a path returns: loss [T], output [T, Q, ...], support_losses [K, T], adapted [T, *shape] by name; with
    adapted tensors the update rule's moments {moment: {name: [T, *shape]}}.
    """

    loss: Any
    output: Any
    support_losses: Tensor
    adapted: Mapping[str, Tensor]
    moments: Mapping[str, Mapping[str, Tensor]] | None = None


class Path(Protocol):
    """One way to run calls of one signature, with everything that does not depend on the data already worked out.

    kind: a word for it. notice: mode and reasons of a FallbackWarning that is still to be given.
    """

    kind: str
    notice: tuple[str, str] | None

    def __call__(self, batch: Batch) -> Outcome:
        """Adapt to the support sets and judge the results on the query sets, where there are such."""

    def shaped(self, output: Any) -> Any:
        """The outcome's output [T, Q, ...] in the shape that the model gives it."""

    def explain(self, subject: Subject, sizes: Sizes) -> Explanation:
        """How it runs batches of these sizes, and why."""


class Finder(Protocol):
    """What a learner asks for the path of a call. `owner` is that learner: its copies make finders of their own.

    shortcuts: by steps, order and whether gradients are recorded, what runs calls like one before at once.
    """

    owner: Any
    shortcuts: dict[Hashable, Any]

    def find(self, batch: Batch, steps: int, first_order: bool, keep: int) -> Path:
        """The path, checked against the batch; warns where it is a slow one."""

    def explain(self, batch: Batch) -> Explanation:
        """How such calls run. Warns of nothing."""


def in_our_words(error: Exception) -> Exception:
    """An error of the engine about targets, which its own functions call by other names, by the names used here."""
    argument, found, rest = str(error).partition(":")
    known = {"support_y": "sy", "query_y": "qy", "labels": "sy", "query_labels": "qy"}
    return type(error)(f"{known[argument]}:{rest}") if found and argument in known else error
