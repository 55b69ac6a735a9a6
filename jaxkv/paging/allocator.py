"""Which sequence holds which pages: admit, extend, advance, fork, truncate, release."""

from collections.abc import Callable, Hashable, Sequence

import numpy as np

from jaxkv.errors import BookkeepingError, PoolFullError, UnknownRequestError
from jaxkv.paging.audit import Usage, measure, problems
from jaxkv.paging.group import Group, GroupPages, check_fits, check_free, how_full
from jaxkv.paging.prefix_index import Event, PrefixIndex
from jaxkv.paging.prompt import Prompt
from jaxkv.paging.search import PrefixSearch
from jaxkv.paging.sequence import Admission, Copy, HeldSequence

Request = Hashable


class PageAllocator:
    """The bookkeeping of a paged cache: no arrays, no device.

    A request is admitted with a prompt. Then, over and over: ``extend`` gives its next tokens
    pages, the device computes them, ``advance`` says so. ``release`` ends it. Every call does all
    that it says or raises and does nothing. Full pages of prompts stay findable after ``advance``
    and after ``release``, until they are taken for something else.

    Args:
      groups: of layers, or the number of pages of the only one.
      page_size: tokens a page.
      chunk: a hit ends at a multiple of so many tokens, or right before the last token. Give the
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
    ):
        groups = [Group(groups)] if isinstance(groups, int) else list(groups)
        chunk = page_size if chunk is None else chunk
        if not groups or page_size < 1 or chunk < 1 or reserve < 0:
            raise ValueError(
                "PageAllocator: groups, page_size and chunk must be at least 1 and reserve at "
                f"least 0, got {len(groups)}, {page_size}, {chunk} and {reserve}."
            )
        self.page_size, self.chunk, self.reserve = page_size, chunk, reserve
        self.fingerprint, self.sharing = fingerprint, sharing
        self.groups = [
            GroupPages(group, page_size, chunk, PrefixIndex(number, on_event))
            for number, group in enumerate(groups)
        ]
        self.sequences: dict[Request, HeldSequence] = {}
        self.num_prompt_tokens = self.num_hit_tokens = 0

    def check_fits(self, length: int) -> None:
        """Raise `CacheFullError` for so many tokens that even an idle pool has no room for them."""
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
        return next(PrefixSearch(self.groups, prompt, self.chunk).hits())

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
        search = PrefixSearch(self.groups, prompt, self.chunk, ahead)
        hit = search.longest_that_fits(self.reserve if self.sequences else 0)
        if hit is None:
            raise PoolFullError(f"{how_full(self.groups)}: no room for {len(prompt)} tokens now.")
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

    def extend(self, request: Request, length: int) -> None:
        """Give a request pages for its first ``length`` tokens, where it has none yet.

        Raises:
          PoolFullError: not enough pages are free.
          UnknownRequestError: it was not admitted, or released.
        """
        sequence = self._sequence(request)
        end = -(-length // self.page_size)
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
        known = -(-max(parent.length, len(parent.prompt)) // self.page_size)
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
        """Let nobody find the pages of a request any more; who has them keeps them.

        Raises:
          UnknownRequestError: it was not admitted, or released.
        """
        for group, table in zip(self.groups, self._sequence(request).tables, strict=True):
            for page in table:
                group.pool.index.remove(page)

    def forget(self) -> None:
        """Forget the content of all pages, as after a change of weights.

        Raises:
          ValueError: a request still runs.
        """
        if self.sequences:
            raise ValueError(f"{len(self.sequences)} requests still hold pages: release them first")
        for group in self.groups:
            group.pool.forget_cached()

    def usage(self) -> Usage:
        """Capacity, what is held and cached, the most that was held, waste, hits."""
        return measure(self)

    def check(self) -> None:
        """Prove that the books are right; cheap enough to call now and then in production.

        Raises:
          BookkeepingError: naming every rule that is broken.
        """
        if found := problems(self):
            raise BookkeepingError(f"The books of the page pool are wrong: {'; '.join(found)}.")

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
