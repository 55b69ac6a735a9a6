"""The text that tokens stand for, whole characters only."""

from collections.abc import Sequence
from typing import Any

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


class TextStream:
    """The text of an answer as its tokens come, never cut inside a character.

    Args:
      tokenizer: a `tokenizers.Tokenizer`; None for the ids themselves.
      prompt: the tokens that the answer follows.

    >>> import jaxkv
    >>> stream = TextStream(jaxkv.models.byte_tokenizer())
    >>> [stream([byte]) for byte in "aé!".encode()]
    ['a', '', 'é', '!']
    """

    def __init__(self, tokenizer: Any, prompt: Sequence[int] = ()):
        self._tokenizer, self._prompt = tokenizer, list(prompt)
        self._answer: list[int] = []
        self._given = 0

    def __call__(self, tokens: Sequence[int]) -> str:
        """What these tokens add to the text that was given so far."""
        self._answer += tokens
        text = decode_answer(self._tokenizer, self._prompt, self._answer).rstrip(_INCOMPLETE)
        new = text[self._given :]
        self._given = max(self._given, len(text))
        return new

    def rest(self) -> str:
        """What is left at the end of an answer that ends inside a character."""
        text = decode_answer(self._tokenizer, self._prompt, self._answer)
        return text[self._given :]


def _decode(tokenizer: Any, tokens: Sequence[int]) -> str:
    return tokenizer.decode(tokens) if tokenizer else "".join(f" {token}" for token in tokens)
