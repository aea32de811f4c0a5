"""``python -m bench export --format hf-kernels``: a folder that Hugging Face's ``kernels benchmark FOLDER`` runs.

That command takes the scripts ``benchmarks/benchmark*.py`` and the kernel from ``build/VARIANT/``, a Python package
beside a metadata.json (huggingface/kernels, read at 8ac69fc, 2026-08-20). The variants written here are this project's
functions as they are installed: no kernel is built, and nothing is to be uploaded.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

from bench.report.record import environment

SCRIPTS = Path(__file__).resolve().parents[2] / "benchmarks"
BACKENDS = ("cpu", "cuda")
FUNCTIONS = ("head_inner_loop", "inner_loop", "linear_multihead_loss", "multihead_loss", "trace")
PACKAGE = f'''"""The installed mtml_kernels, as a kernel of Hugging Face's ``kernels``."""

from mtml_kernels import {", ".join(FUNCTIONS)}

__all__ = [{", ".join(f'"{name}"' for name in FUNCTIONS)}]
'''


def metadata(backend: str) -> dict[str, object]:
    """What describes a variant; its id ends with the commit, which the command prints."""
    commit = str(environment().get("sha") or "unknown").replace("-", "")
    return {
        "id": f"_mtml_kernels_{backend}_{commit}",
        "name": "mtml-kernels",
        "version": 1,
        "license": "MIT",
        "python-depends": [],
        "backend": {"type": backend},
    }


def write(out: Path) -> Iterator[Path]:
    """The scripts, and a variant each for CPUs and NVIDIA GPUs; yields what was written."""
    for script in sorted(SCRIPTS.glob("benchmark*.py")):
        target = out / "benchmarks" / script.name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(script, target)
        yield target
    for backend in BACKENDS:
        folder = out / "build" / f"torch-{backend}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "__init__.py").write_text(PACKAGE)
        (folder / "metadata.json").write_text(json.dumps(metadata(backend), indent=2) + "\n")
        yield folder
