"""The requests that run or wait: where each runs, and the steps that move all of them on."""

import collections
import contextlib
import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxkv.cache.axes import Spread
from jaxkv.drafts.draft import Draft, StatefulDraft, state_of
from jaxkv.errors import ModelChangedError, PoolFullError
from jaxkv.memory.session import Session
from jaxkv.paging import Copy, Pools
from jaxkv.serve import steps
from jaxkv.serve.calibration import Constants, with_constants
from jaxkv.serve.figures import Figures
from jaxkv.serve.model_step import Model, ModelStep, Watch, Weights, spread_over
from jaxkv.serve.rank import Rank
from jaxkv.serve.request import MOST_STOP_TOKENS, Request
from jaxkv.serve.sampling import Sampling
from jaxkv.serve.speculate import Pace, Static, padded
from jaxkv.serve.swap import SwapSpace

Arrived = list[tuple[Request, list[int]]]


class Chunk(NamedTuple):
    """Tokens of a prompt that go through the model together."""

    request: Request
    start: int
    end: int


class Batch:
    """A row of the cache for each request that runs, on one of the data ranks.

    Args:
      model, sampling: of every step.
      session: holds the cache.
      pages: its books.
      prefill_chunk, decode_steps: tokens of a request that a step takes.
      prefill_rows: chunks that a step of prefill takes, on each data rank.
      swap_space: bytes of host memory for pages of requests that had to make room.
      draft, num_guesses: who guesses tokens that a step checks, and how many.

    Attributes:
      ranks: the rows of the cache, in order.
      waiting: requests without a row, the next first.
    """

    def __init__(
        self,
        model: Model,
        sampling: Sampling,
        session: Session,
        pages: Pools,
        *,
        prefill_chunk: int,
        prefill_rows: int,
        decode_steps: int,
        swap_space: int,
        spread: Spread | None = None,
        constants: Constants | None = None,
        draft: Draft | StatefulDraft | None = None,
        num_guesses: int = 0,
    ):
        num_rows = (session.config.batch_size or 1) // len(pages)
        self.ranks = [Rank(number, own, num_rows) for number, own in enumerate(pages)]
        self.waiting: collections.deque[Request] = collections.deque()
        self.pages, self.figures = pages, Figures()
        self._swap = SwapSpace(swap_space, self.figures, len(pages))
        self._model = model
        self._watch = Watch(Weights.of(model))
        self._spread = spread
        self._constants, self._calibrated = constants, False
        self._copies: tuple[Watch, Weights] | None = None
        self._sampling, self._session = sampling, session
        self._compiled = False
        self._chunk, self._chunks_per_step = prefill_chunk, prefill_rows
        self._decode_steps = decode_steps
        self._draft = draft if spread is None else spread_over(spread.mesh, draft)
        self._num_guesses = num_guesses
        if draft is not None:
            remembered = state_of(draft, len(self.rows), session.config.max_context_length)
            self._drafting = steps.Drafting(Pace.begin(), remembered)

    @property
    def rows(self) -> list[Request | None]:
        """The request of each row of the cache, or None."""
        return [row for rank in self.ranks for row in rank.rows]

    @property
    def running(self) -> list[Request]:
        """The requests that have rows; of each rank, those admitted first first."""
        return [request for rank in self.ranks for request in rank.running]

    @property
    def begun(self) -> list[Request]:
        """The requests that something was computed for, or that have pages."""
        return [*self.running, *(request for request in self.waiting if request.begun)]

    @property
    def most_decoding(self) -> int:
        """Of requests whose prompts are computed, on the rank that has most of them."""
        return max(len(rank.running) - len(rank.prefilling) for rank in self.ranks)

    def rank_of(self, request: Request) -> Rank:
        """Where a request runs."""
        assert request.rank is not None, "it has a row"
        return self.ranks[request.rank]

    @contextlib.contextmanager
    def weights_as_they_are(self) -> Iterator[None]:
        """Rounds in here use the model's weights of now, which nothing keeps between them.

        Raises:
          ModelChangedError: they were exchanged since requests have begun.
        """
        weights = Weights.of(self._model)
        if not self._watch.sees(weights):
            if self.begun:
                raise ModelChangedError(
                    f"the model's weights were exchanged, and {len(self.begun)} requests have "
                    "begun with the old ones. Call Engine.update(model, restart=True) to begin "
                    "these anew, or cancel them."
                )
            self._forget(weights)
        self._weights = weights if self._spread is None else self._copied(weights, self._spread)
        if not self._calibrated:
            self._calibrate()
        try:
            yield
        finally:
            del self._weights

    def _calibrate(self) -> None:
        """Before anything is computed: with constants of this model, not of the first request."""
        mesh = None if self._spread is None else self._spread.mesh
        cache = with_constants(self._weights, self._session.cache, self._constants, mesh)
        self._session.cache, self._calibrated = cache, True

    def _copied(self, weights: Weights, spread: Spread) -> Weights:
        """The weights on all devices of the mesh, copied anew only where they were exchanged."""
        if self._copies is None or not self._copies[0].sees(weights):
            self._copies = Watch(weights), weights.spread_over(spread.mesh)
        return self._copies[1]

    def exchange(self, model: Model) -> None:
        """Another model, or other weights of this one, for requests that then all begin anew."""
        for request in sorted(self.running, key=lambda request: request.number, reverse=True):
            self._wait_again(request)
        for request in self.begun:
            self._swap.drop(request)
            request.start_over()
        self._model = model
        self._forget(Weights.of(model))

    def _forget(self, weights: Weights) -> None:
        """What was computed with others, of which nothing is in use."""
        self._compiled = False
        self.pages.forget()
        self._session.cache = steps.without_codec_state(self._session.cache)
        self._constants, self._calibrated = None, False  # they were of the old ones
        self._watch = Watch(weights)

    def admit_waiting(self) -> None:
        """Give waiting requests rows and pages, in their order, while they last."""
        while self.waiting and self._admit(self.waiting[0]):
            self.waiting.popleft()

    def _admit(self, request: Request) -> bool:
        """Give it a row and pages; False if there are none, or it had better wait."""
        for rank in self._choices(request):
            with contextlib.suppress(PoolFullError):
                if request in self._swap:
                    self._resume(request, rank)
                else:
                    self._begin(request, rank)
                return True
        return False

    def _choices(self, request: Request) -> list[Rank]:
        """Ranks with a row for it: where most of its prompt is found, and then the emptiest, first.

        One that is computing what it could find there a little later is none of them.
        """
        kept, prompt = request in self._swap, request.prompt
        free = [rank for rank in self.ranks if None in rank.rows]
        ready = [rank for rank in free if kept or not rank.is_computing(prompt)]
        return sorted(
            ready, key=lambda rank: (rank.pages.find(prompt), rank.free_share), reverse=True
        )

    def _begin(self, request: Request, rank: Rank) -> None:
        """Pages for its prompt and for what it answered before."""
        admission = rank.pages.admit(request.number, request.prompt, ahead=len(request.tokens))
        rank.seat(request)
        self._copy(rank, admission.copies)
        request.length, request.shares = admission.num_cached, admission.num_cached > 0
        if request.num_cached is None:
            request.num_cached = admission.num_cached

    def _resume(self, request: Request, rank: Rank) -> None:
        """Other pages with what was kept of its old ones; nothing of it is computed again."""
        rank.pages.restore(request.number, request.prompt, request.length)
        rank.seat(request)
        self._session.cache = self._swap.put_back(request, rank, self._session.cache)
        rank.pages.advance(request.number, request.length)

    def fork(self, request: Request, child: Request) -> bool:
        """Give a request a row and the tokens of one that runs; False if there is none beside it.

        Raises:
          PoolFullError: not enough pages are free.
        """
        rank = self.rank_of(request)
        if None not in rank.rows:
            return False
        rows = rank.rows.index(request), rank.rows.index(None)
        self._copy(rank, rank.pages.fork(request.number, child.number), rows)
        child.length, child.shares = request.length, request.shares
        child.num_cached = child.prompt.num_shareable
        rank.seat(child)
        return True

    def leave(self, request: Request) -> None:
        """Take the row and the pages of a request, or its place among those that wait."""
        if request in self.rows:
            self.rank_of(request).leave(request)
        else:
            self.waiting.remove(request)
            self._swap.drop(request)

    def compile(self) -> None:
        """The programs of a round, before the first: XLA takes long for each, and two at once."""
        if self._compiled:
            return
        decode, arguments, options = self._decoding([None] * len(self.rows))
        given = self._given([None] * (self._chunks_per_step * len(self.ranks)))
        compilations = (
            decode.compilation(self._weights, *arguments, **options),
            steps.prefill.compilation(self._weights, *given, self._session.cache),
        )
        with ThreadPoolExecutor() as pool:
            list(pool.map(lambda compilation: compilation(), compilations))
        self._compiled = True

    def prefill(self, num_chunks: int) -> None:
        """Compute up to this many chunks of prompts on each rank, but at least those of a step."""
        for _ in range(max(1, num_chunks // self._chunks_per_step)):
            chunks = [self._next_chunks(rank) for rank in self.ranks]
            if not any(chunks):
                return
            self._compute(chunks)

    def _next_chunks(self, rank: Rank) -> list[Chunk]:
        """What a step computes of the prompts on a rank, in order of admission."""
        chunks: list[Chunk] = []
        for request in rank.prefilling:
            if request not in rank.rows or len(chunks) == self._chunks_per_step:
                break  # it had to make room for one before it, or it comes in another step
            if not self._make_room(rank, request, self._end_of_chunk(request, request.length)):
                break
            chunks += self._chunks_of(rank, request)[: self._chunks_per_step - len(chunks)]
        return chunks

    def _chunks_of(self, rank: Rank, request: Request) -> list[Chunk]:
        """The next chunks of a prompt: after the first, those for which there are pages anyway."""
        chunks: list[Chunk] = []
        start = request.length
        while start < request.prompt.num_shareable and len(chunks) < self._chunks_per_step:
            end = self._end_of_chunk(request, start)
            try:
                rank.pages.extend(request.number, end)
            except PoolFullError:  # behind a window, whose pages come back as tokens pass
                break
            chunks.append(Chunk(request, start, end))
            start = end
        return chunks

    def _end_of_chunk(self, request: Request, start: int) -> int:
        return min(start + self._chunk, request.prompt.num_shareable)

    def _compute(self, chunks: Sequence[Sequence[Chunk]]) -> None:
        """The chunks of each rank, all in one step; rows without one rest."""
        rows = [
            chunk
            for own in chunks
            for chunk in (*own, *[None] * (self._chunks_per_step - len(own)))
        ]
        given = self._given(rows)
        self._session.cache = steps.prefill(self._weights, *given, self._session.cache)
        self.figures.prefill_steps += 1
        for chunk in rows:
            if chunk is not None:
                self.figures.prefilled_tokens += chunk.end - chunk.start
                chunk.request.length = chunk.end
                self.rank_of(chunk.request).pages.advance(chunk.request.number, chunk.end)

    def _given(self, rows: Sequence[Chunk | None]) -> tuple[Any, ...]:
        """What a step of prefill is told: tokens, how many are real, where they begin, pages."""
        tokens = np.zeros((len(rows), self._chunk), np.int32)
        num_tokens, start = np.zeros((2, len(rows)), np.int32)
        for row, chunk in enumerate(rows):
            if chunk is not None:
                start[row], num_tokens[row] = chunk.start, chunk.end - chunk.start
                own = chunk.request.prompt.tokens[chunk.start : chunk.end]
                tokens[row, : len(own)] = own
        tables = self._tables([None if chunk is None else chunk.request for chunk in rows])
        return jax.device_put((tokens, num_tokens, start, tables))

    def decode(self) -> Arrived:
        """Find the next tokens of all requests whose prompts are computed."""
        for rank in self.ranks:
            for request in rank.running:
                if request in rank.rows and not request.is_prefilling:  # not preempted meanwhile
                    ahead = min(self._decode_steps, request.max_new_tokens - request.num_decoded)
                    self._make_room(rank, request, request.length + ahead)
        rows = [None if r is None or r.is_prefilling else r for r in self.rows]
        if not any(rows):
            return []
        new, arrived = self._decode(rows), []
        for row, decoded in enumerate(rows):
            if decoded is not None:
                tokens, logprobs, failed = new.of(row)
                fresh = decoded.take(tokens, logprobs, failed and not decoded.shares)
                self.rank_of(decoded).pages.advance(decoded.number, decoded.length)
                self.figures.generated_tokens += len(fresh)
                self.figures.repeated_tokens += len(tokens) - len(fresh)
                arrived.append((decoded, fresh))
                if failed and decoded.finish_reason != "stop":  # by a string that came before
                    self._distrust(decoded)
        self.figures.look(self.pages.usage())
        for decoded, _ in arrived:
            if decoded.done:
                self.leave(decoded)
        return [(decoded, fresh) for decoded, fresh in arrived if fresh]

    def _decode(self, rows: Sequence[Request | None]) -> Any:
        """What a dispatch of decode finds."""
        step, arguments, options = self._decoding(rows)
        results = step(self._weights, *arguments, **options)
        if self._draft is None:
            self._session.cache, new = results
            return jax.device_get(new)
        self._session.cache, new, self._drafting, counts = results
        new, (num_steps, num_guesses) = jax.device_get((new, counts))
        self.figures.checked_guesses += int(num_guesses)
        self.figures.right_guesses += int((new.guessed & (new.tokens >= 0)).sum())
        self.figures.steps += int(num_steps)
        return new

    def _decoding(
        self, rows: Sequence[Request | None]
    ) -> tuple[ModelStep, tuple[Any, ...], dict[str, Any]]:
        """The step that decodes, what it is told, and its options."""
        options = {"sampling": self._sampling, "num_steps": self._decode_steps}
        given, cache = jax.device_put(self._dispatch(rows)), self._session.cache
        if self._draft is None:
            return steps.decode, (given, cache), options
        static, arrays = Static.of(self._draft)
        texts: list[Sequence[int]] = [
            () if row is None else [*row.prompt.tokens, *row.tokens] for row in rows
        ]
        text = jax.device_put(padded(texts, self._session.config.max_context_length))
        options |= {"draft": static, "num_guesses": self._num_guesses}
        return steps.speculate, (given, self._drafting, arrays, cache, text), options

    def _dispatch(self, rows: Sequence[Request | None]) -> steps.Rows:
        def column(value: Any) -> np.ndarray:
            return np.array([0 if r is None else value(r) for r in rows], np.int32)

        def padded(values: Iterable[Sequence[int]], width: int) -> np.ndarray:
            array = np.full((len(rows), width), -1, np.int32)
            for row, some in zip(array, values, strict=True):
                row[: len(some)] = some[:width]
            return array

        known = [() if r is None else r.tokens[r.num_decoded :][: self._decode_steps] for r in rows]
        return steps.Rows(
            last=column(lambda r: r.next_input),
            remaining=column(lambda r: r.max_new_tokens - r.num_decoded),
            seeds=column(lambda r: r.seed),
            lengths=column(lambda r: r.length),
            stop_tokens=padded(
                (() if r is None else r.stop_tokens for r in rows), MOST_STOP_TOKENS
            ),
            known=padded(known, self._decode_steps),
            prompts=column(lambda r: r.prompt.num_shareable),
            tables=self._tables(rows),
        )

    def _tables(self, rows: Sequence[Request | None]) -> steps.Tables:
        """The page tables of these rows, a table a group; rows that rest have no pages."""
        tables = []
        for number, group in enumerate(self._session.cache.groups):
            assert group.pages is not None, "check_config saw it"
            table = np.full((len(rows), group.pages.table.shape[-1]), -1, np.int32)
            for row, request in zip(table, rows, strict=True):
                if request is not None:
                    pages = self.rank_of(request).pages.table(request.number, number)
                    row[: len(pages)] = pages
            tables.append(table)
        return tuple(tables)

    def _make_room(self, rank: Rank, request: Request, length: int) -> bool:
        """Assign pages for this many tokens, preempting requests admitted last; False if itself."""
        while True:
            try:
                rank.pages.extend(request.number, length)
                return True
            except PoolFullError:
                victim = rank.running[-1]
                self._preempt(rank, victim)
                if victim is request:
                    return False

    def _preempt(self, rank: Rank, request: Request) -> None:
        """Take its pages. They come back, or are computed again in the same way: the same bits."""
        if not self._swap.keep(request, rank, self._session.cache):
            request.length = 0
        request.num_preemptions += 1
        self.figures.preemptions += 1
        self._wait_again(request)

    def _distrust(self, request: Request) -> None:
        """What gave logits that are no numbers is shared no more.

        Tokens of a chunk spoil those before them too, for zero times NaN is NaN. So who found
        pages in the pool computes them for itself before it is said to have failed.
        """
        self.rank_of(request).pages.withdraw(request.number)
        if request.shares:
            request.length = 0
            request.prompt = dataclasses.replace(request.prompt, reuse=False)
            self._wait_again(request)

    def _wait_again(self, request: Request) -> None:
        self.leave(request)
        self.waiting.appendleft(request)

    def _copy(self, rank: Rank, copies: list[Copy], rows: tuple[int, int] = (-1, -1)) -> None:
        """Pages and, from row to row, newest tokens. Before the next step; padded to one shape."""
        num_groups = len(rank.pages.groups)
        num_pools = len(steps.pools_of(self._session.cache))
        if not copies and (num_pools == num_groups or rows[1] < 0):
            return
        pairs = np.full((2, num_pools, len(self.ranks)), -1, np.int32)
        pairs[:, num_groups:, rank.number] = np.array(rows)[:, None]
        for copy in copies:
            pairs[:, copy.group, rank.number] = copy.source, copy.destination
        sources, destinations = jax.device_put((tuple(pairs[0]), tuple(pairs[1])))
        self._session.cache = steps.copy(sources, destinations, self._session.cache)
