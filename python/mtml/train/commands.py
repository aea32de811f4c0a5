"""The typer application behind the command `mtml`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mtml.tasks.errors import DataError
from mtml.train.failures import line_of, missing, with_notes
from mtml.train.job import say_why
from mtml.train.options import Backend, Iterations, Minutes, Out, PlainSeconds, Resume, Seed, Threads, count, number

if TYPE_CHECKING:
    from mtml.train.ranks import Ranks

__all__ = ["app"]

app = typer.Typer(
    help="Meta-learning with fused inner loops.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich" if find_spec("rich") else None,
)
train = typer.Typer(
    help="Run a published experiment in the fused engine. `torchrun --nproc_per_node N -m mtml train ...` shares the "
    "tasks of every meta-batch among N processes.",
    no_args_is_help=True,
)
app.add_typer(train, name="train")


@contextmanager
def _clear_errors() -> Iterator[list[str]]:
    """What the user can put right ends with one line on stderr and status 2 (130 after Ctrl-C), not with a traceback.

    Gives a list to which the command adds what the line shall end with, such as what is already saved.
    """
    from mtml.distributed import RankLost
    from mtml.train.loop import Diverged
    from mtml_kernels.errors import BackendUnavailable

    notes: list[str] = []
    try:
        yield notes
    except BrokenPipeError:  # who reads our output has enough of it, `head` for one
        raise
    except (Exception, KeyboardInterrupt) as error:
        for note in notes:
            error.add_note(note)
        known = isinstance(error, DataError | Diverged | BackendUnavailable | RankLost)
        line = with_notes(str(error), error) if known else line_of(error)
        if line is None:
            raise
        say_why(line)
        raise typer.Exit(130 if isinstance(error, KeyboardInterrupt) else 2) from error


def _need(*modules: str) -> None:
    """Find out at the start, not after an hour of training, that a library of the extra is missing."""
    if gone := [name for name in modules if find_spec(name) is None]:
        raise DataError(missing(*gone))


def _announce(title: str, threads: int | None, ranks: Ranks) -> None:
    """Set the number of threads where one was asked for, and say what is trained and by how many."""
    import torch

    if threads is not None:
        torch.set_num_threads(threads)
    if ranks.main:
        several = f"{ranks.count} ranks of " if ranks.count > 1 else ""
        typer.echo(f"{title}, {several}{torch.get_num_threads()} thread(s)")


def _trained(progress: Any, ranks: Ranks, folder: Path, command: str, notes: list[str]) -> None:
    """Say how far training came; after Ctrl-C leave with the status of an interrupted program. Of several ranks the
    main one goes on alone."""
    ranks.leave()
    if not ranks.main:
        raise typer.Exit(130 if progress.stopped else 0)
    notes.append(f"what was trained is saved in {folder}: `{command} --out {folder} --resume` goes on from there")
    rate = progress.iteration / max(progress.seconds, 1e-9)
    typer.echo(f"{progress.iteration} meta-iterations in {progress.seconds:.1f} s ({rate:.0f}/s)")
    if progress.stopped:
        typer.echo(f"stopped and saved in {folder}; `{command} --out {folder} --resume` continues")
        raise typer.Exit(130)


def _report(comparison: Any) -> None:
    """Print the comparison; meta-gradients that differ are a failure."""
    typer.echo(f"\n{comparison}")
    if not comparison.agree:
        raise typer.Exit(1)


@train.command()
def sinusoid(
    iterations: Annotated[int, typer.Option(min=1, help="Meta-iterations to train for.")] = 70_000,
    minutes: Minutes = None,
    meta_batch: Annotated[int, count("Tasks per meta-iteration.")] = 25,
    shots: Annotated[int, count("Points to adapt on in training.")] = 10,
    steps: Annotated[int, count("Inner steps.")] = 1,
    inner_lr: Annotated[float, number("Inner learning rate.")] = 0.01,
    outer_lr: Annotated[float, number("Adam's learning rate.", min=0.0)] = 1e-3,
    init: Annotated[str, typer.Option(help="Initial weights: torch, finn2017 or he.")] = "torch",
    tasks: Annotated[str, typer.Option(help="finn2017, or meta-sgd: frequencies 0.8 to 1.2 too.")] = "finn2017",
    meta_sgd: Annotated[bool, typer.Option("--meta-sgd", help="Learn an inner rate for every weight.")] = False,
    seed: Seed = 0,
    threads: Threads = None,
    out: Out = None,
    resume: Resume = False,
    demo: Annotated[
        bool, typer.Option("--demo", help="The published table: --tasks meta-sgd --shots 5, 60000 iterations or 45 s.")
    ] = False,
    backend: Backend = "auto",
    plain_seconds: PlainSeconds = 5.0,
) -> None:
    """Sinusoid regression as in the MAML paper (--demo: as in the published table of the Meta-SGD paper)."""
    from mtml.train.models import INITS
    from mtml.train.ranks import join
    from mtml.train.sinusoid import FREQUENCY, SinusoidRun, SinusoidSettings, table_text

    for option, value, known in (("--init", init, INITS), ("--tasks", tasks, tuple(FREQUENCY))):
        if value not in known:
            raise typer.BadParameter(f"expected one of {', '.join(known)}; got {value!r}", param_hint=option)
    folder = out or Path("runs/sinusoid")
    with _clear_errors() as notes:
        _need("matplotlib", "tqdm")
        ranks = join()
        settings = SinusoidSettings(
            iterations=iterations,
            minutes=minutes,
            meta_batch=meta_batch,
            shots=shots,
            steps=steps,
            inner_lr=inner_lr,
            outer_lr=outer_lr,
            init=init,
            tasks=tasks,
            meta_sgd=meta_sgd,
            seed=seed,
            backend=backend,
            plain_seconds=plain_seconds,
        )
        settings = settings.demo() if demo else settings
        title = (
            f"sinusoid ({settings.tasks}): {settings.iterations} meta-iterations of {meta_batch} tasks, "
            f"{settings.shots} shots, {steps} inner step(s) at {inner_lr:g}"
        )
        _announce(title, threads, ranks)
        run = SinusoidRun(settings, folder, ranks)
        progress = run.train(resume)
        _trained(progress, ranks, folder, "mtml train sinusoid", notes)
        table = run.table()
        typer.echo("\n" + table_text(table, settings, progress.iteration))
        picture = run.plot()
        comparison = run.compare()
        run.save_results(progress, table, comparison)
        typer.echo(f"\npicture: {picture}\nlog: {folder / 'log.csv'}\nresults: {folder / 'results.json'}")
    _report(comparison)


@train.command()
def omniglot(
    data: Annotated[
        Path | None,
        typer.Option(help="Omniglot: folder or zips. Without it, scikit-learn's digits.", show_default=False),
    ] = None,
    ways: Annotated[int, count("Classes per task.", least=2)] = 5,
    shots: Annotated[int, count("Drawings per class to adapt on.")] = 1,
    net: Annotated[str, typer.Option(help="mlp (784-256-128-64-64-N) or conv4 (four convolutions).")] = "mlp",
    preset: Annotated[
        str | None,
        typer.Option(
            help="mtml (mlp without BatchNorm, trains best; its default), finn2017 (conv4's default), learn2learn or "
            "maml++.",
            show_default=False,
        ),
    ] = None,
    split: Annotated[
        str, typer.Option(help="maml: 1200/423 characters of all alphabets; background: 964/659, new alphabets.")
    ] = "maml",
    queries: Annotated[int | None, count("Query drawings per class.")] = None,
    steps: Annotated[int | None, count("Inner steps in training.")] = None,
    test_steps: Annotated[int | None, count("Inner steps in the test.", least=0)] = None,
    meta_batch: Annotated[int | None, count("Tasks per meta-iteration.")] = None,
    inner_lr: Annotated[float | None, number("Inner rate, under the mean cross-entropy.")] = None,
    outer_lr: Annotated[float | None, number("Adam's learning rate.", min=0.0)] = None,
    init: Annotated[
        str | None, typer.Option(help="Initial weights: torch, finn2017, he, learn2learn or maml++.")
    ] = None,
    norm: Annotated[
        str | None,
        typer.Option(help="Batch normalisation: none, bias (not adapted), affine (adapted) or meta-affine (not)."),
    ] = None,
    learn_lr: Annotated[str | None, typer.Option(help="Learn the inner rates: no, all, tensor or element.")] = None,
    meta_sgd: Annotated[bool, typer.Option("--meta-sgd", help="The same as --learn-lr element.")] = False,
    shift: Annotated[int | None, count("Pixels to move training drawings by at random.", least=0)] = None,
    cosine: Annotated[bool | None, typer.Option(help="Let the outer rate decay to nothing along a cosine.")] = None,
    minutes: Minutes = None,
    iterations: Iterations = None,
    validation: Annotated[int, count("Training characters kept for validation.", least=0)] = 0,
    test_tasks: Annotated[int, count("Tasks to test on; published: at least 600.")] = 1000,
    test_queries: Annotated[
        int | None,
        count("Query drawings per class in the test; where it is not 15, a second test has 15."),
    ] = None,
    seed: Seed = 0,
    threads: Threads = None,
    out: Out = None,
    resume: Resume = False,
    plain: Annotated[bool, typer.Option("--plain", help="Train the plain PyTorch way instead.")] = False,
    backend: Backend = "auto",
    plain_seconds: PlainSeconds = 5.0,
) -> None:
    """Few-shot classification of characters: a perceptron or Finn's network of four convolutions.

    It leaves log.csv, results.json and characters.csv (recall and F1 of every character) in the folder, with pictures
    of the curves, of tasks with their predictions, and of the hardest and easiest characters.
    """
    from mtml.train.omniglot import OmniglotRun, OmniglotSettings, table_text
    from mtml.train.presets import default_preset, resolve
    from mtml.train.ranks import join

    with _clear_errors() as notes:
        _need("matplotlib", "sklearn", "tqdm")
        chosen = resolve(
            default_preset(net) if preset is None else preset,
            ways,
            shots,
            net=net,
            queries=queries,
            steps=steps,
            test_steps=test_steps,
            test_queries=test_queries,
            meta_batch=meta_batch,
            inner_lr=inner_lr,
            outer_lr=outer_lr,
            init=init,
            norm=norm,
            per="element" if meta_sgd else learn_lr,
            cosine=cosine,
            shift=0 if shift is None and data is None else shift,  # the digits are too small and well centred
        )
        settings = OmniglotSettings(
            data=data,
            preset=chosen,
            net=net,
            split=split,
            ways=ways,
            shots=shots,
            minutes=minutes,
            iterations=iterations,
            validation=validation,
            test_tasks=test_tasks,
            seed=seed,
            backend=backend,
            plain=plain,
            plain_seconds=plain_seconds,
        )
        folder = out or Path("runs/digits" if data is None else "runs/omniglot")
        ranks = join()
        _announce(settings.title, threads, ranks)
        run = OmniglotRun(settings, folder, ranks)
        progress = run.train(resume)
        _trained(progress, ranks, folder, "mtml train omniglot", notes)
        found, wide = run.evaluate(), run.evaluate_wide()
        classes = run.per_class(wide or found)
        typer.echo("\n" + table_text(run, found, wide, classes))
        pictures = run.plot(found, classes)
        comparison = run.compare()
        run.save_results(progress, found, wide, classes, comparison)
        typer.echo("\n" + "\n".join(f"picture: {picture}" for picture in pictures))
        typer.echo(f"log: {folder / 'log.csv'}\nresults: {folder / 'results.json'}")
        typer.echo(f"characters: {folder / 'characters.csv'}")
    if comparison is not None:
        _report(comparison)


@train.command()
def multitask(
    groups: Annotated[
        str, typer.Option(help="Kinds of tasks, with commas: digits, sinusoid, tokens, segmentation.")
    ] = "digits,sinusoid,tokens,segmentation",
    iterations: Annotated[int, typer.Option(min=1, help="Meta-iterations to train for.")] = 3_000,
    minutes: Minutes = None,
    meta_batch: Annotated[int, count("Tasks of each group per meta-iteration.")] = 8,
    steps: Annotated[int, count("Inner steps; 0 for plain multi-task learning.", least=0)] = 5,
    inner_lr: Annotated[float, number("Inner learning rate.")] = 0.1,
    outer_lr: Annotated[float, number("Adam's learning rate.", min=0.0)] = 1e-3,
    weighting: Annotated[
        str, typer.Option(help="Of the groups, by its name in mtml.weighting: sum, uncertainty, dwa, ...")
    ] = "sum",
    seed: Seed = 0,
    threads: Threads = None,
    out: Out = None,
    resume: Resume = False,
    backend: Backend = "auto",
) -> None:
    """Tasks of several kinds at once: a trunk and a head for each, of which the inner loop adapts the head."""
    from mtml.train.multitask import MultiTaskRun, MultiTaskSettings, table_text
    from mtml.train.multitask_groups import named
    from mtml.train.ranks import join
    from mtml.weighting.make import NAMED

    if weighting not in NAMED:
        raise typer.BadParameter(f"expected one of {', '.join(NAMED)}; got {weighting!r}", param_hint="--weighting")
    folder = out or Path("runs/multitask")
    with _clear_errors() as notes:
        _need("matplotlib", "tqdm")
        ranks = join()
        settings = MultiTaskSettings(
            groups=named(groups),
            iterations=iterations,
            minutes=minutes,
            meta_batch=meta_batch,
            steps=steps,
            inner_lr=inner_lr,
            outer_lr=outer_lr,
            weighting=weighting,
            seed=seed,
            backend=backend,
        )
        title = (
            f"multitask ({', '.join(settings.groups)}): {iterations} meta-iterations of {meta_batch} tasks a group, "
            f"{steps} inner step(s) at {inner_lr:g}"
        )
        _announce(title, threads, ranks)
        run = MultiTaskRun(settings, folder, ranks)
        progress = run.train(resume)
        _trained(progress, ranks, folder, "mtml train multitask", notes)
        found = run.test()
        typer.echo("\n" + table_text(found))
        picture = run.plot(found)
        run.save_results(progress, found)
        typer.echo(f"\npicture: {picture}\nlog: {folder / 'log.csv'}\nresults: {folder / 'results.json'}")


@app.command()
def record(
    folder: Annotated[Path, typer.Argument(help="The folder of a finished `mtml train`.")],
    prefix: Annotated[Path, typer.Argument(help="Where to, without a suffix: bench/results/training/NAME.")],
    rows: Annotated[int, count("Rows to keep of the log, besides those with an accuracy.", least=2)] = 400,
) -> None:
    """Copy what a run leaves to be kept (results, log, characters, pictures) to PREFIX.json, PREFIX.csv and so on."""
    from mtml.train.record import record_run

    with _clear_errors():
        for path in record_run(folder, prefix, rows):
            typer.echo(str(path))


@app.command()
def plot(
    log: Annotated[Path, typer.Argument(help="A log.csv of `mtml train`.")],
    out: Annotated[
        Path | None, typer.Option(help="The picture; beside the log by default.", show_default=False)
    ] = None,
) -> None:
    """Draw the curves of a log."""
    from mtml.train.plots import plot_log

    with _clear_errors():
        _need("matplotlib")
        typer.echo(str(plot_log(log, out or log.parent / f"{log.stem}.png")))


@app.command()
def doctor(json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """What is installed, built, detected and chosen on this machine, and why."""
    from mtml_kernels.doctor import main

    main(json)
