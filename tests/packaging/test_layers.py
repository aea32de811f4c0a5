"""Imports point one way: every Python file of both packages, walked; lazy imports count, those for types do not."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import pytest

import mtml
import mtml_kernels

# From below to above; a layer may import what stands in it or before it. The longest name that fits decides.
LAYERS: tuple[tuple[str, ...], ...] = (
    (
        "mtml_kernels._version",
        "mtml_kernels.errors",
        "mtml_kernels.memory",
        "mtml_kernels.neutral",
        "mtml_kernels.recurrent",
    ),
    (
        "mtml_kernels.transforms",
        "mtml_kernels.checks",
        "mtml_kernels.registry",
        "mtml_kernels.rates",
        "mtml_kernels.precision",
    ),
    ("mtml_kernels.schema",),
    ("mtml_kernels.losses", "mtml_kernels.batch_norm", "mtml_kernels.costs"),
    ("mtml_kernels.program",),
    (
        "mtml_kernels.reference",
        "mtml_kernels.general",
        "mtml_kernels.schedule",
        "mtml_kernels.native",
        "mtml_kernels.cuda",
        "mtml_kernels.triton",
    ),
    ("mtml_kernels.ops",),
    ("mtml_kernels.functional",),
    ("mtml_kernels.doctor", "mtml_kernels"),
    ("mtml.params", "mtml.gradients", "mtml.inner", "mtml.inner_lr", "mtml.notices", "mtml.tasks", "mtml.wrappers"),
    ("mtml.paths",),
    ("mtml.adapted", "mtml.clone"),
    ("mtml.algorithms", "mtml.head_losses", "mtml.multihead.heads"),
    ("mtml.weighting", "mtml.balance", "mtml.mapped"),
    ("mtml.multihead",),
    ("mtml",),
    ("mtml.train",),
    ("mtml.cli", "mtml.__main__"),
)
RANKS = {name: rank for rank, layer in enumerate(LAYERS) for name in layer}


class Import(NamedTuple):
    importer: str
    imported: str  # a module
    name: str  # of what is taken from it, or ""


def modules_of(root: Path, package: str) -> dict[str, str]:
    """The source of every module below a package's folder, by dotted name."""
    found = {}
    for path in sorted(root.rglob("*.py")):
        parts = [package, *path.relative_to(root).with_suffix("").parts]
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path.read_text()
    return found


def sources() -> dict[str, str]:
    """Both packages as they are installed."""
    roots = [(Path(str(module.__file__)).parent, module.__name__) for module in (mtml_kernels, mtml)]
    return {name: text for root, package in roots for name, text in modules_of(root, package).items()}


def imports_of(name: str, text: str, known: Mapping[str, str]) -> Iterator[Import]:
    """Imports of known modules, at the top or within functions; those under TYPE_CHECKING are left out."""
    waiting: list[ast.AST] = [ast.parse(text)]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            waiting += node.orelse
            continue
        waiting += ast.iter_child_nodes(node)
        if isinstance(node, ast.Import):
            yield from (Import(name, alias.name, "") for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{name}: relative import of {node.module}; write the whole name"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                if full in known and not _exports(node.module, known.get(node.module, ""), alias.name):
                    yield Import(name, full, "")
                elif node.module in known:
                    yield Import(name, node.module, alias.name)


def _exports(package: str, text: str, name: str) -> bool:
    """Whether a package's own text binds the name of one of its modules to something else, a function say."""
    return any(
        isinstance(node, ast.ImportFrom)
        and node.module != package  # that would be the module itself
        and any((alias.asname or alias.name) == name for alias in node.names)
        for node in ast.parse(text).body
    )


def rank_of(module: str) -> int:
    """The layer of a module; raises KeyError for one that has no place."""
    name = module
    while name not in RANKS:
        name, dot, _ = name.rpartition(".")
        if not dot:
            raise KeyError(module)
    return RANKS[name]


def against_the_order(imports: list[Import]) -> list[str]:
    return [f"{i.importer} imports {i.imported}" for i in imports if rank_of(i.imported) > rank_of(i.importer)]


def private_across_packages(imports: list[Import], known: Mapping[str, str]) -> list[str]:
    """Names with an underscore, of modules or within them, that leave their folder."""

    def folder(module: str) -> str:
        return module if any(other.startswith(f"{module}.") for other in known) else module.rpartition(".")[0]

    def private(name: str) -> bool:
        return name.startswith("_") and not name.startswith("__")

    return [
        f"{i.importer} takes {i.name or i.imported} of {i.imported}"
        for i in imports
        if folder(i.importer) != folder(i.imported)
        and (private(i.name) or any(private(part) for part in i.imported.split(".") if part != "_version"))
    ]


def cycles(imports: list[Import]) -> list[list[str]]:
    """Groups of modules that reach each other (Tarjan's strongly connected components)."""
    graph: dict[str, list[str]] = {}
    for i in imports:
        graph.setdefault(i.importer, []).append(i.imported)
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(module: str) -> None:
        index[module] = low[module] = len(index)
        stack.append(module)
        for other in graph.get(module, []):
            if other not in index:
                visit(other)
            if other in stack:
                low[module] = min(low[module], low[other])
        if low[module] == index[module]:
            group = stack[stack.index(module) :]
            del stack[stack.index(module) :]
            if len(group) > 1:
                found.append(sorted(group))

    for module in list(graph):
        if module not in index:
            visit(module)
    return found


@pytest.fixture(scope="module")
def known() -> dict[str, str]:
    return sources()


@pytest.fixture(scope="module")
def imports(known: dict[str, str]) -> list[Import]:
    return [i for name, text in known.items() for i in imports_of(name, text, known)]


def test_every_module_has_a_layer(known: dict[str, str]) -> None:
    assert len(known) > 150
    for name in known:
        rank_of(name)


def test_imports_point_down(imports: list[Import]) -> None:
    assert against_the_order(imports) == []


def test_no_import_goes_in_a_circle(imports: list[Import]) -> None:
    assert cycles(imports) == []


def test_no_private_name_leaves_its_folder(imports: list[Import], known: dict[str, str]) -> None:
    assert private_across_packages(imports, known) == []


def test_what_is_wrong_is_noticed() -> None:
    """The control: one import of each forbidden kind."""
    wrong = {
        "mtml_kernels": "",
        "mtml_kernels.schema": "def late():\n    from mtml_kernels.ops.inner_loop import BACKENDS",
        "mtml_kernels.ops": "",
        "mtml_kernels.ops.inner_loop": "import mtml_kernels.schema\nfrom mtml_kernels.native.tensors import _at",
        "mtml_kernels.native": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import mtml_kernels.ops",
        "mtml_kernels.native.tensors": "",
    }
    found = [i for name, text in wrong.items() for i in imports_of(name, text, wrong)]
    assert against_the_order(found) == ["mtml_kernels.schema imports mtml_kernels.ops.inner_loop"]
    assert cycles(found) == [["mtml_kernels.ops.inner_loop", "mtml_kernels.schema"]]
    assert private_across_packages(found, wrong) == [
        "mtml_kernels.ops.inner_loop takes _at of mtml_kernels.native.tensors"
    ]
    with pytest.raises(KeyError):
        rank_of("elsewhere")
