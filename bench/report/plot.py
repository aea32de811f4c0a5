"""``python -m bench plot CSV``: bars of the recorded times, one panel per workload, on a logarithmic axis."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import TYPE_CHECKING

from bench.providers.base import is_ours
from bench.report.record import Record, milliseconds

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def _panel(axes: Axes, workload: str, rows: list[Record]) -> None:
    rows = sorted(rows, key=lambda r: -r.ms)
    colours = ["tab:orange" if is_ours(r.provider) else "tab:blue" for r in rows]
    bars = axes.barh([r.provider for r in rows], [r.ms for r in rows], color=colours)
    axes.bar_label(bars, [milliseconds(r.ms) for r in rows], padding=3, fontsize=8)
    axes.set_xscale("log")
    axes.tick_params(axis="x", which="minor", labelbottom=False)  # the bars carry their numbers
    axes.set_xlim(min(r.ms for r in rows) / 3, max(r.ms for r in rows) * 4)
    axes.set_title(workload, fontsize=10)


def plot(records: Iterable[Record], path: str | os.PathLike[str]) -> None:
    """Draw the timed records into an image file. Raises ValueError where none was timed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    timed = {(r.workload, r.provider): r for r in records if r.ok}
    panels = list(dict.fromkeys(workload for workload, _ in timed))
    if not panels:
        raise ValueError("nothing to plot: the records hold no timed row")
    columns = min(3, len(panels))
    height = (len(panels) + columns - 1) // columns
    figure, axes = plt.subplots(
        height, columns, figsize=(4.6 * columns, 2.8 * height), squeeze=False, layout="constrained"
    )
    for index, axis in enumerate(axes.flat):
        if index < len(panels):
            _panel(axis, panels[index], [r for (w, _), r in timed.items() if w == panels[index]])
        else:
            axis.set_visible(False)
    first = next(iter(timed.values()))
    figure.supxlabel(
        f"milliseconds of one meta-step, threads: {first.threads}, {first.machine}, {first.date[:10]}", fontsize=9
    )
    figure.savefig(path, dpi=150)
    plt.close(figure)
