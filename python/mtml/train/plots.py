"""The pictures of a run. matplotlib is imported when one is drawn, without pyplot's global state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from mtml.tasks.errors import DataError
from mtml.tasks.files import atomic_write
from mtml.train.log import read_log

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from mtml.train.metrics import PerClass

__all__ = [
    "AdaptedTask",
    "ImageTask",
    "plot_classes",
    "plot_groups",
    "plot_images",
    "plot_log",
    "plot_sinusoids",
    "plot_tasks",
]


class AdaptedTask(NamedTuple):
    """One regression task: a curve per number of steps over x [N], the truth [N], and the support points [S]."""

    x: np.ndarray
    truth: np.ndarray
    support_x: np.ndarray
    support_y: np.ndarray
    curves: dict[int, np.ndarray]


class ImageTask(NamedTuple):
    """One classification task: a support drawing of each class [N, side, side]; queries [Q, side, side], their classes
    [Q], and those named before and after adaptation [Q]."""

    support: np.ndarray
    query: np.ndarray
    truth: np.ndarray
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
        DataError: where the log is missing or empty or is no log, where `out` is the log itself, or where matplotlib is
            not installed.
    """
    rows = read_log(log)
    if out.resolve() == log.resolve():
        raise DataError(f"out: expected another file than the log {log}, which the picture would replace")
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


def plot_groups(
    log: Path, by_step: Mapping[str, Mapping[int, tuple[float, float]]], trained_steps: int, out: Path
) -> Path:
    """The learning curve of all groups of tasks together, and each group's loss on new tasks: during training, and by
    adaptation step with its interval."""
    figure = _figure(4.2 * (1 + len(by_step)), 7)
    grid = figure.add_gridspec(2, 1 + len(by_step))
    rows = read_log(log)
    _loss_curve(figure.add_subplot(grid[:, 0]), rows)
    for column, (name, losses) in enumerate(by_step.items(), 1):
        above, below = figure.add_subplot(grid[0, column]), figure.add_subplot(grid[1, column])
        _curve(above, rows, name, "query loss on new tasks")
        above.set(title=name)
        means, bars = np.array(list(losses.values())).T
        below.errorbar(list(losses), means, bars, marker="o", capsize=3, color="tab:orange")
        below.axvline(trained_steps, color="grey", linestyle=":", label="steps in training")
        below.set(xlabel="adaptation steps", ylabel="query loss", yscale="log")
        below.grid(alpha=0.3)
    return _save(figure, out)


def _shade(value: float) -> Any:
    from matplotlib import colormaps

    return colormaps["YlOrRd"](value)


def plot_images(
    log: Path, by_step: Sequence[tuple[float, float]], tasks: Sequence[ImageTask], trained_steps: int, out: Path
) -> Path:
    """Learning curve, accuracy during training, accuracy by adaptation step with its interval, and fresh tasks."""
    figure = _figure(15, 9)
    grid = figure.add_gridspec(2, 3, height_ratios=(1, 1))
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
    places = [grid[1, 0], grid[1, 1], grid[1, 2]] if len(tasks[0].support) <= 6 else [grid[1, :]]
    for place, task in zip(places, tasks, strict=False):
        _draw_task(figure.add_subplot(place), task, "a fresh task")
    return _save(figure, out)


def plot_tasks(tasks: Sequence[ImageTask], steps: int, out: Path) -> Path:
    """A page of tasks: support drawings, and under them queries of the same class with what they were taken for."""
    ways = len(tasks[0].support)
    columns = 2 if ways <= 6 else 1
    rows = -(-len(tasks) // columns)
    across = max(6.0, 0.85 * ways)
    figure = _figure(columns * across, rows * 0.62 * across * (5 / ways if ways > 6 else 1) + 0.6)
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.ravel()[len(tasks) :]:
        axes.set_axis_off()
    for number, (axes, task) in enumerate(zip(grid.ravel(), tasks, strict=False), 1):
        _draw_task(axes, task, f"task {number}")
    figure.suptitle(
        f"test tasks: support drawings of each class above; queries below: class named before → after {steps} "
        f"adaptation step{'' if steps == 1 else 's'}"
    )
    return _save(figure, out)


GAP, CAPTION = 0.12, 0.3  # in widths of a drawing


def _draw_task(axes: Axes, task: ImageTask, title: str) -> None:
    """One task in one pair of axes, a column for each class: a pair for every drawing would take minutes."""
    ways, placed = len(task.support), dict.fromkeys(range(len(task.support)), 1)
    for way, image in enumerate(task.support):
        _draw_image(axes, image, way, 0, f"class {way}" if ways <= 10 else str(way), None)
    for image, way, before, after in zip(task.query, task.truth, task.before, task.after, strict=True):
        _draw_image(axes, image, int(way), placed[int(way)], f"{before} → {after}", bool(after == way))
        placed[int(way)] += 1
    depth = max(placed.values()) * (1 + GAP + CAPTION)
    right = [f"{int((named == task.truth).sum())}" for named in (task.before, task.after)]
    axes.set(xlim=(-GAP, ways * (1 + GAP)), ylim=(depth, -GAP), aspect="equal")
    axes.set_axis_off()
    axes.set_title(f"{title}: {right[0]} of {len(task.truth)} right before, {right[1]} after", fontsize="medium")


def _draw_image(axes: Axes, image: np.ndarray, column: int, row: int, caption: str, right: bool | None) -> None:
    """A drawing with its caption below; a query's frame is solid green or dashed red, and its caption says so too."""
    from matplotlib.patches import Rectangle

    x, y = column * (1 + GAP), row * (1 + GAP + CAPTION)
    axes.imshow(image, cmap="gray_r", vmin=0, vmax=1, extent=(x, x + 1, y + 1, y))
    color = {None: "black", True: "tab:green", False: "tab:red"}[right]
    style, width = ("--", 2.0) if right is False else ("-", 0.6 if right is None else 1.5)
    axes.add_patch(Rectangle((x, y), 1, 1, fill=False, edgecolor=color, linestyle=style, linewidth=width))
    mark = {None: "", True: " ✓", False: " ✗"}[right]
    axes.text(x + 0.5, y + 1.06, caption + mark, ha="center", va="top", color=color, fontsize=7.5)


SHOWN_CLASSES = 12


def plot_classes(classes: PerClass, images: np.ndarray, out: Path) -> Path:
    """How recall and F1 are distributed over the classes, and drawings of the hardest and the easiest.

    `images` [C, drawings, side, side] are those of all classes.
    """
    order = classes.by_difficulty()
    figure = _figure(12, 7.5)
    grid = figure.add_gridspec(3, 1, height_ratios=(3, 2, 2))
    axes = figure.add_subplot(grid[0])
    bins = np.linspace(0, 1, 41).tolist()
    for values, name, color in ((classes.recall, "recall", "tab:blue"), (classes.f1, "F1", "tab:orange")):
        axes.hist(values[order], bins=bins, alpha=0.55, label=name, color=color)
    axes.set(title="classes by recall and F1 after adaptation", ylabel="classes", yscale="log")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    count = min(SHOWN_CLASSES, len(order))
    for place, title, chosen in ((grid[1], "hardest", order[:count]), (grid[2], "easiest", order[-count:][::-1])):
        row = figure.add_subplot(place)
        for column, i in enumerate(chosen):
            _draw_image(row, images[i, 0] / 255, column, 0, f"{_short(classes.names[i])}\nF1 {classes.f1[i]:.2f}", None)
        row.set(xlim=(-GAP, SHOWN_CLASSES * (1 + GAP)), ylim=(1.6, -GAP), aspect="equal", title=title)
        row.set_axis_off()
    return _save(figure, out)


def _short(name: str) -> str:
    """A character's name on two short lines."""
    alphabet, _, character = name.partition("/")
    return f"{alphabet[:14]}\n{character.removeprefix('character')}" if character else name
