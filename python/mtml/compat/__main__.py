"""``python -m mtml.compat SCRIPT [ARGUMENTS]``: run a script that imports libraries which are not installed.

Processes that the script starts anew (multiprocessing by spawn) know nothing of it: such a script calls
``mtml.compat.install()`` itself, before its imports.
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

from mtml.compat.names import LIBRARIES, install

USAGE = f"usage: python -m mtml.compat SCRIPT [ARGUMENTS]\nWhere absent, these are mtml's: {', '.join(LIBRARIES)}"


def main() -> None:
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
        asked = len(sys.argv) > 1
        print(USAGE, file=sys.stdout if asked else sys.stderr)
        raise SystemExit(0 if asked else 2)
    script = Path(sys.argv[1])
    if not script.is_file():
        print(f"SCRIPT: expected a Python file, got {str(script)!r}", file=sys.stderr)
        raise SystemExit(2)
    install()
    sys.argv = sys.argv[1:]
    if not sys.flags.safe_path:
        sys.path[0] = str(script.resolve().parent)
    runpy.run_path(str(script), run_name="__main__")


if __name__ == "__main__":
    main()
