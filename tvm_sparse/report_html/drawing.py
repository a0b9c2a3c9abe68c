"""What the page's plots share: scales, ticks and text, as SVG."""

from __future__ import annotations

import math
from dataclasses import dataclass

from .text import escape

LINE_HEIGHT = 13


@dataclass(frozen=True)
class Scale:
    """Where the values from `low` to `high` stand along an axis that is drawn from start to end."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        """Return the place of a value."""
        share = (value - self.low) / (self.high - self.low)
        return self.start + share * (self.end - self.start)


@dataclass(frozen=True)
class LogScale:
    """The same, on a logarithmic axis; `low` is above zero."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        """Return the place of a value."""
        linear = Scale(math.log(self.low), math.log(self.high), self.start, self.end)
        return linear(math.log(value))


def label(x: float, y: float, text: str, anchor: str, kind: str = "label") -> str:
    """Write a text into a drawing."""
    return (
        f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'
    )


def apart(first: float, second: float) -> tuple[float, float]:
    """Move two labels apart that would be written over each other; the upper one stays so."""
    gap = (LINE_HEIGHT - abs(first - second)) / 2
    if gap <= 0:
        return first, second
    return (first - gap, second + gap) if first <= second else (first + gap, second - gap)


def log_ticks(low: float, high: float) -> list[float]:
    """Choose round values: 1, 2, 5, 10 of a wide range, equal steps of a narrow one."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    lead = (1,) if high / low > 1000 else (1, 2, 5)
    ticks = [digit * 10.0**decade for decade in decades for digit in lead]
    ticks = [tick for tick in ticks if low <= tick <= high]
    return ticks if len(ticks) > 2 else _linear_ticks(low, high, _step(high - low))


def whole_ticks(low: float, high: float) -> list[float]:
    """Choose round whole numbers."""
    return _linear_ticks(low, high, max(1.0, _step(high - low)))


def _linear_ticks(low: float, high: float, step: float) -> list[float]:
    return [step * index for index in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _step(extent: float) -> float:
    """Choose a round step of which some four fit."""
    unit = 10.0 ** math.floor(math.log10(extent / 4))
    return next(unit * digit for digit in (1, 2, 5, 10) if unit * digit >= extent / 4 * 0.99)
