"""Calls with mutated arguments, on the engine under sanitizers:

    python tests/fuzz/run.py [--calls 100000] [--seed 0] [--only SEED | --control]

Every call must return or raise an error in words. A crash names its seed, and `--only SEED` runs that call alone;
`--control` makes one that must be noticed.
"""

from __future__ import annotations

import argparse
import collections
import importlib.util
import json
import os
import random
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path

HERE = Path(__file__).resolve().parent
# A kernel that reads memory which PyTorch has freed, say, is an error of the engine; what a library leaks is not.
ASAN = "detect_leaks=0:allocator_may_return_null=1:max_allocation_size_mb=1024:alloc_dealloc_mismatch=0:exitcode=99"
MODULE, PROGRESS = "MTML_FUZZ_MODULE", "MTML_FUZZ_PROGRESS"


def run_under_sanitizers(*options: str) -> str:
    """The report of a run in a process of its own, as JSON; `options` as on the command line.

    Raises:
        RuntimeError: a call crashed or gave no clean error; the text has its seed and what the sanitizer says.
    """
    from fuzz.build import build, runtime

    with tempfile.TemporaryDirectory() as folder:
        progress = Path(folder, "seed")
        variables = {
            "LD_PRELOAD": runtime() or "",
            "ASAN_OPTIONS": ASAN,
            "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
            "OMP_NUM_THREADS": "1",
            "MTML_CPU_ISA": "base",
            MODULE: str(build()),
            PROGRESS: str(progress),
        }
        command = [sys.executable, "-P", str(HERE / "run.py"), *options]
        inherited = {name: value for name, value in os.environ.items() if name != "MTML_BACKEND"}
        done = subprocess.run(command, env=inherited | variables, capture_output=True, text=True)
        if done.returncode != 0:
            at = progress.read_text() if progress.exists() else "none"
            raise RuntimeError(f"exit status {done.returncode} in the call of seed {at}\n{_said(done.stderr)}")
        return done.stdout


def _said(stderr: str) -> str:
    """What a sanitizer reports, less the frames of PyTorch and Python."""
    report = stderr[max(stderr.find("ERROR: "), 0) :].splitlines()
    others = ("site-packages", " Python/", " Objects/", " Modules/", "libtorch", "<unknown module>", "_start")
    return "\n".join(line for line in report if not any(other in line for other in others))[:6000]


def _load(path: str) -> None:
    """The module under sanitizers in the place of the installed one; it knows float64 only."""
    import torch

    spec = importlib.util.spec_from_file_location("mtml_kernels._C", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["mtml_kernels._C"] = module
    spec.loader.exec_module(module)
    from mtml_kernels.schema.dtypes import DTYPES

    del DTYPES[torch.float32]
    # PyTorch shows the arguments that it cannot convert, and reads on where a tensor's memory is gone.
    torch.Tensor.__repr__ = lambda t: f"tensor {list(t.shape)}"  # type: ignore[method-assign, misc]


def _attempt(seed: int, calls: list, progress: Path) -> tuple[str, str]:
    """The call's name and its end: "returned", or the class of a clean error."""
    import torch
    from fuzz.mutate import faults

    from mtml_kernels.errors import BackendUnavailable

    clean = (ValueError, TypeError, RuntimeError, NotImplementedError, MemoryError, BackendUnavailable)
    progress.write_text(str(seed))
    rng = random.Random(seed)
    torch.manual_seed(seed)
    call = rng.choice(calls)
    args = faults(rng, call.name, call.args)
    try:
        call.function(*args)
    except clean as error:
        assert str(error), f"seed {seed}: {call.name}: an error without words"
        return call.name, type(error).__name__
    except Exception as error:
        raise AssertionError(f"seed {seed}: {call.name}: {type(error).__name__} is no error in words") from error
    return call.name, "returned"


def _run(calls: int, seed: int, only: int | None) -> dict[str, object]:
    _load(os.environ[MODULE])
    from fuzz.corpus import corpus

    warnings.simplefilter("ignore")
    progress = Path(os.environ[PROGRESS])
    known = corpus()
    ends: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    start = time.process_time()
    seeds = range(seed, seed + calls) if only is None else [only]
    failed = []
    for each in seeds:
        try:
            name, end = _attempt(each, known, progress)
        except AssertionError:
            failed.append(traceback.format_exc(limit=-3))
            continue
        ends[name][end] += 1
    if failed:
        print(len(failed), "calls gave no clean error, the first of them:", *failed[:10], sep="\n", file=sys.stderr)
        raise SystemExit(1)
    counts = {name: dict(counter) for name, counter in sorted(ends.items())}
    return {"calls": len(seeds), "seed": seed, "cpu_seconds": round(time.process_time() - start), "ends": counts}


def _control() -> None:
    """A head's weight that is shorter than the engine is told."""
    _load(os.environ[MODULE])
    import torch

    from mtml_kernels import native

    tensors = [torch.zeros(n, dtype=torch.float64) for n in (6, 6, 5, 1, 2)]
    outputs = [torch.zeros(n, dtype=torch.float64) for n in (1, 4, 1, 4)]
    x, query, weight, rates, y = (t.data_ptr() for t in tensors)
    sizes, numbers = [1, 1, 1, 2, 2, 3, 2, 1, 1, 0], [0, 0, 0.0, 0, 0, 0.0, 0.0, 0.0]
    inputs = [x, query, weight, 0, rates, y, 0, 0, 0, 0, 0, 0, 0, 0]
    native.engine().head_loop(sizes, numbers, inputs, [t.data_ptr() for t in outputs])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int)
    parser.add_argument("--control", action="store_true")
    options = parser.parse_args()
    sys.path.insert(0, str(HERE.parent))
    if MODULE not in os.environ:
        print(run_under_sanitizers(*sys.argv[1:]))
    elif options.control:
        _control()
    else:
        print(json.dumps(_run(options.calls, options.seed, options.only), indent=2))


if __name__ == "__main__":
    main()
