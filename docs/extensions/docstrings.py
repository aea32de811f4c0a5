"""Docstrings as Markdown: what `help()` shows as plain text means the same on a page of the API reference."""

from __future__ import annotations

import re
from typing import Any

from griffe import Extension, Object

# In double or single backquotes, after a prompt, or indented behind an empty line.
CODE = re.compile(r"(``.*?``|`[^`]*`|^[ ]*(?:>>>|\.\.\.)[^\n]*$|(?<=\n\n)(?:[ ]{4}[^\n]*(?:\n|$))+)", re.M | re.S)
PLAIN = {"*": r"\*", "<": "&lt;"}  # no emphasis, no tags


def as_markdown(text: str) -> str:
    """`Example:` as the section that griffe takes for code; outside of code a star is a star, and <name> is no tag."""
    parts = CODE.split(re.sub(r"^Example:$", "Examples:", text, flags=re.M))
    parts[::2] = [re.sub(r"[*<]", lambda found: PLAIN[found[0]], part) for part in parts[::2]]
    return "".join(parts)


class Docstrings(Extension):
    """Applied to every object that griffe reads, before its docstring is parsed."""

    def on_instance(self, *, obj: Object, **_: Any) -> None:
        if obj.docstring:
            obj.docstring.value = as_markdown(obj.docstring.value)
