"""Lines over time, drawn as SVG."""

from collections.abc import Iterator, Sequence
from html import escape
from math import log
from pathlib import Path
from typing import NamedTuple

WIDTH, HEIGHT, LEFT, GAP = 900, 150, 70, 50
"""Of one panel in pixels: the drawing, what stands left of it, and what stands above it."""

COLOURS = ("#1f6fb4", "#d0542f", "#3d8c40")


class Panel(NamedTuple):
    """One drawing: its title with the unit, and lines by name, each with one value for each time.

    Its axis begins at 0; a `logarithmic` one at 1.
    """

    title: str
    lines: dict[str, Sequence[float]]
    logarithmic: bool = False

    @property
    def highest(self) -> float:
        """Where the axis ends."""
        return 1.1 * max((value for line in self.lines.values() for value in line), default=1.0) or 1.0

    def place(self, value: float) -> float:
        """How far up the axis a value stands, 0 to 1."""
        return log(max(value, 1.0)) / log(self.highest) if self.logarithmic else value / self.highest

    def read(self, place: float) -> float:
        """The value that stands there."""
        return self.highest**place if self.logarithmic else self.highest * place


def write_plot(path: Path, times: Sequence[float], panels: Sequence[Panel]) -> None:
    """Draw the panels, one below the other, over the same times (minutes)."""
    height = len(panels) * (HEIGHT + GAP) + 40
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{LEFT + WIDTH + 20}" height="{height}" '
        'font-family="sans-serif" font-size="12"><rect width="100%" height="100%" fill="white"/>'
    ]
    for number, panel in enumerate(panels):
        parts += _draw_panel(panel, times, number * (HEIGHT + GAP) + GAP)
    end = times[-1] if times else 0.0
    parts.append(f'<text x="{LEFT}" y="{height - 20}">0 min</text>')
    parts.append(f'<text x="{LEFT + WIDTH}" y="{height - 20}" text-anchor="end">{write_value(end)} min</text></svg>')
    path.write_text("\n".join(parts) + "\n")


def _draw_panel(panel: Panel, times: Sequence[float], top: int) -> Iterator[str]:
    span = max(times, default=1.0) or 1.0
    yield f'<text x="{LEFT}" y="{top - 8}" font-weight="bold">{escape(panel.title)}</text>'
    yield f'<rect x="{LEFT}" y="{top}" width="{WIDTH}" height="{HEIGHT}" fill="none" stroke="#999"/>'
    for place in (0.0, 0.5, 1.0):
        y = top + HEIGHT * (1 - place)
        yield f'<text x="{LEFT - 6}" y="{y + 4:.0f}" text-anchor="end">{write_value(panel.read(place))}</text>'
    for number, (name, line) in enumerate(panel.lines.items()):
        colour = COLOURS[number % len(COLOURS)]
        points = " ".join(
            f"{LEFT + WIDTH * time / span:.1f},{top + HEIGHT * (1 - panel.place(value)):.1f}"
            for time, value in zip(times, line, strict=True)
        )
        yield f'<polyline points="{points}" fill="none" stroke="{colour}"/>'
        x = LEFT + WIDTH - 90 * (len(panel.lines) - number)
        yield f'<text x="{x}" y="{top - 8}" fill="{colour}">{escape(name)}</text>'


def write_value(value: float) -> str:
    """A number for an axis."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
