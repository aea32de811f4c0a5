"""CUDA sources compiled for the CPU by a C++ compiler, plain or under a sanitizer, and programs made of them."""

from __future__ import annotations

import fcntl
import functools
import hashlib
import json
import os
import shlex
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc"
INCLUDE = (f"-I{CSRC / 'include'}", f"-I{CSRC}")
COMMON = (
    "-std=c++17",
    "-fPIC",
    "-pthread",
    "-fvisibility=hidden",
    "-ffp-contract=off",
    "-Wall",
    "-Wextra",
    "-Werror",
    "-Wno-psabi",
    "-Wno-unknown-pragmas",
)
FLAVOURS = {
    "plain": ("-O2",),
    "ucontext": ("-O1", "-DMTMLK_HOST_UCONTEXT"),  # as where there is no switch of our own
    "thread": ("-O1", "-g1", "-fsanitize=thread"),
    "address": ("-O1", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"),
}
LIBRARIES = {"thread": ("libtsan.so",), "address": ("libasan.so", "libubsan.so")}
ORDERS = range(5)  # of threads: from the first, from the last, three times at random


def compiler() -> list[str]:
    return shlex.split(os.environ.get("CXX") or "g++")


@functools.cache
def missing(flavour: str) -> str | None:
    """Why nothing can be compiled so here."""
    if shutil.which(compiler()[0]) is None:
        return f"no C++ compiler {compiler()[0]}"
    for name in LIBRARIES.get(flavour, ()):
        done = subprocess.run([*compiler(), f"-print-file-name={name}"], capture_output=True, text=True)
        if not Path(done.stdout.strip()).is_absolute():
            return f"the C++ compiler has no {name}"
    return None


def _key(source: Path, command: list[str]) -> str:
    inputs = [*CSRC.joinpath("cuda").rglob("*"), *CSRC.joinpath("include").rglob("*"), *source.parent.rglob("*")]
    text = shlex.join(command).encode() + b"".join(p.read_bytes() for p in sorted(inputs) if p.is_file())
    return hashlib.sha256(text).hexdigest()[:12]


def build(source: Path, flavour: str = "plain", *flags: str) -> Path:
    """The program of a .cu file, compiled where no equal one lies under build/.

    With -shared a library, for ctypes: of the functions that are MTMLK_API. A sanitizer wants a program.
    """
    if reason := missing(flavour):
        pytest.skip(reason)
    command = [*compiler(), *COMMON, *FLAVOURS[flavour], *INCLUDE, *flags, "-x", "c++", str(source)]
    kind = hashlib.sha256(shlex.join(flags).encode()).hexdigest()[:6]
    name = f"{source.parent.name}-{source.stem}-{flavour}-{kind}"
    folder = ROOT / "build" / "cuda-host"
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"{name}-{_key(source, command)}"
    with open(folder / f"{name}.lock", "w") as lock:  # test processes side by side: one compiles, the others wait
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists():
            for old in folder.glob(f"{name}-*"):
                old.unlink()
            _compile(command, target)
    return target


def _compile(command: list[str], target: Path) -> None:
    partial = target.with_name(f"{target.name}.partial")
    done = subprocess.run([*command, "-o", str(partial)], cwd=ROOT, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{shlex.join(command)}\n{done.stderr}")
    partial.replace(target)


@dataclass(frozen=True)
class Run:
    status: int  # negative: the signal that ended it
    output: str
    errors: str

    @property
    def report(self) -> dict[str, Any]:
        """What a case of tests/cuda/kernels prints."""
        assert self.status == 0, self.errors
        found: dict[str, Any] = json.loads(self.output)
        return found


def run(program: Path, *arguments: str, order: int = 0) -> Run:
    kept = {k: v for k, v in os.environ.items() if not k.endswith("SAN_OPTIONS")}
    done = subprocess.run(
        [str(program), *arguments],
        env=kept | {"MTML_HOST_ORDER": str(order)},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    return Run(done.returncode, done.stdout, done.stderr)
