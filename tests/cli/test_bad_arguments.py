"""Commands, options and values that do not exist, over all options there are."""

import re
import runpy
import sys
import typing
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("typer")
pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")

import typer.models
from cases.command_line import SINUSOID, START

from mtml.train import commands

HUGE = str(10**30)


def options() -> Iterator[tuple[str, str, str]]:
    """(command, option, bad value): names that do not exist, numbers out of every range, and what is no number."""
    for registered in (*commands.train.registered_commands, *commands.app.registered_commands):
        function = registered.callback
        for name, hint in typing.get_type_hints(function, include_extras=True).items():
            if name == "return" or not hasattr(hint.__metadata__[0], "callback"):
                continue
            kinds = {hint.__origin__, *typing.get_args(hint.__origin__)}
            if isinstance(hint.__metadata__[0], typer.models.ArgumentInfo) or kinds & {bool, Path}:
                continue
            bad = BAD[next(iter(kinds & set(BAD)))]
            option = f"--{name.replace('_', '-')}"
            yield from (
                (function.__name__, option, value) for value in bad if (option, value) != ("--iterations", HUGE)
            )


BAD = {str: ["nonsense", ""], int: ["x", "1.5", "-1", HUGE], float: ["x", "nan", "inf", "-inf"]}
FOUND = list(options())


def test_options_are_all_looked_at():
    assert {command for command, *_ in FOUND} == {"sinusoid", "omniglot", "multitask", "record"}
    assert {"--backend", "--init", "--tasks", "--net", "--preset", "--split", "--norm", "--learn-lr", "--minutes"} <= {
        name for _, name, _ in FOUND
    }
    assert len(FOUND) > 100


@pytest.mark.parametrize(("command", "option", "value"), FOUND)
def test_bad_option(fails, folder, command, option, value):
    line = fails(*START[command], option, value)
    assert option.lstrip("-") in line, line
    assert "expected" in line or "--help` lists" in line
    assert not (folder / "runs").exists()


@pytest.mark.parametrize(
    "arguments",
    [["nothing"], ["train", "nothing"], ["doctor", "--yaml"], ["record", "only"], ["plot", "a", "b"], ["--nothing"]],
)
def test_bad_command(fails, arguments):
    assert "--help` lists what there is" in fails(*arguments)


@pytest.mark.parametrize("command", ["sinusoid", "omniglot"])
def test_unknown_backend_in_the_environment(fails, monkeypatch, command):
    monkeypatch.setenv("MTML_BACKEND", "gpu")
    assert "the variable MTML_BACKEND: expected one of auto, cpu" in fails(*START[command])


def test_backend_that_is_not_here(fails):
    assert "backend" in fails(*SINUSOID, "--backend", "cuda")


def test_as_a_module(monkeypatch, capfd):
    monkeypatch.setattr(sys, "argv", ["python -m mtml", *SINUSOID, "--backend", "gpu"])
    with pytest.raises(SystemExit, match="2"):
        runpy.run_module("mtml", run_name="__main__")
    output, errors = capfd.readouterr()
    assert not output and re.fullmatch(r"error: .*--backend.*expected one of auto, cpu.*got 'gpu'.*\n", errors)
