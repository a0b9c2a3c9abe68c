"""How the page writes names, numbers and times."""

from __future__ import annotations

import html
import math
import re
from collections.abc import Mapping
from numbers import Real
from typing import Any, TypeGuard

# What XML has no way to write; HTML has none for most of it.
_UNWRITABLE = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def escape(text: object) -> str:
    """Write any text so that it is text in HTML, and in attributes."""
    return html.escape(_UNWRITABLE.sub("\ufffd", str(text)))


def breakable(text: str) -> str:
    """Write a layer's name, a path that is too long for most places: it breaks between steps."""
    return re.sub("([./:])", r"\1<wbr>", escape(text))


def is_time(value: Any) -> TypeGuard[float]:
    """Tell whether a value can be drawn: a finite number that is not negative."""
    return isinstance(value, Real) and math.isfinite(value) and float(value) >= 0


def microseconds(value: float) -> str:
    """Write a time."""
    return f"{value:,.1f} us"


def short_time(value: float) -> str:
    """Write a time in the unit that suits it."""
    return f"{value / 1000:,.2f} ms" if value >= 1000 else microseconds(value)


def count(number: int, noun: str) -> str:
    """Write a number of things."""
    return f"{number} {noun}{'s' if number != 1 else ''}"


def settings(config: Mapping[str, Any]) -> str:
    """Write a kernel's configuration."""
    return ", ".join(f"{name}={value}" for name, value in config.items())


def shape(sizes: tuple[int, ...]) -> str:
    """Write a shape, for example ``64x3x7x7``."""
    return "x".join(map(str, sizes)) or "scalar"
