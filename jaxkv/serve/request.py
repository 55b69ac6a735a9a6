"""What a user holds of a request: its answer so far, and how it ended."""

import dataclasses
import time
from collections.abc import Callable
from typing import Any

from jaxkv.cache.hybrid import AnyCache
from jaxkv.counts import ceil_div
from jaxkv.paging import Prompt
from jaxkv.serve.ending import Ending
from jaxkv.serve.sampling import Sampling
from jaxkv.show.stop_strings import StopStrings

# Tokens that end a request, those of the engine and its own together: a fixed shape to compile.
MOST_STOP_TOKENS = 16


# From an empty cache to one with what an encoder made for a request, or for each of several.
Prepare = Callable[[AnyCache], AnyCache]


@dataclasses.dataclass(eq=False)
class Request:
    """One prompt on its way through an `Engine`. Made by `Engine.submit`; read it at any time.

    Attributes:
      number: of the request, counted from 0 by its engine.
      prompt: with the names of its pages.
      max_new_tokens: the most tokens of the answer.
      seed: of its draws.
      sampling: how they are made.
      stop_tokens: ids that end it, the engine's included.
      stop_strings: texts that end it, the engine's included.
      tokenizer: of its engine; None for none.
      tokens: the answer so far, a stop token included, and what completed a stop string.
      logprobs: of each, under the model before temperature and filters.
      finish_reason: ``"stop"``, ``"length"``, ``"cancelled"``, or ``"nan"`` where the model's next
        logits were no distribution, see `jaxkv.sample`; None while it is not over.
      num_cached: prompt tokens that were in the pool when it first ran.
      num_preemptions: times that its pages were taken from it, to be computed again later.
      submitted, first_token: times by `time.perf_counter`, the second None until it came.
      rank: the part of the batch that it runs on, or ran on last, where the batch is split over
        devices (0 where not); None before it first ran.
    """

    number: int
    prompt: Prompt
    max_new_tokens: int
    seed: int
    stop_tokens: tuple[int, ...]
    sampling: Sampling = Sampling()
    stop_strings: StopStrings = StopStrings()
    tokenizer: Any = None
    tokens: list[int] = dataclasses.field(default_factory=list)
    logprobs: list[float] = dataclasses.field(default_factory=list)
    finish_reason: str | None = None
    num_cached: int | None = None
    num_preemptions: int = 0
    submitted: float = dataclasses.field(default_factory=time.perf_counter)
    first_token: float | None = None
    rank: int | None = None
    # Writes what its cross-attention reads into a cache of one sequence.
    prepare: Prepare | None = None
    # Of its rank, while it runs.
    row: int = -1
    # Tokens whose keys and values are in its pages; those of the answer follow the prompt's.
    length: int = 0
    # Did others compute some of them?
    shares: bool = False
    # Of its prompt, how many tokens stay once a policy has chosen; None for all.
    num_kept: int | None = None
    has_chosen: bool = False
    # What the policy looks at, while the prompt is computed.
    queries: Any = dataclasses.field(default=None, repr=False)

    @property
    def done(self) -> bool:
        return self.finish_reason is not None

    @property
    def text(self) -> str:
        """The answer so far as text, before a stop string.

        Raises:
          ValueError: its engine has no tokenizer.
        """
        if self.tokenizer is None:
            raise ValueError("Request.text needs an Engine with tokenizer=.")
        return self._ending.text_of(self.prompt.tokens, self.tokens)

    @property
    def _ending(self) -> Ending:
        return Ending(self.max_new_tokens, self.stop_tokens, self.stop_strings, self.tokenizer)

    @property
    def begun(self) -> bool:
        """Was anything computed for it?"""
        return bool(self.length or self.tokens)

    @property
    def is_prefilling(self) -> bool:
        """Are tokens of the prompt to be computed yet, the last one aside?"""
        return self.length < self.prompt.num_shareable

    @property
    def must_choose(self) -> bool:
        """Is its prompt computed, and a policy to choose of it?"""
        return self.num_kept is not None and not self.has_chosen and not self.is_prefilling

    @property
    def kept_slots(self) -> int:
        """Slots of the whole pages that what stays of its prompt takes."""
        return ceil_div(self.num_kept or 0, self.prompt.page_size) * self.prompt.page_size

    @property
    def kept_pages(self) -> int:
        """Its first pages, if they hold what a policy chose."""
        return self.kept_slots // self.prompt.page_size if self.has_chosen else 0

    def num_slots(self, length: int) -> int:
        """Slots of its pages up to that of the last of so many tokens of its text."""
        if not self.has_chosen:
            return length
        return self.kept_slots + length - self.prompt.num_shareable

    @property
    def num_decoded(self) -> int:
        """Tokens of the answer that have been found, or found again since a preemption."""
        return max(0, self.length - self.prompt.num_shareable)

    @property
    def next_input(self) -> int:
        """The token that the next decode step takes."""
        decoded = self.num_decoded
        return self.tokens[decoded - 1] if decoded else int(self.prompt.tokens[-1])

    def start_over(self) -> None:
        """Forget the answer so far."""
        # Other lists, by which a stream sees that this is another answer.
        self.tokens, self.logprobs = [], []
        self.num_cached, self.first_token = None, None
        self.without_pages()

    def without_pages(self) -> None:
        """What was computed of it is gone, and its answer so far is not."""
        self.length, self.has_chosen = 0, False

    def take(self, tokens: list[int], logprobs: list[float], failed: bool) -> list[int]:
        """Enter what a dispatch found, as `New.of` says it, and return what of it is new."""
        again = len(self.tokens) - self.num_decoded
        answer, known = [*self.tokens, *tokens[again:]], len(self.tokens)
        count, self.finish_reason = self._ending.of(self.prompt.tokens, answer, known, failed)
        new = answer[known:count]
        self.length += len(tokens)
        self.tokens += new
        self.logprobs += logprobs[again : again + len(new)]
        if new and self.first_token is None:
            self.first_token = time.perf_counter()
        return new
