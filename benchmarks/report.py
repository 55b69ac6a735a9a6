"""What a run prints: tables, and a header that says where the figures come from."""

import dataclasses
import importlib
import importlib.metadata
import importlib.util
import os
import platform
import textwrap
from pathlib import Path
from typing import Any

from jaxkv.show.text import pairs

PEERS = ("torch", "transformers", "flax")

# Column -> value. A number is shown with three digits; None, where there is nothing to say, as -.
Row = dict[str, Any]


@dataclasses.dataclass
class Table:
    """One part's figures.

    Attributes:
      notes: what was done, and which targets were met.
    """

    title: str
    rows: list[Row]
    notes: list[str] = dataclasses.field(default_factory=list)

    def __str__(self) -> str:
        notes = [textwrap.fill(note, 100, initial_indent="  ") for note in self.notes]
        return "\n".join([self.title, "=" * len(self.title), _aligned(self.rows), *notes])


@dataclasses.dataclass(frozen=True)
class Pieces:
    """What is asked for of a part that can be run in pieces.

    Attributes:
      tables, rows: words, one of which a title or a row's name must hold; all do if there are none.
      known: tables of earlier runs, whose rows are not measured again.
    """

    tables: tuple[str, ...] = ()
    rows: tuple[str, ...] = ()
    known: tuple[Table, ...] = ()

    def has_table(self, title: str) -> bool:
        return not self.tables or any(word in title for word in self.tables)

    def has_row(self, name: str) -> bool:
        return not self.rows or any(word in name for word in self.rows)

    def known_rows(self, title: str) -> list[Row]:
        """Those of the tables of this title."""
        return [row for table in self.known if table.title == title for row in table.rows]


def _aligned(rows: list[Row]) -> str:
    """Columns under their names, words to the left and numbers to the right."""
    columns = list(dict.fromkeys(column for row in rows for column in row))
    lines = [columns] + [[_cell(row.get(column)) for column in columns] for row in rows]
    widths = [max(map(len, cells)) for cells in zip(*lines, strict=True)]
    words = [any(isinstance(row.get(column), str) for row in rows) for column in columns]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if is_word else cell.rjust(width)
            for cell, width, is_word in zip(line, widths, words, strict=True)
        ).rstrip()
        for line in lines
    )


def target(what: str, reached: float, goal: float, *, at_most: bool = False) -> str:
    """One line that says whether a ratio is where it should be."""
    met = reached <= goal if at_most else reached >= goal
    bound = "at most" if at_most else "at least"
    return f"target: {what} {bound} {goal:g}x: {reached:.2f}x, {'met' if met else 'NOT MET'}"


def missing(*peers: str) -> str | None:
    """Why a peer cannot run here, or None."""
    absent = [peer for peer in peers if importlib.util.find_spec(peer) is None]
    return f"{' and '.join(absent)} not installed" if absent else None


def environment(command: str) -> dict[str, str]:
    """Machine, versions and command, for the header and the JSON file."""
    import psutil

    memory = psutil.virtual_memory()
    facts = {
        "command": command,
        "processor": f"{_processor()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}",
        "memory": f"{memory.total / 1e9:.1f} GB, {memory.available / 1e9:.1f} GB free",
        "python": platform.python_version(),
    }
    for package in ("jaxkv", "jax", "jaxlib", *PEERS):
        facts[package] = "absent" if missing(package) else _version(package)
    return facts


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:  # run from a checkout
        return importlib.import_module(package).__version__


def header(facts: dict[str, str]) -> str:
    return pairs(list(facts.items()))


def _processor() -> str:
    """What Linux calls it; elsewhere the platform's word for it."""
    path = Path("/proc/cpuinfo")
    if path.exists():
        for line in path.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) else str(value)
