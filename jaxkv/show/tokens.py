"""The text that tokens stand for, whole characters only."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxkv.show.stop_strings import StopStrings

# What a decoded text ends with while a character's last bytes are still to come.
_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"


def decode_prompt(tokenizer: Any, prompt: Sequence[int]) -> str:
    """The text of token ids, whole characters only; the ids themselves without a tokenizer."""
    return _decode(tokenizer, prompt).rstrip(_INCOMPLETE)


def decode_answer(tokenizer: Any, prompt: Sequence[int], tokens: Sequence[int]) -> str:
    """What the tokens of an answer add to the text of its prompt.

    Not the text of these tokens alone, for it may depend on those before: SentencePiece's has no
    space at its start, and a character may take several tokens.
    """
    return _decode(tokenizer, [*prompt, *tokens])[len(decode_prompt(tokenizer, prompt)) :]


def count_to_stop(
    tokenizer: Any,
    prompt: Sequence[int] | np.ndarray,
    tokens: Sequence[int],
    known: int,
    stops: StopStrings,
) -> int | None:
    """The fewest tokens of an answer that complete a stop string; None where all do not.

    Args:
      known: tokens of the answer that are known to complete none.
    """
    if not stops.strings:
        return None
    prompt = [int(token) for token in prompt]
    if _before(tokenizer, prompt, tokens, stops) is None:
        return None
    counts = range(known + 1, len(tokens))
    return next(
        (n for n in counts if _before(tokenizer, prompt, tokens[:n], stops) is not None),
        len(tokens),
    )


class TextStream:
    """The text of an answer as its tokens come, never cut inside a character.

    Args:
      tokenizer: a `tokenizers.Tokenizer`; None for the ids themselves.
      prompt: the tokens that the answer follows.
      stop_strings: texts that end the answer before them; what may be the beginning of one is
        held back until it is known.

    Attributes:
      text: all that was given so far.
      stopped: was a stop string found? Then no more is given.

    Raises:
      ValueError: an empty stop string, or one without a tokenizer.

    >>> import jaxkv
    >>> stream = TextStream(jaxkv.models.byte_tokenizer(), stop_strings=["!?"])
    >>> [stream([byte]) for byte in "aé!b!?c".encode()]
    ['a', '', 'é', '', '!b', '', '', '']
    >>> stream.stopped
    True
    """

    def __init__(
        self, tokenizer: Any, prompt: Sequence[int] = (), stop_strings: str | Sequence[str] = ()
    ):
        self._tokenizer, self._prompt = tokenizer, list(prompt)
        self._stops = StopStrings.of(stop_strings, tokenizer)
        self._answer: list[int] = []
        self.text, self.stopped = "", False

    def __call__(self, tokens: Sequence[int]) -> str:
        """What these tokens add to the text that was given so far."""
        if self.stopped:
            return ""
        self._answer += tokens
        whole = decode_answer(self._tokenizer, self._prompt, self._answer)
        before = self._stops.before(whole)
        self.stopped = before is not None
        return self._give(
            self._stops.certain(whole.rstrip(_INCOMPLETE)) if before is None else before
        )

    def rest(self) -> str:
        """What is left at the end of an answer, as of one that ends inside a character."""
        if self.stopped:
            return ""
        return self._give(decode_answer(self._tokenizer, self._prompt, self._answer))

    def _give(self, text: str) -> str:
        new = text[len(self.text) :]
        self.text += new
        return new


def _before(
    tokenizer: Any, prompt: Sequence[int], tokens: Sequence[int], stops: StopStrings
) -> str | None:
    return stops.before(decode_answer(tokenizer, prompt, tokens))


def _decode(tokenizer: Any, tokens: Sequence[int]) -> str:
    return tokenizer.decode(tokens) if tokenizer else "".join(f" {token}" for token in tokens)
