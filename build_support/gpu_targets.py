"""Which GPUs the CUDA code is compiled for: what a variable asks for, held against what nvcc knows."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping

from build_support.gpu_names import GENERATIONS, Target, parse_target
from build_support.messages import fail

__all__ = ["VARIABLES", "TargetList", "requested"]

VARIABLES = ("MTML_CUDA_ARCHS", "TORCH_CUDA_ARCH_LIST", "CUDAARCHS")  # the first that says something decides
DEFAULT = ("75", "80", "86", "89", "90", "100f", "120f")


def requested(environment: Mapping[str, str]) -> tuple[str, str]:
    """The variable that decides and what it says; of the first, nothing, where none does."""
    return next(((name, text) for name in VARIABLES if (text := environment.get(name, "").strip())), (VARIABLES[0], ""))


class TargetList:
    """Turns a list as people type it into targets.

    Args:
        source: the variable that it comes from, for errors.
        nvcc: nvcc's version, for errors.
        known: the codes that this nvcc can write ("sm_90", "compute_90").
        devices: tells the compute capabilities of this machine's GPUs, or raises LookupError; asked for "native" only.
    """

    def __init__(
        self, source: str, nvcc: str, known: Collection[str], devices: Callable[[], list[tuple[int, int]]]
    ) -> None:
        self.source, self.nvcc, self.known, self.devices = source, nvcc, known, devices

    def targets(self, text: str) -> tuple[Target, ...]:
        """Sorted, each once.

        Raises:
            SystemExit: a word of the list is unknown; the message names it.
        """
        words = re.split(r"[;,\s]+", text.strip())
        found = {target for word in words if word for target in self.of_word(word)} or set(self.default())
        return tuple(sorted(found - set(self.superseded(found))))

    def of_word(self, word: str) -> Iterable[Target]:
        name, plus_ptx, _ = word.lower().partition("+ptx")
        if word.lower() == "native":
            found: list[Target] = self.native()
        elif word.lower() in {"all", "all-major"}:
            found = self.all_known(major=word.lower() == "all-major")
        elif name in GENERATIONS:
            found = self.preferred(GENERATIONS[name])
            found += [target._replace(variant="", ptx=True) for target in found[-1:] if plus_ptx]
        else:
            found = parse_target(word.lower())
        if not found or not all(target.code in self.known for target in found):
            raise fail(f"{self.source}: {word!r} is no GPU architecture that nvcc {self.nvcc} knows; {self.menu()}")
        return found

    def preferred(self, archs: Iterable[str]) -> list[Target]:
        """What nvcc knows of a list of ours; a chip's own code where it does not know families yet."""
        found = []
        for arch in archs:
            (family,) = parse_target(arch)
            choices = (family, family._replace(variant=""))
            found += [target for target in choices if target.code in self.known][:1]
        return found

    def default(self) -> list[Target]:
        found = self.preferred(DEFAULT)
        if not found:
            raise fail(f"nvcc {self.nvcc} knows none of {';'.join(DEFAULT)}: name others in {VARIABLES[0]}")
        # PTX of a plain one serves every later GPU without code of its own (11.0), that of a family the family alone.
        newest = max((target for target in found if not target.variant), default=found[-1])
        return [*found, newest._replace(ptx=True)]

    def plain(self) -> list[Target]:
        every = (parse_target(code) for code in self.known if code.startswith("sm_"))
        return sorted(target for targets in every for target in targets if not target.variant)

    def all_known(self, major: bool) -> list[Target]:
        plain = self.plain()
        found = [target for target in plain if not major or target.number % 10 == 0 or target == plain[0]]
        return [*found, *(target._replace(ptx=True) for target in found[-1:])]

    def native(self) -> list[Target]:
        try:
            capabilities = self.devices()
        except LookupError as reason:
            wanted = f"{self.source}: 'native' asks for the GPUs of this machine, and there is none ({reason.args[0]})"
            raise fail(f"{wanted}; name the architecture, e.g. {VARIABLES[0]}=90") from None
        found = [Target(10 * major + minor) for major, minor in capabilities]
        unknown = [target for target in found if target.code not in self.known]
        if unknown:
            here = f"{self.source}: 'native': this machine has a GPU of architecture {unknown[0].arch}"
            raise fail(f"{here}, which nvcc {self.nvcc} does not know; {self.menu()}")
        return found

    def superseded(self, targets: Iterable[Target]) -> Iterable[Target]:
        """Plain code beside that of its family: nvcc refuses the pair, and the family's runs on the same GPUs."""
        families = {target.number for target in targets if target.variant == "f" and not target.ptx}
        return [target for target in targets if target.number in families and not (target.variant or target.ptx)]

    def menu(self) -> str:
        archs = sorted({target for code in self.known for target in parse_target(code) if not target.ptx})
        return f"it knows {', '.join(target.arch for target in archs)}; also native, all, all-major and names (Hopper)"
