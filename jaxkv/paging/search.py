"""The longest start of a prompt that is in the pages already."""

import itertools
from collections.abc import Iterator, Sequence

from jaxkv.paging.group import GroupPages
from jaxkv.paging.prompt import Prompt
from jaxkv.paging.snapshots import Snapshots


class PrefixSearch:
    """What all groups together hold of a prompt.

    A hit is a number of tokens: all but the last, or a multiple of ``chunk``. With ``snapshots`` it
    ends at one.
    """

    def __init__(
        self,
        groups: Sequence[GroupPages],
        prompt: Prompt,
        chunk: int,
        ahead: int = 0,
        snapshots: Snapshots | None = None,
    ):
        self.prompt, self._chunk, self._snapshots = prompt, chunk, snapshots
        self.groups = [GroupSearch(group, prompt, ahead) for group in groups]

    def hits(self) -> Iterator[int]:
        """The lengths that can be served, the longest first; 0 at last."""
        for hit in self.in_pages():
            if not hit or self._snapshots is None or self._snapshots.has(self.prompt, hit):
                yield hit

    def in_pages(self) -> Iterator[int]:
        """Those that every group can serve, whether a snapshot is there or not."""
        reach = min(group.reach() for group in self.groups)
        whole = [reach] if reach == self.prompt.num_shareable else []
        for hit in (*whole, *range(reach - reach % self._chunk, 0, -self._chunk)):
            if hit <= self.prompt.num_findable and all(group.covers(hit) for group in self.groups):
                yield hit
        yield 0

    def longest_that_fits(self, reserve: int) -> int | None:
        """The longest hit for which there are free pages for the rest, or None."""
        hit = next(self.hits())
        if self._fits(hit, reserve):
            return hit
        # A page to copy from must not be taken for the rest. A hit of full pages needs none.
        page_size = self.prompt.page_size
        hit = next(hit for hit in self.hits() if not hit % page_size)
        return hit if self._fits(hit, reserve) else None

    def _fits(self, hit: int, reserve: int) -> bool:
        return all(group.num_left(hit) >= reserve for group in self.groups)


class GroupSearch:
    """Which pages of a prompt one group still holds."""

    def __init__(self, group: GroupPages, prompt: Prompt, ahead: int):
        self._group, self._prompt, self._index = group, prompt, group.pool.index
        self._length = len(prompt) + ahead
        self._pages: list[int | None] = []
        for number in range(len(prompt.digests) if prompt.reuse else 0):
            page = self._index.find(prompt.content(number))
            if page is None and group.window is None:
                break  # without its start the rest is of no use
            self._pages.append(page)
        missing = (page is None for page in self._pages)
        self._num_missing = list(itertools.accumulate(missing, initial=0))

    def reach(self) -> int:
        """The most tokens that a hit can have, as far as this group goes."""
        if self._group.window is not None:
            return self._prompt.num_shareable
        full = len(self._pages)
        _, common = self._index.find_start(self._prompt.content(full))
        return full * self._group.page_size + common

    def covers(self, hit: int) -> bool:
        """Does the group hold all that a query after ``hit`` tokens may see?"""
        first, (full, rest) = self._group.first_seen(hit), divmod(hit, self._group.page_size)
        if full > len(self._pages) or self._num_missing[full] > self._num_missing[first]:
            return False
        return not rest or self.source(hit) is not None

    def pages(self, hit: int) -> list[int]:
        """The full pages among ``hit`` tokens that a later query may see."""
        seen = self._pages[self._group.first_seen(hit) : hit // self._group.page_size]
        return [page for page in seen if page is not None]

    def found(self) -> list[int]:
        """All of them, the one that holds the rest of the prompt included."""
        source = self.source(self._prompt.num_shareable)
        found = [page for page in self._pages if page is not None]
        return found if source is None else [*found, source]

    def source(self, hit: int) -> int | None:
        """The page whose start holds the tokens of ``hit`` that do not fill a page."""
        full, rest = divmod(hit, self._group.page_size)
        if not rest:
            return None
        if full < len(self._pages) and self._pages[full] is not None:
            return self._pages[full]
        page, common = self._index.find_start(self._prompt.content(full))
        return page if common >= rest else None

    def num_left(self, hit: int) -> int:
        """Pages that would be free still, were the prompt admitted with this hit."""
        group, source = self._group, self.source(hit)
        used = self.pages(hit) + ([] if source is None else [source])
        num_new = group.end(hit, self._length) - hit // group.page_size
        return group.pool.num_free - group.num_with(0, used) - num_new

    def claim(self, hit: int) -> tuple[list[int], int | None]:
        """Take the pages of the prompt: its table, and the page to copy the hit's rest from."""
        group, source = self._group, self.source(hit)
        found = self.pages(hit)
        for page in found if source is None else [*found, source]:
            group.pool.hold(page)
        num_new = group.end(hit, self._length) - hit // group.page_size
        new = [group.pool.take() for _ in range(num_new)]
        if source is not None:
            group.pool.drop(source)
        return [-1] * group.first_seen(hit) + found + new, source
