"""`θ_{k+1}` and `A^W_k`, as the pages spell their formulas, with the indices below and above the line."""

from __future__ import annotations

import html
import re
from typing import Any

INDEX = re.compile(r"([_^])(?:\{([^}]*)\}|([A-Za-z0-9α-ω]+))")
# A symbol is one letter or `logits`; a longer word with underscores is a name in a program.
SYMBOL = re.compile(rf"(?<![\w^])((?:logits|d?[A-Za-zΑ-Ωα-ω∇])(?:{INDEX.pattern})+)")
# Tags and code, which stay as they are.
OTHER = re.compile(r"(<pre\b.*?</pre>|<code\b.*?</code>|<[^>]*>)", re.S)
BLOCK = re.compile(r"(<pre[^>]*><span></span><code>)([^<]*)(</code></pre>)")  # without colours: no program
SMALL = 0.75  # of the font's size, as in style.css


def _index(found: re.Match[str]) -> str:
    tag = "sub" if found[1] == "_" else "sup"
    return f"<{tag}>{found[2] or found[3]}</{tag}>"


def raised(text: str) -> str:
    """`text` with its indices as tags."""
    return SYMBOL.sub(lambda symbol: INDEX.sub(_index, symbol[0]), text)


def _width(text: str) -> float:
    """In characters of the block: what `text`, raised, takes less than as it was spelt."""
    lost = 0.0
    for symbol in SYMBOL.finditer(text):
        for index in INDEX.finditer(symbol[0]):
            lost += len(html.unescape(index[0])) - SMALL * len(html.unescape(index[2] or index[3]))
    return lost


def aligned(line: str) -> str:
    """A line of a block: what the indices take less stands before the next gap, so that columns stay columns."""
    parts = re.split(r"( {2,}(?=\S)|(?<=\S) (?== ))", line)
    for i in range(0, len(parts) - 1, 2):
        lost = _width(parts[i])
        parts[i] = raised(parts[i]) + (f'<span style="padding-left: {lost:g}ch"></span>' if lost else "")
    return "".join(parts[:-1]) + raised(parts[-1])


def on_page_content(content: str, *, page: Any, **_: Any) -> str:
    """Every page but those of the reference, where underscores are names'."""
    if page.file.src_uri.startswith("api/"):
        return content
    blocks = BLOCK.split(content)
    blocks[2::4] = ["\n".join(map(aligned, block.split("\n"))) for block in blocks[2::4]]
    for i in range(0, len(blocks), 4):
        parts = OTHER.split(blocks[i])
        parts[::2] = map(raised, parts[::2])
        blocks[i] = "".join(parts)
    return "".join(blocks)
