"""Numbers as people read them."""

import re
from collections.abc import Sequence
from decimal import Decimal


def format_bytes(size: float) -> str:
    """Bytes as people read them, in decimal units: ``536.9 MB``."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if abs(size) < 1000 or unit == "TB":
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    raise AssertionError


def sequences(count: int) -> str:
    """``1 sequence``, ``2 sequences``."""
    return f"{count:,} sequence{'' if count == 1 else 's'}"


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
    """`format_bytes`, and a dash for an unknown number."""
    return "-" if size is None else format_bytes(size)


_BYTES = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?", re.IGNORECASE)
_TOKENS = re.compile(r"(\d+)\s*([km]?)", re.IGNORECASE)


def parse_bytes(text: str) -> int:
    """Bytes from ``24GB`` (decimal), ``24GiB`` (binary) or a plain number.

    Raises:
      ValueError: for anything else.

    >>> parse_bytes("24GB"), parse_bytes("1.5 GiB"), parse_bytes("512")
    (24000000000, 1610612736, 512)
    """
    match = _BYTES.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"Not a size in bytes: {text!r}. Expected such as 24GB, 24GiB or 512MB.")
    number, prefix, binary = match.groups()
    step = 1024 if binary else 1000
    return int(Decimal(number) * step ** " kmgt".index(prefix.lower() or " "))


def parse_size(text: str) -> int:
    """`parse_bytes` of a size that says its unit: nobody means 24 bytes by ``24``.

    Raises:
      ValueError: likewise, and for a plain number.

    >>> parse_size("16GB")
    16000000000
    """
    if is_number(text):
        raise ValueError(f"A size needs a unit, got {text!r}. Write {text.strip()}GB.")
    return parse_bytes(text)


def is_number(text: str) -> bool:
    """Whether a text is a number and no more."""
    return text.strip().replace(".", "", 1).isdecimal()


def parse_tokens(text: str) -> int:
    """Tokens from ``32k`` (32,768: context lengths are counted in 1024s) or a plain number.

    Raises:
      ValueError: for anything else.

    >>> parse_tokens("32k"), parse_tokens("1M"), parse_tokens("4000")
    (32768, 1048576, 4000)
    """
    match = _TOKENS.fullmatch(text.strip().replace(",", ""))
    if match is None:
        raise ValueError(f"Not a number of tokens: {text!r}. Expected such as 32k or 4096.")
    number, prefix = match.groups()
    return int(number) * 1024 ** " km".index(prefix.lower() or " ")
