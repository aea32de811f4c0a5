"""What is installed, built, detected and chosen here, and why: `mtml doctor` or `python -m mtml_kernels.doctor`.

Nothing but the standard library is imported before a probe runs, and every probe is guarded: a machine on which half of
this fails to import still gets its report. Native code is put to the test in a process of its own (see selftest.py).
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata as metadata
import os
import pkgutil
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from json import dumps, loads
from pathlib import Path
from typing import Any

from mtml_kernels._version import __version__
from mtml_kernels.doctor.cuda import cuda
from mtml_kernels.doctor.processes import in_a_process

__all__ = ["command", "failed", "guarded", "main", "report"]

PACKAGE = Path(__file__).resolve().parents[1]
TESTED_TORCH = ((2, 11), (2, 13))  # the oldest and the newest that the test suite has run with
# What the per-ISA bodies are compiled for (build_support/host.py).
CPU_FEATURES = ("avx2", "fma", "avx512f", "avx512dq", "avx512bw", "avx512vl")
VARIABLES = (
    "CUDAARCHS",
    "CUDA_HOME",
    "CUDA_PATH",
    "CUDA_VISIBLE_DEVICES",
    "CXX",
    "CXXFLAGS",
    "LD_PRELOAD",
    "MAX_JOBS",
    "MKL_NUM_THREADS",
    "NVCC_APPEND_FLAGS",
    "NVCC_PREPEND_FLAGS",
    "PYTHONPATH",
    "TORCH_CUDA_ARCH_LIST",
    "TRITON_INTERPRET",
)
VARIABLE_PREFIXES = ("MTML_", "OMP_", "GOMP_", "KMP_")


def guarded(probe: Callable[[], Any]) -> Any:
    """The probe's result, or {"error": ...}: the report goes on whatever is broken."""
    try:
        return probe()
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a broken install may raise anything, SystemExit included
        return {"error": f"{type(error).__name__}: {error}"}


def failed(value: Any) -> bool:
    return isinstance(value, dict) and set(value) == {"error"}


def _version_of(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"


def _versions() -> dict[str, str]:
    shown = {"mtml-kernels": __version__, "python": f"{platform.python_version()} ({sys.executable})"}
    shown |= {name: _version_of(name) for name in ("torch", "numpy", "triton")}
    return shown | {"torch_tested": _tested(shown["torch"]), "system": platform.platform()}


def _tested(torch_version: str) -> str:
    """Which PyTorch the tests have run with, and whether this one is among them."""
    (oldest, newest), numbers = TESTED_TORCH, re.match(r"(\d+)\.(\d+)", torch_version)
    tested = f"{oldest[0]}.{oldest[1]} to {newest[0]}.{newest[1]}"
    if numbers is None:
        return tested
    among = oldest <= (int(numbers[1]), int(numbers[2])) <= newest
    return (
        f"{tested}, this one among them"
        if among
        else f"{tested}, this one not: the self-test below is all that is known"
    )


def _package() -> dict[str, Any]:
    """Where the package comes from: a folder in the working directory may hide the installed one."""
    found = {"imported_from": str(PACKAGE), "installed": _version_of("mtml-kernels")}
    modules = sorted(path.name for path in PACKAGE.glob("_C*") if path.suffix in {".so", ".pyd"})
    record = PACKAGE / "_build.json"
    return found | {
        "compiled_modules": modules,
        "build_record": loads(record.read_text()) if record.exists() else None,
    }


def _native() -> dict[str, Any]:
    """Whether the compiled module loads, and the instruction set it chose."""
    native = importlib.import_module("mtml_kernels.native")
    return dict(native.info())


def _cpu() -> dict[str, Any]:
    info = Path("/proc/cpuinfo")
    text = info.read_text() if info.exists() else ""
    model = re.search(r"^model name\s*:\s*(.*)$", text, re.MULTILINE)
    flags = re.search(r"^(?:flags|Features)\s*:\s*(.*)$", text, re.MULTILINE)
    has = set(flags[1].split()) if flags else set()
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "model": model[1] if model else platform.processor() or platform.machine(),
        "cores": usable,
        "features": {name: name in has for name in CPU_FEATURES} if has else {},
    }


def _threads() -> dict[str, Any]:
    torch = importlib.import_module("torch")
    maps = Path("/proc/self/maps")
    paths = {line.split()[-1] for line in maps.read_text().splitlines()} if maps.exists() else set()
    runtimes = sorted(path for path in paths if re.search(r"lib(gomp|iomp5|omp)\b.*\.so", path))
    return {"torch": torch.get_num_threads(), "interop": torch.get_num_interop_threads(), "openmp_runtimes": runtimes}


def _gpu() -> dict[str, Any]:
    torch = importlib.import_module("torch")
    devices = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        chip = torch.cuda.get_device_properties(index)
        devices.append(
            {
                "name": chip.name,
                "capability": f"{chip.major}.{chip.minor}",
                "memory_gib": round(chip.total_memory / 2**30),
            }
        )
    return {"torch_cuda": torch.version.cuda, "devices": devices}


def _nvcc() -> dict[str, Any]:
    """Of the places where a build looks for it (build_support/nvcc.py)."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    folders = [home] if home else ["", "/usr/local/cuda"]
    found = (shutil.which("nvcc", path=str(Path(folder, "bin")) if folder else None) for folder in folders)
    path = next(filter(None, found), None)
    if path is None:
        return {"path": None, "version": None}
    shown = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=20).stdout
    release = re.search(r"release ([\d.]+)", shown)
    return {"path": path, "version": release[1] if release else None}


def _triton() -> dict[str, Any]:
    version = _version_of("triton")
    interpreted = os.environ.get("TRITON_INTERPRET", "") not in {"", "0"}
    mode = "not installed" if version == "not installed" else "interpreter" if interpreted else "compiler"
    return {"version": version, "mode": mode}


def _environment() -> dict[str, str]:
    return {k: v for k, v in sorted(os.environ.items()) if k in VARIABLES or k.startswith(VARIABLE_PREFIXES)}


def _registries() -> Iterator[Any]:
    """The backend registries that the modules of mtml_kernels.ops keep, one an op."""
    registry = importlib.import_module("mtml_kernels.registry").Registry
    seen: set[str] = set()
    ops = importlib.import_module("mtml_kernels.ops")
    for module in pkgutil.iter_modules(ops.__path__, "mtml_kernels.ops."):
        for value in vars(importlib.import_module(module.name)).values():
            if isinstance(value, registry) and value.op not in seen:
                seen.add(value.op)
                yield value


def _ops() -> dict[str, dict[str, Any]]:
    """op -> backend -> None where it can run, else the reason why not."""
    return {registry.op: registry.status() for registry in _registries()}


def _self_test() -> dict[str, Any]:
    return in_a_process("mtml_kernels.doctor.selftest")


def _problems(found: dict[str, Any]) -> list[str]:
    """What a reader should act on, each with what to do."""
    problems = [f"{name}: {value['error']}" for name, value in found.items() if failed(value)]
    if not failed(found["package"]) and not found["package"]["compiled_modules"]:
        problems.append(f"no compiled module in {PACKAGE}: run `pip install -e .` in the source tree")
    if not failed(found["threads"]) and len(found["threads"]["openmp_runtimes"]) > 1:
        problems.append("two OpenMP runtimes are loaded and compete for the cores: import torch before other libraries")
    if not failed(found["cuda"]):
        devices = enumerate(found["cuda"].get("devices", []))
        problems += [f"GPU {index}: {device['verdict']}" for index, device in devices if not device["ok"]]
    if not failed(found["self_test"]):
        wrong = [name for name, result in found["self_test"].items() if not result.get("ok")]
        problems += [f"self-test of backend {name!r}: {found['self_test'][name]}" for name in wrong]
    return problems


PROBES: dict[str, Callable[[], Any]] = {
    "versions": _versions,
    "package": _package,
    "native": _native,
    "cpu": _cpu,
    "threads": _threads,
    "gpu": _gpu,
    "nvcc": _nvcc,
    "cuda": cuda,
    "triton": _triton,
    "environment": _environment,
    "ops": _ops,
    "self_test": _self_test,
}


def report() -> dict[str, Any]:
    """Everything the doctor knows, as values that JSON can hold. Takes a few seconds; never raises.

    A probe that fails gives ``{"error": "..."}`` under its name; ``problems`` lists what needs action.

    Example:
        >>> from mtml_kernels import doctor
        >>> sorted(doctor.report()["ops"]["inner_loop"])
        ['cpu', 'reference', 'torch']
    """
    found = {name: guarded(probe) for name, probe in PROBES.items()}
    problems = guarded(lambda: _problems(found))
    return found | {"problems": [problems["error"]] if failed(problems) else problems}


def _flat(value: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """(label, text) of every leaf; lists of plain values on one line, nested tables as label.inner."""
    if isinstance(value, dict):
        if not value:
            yield prefix or "none", ""
        for name, inner in value.items():
            yield from _flat(inner, f"{prefix}.{name}" if prefix else str(name))
    elif isinstance(value, list) and any(isinstance(item, dict) for item in value):
        for index, item in enumerate(value):
            yield from _flat(item, f"{prefix}[{index}]")
    elif isinstance(value, list):
        yield prefix, ", ".join(map(str, value)) or "-"
    else:
        yield prefix, _plain(value)


def _plain(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "-" if value in (None, "") else str(value)


def _readable(name: str, value: Any) -> Any:
    """The same facts with fewer words, for the sections whose structure is made for programs."""
    if failed(value):
        return value
    if name == "ops":
        return {
            op: {b: "available" if why is None else f"not here: {why}" for b, why in s.items()}
            for op, s in value.items()
        }
    if name == "cpu":
        return value | {"features": [feature for feature, has in value["features"].items() if has]}
    if name == "self_test":
        return {backend: _verdict(result) for backend, result in value.items()}
    return value


def _verdict(result: dict[str, Any]) -> str:
    if "error" in result:
        return f"FAILED: {result['error']}"
    errors = ", ".join(
        f"{dtype}: loss {of['loss']:.1e}, gradient {of['gradient']:.1e}" for dtype, of in result["errors"].items()
    )
    return f"{'ok' if result['ok'] else 'WRONG'} (relative error, {errors})"


def render(found: dict[str, Any]) -> str:
    """The report as text: one section a probe, labels and values in two columns."""
    lines = []
    for name, value in found.items():
        lines.append(name.replace("_", " "))
        if name == "problems":
            lines += [f"  ! {problem}" for problem in value] or ["  none"]
            continue
        rows = list(_flat(_readable(name, value)))
        width = max(len(label) for label, _ in rows)
        lines += [f"  {label:<{width}}  {text}".rstrip() for label, text in rows]
    return "\n".join(lines)


def main(json: bool = False) -> None:
    """Prints the report, as text or as JSON.

    Raises:
        OSError: where it cannot be printed.
    """
    found = report()
    print(dumps(found, indent=2, default=str) if json else render(found), flush=True)


def command() -> None:
    """As a program: what hinders it is one line."""
    parser = argparse.ArgumentParser(
        prog="python -m mtml_kernels.doctor", description="What is installed and works here"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    json = parser.parse_args().json
    try:
        main(json)
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        sys.exit(130)
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python tries once more at its end
        if not isinstance(error, BrokenPipeError):  # who reads it has enough, `head` for one
            print(f"error: the report cannot be printed: {error.strerror}", file=sys.stderr)
        sys.exit(1)
