"""The books of several data ranks: what is told of all, and which of them is wrong."""

import pytest

from jaxkv.errors import BookkeepingError
from jaxkv.paging import PageAllocator, Pools

PROMPT = list(range(10))


def two_ranks():
    """The first is idle and remembers a prompt; the second holds the same one."""
    pages = Pools(PageAllocator(8, page_size=4) for _ in range(2))
    for own in pages:
        own.admit("a", own.prompt(PROMPT))
        own.advance("a", len(PROMPT) - 1)
    pages[0].release("a")
    return pages


def test_figures_are_those_of_all_ranks():
    usage = two_ranks().usage()
    assert (usage.num_pages, usage.page_size) == (16, 4)
    assert usage.by_use == {"sequences": 3, "shared": 0, "cached": 3, "free": 10}
    assert (usage.num_requests, usage.prompt_tokens, usage.hit_tokens) == (1, 20, 0)
    assert usage.wasted_slots == 2


def test_nothing_is_forgotten_while_one_rank_is_in_use():
    pages = two_ranks()
    with pytest.raises(ValueError, match="1 requests still hold pages"):
        pages.forget()
    assert [own.find(own.prompt(PROMPT)) for own in pages] == [9, 9]
    pages[1].release("a")
    pages.forget()
    assert [own.find(own.prompt(PROMPT)) for own in pages] == [0, 0]


def test_wrong_books_are_told_with_their_rank():
    pages = two_ranks()
    pages.check()
    pages[1].groups[0].pool.references[0] += 1
    with pytest.raises(BookkeepingError, match="reference counts") as caught:
        pages.check()
    assert caught.value.__notes__ == ["They are those of data rank 1 of 2."]


def test_books_of_one_pool_are_of_one_rank():
    one = PageAllocator(8)
    assert list(Pools.of(one)) == [one]
    assert Pools.of(pools := Pools([one])) is pools
