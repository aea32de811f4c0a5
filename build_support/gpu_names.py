"""GPU architectures, in every spelling that people type."""

from __future__ import annotations

import re
from typing import NamedTuple

__all__ = ["GENERATIONS", "Target", "parse_target"]

# Names of generations, as TORCH_CUDA_ARCH_LIST has them. A family ("f") holds all chips of its major number.
GENERATIONS = {
    "maxwell": ("50", "52"),
    "pascal": ("60", "61"),
    "volta": ("70",),
    "turing": ("75",),
    "ampere": ("80", "86"),
    "ampere+tegra": ("87",),
    "ada": ("89",),
    "hopper": ("90",),
    "blackwell": ("100f", "120f"),
    "blackwell+tegra": ("110f",),
}
# sm_90, compute_90, 90, 9.0, each with a or f, and one of -real, -virtual, +PTX.
SPELLING = re.compile(r"(?:(sm|compute)_?)?(?:(\d{2,3})|(\d{1,2})\.(\d))([af]?)(-real|-virtual|\+ptx)?")
# (prefix, suffix) -> whether native code is meant, and whether PTX is. The other pairs contradict themselves.
FORMS = {
    ("", ""): (True, False),
    ("", "-real"): (True, False),
    ("", "-virtual"): (False, True),
    ("", "+ptx"): (True, True),
    ("sm", ""): (True, False),
    ("sm", "+ptx"): (True, True),
    ("compute", ""): (False, True),
}


class Target(NamedTuple):
    """One code in the binary. Targets sort by age."""

    number: int  # ten times the compute capability
    variant: str = ""  # "a": this chip alone; "f": the chips of its family; "": all later ones of the same major number
    ptx: bool = False  # PTX, which the driver compiles for any later GPU, instead of native code

    @property
    def arch(self) -> str:
        return f"{self.number}{self.variant}"

    @property
    def code(self) -> str:
        """As nvcc calls it.

        Example:
            >>> Target(90, "a").code, Target(120, ptx=True).code
            ('sm_90a', 'compute_120')
        """
        return f"{'compute' if self.ptx else 'sm'}_{self.arch}"

    @property
    def gencode(self) -> str:
        return f"-gencode=arch=compute_{self.arch},code={self.code}"


def parse_target(word: str) -> list[Target]:
    """What a word (in lower case) asks for; nothing where it is no architecture.

    Example:
        >>> parse_target("9.0a+ptx")
        [Target(number=90, variant='a', ptx=False), Target(number=90, variant='a', ptx=True)]
    """
    match = SPELLING.fullmatch(word)
    form = FORMS.get((match[1] or "", match[6] or "")) if match else None
    if match is None or form is None:
        return []
    number = int(match[2] or match[3] + match[4])
    return [Target(number, match[5], ptx) for ptx, asked in zip((False, True), form, strict=True) if asked]
