"""Other libraries' names: what they find, when, and what `python -m mtml.compat` does with a script."""

from __future__ import annotations

import importlib
import importlib.util
import pickle
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

import mtml.compat
from mtml.compat import names
from mtml.compat.__main__ import main

NAME = "torchmeta"  # the others are found in the same way


@pytest.fixture(autouse=True)
def nothing_installed() -> Iterator[None]:
    """Before and after: no finder of ours, and no library under its own name."""

    def clear() -> None:
        sys.meta_path[:] = [finder for finder in sys.meta_path if type(finder).__module__ != names.__name__]
        for name in [n for n in sys.modules if n.partition(".")[0] in mtml.compat.LIBRARIES]:
            del sys.modules[name]
        importlib.invalidate_caches()

    clear()
    yield
    clear()


@pytest.fixture
def original(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package of the library's name, as if it were installed."""
    package = tmp_path / NAME
    package.mkdir()
    (package / "__init__.py").write_text("WHOSE = 'theirs'\n")
    (package / "extra.py").write_text("WHOSE = 'theirs too'\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    return package


def ours(name: str) -> bool:
    return importlib.import_module(name) is importlib.import_module(f"mtml.compat.{name}")


def test_without_install_the_name_is_unknown() -> None:
    with pytest.raises(ModuleNotFoundError, match=NAME):
        importlib.import_module(NAME)


def test_a_library_and_its_submodules_are_the_same_objects_under_both_names() -> None:
    mtml.compat.install(NAME)
    # a submodule first: its parents come with it
    for name in (f"{NAME}.utils.data.dataset", NAME, f"{NAME}.modules", f"{NAME}.utils", f"{NAME}.toy.helpers"):
        assert ours(name)
        module = importlib.import_module(name)
        assert module.__name__ == module.__spec__.name == f"mtml.compat.{name}"
    from torchmeta.modules import MetaLinear

    assert MetaLinear is importlib.import_module("mtml.compat.torchmeta").modules.MetaLinear
    assert importlib.util.find_spec(f"{NAME}.modules") is not None
    assert importlib.reload(importlib.import_module(f"{NAME}.version")).VERSION


def test_only_what_was_asked_for_and_twice_is_once() -> None:
    mtml.compat.install(NAME)
    mtml.compat.install(NAME)
    assert sum(type(finder).__module__ == names.__name__ for finder in sys.meta_path) == 1
    assert ours(NAME)
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("learn2learn")
    mtml.compat.install()
    assert ours("learn2learn")


def test_a_submodule_that_is_not_there() -> None:
    mtml.compat.install(NAME)
    with pytest.raises(ModuleNotFoundError, match=f"{NAME}.nothing"):
        importlib.import_module(f"{NAME}.nothing")
    with pytest.raises(ModuleNotFoundError, match="not a package"):
        importlib.import_module(f"{NAME}.version.nothing")


def test_pickles_need_no_install_and_those_by_the_old_name_are_read() -> None:
    mtml.compat.install(NAME)
    from torchmeta.transforms import Categorical

    saved = pickle.dumps(Categorical(3), protocol=0)
    assert b"mtml.compat.torchmeta" in saved
    assert pickle.loads(saved.replace(b"mtml.compat.torchmeta", b"torchmeta")).num_classes == 3


def test_an_original_that_is_there_is_not_replaced(original: Path) -> None:
    mtml.compat.install(NAME)
    assert importlib.import_module(NAME).WHOSE == "theirs"
    assert importlib.import_module(f"{NAME}.extra").WHOSE == "theirs too"
    with pytest.raises(ModuleNotFoundError):  # no mixture: what theirs lacks is not taken from here
        importlib.import_module(f"{NAME}.modules")


def test_replace_goes_before_the_original(original: Path) -> None:
    mtml.compat.install(NAME, replace=True)
    mtml.compat.install(NAME)  # does not take it back
    assert ours(NAME) and ours(f"{NAME}.modules")
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module(f"{NAME}.extra")


def test_replace_after_the_original_was_imported(original: Path) -> None:
    importlib.import_module(NAME)
    with pytest.raises(RuntimeError, match=f"original {NAME} has been imported already .*before anything imports it"):
        mtml.compat.install(NAME, replace=True)
    assert not any(type(finder).__module__ == names.__name__ for finder in sys.meta_path)  # nothing half done


def test_replace_again_is_fine() -> None:
    mtml.compat.install(NAME, replace=True)
    importlib.import_module(NAME)
    mtml.compat.install(NAME, replace=True)


def test_an_original_that_another_finder_knows_is_there_too(original: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Editable:  # what setuptools leaves for an editable installation
        @staticmethod
        def find_spec(name: str, path: object = None, target: object = None) -> object:
            return importlib.util.spec_from_file_location(name, original / "__init__.py") if name == NAME else None

    monkeypatch.undo()  # not on sys.path any more
    monkeypatch.setattr(sys, "meta_path", [*sys.meta_path, Editable])
    mtml.compat.install(NAME)
    assert importlib.import_module(NAME).WHOSE == "theirs"


def test_a_folder_of_that_name_without_code_is_no_original(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / NAME).mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    mtml.compat.install(NAME)
    assert ours(NAME)


def test_an_unknown_library() -> None:
    with pytest.raises(ValueError, match=r"libraries: expected some of higher, learn2learn.*'betty'"):
        mtml.compat.install("betty")


# --- python -m mtml.compat ---


@pytest.fixture
def script(tmp_path: Path) -> Path:
    (tmp_path / "beside.py").write_text("VALUE = 7\n")
    path = tmp_path / "train.py"
    path.write_text(
        textwrap.dedent(
            """
            import sys
            import torchmeta
            import beside

            class Mine: pass

            print(torchmeta.__name__, __name__, sys.argv[1:], beside.VALUE, Mine.__module__, __file__ == sys.argv[0])
            if __name__ == "__main__":
                sys.exit(5)
            """
        )
    )
    return path


def test_a_script_runs_as_python_runs_it(script: Path) -> None:
    command = [sys.executable, "-m", "mtml.compat", str(script), "--lr", "0.1", "-h"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout.split("\n")[0] == "mtml.compat.torchmeta __main__ ['--lr', '0.1', '-h'] 7 __main__ True"
    assert done.returncode == 5, done.stderr


@pytest.fixture
def arguments(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.setattr(sys, "path", ["", *sys.path])
    return monkeypatch


@pytest.mark.parametrize("given", [["no_such.py"], ["."]])
def test_a_script_that_is_not_there(
    given: list[str], arguments: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments.setattr(sys, "argv", ["mtml.compat", *given])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    assert "SCRIPT: expected a Python file, got" in capsys.readouterr().err


@pytest.mark.parametrize(("given", "status"), [([], 2), (["-h"], 0), (["--help"], 0)])
def test_usage(
    given: list[str], status: int, arguments: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments.setattr(sys, "argv", ["mtml.compat", *given])
    with pytest.raises(SystemExit) as stopped:
        main()
    out, err = capsys.readouterr()
    assert stopped.value.code == status and "usage: python -m mtml.compat SCRIPT" in (err if status else out)


def test_an_error_of_the_script_is_its_own(tmp_path: Path, arguments: pytest.MonkeyPatch) -> None:
    path = tmp_path / "broken.py"
    path.write_text("raise LookupError('mine')\n")
    arguments.setattr(sys, "argv", ["mtml.compat", str(path)])
    with pytest.raises(LookupError, match="mine"):
        main()
