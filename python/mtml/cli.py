"""The command `mtml`. Nothing but the standard library is imported until it is known what is asked for."""

from __future__ import annotations

import sys
from collections.abc import Sequence

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command line (default: the process's own) and exit with its status."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given[:1] == ["doctor"] and set(given[1:]) <= {"--json"}:
        from mtml_kernels.doctor import main as doctor  # it must work where typer does not

        doctor("--json" in given)
        return
    try:
        import typer  # noqa: F401
    except ImportError:
        sys.exit('mtml: the command line needs typer: pip install "mtml-kernels[train]"')
    from mtml.train.commands import app

    app(given, prog_name="mtml")
