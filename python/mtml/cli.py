"""The command `mtml`. Nothing but the standard library is imported until it is known what is asked for."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from mtml.train.failures import line_of
from mtml.train.job import say_why

__all__ = ["main"]

USAGE, INTERRUPTED = 2, 130


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command line (default: the process's own) and exit with its status.

    What is wrong with the command line, the installation or the machine is one line on stderr and status 2; Ctrl-C is
    one line and status 130.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal without ± is no reason to stop
    try:
        status = _run(given)
        if status:
            _drop(sys.stdout)
        sys.stdout.flush()  # a full disk shows here, or after the end of main
    except BrokenPipeError:  # who read our output has enough of it, `head` for one
        _drop(sys.stdout)
        sys.exit(1)
    except (ImportError, OSError, KeyboardInterrupt) as error:
        _drop(sys.stdout)
        _end(line_of(error) or "", INTERRUPTED if isinstance(error, KeyboardInterrupt) else USAGE)
    if status:
        sys.exit(status)


def _run(given: list[str]) -> int:
    """The command's status."""
    if given[:1] == ["doctor"] and set(given[1:]) <= {"--json"}:
        from mtml_kernels.doctor import main as doctor  # it must work where typer does not

        doctor("--json" in given)
        return 0
    import typer

    from mtml.train.commands import app

    usage: Any = typer.BadParameter.__mro__[2]  # ClickException, which typer does not export
    try:
        return app(given, prog_name="mtml", standalone_mode=False) or 0
    except typer.Abort:
        raise KeyboardInterrupt from None
    except usage as error:
        message = error.format_message()
        if not message.strip() or "\n" in message:  # the help, where nothing was asked for
            error.show()
            return USAGE
        command = error.ctx.command_path if getattr(error, "ctx", None) else "mtml"
        _end(f"{message} (`{command} --help` lists what there is)", USAGE)


def _end(line: str, status: int) -> NoReturn:
    say_why(line)
    sys.exit(status)


def _drop(stream: Any) -> None:
    """Let what could not be written go nowhere, or Python would try once more at the end and say so."""
    try:
        stream.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
