"""Keep tables of contents whole while pages come and go.

A pattern in a table of contents that no page matches (yet) is left out, and the index lists every
page that no other table names, so that a new page appears by itself.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sphinx.application import Sphinx

PLACE = "PAGES-LEFT-OVER"
_ENTRY = re.compile(r"^(?![:`#\s])\S+$", flags=re.MULTILINE)


def left_over(tables: Collection[str], pages: Collection[str]) -> list[str]:
    """Find the pages that no table of contents names or matches."""
    listed = [entry for table in tables for entry in _ENTRY.findall(table)]
    return sorted(
        page
        for page in set(pages) - {"index"}
        if not any(fnmatchcase(page, entry) for entry in listed)
    )


def without_empty_patterns(text: str, pages: Collection[str]) -> str:
    """Leave out the patterns of a page's tables of contents that match nothing."""

    def kept(entry: re.Match[str]) -> str:
        pattern = entry.group()
        matches = "*" not in pattern or any(fnmatchcase(page, pattern) for page in pages)
        return pattern if matches else ""

    return _ENTRY.sub(kept, text)


def tables_of(text: str) -> list[str]:
    """Find the tables of contents in a page."""
    return re.findall(r"^```\{toctree\}$(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)


def _fill_in(app: Sphinx, page: str, source: list[str]) -> None:
    pages = app.env.found_docs
    for table in tables_of(source[0]):
        source[0] = source[0].replace(table, without_empty_patterns(table, pages))
    if page == "index":
        texts = (app.env.doc2path(name).read_text(encoding="utf-8") for name in pages)
        tables = [table.replace(PLACE, "") for text in texts for table in tables_of(text)]
        source[0] = source[0].replace(PLACE, "\n".join(left_over(tables, pages)))


def setup(app: Sphinx) -> dict[str, bool]:
    """Register with Sphinx."""
    app.connect("source-read", _fill_in)
    return {"parallel_read_safe": True}
