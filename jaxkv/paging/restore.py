"""Pages for tokens whose keys and values were computed before: a file's, or host memory's."""

from collections.abc import Hashable
from typing import TYPE_CHECKING

from jaxkv.paging.group import check_fits, check_free
from jaxkv.paging.prompt import Prompt
from jaxkv.paging.sequence import HeldSequence

if TYPE_CHECKING:
    from jaxkv.paging.allocator import PageAllocator


def restore(pages: "PageAllocator", request: Hashable, prompt: Prompt, length: int) -> None:
    """Admit a request whose first tokens are to be written to its pages from elsewhere.

    All its pages are fresh, and none is looked for. Write them before the next step;
    ``pages.advance(request, length)`` then makes those of the prompt findable.

    Args:
      pages: the books of the pool.
      request: any hashable name that no admitted request has.
      prompt: what the tokens begin with; there are pages for the rest of it too.
      length: tokens that are there already, of the prompt and what followed it.

    Raises:
      PoolFullError: not enough pages are free now. The books are as they were.
      CacheFullError: more tokens than the whole pool has room for.
      ValueError: the request is there already, or the prompt has another page size.

    >>> import jaxkv.paging
    >>> pages = jaxkv.paging.PageAllocator(8, page_size=4)
    >>> restore(pages, "a", pages.prompt([1, 2, 3, 4, 5, 6]), length=5)
    >>> pages.advance("a", 5)  # once they are written
    >>> pages.find(pages.prompt([1, 2, 3, 4, 5, 7]))
    5
    """
    pages.check_new(request, prompt)
    total = max(length, len(prompt))
    check_fits(pages.groups, total)
    held = [range(group.first_seen(length), group.end(length, total)) for group in pages.groups]
    reserve = pages.reserve if pages.sequences else 0
    needed = [len(numbers) + reserve for numbers in held]
    check_free(pages.groups, needed, f"no room for {total} tokens of request {request!r}")
    sequence = HeldSequence(prompt, length)
    sequence.num_published = 0
    for group, numbers in zip(pages.groups, held, strict=True):
        sequence.tables.append([-1] * numbers.start + [group.pool.take() for _ in numbers])
    pages.sequences[request] = sequence
