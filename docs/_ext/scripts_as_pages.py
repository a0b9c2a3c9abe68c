"""Show scripts as pages: their comments as text, the rest as code.

A script is read as it stands. Its docstring becomes the title and the first paragraph; a block of
comments between blank lines becomes text, with a heading where it is underlined; code stays code.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sphinx.application import Sphinx


def page_of(source: str, name: str) -> str:
    """Write a script as Markdown.

    Parameters
    ----------
    source : str
        The script.
    name : str
        Its place in the project, for the reader to find it.
    """
    tree = ast.parse(source)
    title, _, rest = (ast.get_docstring(tree) or name).partition("\n")
    parts = [f"# {title.rstrip('.')}", f"`{name}`", rest.strip()]
    lines = source.splitlines()
    first = tree.body[0]
    behind = first.end_lineno or 0 if ast.get_docstring(tree) is not None else 0
    for is_text, block in _blocks(lines[behind:]):
        parts.append(_text(block) if is_text else f"```python\n{block}\n```" if block else "")
    return "\n\n".join(part for part in parts if part) + "\n"


def _blocks(lines: list[str]) -> Iterator[tuple[bool, str]]:
    """Cut a script into text and code; what is parted by blank lines alone stays together."""
    is_text, kinds = False, []
    for is_filled, group in groupby(lines, key=bool):
        paragraph = list(group)
        if is_filled:
            is_text = all(line.startswith("#") for line in paragraph)
        kinds += [is_text] * len(paragraph)
    for kind, pairs in groupby(zip(kinds, lines, strict=True), key=itemgetter(0)):
        yield kind, "\n".join(line for _, line in pairs).strip("\n")


def _text(comments: str) -> str:
    """Turn comments into text, and what they underline into headings."""
    text = re.sub(r"^# ?", "", comments, flags=re.MULTILINE)
    return re.sub(r"^(.+)\n-{3,}$", r"## \1\n", text, flags=re.MULTILINE)


def _write_pages(app: Sphinx) -> None:
    for folder, scripts in app.config.scripts_as_pages.items():
        target = Path(app.srcdir, folder)
        target.mkdir(exist_ok=True)
        for path in sorted(Path(app.srcdir, scripts).glob("[0-9]*.py")):
            page = target / f"{path.stem}.md"
            text = page_of(path.read_text(encoding="utf-8"), f"{folder}/{path.name}")
            # An unchanged page need not be read again.
            if not page.exists() or page.read_text(encoding="utf-8") != text:
                page.write_text(text, encoding="utf-8")


def setup(app: Sphinx) -> dict[str, bool]:
    """Register with Sphinx."""
    app.add_config_value("scripts_as_pages", {}, "env")
    app.connect("config-inited", lambda app, _config: _write_pages(app))
    return {"parallel_read_safe": True}
