"""What the page's plots share: scales, ticks and text, as SVG."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
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


@dataclass(frozen=True)
class Frame:
    """A plot's frame within its picture; the room around it is for what is written.

    `gap` is what more room large writing needs above the frame, and below.
    """

    width: int
    height: int
    left: int
    right: int
    top: int
    bottom: int
    gap: int = 0

    def rows(self, ticks: Sequence[float], y: Callable[[float], float], unit: str) -> list[str]:
        """Draw the vertical axis: a line and a number for each tick, and the unit above."""
        parts = [f'<path class="axis" d="M{self.left} {self.top}V{self.bottom}H{self.right}"/>']
        for tick in ticks:
            parts.append(f'<path class="grid" d="M{self.left} {y(tick):.1f}H{self.right}"/>')
            parts.append(label(self.left - 6, y(tick) + 4, f"{tick:,.10g}", "end"))
        return [*parts, label(self.left - 6, self.top - 8 - self.gap, unit, "end")]

    def columns(self, ticks: Sequence[float], x: Callable[[float], float], name: str) -> list[str]:
        """Draw what stands below the horizontal axis: ticks, their numbers, and its name."""
        parts = []
        for tick in ticks:
            parts.append(f'<path class="axis" d="M{x(tick):.1f} {self.bottom}v4"/>')
            parts.append(label(x(tick), self.bottom + 17 + self.gap / 2, f"{tick:,.10g}", "middle"))
        return [*parts, label((self.left + self.right) / 2, self.height - 6, name, "middle")]

    def picture(self, title: str, parts: Sequence[str]) -> str:
        """Put a drawing together; its title is for those who cannot see it."""
        drawing = "\n".join([f"<title>{escape(title)}</title>", *parts])
        return f'<svg viewBox="0 0 {self.width} {self.height}" role="img">\n{drawing}\n</svg>'


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
