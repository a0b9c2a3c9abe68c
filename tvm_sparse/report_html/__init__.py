"""A report as a page of HTML: one file with its styles, its pictures and a little script inside.

Everything can be read without the script; it searches and sorts the table, and shows one weight at
a time. The page's policy lets nothing else run and nothing be loaded, whatever a name may hold.
"""

from __future__ import annotations

import base64
import hashlib
from importlib.resources import files

from ..report import Report
from .head import head
from .roofline import roofline
from .searches import searches
from .table import table
from .text import escape
from .times import times
from .weights import weights

_PARTS = (head, times, table, weights, roofline, searches)


def render(report: Report) -> str:
    """Return the page.

    Parameters
    ----------
    report : Report
        Of an inspection, a plan, a compilation or a profile: what it does not know is left out.

    Returns
    -------
    str
        A whole HTML document that refers to nothing outside itself.
    """
    style, script = _file("page.css"), _file("page.js")
    return _PAGE.format(
        policy=f"default-src 'none'; style-src '{_digest(style)}'; script-src '{_digest(script)}'; "
        "img-src data:; base-uri 'none'; form-action 'none'",
        title=escape(report.source or "model"),
        style=style,
        script=script,
        body="\n".join(text for part in _PARTS if (text := part(report))),
    )


def _file(name: str) -> str:
    return files(__name__).joinpath(name).read_text(encoding="utf-8")


def _digest(text: str) -> str:
    """Name a style or a script as policies do."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


_PAGE = """\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<main>
{body}
</main>
<script>{script}</script>
</body>
</html>
"""
