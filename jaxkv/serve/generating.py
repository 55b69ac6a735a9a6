"""A generation under way: its programs are compiled, prompts prefilled, answers decoded."""

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import jax
import numpy as np

from jaxkv.memory.session import Session
from jaxkv.serve.decode import Chunk, New, Prefilled
from jaxkv.serve.ending import Ending
from jaxkv.show.progress import progress_bar

if TYPE_CHECKING:  # loaded when it is asked for
    from jaxkv.serve.compressed import Compression

T = TypeVar("T")


class Answer:
    """What was found for a prompt so far."""

    def __init__(self, prompt: np.ndarray, ending: Ending):
        self.tokens: list[int] = []
        self.logprobs: list[float] = []
        self.guessed: list[bool] = []
        self.finish_reason: str | None = None
        self._prompt, self._ending = prompt, ending

    def take(self, new: New, row: int) -> list[int]:
        """Enter what a dispatch found, and return what of it counts."""
        if self.finish_reason is not None:  # by a stop string, which the device knows nothing of
            return []
        tokens, logprobs, failed = new.of(row)
        answer, known = [*self.tokens, *tokens], len(self.tokens)
        count, self.finish_reason = self._ending.of(self._prompt, answer, known, failed)
        self.tokens = answer[:count]
        self.logprobs += logprobs[: count - known]
        self.guessed += new.guesses_of(row)[: count - known]
        return answer[known:count]

    def text(self) -> str:
        return self._ending.text_of(self._prompt, self.tokens)


class Generating:
    """The cache goes through a `Session`; where its sequences stand, and what was found, is here.

    Args:
      program: a `jaxkv.serve.decode.Program`, or one with a draft.
      state: where each sequence stands.
      chunks: of the prompts, for prefill.
      answers: one a prompt, empty.
      on_tokens: as of `generate`.

    Attributes:
      seconds: that each part took.
      num_first: tokens of answers that prefill found.
    """

    def __init__(
        self,
        program: Any,
        state: Any,
        chunks: Sequence[Chunk],
        answers: Sequence[Answer],
        on_tokens: Callable[[int, list[int]], None] | None,
    ):
        self.state, self.answers, self.num_first = state, answers, 0
        self.seconds = {"compile": 0.0, "prefill": 0.0, "decode": 0.0}
        self._program, self._chunks, self._on_tokens = program, chunks, on_tokens

    @contextlib.contextmanager
    def runs(self, part: str) -> Iterator[None]:
        """Count the time of a part."""
        started = time.perf_counter()
        yield
        self.seconds[part] += time.perf_counter() - started

    @property
    def num_prefilled(self) -> int:
        """Tokens of prompts."""
        return sum(int(chunk.num_tokens.sum()) for chunk in self._chunks)

    def compile_prefill(self, live: Session) -> None:
        """So that timings of the steps do not include XLA's."""
        self._program.compile_prefill(self.state, self._chunks, live.cache)

    def compile_decode(self, live: Session) -> None:
        self._program.compile_decode(self.state, live.cache)

    def prefill(self, live: Session, compression: "Compression | None") -> None:
        """Take the prompts; first tokens too, where the program finds them there."""
        quiet = self._on_tokens is not None
        with progress_bar("prefill", self.num_prefilled, quiet=quiet) as advance_bar:
            for chunk, done in _one_behind(self._prefilled(live)):
                jax.block_until_ready(done.lengths)
                if compression is not None:
                    compression.see(done.queries, chunk.num_tokens, num_chunks=len(self._chunks))
                if done.new is not None:
                    self.num_first += self._take(done.new)
                advance_bar(int(chunk.num_tokens.sum()))

    def _prefilled(self, live: Session) -> Iterator[tuple[Chunk, Prefilled]]:
        for chunk in self._chunks:
            self.state, live.cache, done = self._program.prefill(self.state, chunk, live.cache)
            yield chunk, done

    def decode(self, live: Session, num_wanted: int, worth: Callable[[], float] | None) -> None:
        """Until every answer has ended.

        Args:
          num_wanted: tokens of all answers, at most.
          worth: tokens that a step with a draft gave so far.
        """
        left, quiet = num_wanted - self.num_first, self._on_tokens is not None
        with progress_bar("decode", left, quiet=quiet) as advance_bar:
            while any(answer.finish_reason is None for answer in self.answers):
                self.state, live.cache, found = self._program.decode(self.state, live.cache)
                advance_bar(self._take(found), None if worth is None else worth())

    def _take(self, found: New) -> int:
        """Enter what was found, and count what of it is new."""
        found, fresh = jax.device_get(found), 0
        for number, answer in enumerate(self.answers):
            tokens = answer.take(found, number)
            if self._on_tokens is not None and tokens:
                self._on_tokens(number, tokens)
            fresh += len(tokens)
        return fresh


def _one_behind(steps: Iterator[T]) -> Iterator[T]:
    """Each step when the one after it is on its way."""
    last: list[T] = []
    for step in steps:
        yield from last
        last = [step]
    yield from last
