"""The documents name files that are there."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = ["README.md", "CONTRIBUTING.md", "bench/LADDER.md", "bench/results/README.md"]
DOCUMENTS += sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").glob("*.md"))
FOLDERS = (".ci", "bench", "benchmarks", "csrc", "docs", "examples", "mtml_kernels", "python", "tests")


def paths_in(text: str) -> Iterator[str]:
    """What stands in backquotes and begins with a folder of the root."""
    for path in re.findall(r"`([\w./<>*-]+)`", text):
        if "/" in path and path.split("/")[0] in FOLDERS:
            yield path


def exists(path: str) -> bool:
    """A path, or a pattern with * or <any name> that at least one file fits."""
    return any(ROOT.glob(re.sub(r"<[^>]*>", "*", path).rstrip("/")))


def anchors(document: Path) -> set[str]:
    """Of its headings, as GitHub and mkdocs name them."""
    headings = re.findall(r"^#+ (.*)$", document.read_text(), re.M)
    return {re.sub(r"[^\w -]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


def broken_links(document: Path) -> list[str]:
    """Links to files that are not there, or to headings that they have not. Those into the web are not followed."""
    links = re.findall(r"\]\(([^)\s]+)\)", re.sub(r"```.*?```", "", document.read_text(), flags=re.S))
    broken = []
    for link in [link for link in links if "://" not in link]:
        name, _, anchor = link.partition("#")
        target = document.parent / name if name else document
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    return broken


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_path_exists(document: str) -> None:
    assert [path for path in paths_in((ROOT / document).read_text()) if not exists(path)] == []


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_link_leads_somewhere(document: str) -> None:
    assert broken_links(ROOT / document) == []


def test_broken_links_are_noticed(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "# A title: of two\n[a](page.md#a-title-of-two) [b](#nowhere) [c](missing.md) [d](https://example.org)"
    )
    assert broken_links(page) == ["#nowhere", "missing.md"]


def test_code_of_pages_stands_between_empty_lines() -> None:
    """GitHub does without; on the pages that `make docs` makes the text before or after it would be no paragraph."""
    run_on = []
    for page in (ROOT / "docs").rglob("*.md"):
        fences = list(re.finditer(r"(?:^(.*)\n)?^```.*\n(?=(.*)$)", page.read_text(), re.M))
        run_on += [f"{page.name}: {opening[1]}" for opening in fences[::2] if opening[1] and opening[1][0] != "#"]
        run_on += [f"{page.name}: {closing[2]}" for closing in fences[1::2] if closing[2]]
    assert run_on == []


def test_lists_and_tables_of_pages_follow_an_empty_line() -> None:
    """GitHub does without; on the pages that `make docs` makes they would be running text."""
    inside = re.compile(r"^\s*$|^#|^<!--|^\s|^[-|] |^\|-|^\d+\. ")
    run_on = []
    for page in (ROOT / "docs").rglob("*.md"):
        lines = re.sub(r"```.*?```", "```", page.read_text(), flags=re.S).splitlines()
        for above, line in itertools.pairwise(lines):
            if re.match(r"[-|] |\d+\. ", line) and not inside.match(above):
                run_on.append(f"{page.name}: {line}")
    assert run_on == []


def test_paths_are_found_and_missing_ones_noticed() -> None:
    named = list(paths_in((ROOT / "CONTRIBUTING.md").read_text()))
    assert len(named) > 20 and "mtml_kernels/ops/<op>.py" in named
    assert not exists("mtml_kernels/no_such_file.py") and not exists("csrc/cpu/<op>/no_such_file.h")
