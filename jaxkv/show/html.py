"""A cache in a notebook: plain markup with its style inside, readable on light and dark pages."""

from collections.abc import Iterable
from html import escape
from typing import NamedTuple

# Okabe and Ito's blue and vermillion, which the colour-blind tell apart.
_USED, _OVERFULL = "#0072B2", "#D55E00"
_TRACK = "rgba(128, 128, 128, 0.3)"


class Bar(NamedTuple):
    """How full one thing is: a sequence, a pool."""

    name: str
    used: int
    size: int
    unit: str = "tokens"

    @property
    def words(self) -> str:
        """``37 of 8,192 tokens``."""
        over = f", {self.used - self.size:,} dropped" if self.used > self.size else ""
        return f"{self.used:,} of {self.size:,} {self.unit}{over}"


def occupancy_html(title: str, facts: str, bars: Iterable[Bar], note: str) -> str:
    """A heading, a row a bar, and a note under them.

    >>> html = occupancy_html("KVCache", "2 layers", [Bar("", 3, 4)], "1.1 GB")
    >>> "width: 75.0%" in html, "3 of 4 tokens" in html
    (True, True)
    """
    heading = f"<div><b>{escape(title)}</b> {escape(facts)}</div>"
    # A grid, not a table: on some pages a table has colours and sizes of its own.
    columns = "display: grid; grid-template-columns: max-content 240px max-content; gap: 3px 8px"
    cells = "".join(map(_cells, bars))
    grid = f'<div style="{columns}; align-items: center; margin: 4px 0">{cells}</div>'
    small = f'<div style="opacity: 0.75">{escape(note)}</div>' if note else ""
    style = "font-family: system-ui, sans-serif; font-size: 13px; line-height: 1.4"
    return f'<div style="{style}">{heading}{grid if cells else ""}{small}</div>'


def _cells(bar: Bar) -> str:
    share = min(bar.used / bar.size, 1.0) if bar.size else 0.0
    # A few tokens in many thousand must be seen too.
    least = "min-width: 2px; " if bar.used else ""
    color = _OVERFULL if bar.used > bar.size else _USED
    filled = f"{least}width: {share:.1%}; height: 100%; background: {color}; border-radius: 3px"
    track = f"height: 12px; background: {_TRACK}; border-radius: 3px"
    return (
        f"<div>{escape(bar.name)}</div>"
        f'<div style="{track}"><div style="{filled}"></div></div>'
        f"<div>{escape(bar.words)}</div>"
    )
