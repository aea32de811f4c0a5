"""`examples/README.md`, which stands beside the examples, with its pictures as a page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def on_files(files: Files, *, config: Any) -> Files:
    """Adds examples.md and thumbnails/."""
    files.append(File.generated(config, "examples.md", content=(EXAMPLES / "README.md").read_text()))
    for picture in sorted(EXAMPLES.glob("thumbnails/*.png")):
        files.append(File.generated(config, f"thumbnails/{picture.name}", abs_src_path=str(picture)))
    return files
