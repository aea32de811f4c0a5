"""Builds the engine under AddressSanitizer and UBSan: `python tests/fuzz/build.py` prints the module's path.

The base instruction set in one type (float64), which is half the compilation; the same sources otherwise.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pybind11

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT))  # build_support/ is not installed; last: the installed packages are what is tested

from build_support import compilation  # noqa: E402

COMMON = ("-std=c++17", "-fPIC", "-pthread", "-fvisibility=hidden", "-ffp-contract=off", "-g1", "-w")
DEFINES = ("-DMTMLK_HAVE_BASE", "-DMTMLK_SINGLE=double")
# What compiles fast enough for code that is instantiated for every node and form.
OF_KERNELS = "address,signed-integer-overflow,shift,integer-divide-by-zero,bounds,float-cast-overflow"
OF_PLANNING = "address,undefined,float-cast-overflow"


def compiler() -> list[str]:
    return shlex.split(os.environ.get("CXX") or "g++")


def runtime() -> str | None:
    """What must be loaded first: the sanitizer's shared library and, so that it finds what it intercepts, C++'s.

    None where the compiler has none.
    """
    if shutil.which(compiler()[0]) is None:
        return None
    paths = []
    for name in ("libasan.so", "libstdc++.so.6"):
        done = subprocess.run([*compiler(), f"-print-file-name={name}"], capture_output=True, text=True)
        paths.append(Path(done.stdout.strip()))
    return None if not all(p.is_absolute() and p.exists() for p in paths) else " ".join(str(p.resolve()) for p in paths)


def _flags(source: Path) -> list[str]:
    if source.parent.name == "bindings":
        return ["-O0", f"-I{sysconfig.get_path('include')}", f"-isystem{pybind11.get_include()}"]
    kernels = source.name.startswith("isa_")
    sanitize = OF_KERNELS if kernels else OF_PLANNING
    return ["-O1" if kernels else "-O0", f"-fsanitize={sanitize}", "-fno-sanitize-recover=all"]


def _run(command: list[str], target: Path) -> None:
    partial = target.with_name(f"{target.name}.{os.getpid()}")
    done = subprocess.run([*command, "-o", str(partial)], cwd=ROOT, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{shlex.join(command)}\n{done.stderr}")
    partial.replace(target)


def build() -> Path:
    """The module under sanitizers, compiled where no equal one lies under build/."""
    sources = compilation.sources(("base",), root=ROOT)  # without CUDA
    inputs = [*sources, *sorted((ROOT / "csrc").rglob("*.h"))]
    text = shlex.join(compiler()) + sysconfig.get_config_var("SOABI")
    key = hashlib.sha256(text.encode() + b"".join(p.read_bytes() for p in inputs)).hexdigest()[:12]
    folder = ROOT / "build" / f"fuzz-{key}"
    module = folder / "_C.so"
    folder.parent.mkdir(exist_ok=True)
    with open(folder.parent / "fuzz.lock", "w") as lock:  # test processes side by side: one compiles, the others wait
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not module.exists():
            _compile(sources, folder, module)
    return module


def _compile(sources: list[Path], folder: Path, module: Path) -> None:
    for old in (ROOT / "build").glob("fuzz-*"):
        shutil.rmtree(old, ignore_errors=True)
    folder.mkdir()
    include = [f"-I{ROOT / 'csrc' / 'include'}", f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'csrc' / 'cpu'}"]

    def compiled(source: Path) -> str:
        target = folder / ("-".join(source.relative_to(ROOT / "csrc").with_suffix(".o").parts))
        _run([*compiler(), *COMMON, *DEFINES, *include, *_flags(source), "-c", str(source)], target)
        return str(target)

    with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)) as pool:
        objects = list(pool.map(compiled, sources))
    _run([*compiler(), *objects, "-shared", "-pthread", f"-fsanitize={OF_PLANNING}"], module)


if __name__ == "__main__":
    print(build())
