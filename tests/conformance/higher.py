"""higher's own tests against `mtml.compat.higher`: ``python tests/conformance/higher.py SOURCE [pytest arguments]``.

They import parameterized. None is left out. Those by finite differences draw random numbers without a seed and pass
where 6 of 10 draws are close: the original fails one or two of them now and then, with Adagrad mostly.
"""

from __future__ import annotations

from harness import main

if __name__ == "__main__":
    main("higher", ["tests"], skipped={}, ignored={})
