"""The rules of the page allocator, each small enough to be checked by hand."""

import dataclasses

import pytest

from jaxkv.errors import BookkeepingError, CacheFullError, PoolFullError, UnknownRequestError
from jaxkv.paging import Copy, Group, PageAllocator, Prompt
from jaxkv.paging.prompt import page_digest


def pool(groups=8, **options):
    return PageAllocator(groups, **{"page_size": 4, **options})


def run(pages, request, tokens, **options):
    """Admit and compute a prompt; how much of it was there."""
    admission = pages.admit(request, pages.prompt(tokens, **options))
    pages.extend(request, len(tokens))
    pages.advance(request, len(tokens))
    pages.check()
    return admission.num_cached


def table(pages, request, group=0):
    return pages.table(request, group).tolist()


def test_blank_pages_are_taken_first_then_the_oldest_and_tails_before_heads():
    pages = pool(6)
    run(pages, "old", range(9))  # pages 0, 1, and 2 with the last token only
    run(pages, "new", range(10, 19))  # 3, 4, 5
    pages.release("old")
    pages.release("new")
    assert pages.usage().cached_pages == 4
    order = []
    for number in range(6):
        assert run(pages, number, [100 + number] * 4) == 0
        order += table(pages, number)
    assert order == [5, 2, 1, 0, 4, 3]
    assert pages.usage().evictions == 4
    with pytest.raises(PoolFullError, match="0 of 6 pages are free: no room for 1 tokens now"):
        pages.admit("more", pages.prompt([1]))


def test_a_reused_page_is_known_by_its_new_content_only():
    pages = pool(2)
    run(pages, "a", [1] * 8)
    pages.release("a")
    run(pages, "b", [2] * 8)
    pages.release("b")
    assert pages.find(pages.prompt([1] * 8)) == 0
    assert pages.find(pages.prompt([2] * 8)) == 7


def test_the_last_token_of_a_prompt_is_always_computed():
    pages = pool()
    for length in (1, 4, 5, 8):
        run(pages, length, range(length))
        assert pages.find(pages.prompt(range(length))) == length - 1


def test_equal_prompts_computed_at_once_end_in_the_same_pages():
    pages = pool()
    prompt = pages.prompt(range(10))
    pages.admit("a", prompt)
    pages.admit("b", prompt)
    assert pages.usage().held_pages == 6
    for request in "ab":
        pages.advance(request, 10)
        pages.check()
    assert table(pages, "a")[:2] == table(pages, "b")[:2]
    assert table(pages, "a")[2] != table(pages, "b")[2]
    assert pages.usage().held_pages == 4


def test_a_hit_ends_where_a_chunk_does_or_before_the_last_token():
    pages = pool(32, chunk=8)
    run(pages, "a", range(30))
    assert pages.find(pages.prompt(range(30))) == 29
    assert pages.find(pages.prompt([*range(23), 99])) == 23, "all but the last token is there"
    assert pages.find(pages.prompt([*range(23), 99, 99])) == 16


def test_newest_tokens_that_must_be_computed_are_in_no_hit():
    pages = pool(32, chunk=8)
    run(pages, "a", range(30))
    for fresh, hit in ((1, 24), (5, 24), (6, 16), (13, 16), (14, 8), (99, 0)):
        prompt = dataclasses.replace(pages.prompt(range(30)), fresh=fresh)
        assert pages.find(prompt) == pages.will_leave(prompt, prompt) == hit
        assert pages.admit(fresh, prompt).num_cached == hit
        pages.check()
        pages.release(fresh)


def test_what_is_withdrawn_is_not_found_even_where_it_was_given_back():
    pages = pool(16)
    run(pages, "other", range(6))
    run(pages, "a", range(14))
    assert pages.truncate("a", 0) == []
    pages.extend("a", 6)  # for tokens that are those of no prompt
    pages.advance("a", 6)
    prompt = pages.prompt(range(14))
    assert pages.find(prompt) == 13
    pages.withdraw("a")
    pages.check()
    assert pages.find(prompt) == 0
    assert pages.usage().by_use == {"sequences": 4, "shared": 0, "cached": 0, "free": 12}


def test_salts_and_fingerprints_keep_prompts_apart():
    pages = pool()
    run(pages, "a", range(9), salt="one")
    assert pages.find(pages.prompt(range(9), salt="one")) == 8
    assert pages.find(pages.prompt(range(9), salt="two")) == 0
    assert pages.find(pages.prompt(range(9))) == 0
    # Fields carry their lengths: what moves from one to the next is another name.
    names = {
        Prompt.of([1], page_size=4, salt=salt, fingerprint=fingerprint).root
        for salt, fingerprint in [("ab", b""), ("a", b"b"), ("", b"ab"), ("", b"4:saltab")]
    }
    assert len(names) == 4


def test_the_same_tokens_elsewhere_have_another_name():
    first, second, _ = pool().prompt([7] * 13).digests
    assert first != second
    assert page_digest(first, Prompt.of([7] * 5, page_size=4).content(0).tokens) == second


def test_tokens_are_compared_when_digests_are_equal():
    pages = pool()
    run(pages, "a", range(9))
    pages.release("a")
    other = pages.prompt(range(50, 59))
    forged = Prompt(other.tokens, other.root, pages.prompt(range(9)).digests, 4)
    assert pages.find(forged) == 0
    run_forged = pages.admit("b", forged)
    assert run_forged.num_cached == 0
    pages.advance("b", 9)
    assert pages.find(pages.prompt(range(9))) == 8, "the first content of a digest stays"


def test_sharing_may_be_off():
    for pages, options in ((pool(sharing=False), {}), (pool(), {"reuse": False})):
        assert run(pages, "a", range(9), **options) == 0
        assert run(pages, "b", range(9), **options) == 0
        pages.release("a")
        assert pages.usage().cached_pages == 0


def test_a_fork_shares_full_pages_and_copies_the_last():
    pages = pool()
    run(pages, "a", range(9))
    pages.extend("a", 10)
    pages.advance("a", 10)
    assert pages.fork("a", "b") == [Copy(0, 2, 3)]
    assert table(pages, "b") == [0, 1, 3]
    pages.check()
    with pytest.raises(ValueError, match="'b' was admitted already"):
        pages.fork("a", "b")


def test_what_is_computed_after_a_rollback_is_not_the_prompt():
    pages = pool()
    run(pages, "a", range(13))
    pages.truncate("a", 5)
    pages.extend("a", 13)
    pages.advance("a", 13)
    pages.check()
    assert pages.find(pages.prompt(range(13))) == 4


def test_a_rollback_into_a_shared_page_copies_it():
    pages = pool()
    run(pages, "a", range(9))
    pages.fork("a", "b")
    assert pages.truncate("b", 6) == [Copy(0, 1, 3)]
    assert table(pages, "b") == [0, 3]
    assert pages.find(pages.prompt(range(9))) == 8
    pages.check()


def test_a_hit_is_the_longest_that_all_groups_agree_on():
    # The second group sees 5 tokens: of a long prompt it keeps, and needs, the tail only.
    pages = PageAllocator([Group(12), Group(6, window=5)], page_size=4)
    prompt = pages.prompt(range(30))
    pages.admit("a", prompt)
    for length in range(4, 29, 4):
        pages.extend("a", length + 4)
        pages.advance("a", length)
        pages.check()
        assert len([page for page in table(pages, "a", 1) if page >= 0]) <= 4
    pages.release("a")
    assert pages.find(prompt) == 28
    # The pages that passed out of the window first are taken first: the tail is still there.
    pages.admit("b", pages.prompt([77] * 8))
    assert pages.find(prompt) == 28
    pages.admit("c", pages.prompt([88] * 12))
    assert pages.find(prompt) == 28
    pages.admit("d", pages.prompt([99]))
    assert pages.find(prompt) == 0, "the second group has no tail, whatever the first one holds"
    assert pages.groups[0].pool.num_cached == 6


def test_admission_leaves_a_reserve_unless_nobody_runs():
    pages = pool(4, reserve=2)
    run(pages, "a", range(12))
    with pytest.raises(PoolFullError, match="1 of 4 pages are free"):
        pages.admit("b", pages.prompt([5]))
    pages.extend("a", 16)
    pages.release("a")
    run(pages, "b", [5] * 16)


def test_forget_needs_an_idle_pool():
    pages = pool()
    run(pages, "a", range(9))
    with pytest.raises(ValueError, match="1 requests still hold pages"):
        pages.forget()
    pages.release("a")
    pages.forget()
    pages.check()
    assert pages.usage().cached_pages == pages.find(pages.prompt(range(9))) == 0


def test_figures():
    pages = pool(10)
    run(pages, "a", range(9))
    run(pages, "b", range(9))
    usage = pages.usage()
    assert (usage.held_pages, usage.most_held_pages, usage.num_requests) == (4, 4, 2)
    assert usage.wasted_slots == 3 + 3
    assert usage.waste == 6 / 16
    assert usage.hit_rate == 8 / 18
    assert usage.occupancy == 0.4


REFUSALS = {
    "an empty prompt": (lambda p: p.prompt([]), ValueError, "at least one token id, got an empty"),
    "no integers": (lambda p: p.prompt([0.5]), ValueError, "got float64"),
    "a list of lists": (lambda p: p.prompt([[1]]), ValueError, r"of shape \(1, 1\)"),
    "a long integer": (lambda p: p.prompt([2**31]), ValueError, "token ids must be int32"),
    "a prompt longer than the pool": (
        lambda p: p.admit("new", p.prompt([1] * 33)),
        CacheFullError,
        "33 tokens need 9 pages of 4, and the whole pool has 8",
    ),
    "a prompt longer than what is free": (
        lambda p: p.admit("new", p.prompt([1] * 32)),
        PoolFullError,
        "6 of 8 pages are free: no room for 32 tokens now",
    ),
    "a prompt of other pages": (
        lambda p: p.admit("new", Prompt.of([1], page_size=2)),
        ValueError,
        "pages of 2, a pool of 4",
    ),
    "admitted twice": (
        lambda p: p.admit("a", p.prompt([1])),
        ValueError,
        "'a' was admitted already",
    ),
    "too long an extension": (
        lambda p: p.extend("a", 40),
        PoolFullError,
        "no room for 40 tokens of request 'a', which needs 8 more",
    ),
    "beyond its pages": (
        lambda p: p.advance("a", 9),
        ValueError,
        "holds 6 tokens and has pages for 8: it cannot advance to 9",
    ),
    "backwards": (lambda p: p.advance("a", 5), ValueError, "cannot advance to 5"),
    "a negative rollback": (lambda p: p.truncate("a", -1), ValueError, "at least 0, got -1"),
    "an unknown request": (lambda p: p.extend("x", 1), UnknownRequestError, "'x' holds no pages"),
    "the fork of an unknown one": (lambda p: p.fork("x", "y"), UnknownRequestError, "'x'"),
    "a second release": (
        lambda p: p.release("gone"),
        UnknownRequestError,
        "never admitted, or released already",
    ),
    "no pages": (lambda p: PageAllocator(0), ValueError, "num_pages must be an int of at least"),
    "no window": (lambda p: Group(1, window=0), ValueError, "window must be an int of at least 1"),
    "no page size": (
        lambda p: PageAllocator(1, page_size=0),
        ValueError,
        "page_size must be an int",
    ),
}


@pytest.mark.parametrize("refusal", REFUSALS)
def test_what_is_refused_changes_nothing(refusal):
    call, error, message = REFUSALS[refusal]
    pages = pool()
    run(pages, "a", range(6))
    run(pages, "gone", range(6))
    pages.release("gone")
    before = pages.usage(), table(pages, "a")
    with pytest.raises(error, match=message):
        call(pages)
    assert (pages.usage(), table(pages, "a")) == before
    pages.check()


def test_a_rollback_behind_the_window_is_refused():
    pages = pool([Group(8, window=4)])
    run(pages, "a", range(16))
    with pytest.raises(ValueError, match=r"roll back to 3 tokens: a window of 4 .* back at 16"):
        pages.truncate("a", 3)
    assert pages.truncate("a", 15) == []
    pages.check()


DAMAGES = {
    "reference counts": lambda p: p.groups[0].pool.references.__setitem__(0, 2),
    "not that of its content": lambda p: p.groups[0].pool.index.contents.update(
        {0: p.prompt([9] * 5).content(0)._replace(digest=b"x")}
    ),
    "holds more tokens than its pages": lambda p: p.sequences["a"].tables[0].pop(),
    "stands in its table twice": lambda p: p.sequences["a"].tables[0].append(0),
    "blank page can still be found": lambda p: p.groups[0].pool.index.contents.update(
        {7: p.prompt([9] * 5).content(0)}
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_check_finds_damage(damage):
    pages = pool()
    run(pages, "a", range(9))
    pages.check()
    DAMAGES[damage](pages)
    with pytest.raises(BookkeepingError, match=damage):
        pages.check()
