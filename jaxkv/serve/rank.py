"""A data rank of an engine: rows of the cache, and the books of the pages that they share."""

from typing import Any

from jaxkv.paging import PageAllocator, Prompt
from jaxkv.serve.request import Request


class Rank:
    """A part of the batch, which some devices hold; all of it where the batch is not split.

    Its requests share pages among themselves alone. Rows and pages are counted from 0 here, and
    what a program is told of them is an array with a part for each rank, in order.

    Args:
      number: of the rank.
      pages: its books.
      num_rows: of the cache that are its own.

    Attributes:
      rows: the request of each row, or None.
    """

    def __init__(self, number: int, pages: PageAllocator, num_rows: int):
        self.number, self.pages = number, pages
        self.rows: list[Request | None] = [None] * num_rows

    @property
    def running(self) -> list[Request]:
        """The requests that have rows, those admitted first first."""
        rows: dict[Any, Request] = {row.number: row for row in self.rows if row is not None}
        return [rows[number] for number in self.pages.sequences]

    @property
    def prefilling(self) -> list[Request]:
        """Those of them whose prompts are not all computed yet."""
        return [request for request in self.running if request.is_prefilling]

    @property
    def free_share(self) -> float:
        """Of its pages, in the fullest group."""
        pools = [group.pool for group in self.pages.groups]
        return min(pool.num_free / pool.num_pages for pool in pools)

    def is_computing(self, prompt: Prompt) -> bool:
        """Will a running prefill leave more of this prompt in the pool than there is now?"""
        others = self.prefilling if prompt.reuse else []
        left = (self.pages.will_leave(other.prompt, prompt) for other in others)
        ahead = max(left, default=0)
        return ahead > 0 and ahead > self.pages.find(prompt)

    def seat(self, request: Request) -> None:
        """Give a request, which has pages, a free row."""
        request.row = self.rows.index(None)
        self.rows[request.row] = request
        request.rank = self.number

    def leave(self, request: Request) -> None:
        """Take the row and the pages of a request."""
        self.rows[self.rows.index(request)] = None
        self.pages.release(request.number)
