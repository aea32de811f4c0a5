"""What `mkdocs build --strict` does not look at, page by page."""

from __future__ import annotations

import re
from typing import Any

from mkdocs.exceptions import PluginError

# Scripts, styles, fonts and pictures from elsewhere: the pages are read without a network.
OUTSIDE = re.compile(r"<(?:script|link|img|iframe)\b[^>]*(?:src|href)=\"(?:https?:)?//[^\"]*\"[^>]*>")
# In the API reference: plain text of a docstring that became something else, and a list of names that was cut.
MISREAD = re.compile(r"<em>|<blockquote>|<code>\w+,</code>|&amp;lt;|\\[*]")


def on_post_page(output: str, *, page: Any, **_: Any) -> str:
    """Ends the build where a page loads anything from elsewhere or shows a docstring wrongly."""
    patterns = [OUTSIDE, MISREAD] if page.file.src_uri.startswith("api/") else [OUTSIDE]
    for pattern in patterns:
        if found := pattern.search(output):
            around = output[max(0, found.start() - 100) : found.end() + 100]
            raise PluginError(f"{page.file.src_uri}: expected none of {pattern.pattern}, got ...{around}...")
    return output
