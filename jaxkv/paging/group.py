"""A group of layers with a page table and a pool of its own."""

import dataclasses
from collections.abc import Sequence

from jaxkv.counts import ceil_div, check_fields
from jaxkv.errors import CacheFullError, PoolFullError
from jaxkv.paging.pool import PagePool
from jaxkv.paging.prefix_index import PrefixIndex


@dataclasses.dataclass(frozen=True)
class Group:
    """Layers that share a pool and a page table.

    Args:
      num_pages: of the pool.
      window: newest tokens that a query sees, itself included; all if None. Pages that no later
        query can see are given back.
    """

    num_pages: int
    window: int | None = None

    def __post_init__(self) -> None:
        check_fields(self, "num_pages", optional=("window",))


class GroupPages:
    """A group's pool, and the arithmetic of its pages.

    Page ``n`` of a sequence holds its tokens from ``n * page_size`` on.
    """

    def __init__(self, group: Group, page_size: int, chunk: int, index: PrefixIndex):
        self.window = group.window
        self.pool = PagePool(group.num_pages, index)
        self.page_size = page_size
        self._chunk = chunk

    def first_seen(self, length: int) -> int:
        """The first page that a query after ``length`` tokens may see."""
        return 0 if self.window is None else max(0, length + 1 - self.window) // self.page_size

    def end(self, start: int, length: int) -> int:
        """One past the last page of a prompt of ``length`` tokens, of which ``start`` are there.

        Behind a window it is not the whole prompt, but what is held at once while it passes.
        """
        if self.window is not None:
            length = min(length, start + self.window + self._chunk)
        return ceil_div(length, self.page_size)

    def most_held(self, length: int) -> int:
        """The most pages held at once for a prompt of ``length`` tokens."""
        if self.window is None:
            return self.end(0, length)
        return min(self.end(0, length) + 1, ceil_div(length, self.page_size))

    def num_with(self, references: int, pages: list[int]) -> int:
        """How many of these are held by so many."""
        return sum(self.pool.references[page] == references for page in pages)


def check_fits(groups: Sequence[GroupPages], length: int) -> None:
    """Refuse a prompt that even an idle pool has no room for."""
    for group in groups:
        needed, num_pages = group.most_held(length), group.pool.num_pages
        if needed > num_pages:
            raise CacheFullError(
                f"{length} tokens need {needed} pages of {group.page_size}, and the whole pool has "
                f"{num_pages}. Give fewer tokens, or the cache more num_pages."
            )


def check_free(groups: Sequence[GroupPages], needed: Sequence[int], what: str) -> None:
    """Refuse to take more pages than are free in some group."""
    for group, count in zip(groups, needed, strict=True):
        if count > group.pool.num_free:
            raise PoolFullError(f"{how_full(groups)}: {what}, which needs {count} more.")


def how_full(groups: Sequence[GroupPages]) -> str:
    """The start of a message: ``3 of 64 pages are free``."""
    pools = [group.pool for group in groups]
    return ", ".join(f"{pool.num_free} of {pool.num_pages}" for pool in pools) + " pages are free"
