"""What a run on a GPU comes to: a line a workload, and plots."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from bench.gpu.rows import GpuRecord
from bench.providers.base import is_ours

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BARS = (("wall", "ms"), ("device, hot L2", "hot_ms"), ("device, cold L2", "cold_ms"), ("kernels", "kernel_ms"))


def wrong(rows: Iterable[GpuRecord]) -> list[GpuRecord]:
    """Our own rows that failed or do not match."""
    return [r for r in rows if is_ours(r.provider) and r.status in ("failed", "mismatch")]


def fastest(rows: Iterable[GpuRecord]) -> GpuRecord | None:
    """The shortest wall time."""
    return min((r for r in rows if r.ok), key=lambda r: r.ms, default=None)


def _line(workload: str, turn: str, rows: Sequence[GpuRecord]) -> str:
    ours, peer = fastest(r for r in rows if is_ours(r.provider)), fastest(r for r in rows if not is_ours(r.provider))
    text = f"{workload:20s} {turn:5s} "
    if ours is None:
        return text + "no time of ours"
    text += f"{ours.provider} {1e3 * ours.ms:.1f} us"
    if peer is not None:
        text += f", {peer.ms / ours.ms:.2f} x the fastest peer ({peer.provider} {1e3 * peer.ms:.1f} us)"
    device = ours.kernel_ms if not math.isnan(ours.kernel_ms) else ours.hot_ms
    if ours.predicted_launches and not math.isnan(device):
        text += f"; on the device {1e3 * device:.1f} us, predicted {1e3 * ours.predicted_ms:.1f}"
        text += f" ({device / ours.predicted_ms:.2f} x)"
        if ours.compiled_launches:
            text += f", from its kernels {1e3 * ours.compiled_ms:.1f} ({device / ours.compiled_ms:.2f} x)"
    return text


def lines(rows: Iterable[GpuRecord]) -> Iterator[str]:
    """A line for each workload and turn. Ratios are those of one process."""
    groups: dict[tuple[str, str], list[GpuRecord]] = {}
    for r in rows:
        groups.setdefault((r.workload, r.turn), []).append(r)
    for (workload, turn), group in groups.items():
        yield _line(workload, turn, group)


def _panel(axes: Axes, workload: str, rows: Sequence[GpuRecord]) -> None:
    """A group of bars for each provider, and marks at what was predicted for ours: of its schedule, of its kernels."""
    height = 0.8 / len(BARS)
    for index, (label, column) in enumerate(BARS):
        places = [i + (index - (len(BARS) - 1) / 2) * height for i in range(len(rows))]
        axes.barh(places, [1e3 * getattr(r, column) for r in rows], height=height, label=label)
    for i, r in enumerate(rows):
        if r.predicted_launches:
            axes.plot([1e3 * r.predicted_ms] * 2, [i - 0.45, i + 0.45], color="black", linewidth=2)
        if r.compiled_launches:
            axes.plot([1e3 * r.compiled_ms] * 2, [i - 0.45, i + 0.45], color="black", linewidth=2, linestyle=":")
    axes.set_yticks(range(len(rows)), [f"{r.provider} ({r.turn})" for r in rows], fontsize=8)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_title(workload, fontsize=10)


def times(rows: Sequence[GpuRecord], path: Path) -> None:
    """Draw every timed row: wall and device times, and black marks at the predictions."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    timed = [r for r in rows if r.ok]
    names = list(dict.fromkeys(r.workload for r in timed))
    columns = min(2, len(names))
    down = -(-len(names) // columns)
    figure, axes = plt.subplots(down, columns, figsize=(7 * columns, 3.6 * down), squeeze=False, layout="constrained")
    for index, axis in enumerate(axes.flat):
        if index < len(names):
            _panel(axis, names[index], [r for r in timed if r.workload == names[index]])
        else:
            axis.set_visible(False)
    axes[0][0].legend(fontsize=8)
    marks = "black: predicted of the schedule, dotted: of the kernels"
    figure.supxlabel(f"microseconds of a call; {marks}. {timed[0].machine}, {timed[0].date[:10]}", fontsize=9)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def plots(rows: Sequence[GpuRecord], out: Path) -> list[Path]:
    """Every plot there is to draw; none where nothing was timed, or where matplotlib is not installed."""
    if not any(r.ok for r in rows):
        return []
    if importlib.util.find_spec("matplotlib") is None:
        print('no plot: matplotlib is not installed (pip install "mtml-kernels[bench]")')
        return []
    times(rows, out / "times.png")
    return [out / "times.png"]
