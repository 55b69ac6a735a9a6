"""One admitted sequence: its tokens, as far as they are known, and its pages in each group."""

from collections.abc import Sequence
from typing import NamedTuple

from jaxkv.counts import ceil_div
from jaxkv.errors import PoolFullError
from jaxkv.paging.group import GroupPages, how_full
from jaxkv.paging.prompt import Prompt


class Copy(NamedTuple):
    """A page that the device must copy before its next step; all sources are read first."""

    group: int
    source: int
    destination: int


class Admission(NamedTuple):
    """What an admitted request starts with.

    Attributes:
      num_cached: tokens of the prompt that are in its pages already.
      copies: to be made first.
    """

    num_cached: int
    copies: list[Copy]


class HeldSequence:
    """What the allocator knows of a request.

    Attributes:
      length: tokens that are in the pages.
      tables: of each group, page number -> page, -1 where it was given back.
      num_shareable: tokens from the start that are those of the prompt and may be published.
      num_published: of them, those in pages that are findable, or were when they were computed.
    """

    def __init__(self, prompt: Prompt, length: int):
        self.prompt, self.length = prompt, length
        self.tables: list[list[int]] = []
        self.num_shareable = prompt.num_shareable
        self.num_published = length

    def fork(
        self, groups: Sequence[GroupPages], ends: Sequence[int]
    ) -> tuple["HeldSequence", list[Copy]]:
        """Another with the same tokens, and the pages to copy.

        Args:
          groups: of its tables.
          ends: pages that the other shall have in each group; those not full are its own.
        """
        child = HeldSequence(self.prompt, self.length)
        child.num_shareable, child.num_published = self.num_shareable, self.num_published
        shared, rest = divmod(self.length, self.prompt.page_size)
        copies = []
        for number, (group, end) in enumerate(zip(groups, ends, strict=True)):
            table = self.tables[number][:shared]
            for page in table:
                if page >= 0:
                    group.pool.hold(page)
            table += [group.pool.take() for _ in range(end - shared)]
            if rest:
                copies.append(Copy(number, self.tables[number][shared], table[shared]))
            child.tables.append(table)
        return child, copies

    def publish(self, groups: Sequence[GroupPages], length: int) -> None:
        """Make findable what the step up to ``length`` computed of the prompt."""
        known, page_size = min(length, self.num_shareable), self.prompt.page_size
        end = known // page_size
        for number in range(self.num_published // page_size, end):
            content = self.prompt.content(number)
            for group, table in zip(groups, self.tables, strict=True):
                if table[number] >= 0:
                    table[number] = group.pool.store(table[number], content)
        if self.num_published < known == self.prompt.num_shareable and known % page_size:
            # The rest of this page is still to be written; its start stays what it is.
            content = self.prompt.content(end)
            for group, table in zip(groups, self.tables, strict=True):
                if table[end] >= 0:
                    group.pool.index.add_start(table[end], content)
        self.num_published = max(self.num_published, known)

    def let_go(self, group: GroupPages, table: list[int], end: int) -> None:
        """Give back the pages before ``end``, the later ones the first to be taken again."""
        number = min(end, len(table)) - 1
        while number >= 0 and table[number] >= 0:
            group.pool.drop(table[number])
            table[number] = -1
            number -= 1

    def check_truncate(self, groups: Sequence[GroupPages], length: int) -> None:
        """Refuse what `truncate` cannot do, before anything changes."""
        if length < 0:
            raise ValueError(f"length must be at least 0, got {length}.")
        for group, table in zip(groups, self.tables, strict=True):
            if -1 in table[group.first_seen(length) :]:
                raise ValueError(
                    f"cannot roll back to {length} tokens: a window of {group.window} tokens sees "
                    f"pages from there that were given back at {self.length}."
                )
            last = self._last_page(length)
            freed = group.num_with(1, table[last + 1 :])
            if self._is_shared(group, table, length) and not group.pool.num_free + freed:
                raise PoolFullError(f"{how_full(groups)}: none for a copy of a shared page.")

    def truncate(self, groups: Sequence[GroupPages], length: int) -> list[Copy]:
        """Keep ``length`` tokens; the pages to copy."""
        copies = []
        for number, (group, table) in enumerate(zip(groups, self.tables, strict=True)):
            pool, last, rest = group.pool, self._last_page(length), length % group.page_size
            for page in reversed(table[last + 1 :]):
                pool.drop(page)
            del table[last + 1 :]
            if self._is_shared(group, table, length):
                copies.append(Copy(number, table[last], pool.take()))
                pool.drop(table[last])
                table[last] = copies[-1].destination
            elif rest:
                pool.index.remove_after(table[last], rest)
        self.length = length
        self.num_shareable = min(self.num_shareable, length)
        self.num_published = min(self.num_published, length)
        return copies

    def num_wasted_slots(self) -> int:
        """Slots of its pages, over all groups, that no token known so far needs."""
        is_whole = self.num_shareable == self.prompt.num_shareable
        known = max(self.length, len(self.prompt) if is_whole else 0)
        return sum(max(0, len(table) * self.prompt.page_size - known) for table in self.tables)

    def _last_page(self, length: int) -> int:
        return ceil_div(length, self.prompt.page_size) - 1

    def _is_shared(self, group: GroupPages, table: list[int], length: int) -> bool:
        """Is the page held by others too that the token after ``length`` is written to?"""
        if not length % group.page_size:
            return False
        return group.pool.references[table[self._last_page(length)]] > 1
