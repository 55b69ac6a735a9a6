"""Whole numbers: checked where they come in, and divided."""

import operator
from typing import Any, overload


def as_count(value: Any, least: int = 1) -> int | None:
    """The value as a plain int; None if it is no int of at least ``least``.

    >>> as_count(3), as_count(0), as_count(True), as_count(2.5)
    (3, None, None, None)
    """
    try:
        count = least - 1 if isinstance(value, bool) else operator.index(value)
    except TypeError:
        return None
    return count if count >= least else None


def check_count(what: str, value: Any, least: int = 1, error: type[ValueError] = ValueError) -> int:
    """The value as a plain int.

    Args:
      what: the value's name, for the message.
      value: from a user.
      least: the smallest that is allowed.
      error: what is raised for all else.

    >>> check_count("chunk", 0)
    Traceback (most recent call last):
    ValueError: chunk must be an int of at least 1, got 0.
    """
    count = as_count(value, least)
    if count is None:
        raise error(f"{what} must be an int of at least {least}, got {value!r}.")
    return count


def check_fields(
    thing: Any,
    *fields: str,
    optional: tuple[str, ...] = (),
    least: int = 1,
    error: type[ValueError] = ValueError,
) -> None:
    """Check these fields of a frozen dataclass, and store them as plain ints.

    Args:
      thing: the dataclass, in its ``__post_init__``.
      *fields: names of fields that are counts.
      optional: names of fields that may be None as well.
      least: the smallest count that is allowed.
      error: what is raised.
    """
    given = [field for field in optional if getattr(thing, field) is not None]
    for field in (*fields, *given):
        what = f"{type(thing).__name__}: {field}"
        object.__setattr__(thing, field, check_count(what, getattr(thing, field), least, error))


@overload
def ceil_div(number: int, size: int) -> int: ...
@overload
def ceil_div(number: Any, size: Any) -> Any: ...
def ceil_div(number: Any, size: Any) -> Any:
    """``number / size`` rounded up, of ints or of arrays of them.

    >>> ceil_div(9, 4), ceil_div(8, 4)
    (3, 2)
    """
    return -(-number // size)
