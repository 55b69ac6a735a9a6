"""The books of a cache whose batch is split over devices: a pool of pages on each data rank."""

import dataclasses

from jaxkv.errors import BookkeepingError
from jaxkv.paging.allocator import PageAllocator, Usage


class Pools(tuple[PageAllocator, ...]):
    """The books of each data rank, in order: its pool of pages, their allocator and prefix index.

    A data rank is a part of the batch and the devices that hold it. Pages are counted from 0 on
    each, and no page is of two. One device is one rank: ``pages[0]`` are its books.

    Args:
      pools: an allocator per rank, all of one shape.

    >>> import jaxkv.paging
    >>> pages = Pools(jaxkv.paging.PageAllocator(8, page_size=4) for _ in range(2))
    >>> pages[1].admit("a", pages[1].prompt([1, 2, 3, 4, 5, 6]))
    Admission(num_cached=0, copies=[])
    >>> pages.usage().by_use
    {'sequences': 2, 'shared': 0, 'cached': 0, 'free': 14}
    """

    __slots__ = ()

    @classmethod
    def of(cls, pages: "PageAllocator | Pools") -> "Pools":
        """The same books; those of one pool as of one rank."""
        return pages if isinstance(pages, Pools) else cls([pages])

    def usage(self) -> Usage:
        """Figures of all ranks together, see `PageAllocator.usage`."""
        each = [pages.usage() for pages in self]
        totals = {
            field.name: sum(getattr(usage, field.name) for usage in each)
            for field in dataclasses.fields(Usage)
        }
        return Usage(**totals | {"page_size": each[0].page_size})

    def check(self) -> None:
        """Prove that the books of every rank are right, see `PageAllocator.check`.

        Raises:
          BookkeepingError: naming every rule that is broken on a rank, and the rank.
        """
        for number, pages in enumerate(self):
            try:
                pages.check()
            except BookkeepingError as error:
                error.add_note(f"They are those of data rank {number} of {len(self)}.")
                raise

    def forget(self) -> None:
        """Forget the content of all pages of all ranks, as after a change of weights.

        Raises:
          ValueError: a request still runs. Nothing was forgotten.
        """
        for pages in self:
            pages.check_idle()
        for pages in self:
            pages.forget()
