"""Texts that end an answer, wherever tokens end."""

import dataclasses
from collections.abc import Sequence


@dataclasses.dataclass(frozen=True)
class StopStrings:
    r"""Texts each of which ends an answer before it.

    Args:
      strings: none of them empty.

    Raises:
      ValueError: an empty one, or what is no text.

    >>> stops = StopStrings(("\nUser:",))
    >>> stops.before("Paris.\nUser: And"), stops.before("Paris.\nUs")
    ('Paris.', None)
    >>> stops.certain("Paris.\nUs")
    'Paris.'
    """

    strings: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if bad := [string for string in self.strings if not isinstance(string, str) or not string]:
            raise ValueError(f"a stop string must be a text that is not empty, got {bad[0]!r}.")

    @classmethod
    def of(cls, strings: str | Sequence[str], tokenizer: object) -> "StopStrings":
        """Those that a user gave: one or several, which need a tokenizer.

        Raises:
          ValueError: there is none, or a bad string.
        """
        stops = cls((strings,) if isinstance(strings, str) else tuple(strings))
        if stops.strings and tokenizer is None:
            raise ValueError(
                f"stop strings are texts, and tokens have one by a tokenizer alone: give "
                f"tokenizer= as well as stop_strings={stops.strings!r}."
            )
        return stops

    def before(self, text: str) -> str | None:
        """The text before the string that is complete first, the longest of those; None without."""
        found = [(start + len(s), start) for s in self.strings if (start := text.find(s)) >= 0]
        return text[: min(found)[1]] if found else None

    def certain(self, text: str) -> str:
        """A text without the beginning of a stop string that it may end with."""
        held = max(
            (n for s in self.strings for n in range(1, len(s)) if text.endswith(s[:n])), default=0
        )
        return text[: len(text) - held]
