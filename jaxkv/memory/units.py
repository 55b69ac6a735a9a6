"""Sizes as people write them."""

import re
from decimal import Decimal

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
