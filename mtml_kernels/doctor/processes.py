"""Native code at work in a process of its own: an illegal instruction or a hang there is a finding."""

from __future__ import annotations

import signal
import subprocess
import sys
from json import loads
from typing import Any

__all__ = ["in_a_process"]

SECONDS = 120  # a limit for a machine that hangs; what runs takes about a second


def in_a_process(module: str) -> dict[str, Any]:
    """The JSON that `main` of a module prints, or {"error": how its process ended}."""
    code = f"import sys; sys.path[:] = {sys.path!r}; from {module} import main; main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=SECONDS)
    if done.returncode < 0:
        return {"error": f"the process died of {signal.Signals(-done.returncode).name}"}
    if done.returncode > 0:
        return {"error": (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]}
    return dict(loads(done.stdout.splitlines()[-1]))
