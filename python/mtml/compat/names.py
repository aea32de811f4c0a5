"""`import learn2learn` finds `mtml.compat.learn2learn`: the same module under a second name, submodules too."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import Loader
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType

__all__ = ["LIBRARIES", "install"]

LIBRARIES = ("higher", "learn2learn", "torchmeta", "torchopt")


def install(*libraries: str, replace: bool = False) -> None:
    """Let ``import learn2learn`` (higher, torchmeta, torchopt) find the modules of `mtml.compat`.

    Args:
        libraries: which of `LIBRARIES`; all of them where none is named.
        replace: also where the original is installed; otherwise the original is found, as before.

    Raises:
        ValueError: no such library here.
        RuntimeError: with ``replace=True``, the original has been imported already.

    Example:
        >>> import mtml.compat
        >>> mtml.compat.install("higher")
        >>> import higher
    """
    wanted = libraries or LIBRARIES
    for name in wanted:
        if name not in LIBRARIES:
            raise ValueError(f"libraries: expected some of {', '.join(LIBRARIES)}, got {name!r}")
        if replace:
            _refuse_imported(name)
    finder = next((f for f in sys.meta_path if isinstance(f, _Finder)), None)
    if finder is None:
        finder = _Finder()
        sys.meta_path.insert(0, finder)
    for name in wanted:
        finder.replaces[name] = replace or finder.replaces.get(name, False)


def _refuse_imported(name: str) -> None:
    here = sys.modules.get(name)
    if here is not None and here is not sys.modules.get(f"mtml.compat.{name}"):
        raise RuntimeError(
            f"libraries: the original {name} has been imported already ({getattr(here, '__file__', None)}); call "
            "install(replace=True) before anything imports it"
        )


class _Finder:
    """Finds ``name.rest`` as ``mtml.compat.name.rest``, for the names in `replaces`: whether before the original."""

    def __init__(self) -> None:
        self.replaces: dict[str, bool] = {}

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        library = name.partition(".")[0]
        if library not in self.replaces or not self._is_ours(name, library):
            return None
        real = f"mtml.compat.{name}"
        found = find_spec(real)
        if found is None:
            return None
        is_package = found.submodule_search_locations is not None
        return ModuleSpec(name, _Alias(real), origin=found.origin, is_package=is_package)

    def _is_ours(self, name: str, library: str) -> bool:
        if name != library:  # a submodule is whose its library is
            return sys.modules.get(library) is sys.modules.get(f"mtml.compat.{library}")
        return self.replaces[library] or not self._installed(library)

    def _installed(self, library: str) -> bool:
        """Whether any other finder knows the original; a folder of its name without code (a clone, data) is none."""
        others = [finder.find_spec for finder in sys.meta_path if finder is not self and hasattr(finder, "find_spec")]
        found = [find(library, None) for find in others]
        return any(spec is not None and spec.origin is not None for spec in found)


class _Alias(Loader):
    """Loads a module by giving the one of another name."""

    def __init__(self, real: str) -> None:
        self.real = real

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = importlib.import_module(self.real)
        self.spec = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self.spec  # the import system put the second name's there
