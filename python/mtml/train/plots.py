"""The pictures of a run. matplotlib is imported when one is drawn, without pyplot's global state."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from mtml.tasks._files import atomic_write
from mtml.tasks.errors import DataError
from mtml.train.log import read_log

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["AdaptedTask", "ImageTask", "plot_images", "plot_log", "plot_sinusoids"]


class AdaptedTask(NamedTuple):
    """One regression task: a curve per number of steps over x [N], the truth [N], and the support points [S]."""

    x: np.ndarray
    truth: np.ndarray
    support_x: np.ndarray
    support_y: np.ndarray
    curves: dict[int, np.ndarray]


class ImageTask(NamedTuple):
    """One classification task: support and query [N, side, side], classes named before and after adaptation [N]."""

    support: np.ndarray
    query: np.ndarray
    before: np.ndarray
    after: np.ndarray


def _figure(width: float, height: float) -> Figure:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise DataError('plots need matplotlib: pip install "mtml-kernels[train]"') from error
    return Figure(figsize=(width, height), layout="constrained")


def _save(figure: Figure, path: Path) -> Path:
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=120)
    return path


def _smooth(values: np.ndarray, width: int) -> np.ndarray:
    """Running mean that becomes narrower at both ends."""
    kernel = np.ones(width)
    return np.convolve(values, kernel, "same") / np.convolve(np.ones(len(values)), kernel, "same")


def _curve(axes: Axes, rows: list[dict[str, float]], column: str, label: str) -> None:
    """A column of the log against the iteration: each value pale, their running mean strong."""
    points = [(row["iteration"], row[column]) for row in rows if column in row]
    if not points:
        return
    x, y = np.array(points).T
    axes.plot(x, y, color="tab:blue", alpha=0.25, linewidth=0.8)
    axes.plot(x, _smooth(y, max(1, len(y) // 50)), color="tab:blue")
    axes.set(xlabel="meta-iteration", ylabel=label)
    axes.grid(alpha=0.3)


def _loss_curve(axes: Axes, rows: list[dict[str, float]]) -> None:
    _curve(axes, rows, "loss", "query loss after adaptation")
    axes.set(title="learning curve", yscale="log")


def _accuracy_curve(axes: Axes, rows: list[dict[str, float]]) -> None:
    points = [(r["iteration"], r["accuracy"], r.get("ci95", 0.0)) for r in rows if "accuracy" in r]
    if points:
        x, y, bar = np.array(points).T
        axes.errorbar(x, 100 * y, 100 * bar, marker=".", capsize=2, color="tab:green")
    axes.set(title="accuracy during training", xlabel="meta-iteration", ylabel="accuracy on other tasks, %")
    axes.grid(alpha=0.3)


def plot_log(log: Path, out: Path) -> Path:
    """The curves of a log: the loss, and the accuracy where there is one.

    Raises:
        DataError: where the log is missing or empty or is no log, or where matplotlib is not installed.
    """
    rows = read_log(log)
    if not rows:
        raise DataError(f"{log} has no rows yet: train for at least one reporting interval first")
    accuracy = any("accuracy" in row for row in rows)
    figure = _figure(10 if accuracy else 6, 4)
    columns = 2 if accuracy else 1
    _loss_curve(figure.add_subplot(1, columns, 1), rows)
    if accuracy:
        _accuracy_curve(figure.add_subplot(1, columns, 2), rows)
    return _save(figure, out)


def plot_sinusoids(log: Path, tasks: Sequence[AdaptedTask], out: Path) -> Path:
    """The learning curve, and beside it each task's curves before and after adaptation."""
    figure = _figure(4.2 * (1 + len(tasks)), 4)
    axes = figure.subplots(1, 1 + len(tasks))
    _loss_curve(axes[0], read_log(log))
    for ax, task in zip(axes[1:], tasks, strict=True):
        ax.plot(task.x, task.truth, color="black", linewidth=2, alpha=0.6, label="truth")
        for shade, (steps, curve) in zip(np.linspace(0.35, 0.9, len(task.curves)), task.curves.items(), strict=True):
            label = "before" if steps == 0 else f"{steps} step{'s' if steps > 1 else ''}"
            ax.plot(task.x, curve, color=_shade(shade), linestyle=":" if steps == 0 else "-", label=label)
        ax.plot(task.support_x, task.support_y, "^", color="tab:purple", label="support")
        ax.set(title="a fresh task", xlabel="x", ylim=(-6, 6))
        ax.grid(alpha=0.3)
    axes[1].legend(fontsize="small", loc="lower left", ncols=2)
    return _save(figure, out)


def _shade(value: float) -> Any:
    from matplotlib import colormaps

    return colormaps["YlOrRd"](value)


def plot_images(
    log: Path, by_step: Sequence[tuple[float, float]], task: ImageTask, trained_steps: int, out: Path
) -> Path:
    """Learning curve, accuracy during training, accuracy by adaptation step with its interval, and one fresh task."""
    figure = _figure(15, 7)
    grid = figure.add_gridspec(2, 3, height_ratios=(3, 2))
    rows = read_log(log)
    _loss_curve(figure.add_subplot(grid[0, 0]), rows)
    _accuracy_curve(figure.add_subplot(grid[0, 1]), rows)
    axes = figure.add_subplot(grid[0, 2])
    means, bars = np.array(by_step).T * 100
    axes.errorbar(range(len(means)), means, bars, marker="o", capsize=3, color="tab:orange")
    axes.axvline(trained_steps, color="grey", linestyle=":", label="steps in training")
    axes.set(title="accuracy on test tasks", xlabel="adaptation steps", ylabel="%", xticks=range(len(means)))
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    _image_row(figure, grid[1, :], task)
    return _save(figure, out)


def _image_row(figure: Figure, place: Any, task: ImageTask) -> None:
    """Support drawings above, queries below with the class named before and after adaptation."""
    count = min(len(task.support), 10)
    grid = place.subgridspec(2, count)
    for column in range(count):
        for row, images in enumerate((task.support, task.query)):
            axes = figure.add_subplot(grid[row, column])
            axes.imshow(images[column], cmap="gray_r", vmin=0, vmax=1)
            axes.set(xticks=[], yticks=[])
            before, after = int(task.before[column]), int(task.after[column])
            right = "tab:green" if after == column else "tab:red"
            title = f"support {column}" if row == 0 else f"query: {before} → {after}"
            axes.set_title(title, fontsize="small", color="black" if row == 0 else right)
