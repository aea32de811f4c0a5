"""Run another library's own tests against `mtml.compat`: nothing of theirs is kept here.

``python tests/conformance/<library>.py SOURCE [pytest arguments]`` takes an unpacked source tree of the library, or an
archive of one (.tar.gz, .zip; ``pip download --no-deps --no-binary :all: higher`` brings one where it has tests).
Only the named test files are copied out, so the original's package is not there to be imported.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

PLUGIN = '''
"""Loaded before any test is: the library's name finds mtml.compat."""
import mtml.compat
import pytest

mtml.compat.install({library!r}, replace=True)
SKIPPED = {skipped!r}


def pytest_collection_modifyitems(items):
    for item in items:
        for part, reason in SKIPPED.items():
            if part in item.nodeid:
                item.add_marker(pytest.mark.skip(reason=reason))
'''


def main(library: str, tests: Sequence[str], skipped: Mapping[str, str], ignored: Mapping[str, str]) -> None:
    """Run ``tests`` (paths in the source tree: files or folders) and exit with pytest's status.

    Args:
        skipped: {part of a test's id: why it cannot be had}; each is printed.
        ignored: {path in the tree: why} for files that cannot even be imported.
    """
    parser = argparse.ArgumentParser(description=f"run the tests of {library} against mtml.compat.{library}")
    parser.add_argument("source", type=Path, help="an unpacked source tree, or an archive of one")
    args, rest = parser.parse_known_args()
    if not args.source.exists():
        parser.error(f"source: expected a folder or an archive, got {str(args.source)!r}, which is not there")
    for what, why in {**ignored, **skipped}.items():
        print(f"left out: {what}: {why}", flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        tree = _tree(args.source, Path(scratch) / "source")
        room = Path(scratch) / "tests"
        for path in tests:
            _copy(tree, path, room, ignored)
        (room / "conformance_plugin.py").write_text(PLUGIN.format(library=library, skipped=dict(skipped)))
        command = [sys.executable, "-m", "pytest", "-p", "conformance_plugin", "-q", "-rs", *rest, *tests]
        command += ["-W", "ignore", "-o", "addopts=", "--rootdir", str(room)]
        raise SystemExit(subprocess.run(command, cwd=room, check=False).returncode)


def _tree(source: Path, scratch: Path) -> Path:
    if source.is_dir():
        return source
    if source.suffix == ".zip":
        shutil.unpack_archive(source, scratch)
    else:
        shutil.unpack_archive(source, scratch, filter="data")
    folders = [p for p in scratch.iterdir() if p.is_dir()]
    if len(folders) != 1:
        raise SystemExit(f"source: expected an archive of one folder, got {[p.name for p in folders]}")
    return folders[0]


def _copy(tree: Path, path: str, room: Path, ignored: Mapping[str, str]) -> None:
    origin, place = tree / path, room / path
    if not origin.exists():
        raise SystemExit(f"source: expected {path} in it, which is not there; released archives may lack tests")
    place.parent.mkdir(parents=True, exist_ok=True)
    if origin.is_file():
        shutil.copy(origin, place)
        return
    shutil.copytree(origin, place, dirs_exist_ok=True)
    for gone in ignored:
        (room / gone).unlink(missing_ok=True)
