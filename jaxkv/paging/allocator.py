"""Which sequence holds which pages: admit, extend, advance, fork, truncate, release; the proof."""

import dataclasses
from collections.abc import Callable, Hashable, Sequence

import numpy as np

from jaxkv.counts import ceil_div, check_count
from jaxkv.errors import BookkeepingError, PoolFullError, UnknownRequestError
from jaxkv.paging.group import Group, GroupPages, check_fits, check_free, how_full
from jaxkv.paging.prefix_index import Event, PrefixIndex
from jaxkv.paging.prompt import Prompt, num_tokens, page_digest
from jaxkv.paging.search import GroupSearch, PrefixSearch
from jaxkv.paging.sequence import Admission, Copy, HeldSequence
from jaxkv.paging.snapshots import Snapshots

Request = Hashable


@dataclasses.dataclass(frozen=True)
class Usage:
    """Figures of a moment, over all groups; and of the allocator's life, where it says so.

    Attributes:
      num_pages: of the pools.
      page_size: tokens per page.
      held_pages: that requests hold; a shared page counts once.
      shared_pages: of them, that more than one holds.
      cached_pages: free ones whose content can still be found.
      most_held_pages: at any time so far.
      num_requests: that hold pages.
      wasted_slots: of held pages, that no token known so far needs.
      evictions: cached pages that were taken for something else, so far.
      prompt_tokens: admitted so far.
      hit_tokens: of them, that were in the pool already.
      snapshots: of states that are kept now, and how many made room for others so far.
    """

    num_pages: int
    page_size: int
    held_pages: int
    shared_pages: int
    cached_pages: int
    most_held_pages: int
    num_requests: int
    wasted_slots: int
    evictions: int
    prompt_tokens: int
    hit_tokens: int
    snapshots: int = 0
    snapshot_evictions: int = 0

    @property
    def occupancy(self) -> float:
        """The share of pages that requests hold."""
        return self.held_pages / self.num_pages

    @property
    def by_use(self) -> dict[str, int]:
        """Every page once, as `jaxkv.plots.pool_occupancy` takes them."""
        return {
            "sequences": self.held_pages - self.shared_pages,
            "shared": self.shared_pages,
            "cached": self.cached_pages,
            "free": self.num_pages - self.held_pages - self.cached_pages,
        }

    @property
    def waste(self) -> float:
        """The share of held slots that hold no token."""
        held = self.held_pages * self.page_size
        return self.wasted_slots / held if held else 0.0

    @property
    def hit_rate(self) -> float:
        """The share of prompt tokens that did not have to be computed."""
        return self.hit_tokens / self.prompt_tokens if self.prompt_tokens else 0.0


class PageAllocator:
    """The bookkeeping of a paged cache: no arrays, no device.

    A request is admitted with a prompt. Then, over and over: ``extend`` gives its next tokens
    pages, the device computes them, ``advance`` says so. ``release`` ends it. Every call does all
    that it says or raises and does nothing. Full pages of prompts stay findable after ``advance``
    and after ``release``, until they are taken for something else.

    Args:
      groups: of layers, or the number of pages of the only one.
      page_size: tokens per page.
      chunk: a hit ends at a multiple of this many tokens, or right before the last token. Give the
        tokens of a prefill step, and every cached page was computed by the same step from the
        same tokens; a page if None.
      reserve: free pages that an admission leaves in each group, so that those who run can
        grow, unless nobody runs.
      fingerprint: of what computes the keys and values; part of every digest.
      sharing: False to share nothing between prompts.
      on_event: told what becomes findable and what is forgotten.

    >>> import jaxkv.paging
    >>> pages = jaxkv.paging.PageAllocator(8, page_size=4)
    >>> prompt = pages.prompt([1, 2, 3, 4, 5, 6])
    >>> pages.admit("a", prompt)
    Admission(num_cached=0, copies=[])
    >>> pages.advance("a", 6)
    >>> pages.admit("b", prompt)  # the first page is shared, and the second begins the same
    Admission(num_cached=5, copies=[Copy(group=0, source=1, destination=2)])
    >>> pages.table("a").tolist(), pages.table("b").tolist()
    ([0, 1], [0, 2])
    """

    def __init__(
        self,
        groups: Sequence[Group] | int,
        *,
        page_size: int = 16,
        chunk: int | None = None,
        reserve: int = 0,
        fingerprint: bytes = b"",
        sharing: bool = True,
        on_event: Callable[[Event], None] | None = None,
        snapshots: Snapshots | None = None,
    ):
        groups = [Group(groups)] if isinstance(groups, int) else list(groups)
        chunk = page_size if chunk is None else chunk
        check_count("PageAllocator: groups", len(groups))
        check_count("PageAllocator: page_size", page_size)
        check_count("PageAllocator: chunk", chunk)
        check_count("PageAllocator: reserve", reserve, least=0)
        self.page_size, self.chunk, self.reserve = page_size, chunk, reserve
        self.fingerprint, self.sharing = fingerprint, sharing
        self.snapshots = snapshots
        self.groups = [
            GroupPages(group, page_size, chunk, PrefixIndex(number, on_event))
            for number, group in enumerate(groups)
        ]
        self.sequences: dict[Request, HeldSequence] = {}
        self.num_prompt_tokens = self.num_hit_tokens = 0

    def check_fits(self, length: int) -> None:
        """Raise `CacheFullError` if even an idle pool has no room for this many tokens."""
        check_fits(self.groups, length)

    def prompt(
        self, tokens: Sequence[int] | np.ndarray, *, salt: bytes | str = b"", reuse: bool = True
    ) -> Prompt:
        """Name the pages of a prompt, once for any number of calls; see `Prompt.of`."""
        return Prompt.of(
            tokens,
            page_size=self.page_size,
            salt=salt,
            fingerprint=self.fingerprint,
            reuse=reuse and self.sharing,
        )

    def find(self, prompt: Prompt) -> int:
        """How many tokens of a prompt need not be computed, if it is admitted now."""
        search = PrefixSearch(self.groups, prompt, self.chunk, snapshots=self.snapshots)
        return next(search.hits())

    def will_leave(self, other: Prompt, prompt: Prompt) -> int:
        """How many tokens of a prompt computing another one will leave to be found."""
        common = other.num_common(prompt)
        whole = [common] if common == prompt.num_shareable else []
        for hit in (*whole, *range(common - common % self.chunk, 0, -self.chunk)):
            kept = self.snapshots is None or self.snapshots.wants(other, hit)
            if kept and hit <= prompt.num_findable:
                return hit
        return 0

    def admit(self, request: Request, prompt: Prompt, *, ahead: int = 0) -> Admission:
        """Give a request pages for its whole prompt: those that hold a part of it, and free ones.

        Args:
          request: any hashable name that no admitted request has.
          prompt: see `prompt`.
          ahead: tokens to follow the prompt for which there must be pages too.

        Raises:
          PoolFullError: not enough pages are free now.
          CacheFullError: the prompt needs more pages than there are.
          ValueError: the request is there already, or the prompt has another page size.
        """
        self.check_new(request, prompt)
        check_fits(self.groups, len(prompt) + ahead)
        search = PrefixSearch(self.groups, prompt, self.chunk, ahead, self.snapshots)
        hit = search.longest_that_fits(self.reserve if self.sequences else 0)
        if hit is None:
            raise PoolFullError(f"{how_full(self.groups)}: no room for {len(prompt)} tokens now.")
        if self.snapshots is not None and (found := next(search.in_pages())) > hit:
            self.snapshots.miss(prompt, found)
        sequence, copies = HeldSequence(prompt, hit), []
        for number, group in enumerate(search.groups):
            table, source = group.claim(hit)
            sequence.tables.append(table)
            if source is not None:
                copies.append(Copy(number, source, table[hit // self.page_size]))
        self.sequences[request] = sequence
        self.num_prompt_tokens += len(prompt)
        self.num_hit_tokens += hit
        return Admission(hit, copies)

    def restore(self, request: Request, prompt: Prompt, length: int) -> None:
        """Admit a request whose first tokens are to be written to its pages from elsewhere.

        All its pages are fresh, and none is looked for. Write them before the next step;
        ``advance(request, length)`` then makes those of the prompt findable.

        Args:
          request: any hashable name that no admitted request has.
          prompt: what the tokens begin with; there are pages for the rest of it too.
          length: tokens that are there already, of the prompt and what followed it.

        Raises:
          PoolFullError: not enough pages are free now. The books are as they were.
          CacheFullError: more tokens than the whole pool has room for.
          ValueError: the request is there already, or the prompt has another page size.

        >>> import jaxkv.paging
        >>> pages = jaxkv.paging.PageAllocator(8, page_size=4)
        >>> pages.restore("a", pages.prompt([1, 2, 3, 4, 5, 6]), length=5)
        >>> pages.advance("a", 5)  # once they are written
        >>> pages.find(pages.prompt([1, 2, 3, 4, 5, 7]))
        5
        """
        held = self.check_restore(request, prompt, length)
        sequence = HeldSequence(prompt, length)
        sequence.num_published = 0
        for group, numbers in zip(self.groups, held, strict=True):
            sequence.tables.append([-1] * numbers.start + [group.pool.take() for _ in numbers])
        self.sequences[request] = sequence

    def check_restore(self, request: Request, prompt: Prompt, length: int) -> list[range]:
        """Raise what `restore` would, or say which pages of a sequence it would take, by group."""
        self.check_new(request, prompt)
        total = max(length, len(prompt))
        check_fits(self.groups, total)
        held = [range(group.first_seen(length), group.end(length, total)) for group in self.groups]
        reserve = self.reserve if self.sequences else 0
        needed = [len(numbers) + reserve for numbers in held]
        check_free(self.groups, needed, f"no room for {total} tokens of request {request!r}")
        return held

    def extend(self, request: Request, length: int) -> None:
        """Give a request pages for its first ``length`` tokens, where it has none yet.

        Raises:
          PoolFullError: not enough pages are free.
          UnknownRequestError: it was not admitted, or released.
        """
        sequence = self._sequence(request)
        end = ceil_div(length, self.page_size)
        missing = [max(0, end - len(table)) for table in sequence.tables]
        check_free(self.groups, missing, f"no room for {length} tokens of request {request!r}")
        for group, table, count in zip(self.groups, sequence.tables, missing, strict=True):
            table += [group.pool.take() for _ in range(count)]

    def advance(self, request: Request, length: int) -> None:
        """The first ``length`` tokens of a request are in its pages now.

        Full pages of the prompt can be found from here on. A page whose content is in another
        page already is given back for that one, and pages that no later query sees are given
        back, so ``table`` may change.

        Raises:
          ValueError: fewer tokens than before, or more than there are pages for.
          UnknownRequestError: it was not admitted, or released.
        """
        sequence = self._sequence(request)
        room = min(map(len, sequence.tables)) * self.page_size
        if not sequence.length <= length <= room:
            raise ValueError(
                f"request {request!r} holds {sequence.length} tokens and has pages for {room}: it "
                f"cannot advance to {length}. extend it first; truncate rolls back."
            )
        if sequence.prompt.reuse:
            sequence.publish(self.groups, length)
        sequence.length = length
        for group, table in zip(self.groups, sequence.tables, strict=True):
            sequence.let_go(group, table, group.first_seen(length))

    def fork(self, request: Request, child: Request) -> list[Copy]:
        """Another request with the same tokens so far: shares full pages, copies the last one.

        Raises:
          PoolFullError: not enough pages are free.
          ValueError: the child is there already.
          UnknownRequestError: the parent was not admitted, or released.
        """
        parent = self._sequence(request)
        self.check_new(child, parent.prompt)
        shared = parent.length // self.page_size
        known = ceil_div(max(parent.length, len(parent.prompt)), self.page_size)
        ends = [min(len(table), known) for table in parent.tables]
        missing = [end - shared for end in ends]
        check_free(self.groups, missing, f"no room for a fork of request {request!r}")
        self.sequences[child], copies = parent.fork(self.groups, ends)
        return copies

    def truncate(self, request: Request, length: int) -> list[Copy]:
        """Roll a request back to its first ``length`` tokens; it may continue with others.

        Raises:
          ValueError: a negative length, or one whose window's pages were given back. One beyond
            the request's own changes nothing.
          PoolFullError: the last page is shared, and none is free for a copy.
          UnknownRequestError: it was not admitted, or released.
        """
        sequence = self._sequence(request)
        if length >= sequence.length:
            return []
        sequence.check_truncate(self.groups, length)
        return sequence.truncate(self.groups, length)

    def release(self, request: Request) -> None:
        """End a request. Its pages are free, the last ones the first to be taken again.

        Raises:
          UnknownRequestError: it was not admitted, or released already.
        """
        sequence = self._sequence(request)
        for group, table in zip(self.groups, sequence.tables, strict=True):
            sequence.let_go(group, table, len(table))
        del self.sequences[request]

    def table(self, request: Request, group: int = 0) -> np.ndarray:
        """The pages of a request in the order of its tokens, int32; -1 for one given back."""
        return np.array(self._sequence(request).tables[group], np.int32)

    def withdraw(self, request: Request) -> None:
        """Make the pages of a request unfindable for later ones; requests that hold them keep them.

        Those of its prompt that it gave back, too.

        Raises:
          UnknownRequestError: it was not admitted, or released.
        """
        sequence = self._sequence(request)
        for group, table in zip(self.groups, sequence.tables, strict=True):
            found = GroupSearch(group, sequence.prompt, 0).found() if sequence.prompt.reuse else []
            for page in (*table, *found):
                group.pool.forget(page)
        if self.snapshots is not None:  # whose state they spoiled; the others come again
            self.snapshots.forget()

    def forget(self) -> None:
        """Forget the content of all pages, as after a change of weights.

        Raises:
          ValueError: a request still runs.
        """
        self.check_idle()
        for group in self.groups:
            group.pool.forget_cached()
        if self.snapshots is not None:
            self.snapshots.forget()

    def check_idle(self) -> None:
        """Raise `ValueError` if a request holds pages."""
        if self.sequences:
            raise ValueError(f"{len(self.sequences)} requests still hold pages: release them first")

    def usage(self) -> Usage:
        """Capacity, what is held and cached, the most that was held, waste, hits."""
        pools = [group.pool for group in self.groups]
        sequences = self.sequences.values()
        return Usage(
            num_pages=sum(pool.num_pages for pool in pools),
            page_size=self.page_size,
            held_pages=sum(pool.num_held for pool in pools),
            shared_pages=sum(pool.num_shared for pool in pools),
            cached_pages=sum(pool.num_cached for pool in pools),
            most_held_pages=sum(pool.most_held for pool in pools),
            num_requests=len(sequences),
            wasted_slots=sum(sequence.num_wasted_slots() for sequence in sequences),
            evictions=sum(pool.num_evictions for pool in pools),
            prompt_tokens=self.num_prompt_tokens,
            hit_tokens=self.num_hit_tokens,
            snapshots=0 if self.snapshots is None else self.snapshots.num_held,
            snapshot_evictions=0 if self.snapshots is None else self.snapshots.num_evictions,
        )

    def check(self) -> None:
        """Prove that the books are right; cheap enough to call now and then in production.

        Raises:
          BookkeepingError: naming every rule that is broken.
        """
        if found := self._problems():
            raise BookkeepingError(f"The books of the page pool are wrong: {'; '.join(found)}.")

    def _problems(self) -> list[str]:
        """Every rule that the books break; none if all is well. Linear in pages held and known."""
        found = []
        for number, group in enumerate(self.groups):
            holders = [0] * group.pool.num_pages
            for request, sequence in self.sequences.items():
                held = [page for page in sequence.tables[number] if page >= 0]
                for page in held:
                    holders[page] += 1
                found += [
                    f"group {number}, request {request!r}: {text}"
                    for text in _problems_of(sequence, group, sequence.tables[number])
                ]
            found += [f"group {number}: {text}" for text in group.pool.problems(holders)]
            found += [
                f"group {number}, page {page}: its digest is not that of its content"
                for page, content in group.pool.index.contents.items()
                if content.digest and page_digest(content.parent, content.tokens) != content.digest
            ]
        return found

    def check_new(self, request: Request, prompt: Prompt) -> None:
        """Refuse a request that is there already, and a prompt of other pages."""
        if request in self.sequences:
            raise ValueError(f"request {request!r} was admitted already, and not released.")
        if prompt.page_size != self.page_size:
            raise ValueError(f"a prompt of pages of {prompt.page_size}, a pool of {self.page_size}")

    def _sequence(self, request: Request) -> HeldSequence:
        if request not in self.sequences:
            raise UnknownRequestError(
                f"request {request!r} holds no pages: it was never admitted, or released already."
            )
        return self.sequences[request]


def _problems_of(sequence: HeldSequence, group: GroupPages, table: list[int]) -> list[str]:
    held = [page for page in table if page >= 0]
    contents, references = group.pool.index.contents, group.pool.references
    full, rest = divmod(sequence.length, group.page_size)
    to_write = table[full:]
    start = contents.get(to_write[0]) if to_write else None
    checks = {
        "a page stands in its table twice": len(held) == len(set(held)),
        "it holds more tokens than its pages": sequence.length <= len(table) * group.page_size,
        "a page that a query may see was given back": -1
        not in table[group.first_seen(sequence.length) :],
        "a page that is to be written is shared": all(references[page] == 1 for page in to_write),
        "a page to be written can be found by what stands there": not any(
            page in contents for page in to_write[1:]
        )
        and (start is None or num_tokens(start.tokens) <= rest),
        "a page is found by another content than its tokens": all(
            contents[page] == sequence.prompt.content(number)
            for number, page in enumerate(table[: sequence.num_published // group.page_size])
            if page in contents
        ),
    }
    return [text for text, sound in checks.items() if not sound]
