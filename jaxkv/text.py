"""Numbers as people read them."""


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
