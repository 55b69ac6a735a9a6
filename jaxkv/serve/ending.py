"""What ends an answer: so many tokens, a stop token, a stop string, logits that are no numbers."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxkv.show.stop_strings import StopStrings
from jaxkv.show.tokens import count_to_stop, decode_answer


class Ending(NamedTuple):
    """What ends one answer.

    Attributes:
      max_new_tokens: the most that it has.
      stop_tokens: ids that end it, and are part of it.
      stop_strings: texts that end it before them.
      tokenizer: for these.
    """

    max_new_tokens: int
    stop_tokens: tuple[int, ...] = ()
    stop_strings: StopStrings = StopStrings()
    tokenizer: Any = None

    def of(
        self, prompt: Sequence[int] | np.ndarray, answer: Sequence[int], known: int, failed: bool
    ) -> tuple[int, str | None]:
        """How many tokens of an answer count, and why it ends there; None where it goes on.

        Args:
          answer: all tokens so far.
          known: of them, those that were looked at before.
          failed: are the logits after them no numbers?
        """
        stops = self.stop_strings
        if count := count_to_stop(self.tokenizer, prompt, answer, known, stops):
            return count, "stop"
        if failed:
            return len(answer), "nan"
        if len(answer) > known and answer[-1] in self.stop_tokens:
            return len(answer), "stop"
        return len(answer), "length" if len(answer) == self.max_new_tokens else None

    def text_of(self, prompt: Sequence[int] | np.ndarray, answer: Sequence[int]) -> str:
        """The text of an answer, before a stop string."""
        whole = decode_answer(self.tokenizer, [int(token) for token in prompt], answer)
        before = self.stop_strings.before(whole)
        return whole if before is None else before
