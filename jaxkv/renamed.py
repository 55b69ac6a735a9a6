"""Old names of arguments, which are understood for one version, with a warning."""

import functools
import warnings
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


def renamed(**names: str) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """A function that takes arguments by their old names too. Type checkers know the new alone.

    Args:
      **names: the new name of each old one.

    >>> double = renamed(x="number")(lambda number: 2 * number)
    >>> with warnings.catch_warnings(record=True) as told:
    ...     warnings.simplefilter("always")
    ...     double(x=2), str(told[0].message)
    (4, '<lambda>: x= is now called number=.')
    """

    def decorated(function: Callable[P, T]) -> Callable[P, T]:
        @functools.wraps(function)
        def wrapper(*args: Any, **fields: Any) -> T:
            for old in names.keys() & fields.keys():
                told = f"{function.__name__}: {old}= is now called {names[old]}=."
                if names[old] in fields:
                    raise TypeError(f"{told} Got both.")
                warnings.warn(told, DeprecationWarning, stacklevel=2)
                fields[names[old]] = fields.pop(old)
            return function(*args, **fields)

        return wrapper

    return decorated
