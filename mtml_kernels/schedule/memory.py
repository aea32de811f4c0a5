"""How much of the way there is kept for the way back."""

from __future__ import annotations

import math

__all__ = ["BUDGET", "stretches"]

# Bytes that a call may keep without a second thought. Beyond, steps are run again: a third more work for a square root
# of the memory (5 steps of mini_conv keep 1.4 GiB, 100 steps of omniglot_mlp's 32 tasks 0.6).
BUDGET = 1 << 31
# A long loop may keep an eighth: the more steps, the more a square root of them saves.
LONG = 32


def stretches(steps: int, kept: int, state: int) -> list[range]:
    """Stretches of steps that are run again on the way back, last first.

    Args:
        steps: K.
        kept: bytes of what all steps leave for the way back.
        state: bytes of one step's parameters and moments, which a checkpoint holds.

    With L steps to a stretch, K / L checkpoints of `state` and L steps of `kept / K` are alive at once: the sum is
    smallest where L = sqrt(K state / (kept / K)). The last stretch runs again like the others: autograd holds what the
    way there left until the way back is over.
    """
    if steps < 2 or kept <= (BUDGET if steps < LONG else BUDGET // 8):
        return []
    length = min(max(round(math.sqrt(steps * steps * state / kept)), 1), steps)
    starts = range(0, steps, length)
    return [range(start, min(start + length, steps)) for start in reversed(starts)]
