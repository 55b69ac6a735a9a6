"""Aligned text: what the reports of this package are made of."""

from collections.abc import Sequence

from jaxkv.text import format_bytes


def table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns under their headers: the first to the left, all others to the right."""
    lines = [headers, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(headers))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def pairs(facts: Sequence[tuple[str, str]]) -> str:
    """A line each of a word and what it is, the second parts aligned."""
    width = max(len(word) for word, _ in facts)
    return "\n".join(f"{word.ljust(width)}  {what}" for word, what in facts)


def format_or_unknown(size: int | None) -> str:
    """`format_bytes`, and a dash for what nobody knows."""
    return "-" if size is None else format_bytes(size)
