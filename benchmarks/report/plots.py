"""SVG pictures of three kinds, written without a plotting library."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise
from typing import Any, Final

COLOURS: Final = ("#4269d0", "#efb118", "#ff725c", "#6cc5b0", "#3ca951", "#a463f2", "#97bbf5", "#9c6b4e")

_WIDTH, _HEIGHT = 800, 400
_LEFT, _RIGHT, _TOP, _BOTTOM = 70, 170, 40, 50

Series = Mapping[str, Sequence[tuple[float, float]]]


@dataclass(frozen=True, slots=True)
class Axes:
    """Titles and extent of a picture. `x_labels`: the horizontal axis counts these, instead of measuring."""

    title: str
    x: str
    y: str
    x_max: float
    y_max: float
    x_labels: Sequence[str] = ()
    height: int = _HEIGHT
    left: int = _LEFT

    def to_x(self, value: float) -> float:
        """Pixels from the left."""
        return self.left + (_WIDTH - self.left - _RIGHT) * value / (self.x_max or 1.0)

    def to_y(self, value: float) -> float:
        """Pixels from the top."""
        return self.height - _BOTTOM - (self.height - _TOP - _BOTTOM) * value / (self.y_max or 1.0)

    def frame(self) -> list[str]:
        """Title, axes and their numbers."""
        bottom, right = self.height - _BOTTOM, _WIDTH - _RIGHT
        parts = [
            _text(self.left, 22, self.title, size=15, anchor="start"),
            _text((self.left + right) / 2, self.height - 12, self.x),
            f'<g transform="translate(16 {(_TOP + bottom) / 2:.0f}) rotate(-90)">{_text(0, 0, self.y)}</g>',
            f'<path d="M{self.left} {_TOP}V{bottom}H{right}" fill="none" stroke="#888"/>',
        ]
        for fifth in range(6):
            value = self.y_max * fifth / 5
            if self.y_max:
                y = self.to_y(value)
                parts.append(f'<path d="M{self.left} {y:.1f}H{right}" stroke="#ddd"/>')
                parts.append(_text(self.left - 6, y + 4, f"{value:g}", anchor="end"))
            if not self.x_labels:
                parts.append(_text(self.to_x(self.x_max * fifth / 5), bottom + 16, f"{self.x_max * fifth / 5:g}"))
        parts += [_text(self.to_x(place), bottom + 16, label) for place, label in enumerate(self.x_labels)]
        return parts


def _text(x: float, y: float, words: str, *, size: int = 12, anchor: str = "middle") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" text-anchor="{anchor}">{escape(words)}</text>'


def _legend(entries: Iterable[tuple[str, str]]) -> list[str]:
    """A name and its colour in each row."""
    parts = []
    for row, (name, colour) in enumerate(entries):
        y = _TOP + 18 * row
        parts.append(f'<rect x="{_WIDTH - _RIGHT + 12}" y="{y}" width="12" height="12" fill="{colour}"/>')
        parts.append(_text(_WIDTH - _RIGHT + 30, y + 11, name, anchor="start"))
    return parts


def _colour(place: int) -> str:
    return COLOURS[place % len(COLOURS)]


def _svg(height: int, parts: Sequence[str]) -> str:
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" '
        'font-family="sans-serif" font-size="12" fill="#222">'
    )
    return "\n".join((head, f'<rect width="{_WIDTH}" height="{height}" fill="#fff"/>', *parts, "</svg>\n"))


def round_up(value: float) -> float:
    """The next number that reads well on an axis."""
    if value <= 0:
        return 1.0
    power: float = 10.0 ** (len(f"{value:.0f}") - 1) if value >= 1 else 1.0
    return next(power * step for step in (1, 1.5, 2, 2.5, 3, 4, 5, 6, 8, 10, 20) if power * step >= value)


def lines(axes: Axes, series: Series, dashed: Container[str] = ()) -> str:
    """One line with its points for each of `series`, broken for those in `dashed`."""
    parts = axes.frame()
    for place, (name, points) in enumerate(series.items()):
        path = " ".join(f"{axes.to_x(x):.1f},{axes.to_y(y):.1f}" for x, y in points)
        dash = ' stroke-dasharray="6 4"' if name in dashed else ""
        parts.append(f'<polyline points="{path}" fill="none" stroke="{_colour(place)}" stroke-width="2"{dash}/>')
        parts += [
            f'<circle cx="{axes.to_x(x):.1f}" cy="{axes.to_y(y):.1f}" r="3" fill="{_colour(place)}"/>'
            for x, y in points
        ]
    return _svg(axes.height, [*parts, *_legend((name, _colour(place)) for place, name in enumerate(series))])


def stacked(axes: Axes, series: Series) -> str:
    """Areas on top of each other; all of `series` have the same horizontal positions."""
    parts = axes.frame()
    floor: list[float] = []
    for place, points in enumerate(series.values()):
        floor = floor or [0.0] * len(points)
        ceiling = [low + y for low, (_, y) in zip(floor, points, strict=True)]
        outline = [(x, y) for (x, _), y in zip(points, ceiling, strict=True)]
        outline += [(x, y) for (x, _), y in reversed(list(zip(points, floor, strict=True)))]
        path = " ".join(f"{axes.to_x(x):.1f},{axes.to_y(y):.1f}" for x, y in outline)
        parts.append(f'<polygon points="{path}" fill="{_colour(place)}" fill-opacity="0.85"/>')
        floor = ceiling
    topmost_first = [(name, _colour(place)) for place, name in enumerate(series)][::-1]
    return _svg(axes.height, [*parts, *_legend(topmost_first)])


GANTT_PARTS: Final = {"waits": "#d5d5d5", "prefills": "#ff725c", "decodes": "#4269d0", "tool runs": "#3ca951"}


def gantt(title: str, calls: Sequence[Mapping[str, Any]]) -> str:
    """One row for each call: its wait, its prefill, its decoding and its tool."""
    start_s = min(call["arrived_s"] for call in calls)
    end_s = max(call["finished_s"] + (call["tool_s"] or 0.0) for call in calls)
    height = _TOP + _BOTTOM + 16 * len(calls)
    axes = Axes(title, "seconds of the application", "", round_up(end_s - start_s), 0.0, height=height, left=140)
    parts = axes.frame()
    for row, call in enumerate(calls):
        y = _TOP + 16 * row + 2
        times = [call["arrived_s"], call["scheduled_s"], call["first_token_s"], call["finished_s"]]
        times.append(times[-1] + (call["tool_s"] or 0.0))
        for colour, (begin_s, stop_s) in zip(GANTT_PARTS.values(), pairwise(times), strict=True):
            left, right = axes.to_x(begin_s - start_s), axes.to_x(stop_s - start_s)
            parts.append(f'<rect x="{left:.1f}" y="{y}" width="{right - left:.1f}" height="12" fill="{colour}"/>')
        parts.append(_text(axes.left - 4, y + 10, call["node"][:24], size=9, anchor="end"))
    return _svg(axes.height, [*parts, *_legend(GANTT_PARTS.items())])
