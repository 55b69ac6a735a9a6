"""The requests that run or wait: which have rows and pages, and which must make room."""

import collections
import contextlib
import dataclasses
import itertools
from collections.abc import Iterable

from jaxkv.errors import PoolFullError
from jaxkv.serve.figures import Figures
from jaxkv.serve.model_step import Model
from jaxkv.serve.rank import Rank
from jaxkv.serve.request import Request
from jaxkv.serve.runner import Chunk, Runner
from jaxkv.serve.swap import SwapSpace

Arrived = list[tuple[Request, list[int]]]


class Batch:
    """A row of the cache for each request that runs, on one of the data ranks.

    Args:
      runner: computes.
      figures: what happens to requests is counted there.
      swap_space: bytes of host memory for pages of requests that had to make room.

    Attributes:
      ranks: the rows of the cache, in order.
      waiting: requests without a row, the next first.
    """

    def __init__(self, runner: Runner, figures: Figures, *, swap_space: int):
        pages = runner.pages
        num_rows = runner.num_rows // len(pages)
        self.ranks = [Rank(number, own, num_rows) for number, own in enumerate(pages)]
        self.waiting: collections.deque[Request] = collections.deque()
        self._runner, self._figures = runner, figures
        self._swap = SwapSpace(swap_space, figures, len(pages), runner.choice)

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

    def exchange(self, model: Model) -> None:
        """Another model, or other weights of this one, for requests that then all begin anew."""
        for request in sorted(self.running, key=lambda request: request.number, reverse=True):
            self._wait_again(request)
        for request in self.begun:
            self._swap.drop(request)
            request.start_over()
        self._runner.exchange(model)

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
        ahead = 0 if request.num_kept is not None else len(request.tokens)
        admission = rank.pages.admit(request.number, request.prompt, ahead=ahead)
        rank.seat(request)
        self._runner.copy(rank, admission.copies)
        self._prepare(request, rank)
        if admission.num_cached and (snapshots := rank.pages.snapshots) is not None:
            slot = snapshots.use(request.prompt, admission.num_cached)
            self._runner.restore_state(slot, request.row)
        request.length, request.shares = admission.num_cached, admission.num_cached > 0
        if request.num_cached is None:
            request.num_cached = admission.num_cached

    def _prepare(self, request: Request, rank: Rank) -> None:
        """Write what its cross-attention reads; its own function may fail, and has no row then."""
        try:
            self._runner.prepare(request)
        except BaseException:
            rank.leave(request)
            raise

    def _resume(self, request: Request, rank: Rank) -> None:
        """Other pages with what was kept of its old ones; nothing of it is computed again."""
        slots, prompt = request.num_slots(request.length), request.prompt
        if request.has_chosen:  # what it holds is of no prompt that others could find
            prompt = rank.pages.prompt([0], reuse=False)
        rank.pages.restore(request.number, prompt, slots)
        rank.seat(request)
        self._prepare(request, rank)
        self._runner.session.cache = self._swap.put_back(request, rank, self._runner.session.cache)
        rank.pages.advance(request.number, slots)

    def fork(self, request: Request, child: Request) -> bool:
        """Give a request a row and the tokens of one that runs; False if there is none beside it.

        Raises:
          PoolFullError: not enough pages are free.
        """
        rank = self.rank_of(request)
        if None not in rank.rows:
            return False
        rows = rank.rows.index(request), rank.rows.index(None)
        self._runner.copy(rank, rank.pages.fork(request.number, child.number), rows)
        self._runner.copy_state(*rows)
        child.length, child.shares = request.length, request.shares
        child.has_chosen = request.has_chosen
        child.num_cached = child.prompt.num_shareable
        rank.seat(child)
        self._prepare(child, rank)
        return True

    def leave(self, request: Request) -> None:
        """Take the row and the pages of a request, or its place among those that wait."""
        request.queries = None
        if request in self.rows:
            self.rank_of(request).leave(request)
        else:
            self.waiting.remove(request)
            self._swap.drop(request)

    def prefill(self, num_chunks: int) -> None:
        """Compute up to this many chunks of prompts on each rank, but at least those of a step."""
        for _ in range(max(1, num_chunks // self._runner.prefill_rows)):
            chunks = [self._next_chunks(rank) for rank in self.ranks]
            if not any(chunks):
                return
            self._runner.prefill(chunks)
            for request, start, end in itertools.chain(*chunks):
                request.length = end
                self.rank_of(request).pages.advance(request.number, end)
                self._figures.prefilled_tokens += end - start
            self._keep_states(itertools.chain(*chunks))
            self._choose()

    def _choose(self) -> None:
        """Let the policy choose of prompts that are computed: their pages are free then."""
        for rank in self.ranks:
            for request in rank.running:
                if request in rank.rows and request.must_choose:
                    self._choose_of(request, rank)

    def _choose_of(self, request: Request, rank: Rank) -> None:
        """A policy of the user's own may fail, and then the request waits to begin anew."""
        before = rank.pages.table(request.number)
        rank.pages.truncate(request.number, 0)  # what stays may be copied to these very pages
        if not self._make_room(rank, request, request.kept_slots):
            return
        try:
            self._runner.choose(request, before, rank.pages.table(request.number))
        except BaseException:
            request.without_pages()
            self._wait_again(request)
            raise
        request.has_chosen = True
        rank.pages.advance(request.number, request.kept_slots)

    def _keep_states(self, chunks: Iterable[Chunk]) -> None:
        """Take snapshots at the ends of chunks that were just computed, where some are wanted."""
        rows = {}
        for request, _, end in chunks:
            snapshots = self.rank_of(request).pages.snapshots
            if snapshots is not None and snapshots.wants(request.prompt, end):
                slot = snapshots.keep(request.prompt, end)
                if slot is not None:
                    rows[slot] = request.row
        self._runner.keep_states(rows)

    def _next_chunks(self, rank: Rank) -> list[Chunk]:
        """What a step computes of the prompts on a rank, in order of admission."""
        chunks: list[Chunk] = []
        for request in rank.prefilling:
            if request not in rank.rows or len(chunks) == self._runner.prefill_rows:
                break  # it had to make room for one before it, or it comes in another step
            if not self._make_room(rank, request, self._end_of_chunk(request, request.length)):
                break
            chunks += self._chunks_of(rank, request)[: self._runner.prefill_rows - len(chunks)]
        return chunks

    def _chunks_of(self, rank: Rank, request: Request) -> list[Chunk]:
        """The next chunks of a prompt: after the first, those for which there are pages anyway."""
        chunks: list[Chunk] = []
        start = request.length
        while start < request.prompt.num_shareable and len(chunks) < self._runner.chunks_of_one:
            end = self._end_of_chunk(request, start)
            try:
                rank.pages.extend(request.number, end)
            except PoolFullError:  # behind a window, whose pages come back as tokens pass
                break
            chunks.append(Chunk(request, start, end))
            start = end
        return chunks

    def _end_of_chunk(self, request: Request, start: int) -> int:
        return min(start + self._runner.prefill_chunk, request.prompt.num_shareable)

    def decode(self) -> Arrived:
        """Find the next tokens of all requests whose prompts are computed."""
        self._choose()  # of prompts that were found whole
        for rank in self.ranks:
            for request in rank.running:
                if request in rank.rows and not request.is_prefilling:  # not preempted meanwhile
                    ahead = min(
                        self._runner.decode_steps, request.max_new_tokens - request.num_decoded
                    )
                    self._make_room(rank, request, request.num_slots(request.length + ahead))
        rows = [None if r is None or r.is_prefilling else r for r in self.rows]
        if not any(rows):
            return []
        new, arrived = self._runner.decode(rows), []
        for row, decoded in enumerate(rows):
            if decoded is not None:
                tokens, logprobs, failed = new.of(row)
                fresh = decoded.take(tokens, logprobs, failed and not decoded.shares)
                slots = decoded.num_slots(decoded.length)
                self.rank_of(decoded).pages.advance(decoded.number, slots)
                self._figures.generated_tokens += len(fresh)
                self._figures.repeated_tokens += len(tokens) - len(fresh)
                arrived.append((decoded, fresh))
                if failed and decoded.finish_reason != "stop":  # by a string that came before
                    self._distrust(decoded)
        self._figures.look(self._runner.pages.usage())
        for decoded, _ in arrived:
            if decoded.done:
                self.leave(decoded)
        return [(decoded, fresh) for decoded, fresh in arrived if fresh]

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
        is_ready = request.num_kept is None or request.has_chosen  # or it would want its queries
        if not is_ready or not self._swap.keep(request, rank, self._runner.session.cache):
            request.without_pages()
        request.num_preemptions += 1
        self._figures.preemptions += 1
        self._wait_again(request)

    def _distrust(self, request: Request) -> None:
        """What gave logits that are no numbers is shared no more.

        Tokens of a chunk spoil those before them too, for zero times NaN is NaN. So who found
        pages in the pool computes them for itself before it is said to have failed.
        """
        self.rank_of(request).pages.withdraw(request.number)
        if request.shares:
            request.without_pages()
            request.prompt = dataclasses.replace(request.prompt, reuse=False)
            self._wait_again(request)

    def _wait_again(self, request: Request) -> None:
        self.leave(request)
        self.waiting.appendleft(request)
