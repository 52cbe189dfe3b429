"""What the site's pages need beyond Markdown: links to files of the repository that are not on the site become text."""

from __future__ import annotations

import re
from typing import Any

_LINK = re.compile(r"(?<!!)\[([^\]]+)\]\((\.\./[^)]+)\)")


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Called by mkdocs for each page."""
    return _LINK.sub(r"\1", markdown)
