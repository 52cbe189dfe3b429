"""What the site's pages need beyond Markdown.

Links to files of the repository that are not on the site become text. Types of arguments that docstrings write as
transformers does, with quotes of their own, lose these.
"""

from __future__ import annotations

import re
from typing import Any

_LINK = re.compile(r"(?<!!)\[([^\]]+)\]\((\.\./[^)]+)\)")


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Called by mkdocs for each page."""
    return _LINK.sub(r"\1", markdown)


def on_page_content(html: str, **_: Any) -> str:
    """Called by mkdocs for each page as HTML."""
    return re.sub(r"<code>(`[^<]*)</code>", lambda found: f"<code>{re.sub('[`*]', '', found[1])}</code>", html)
