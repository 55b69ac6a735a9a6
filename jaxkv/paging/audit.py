"""The figures of an allocator, and the proof that its books are right."""

import dataclasses
from typing import TYPE_CHECKING

from jaxkv.paging.group import GroupPages
from jaxkv.paging.prompt import num_tokens, page_digest
from jaxkv.paging.sequence import HeldSequence

if TYPE_CHECKING:
    from jaxkv.paging.allocator import PageAllocator


@dataclasses.dataclass(frozen=True)
class Usage:
    """Figures of a moment, over all groups; and of the allocator's life, where it says so.

    Attributes:
      num_pages: of the pools.
      page_size: tokens a page.
      held_pages: that requests hold; a shared page counts once.
      shared_pages: of them, that more than one holds.
      cached_pages: free ones whose content can still be found.
      most_held_pages: at any time so far.
      num_requests: that hold pages.
      wasted_slots: of held pages, that no token known so far needs.
      evictions: cached pages that were taken for something else, so far.
      prompt_tokens: admitted so far.
      hit_tokens: of them, that were in the pool already.
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


def measure(allocator: "PageAllocator") -> Usage:
    """The figures now."""
    pools = [group.pool for group in allocator.groups]
    sequences = allocator.sequences.values()
    return Usage(
        num_pages=sum(pool.num_pages for pool in pools),
        page_size=allocator.page_size,
        held_pages=sum(pool.num_held for pool in pools),
        shared_pages=sum(pool.num_shared for pool in pools),
        cached_pages=sum(pool.num_cached for pool in pools),
        most_held_pages=sum(pool.most_held for pool in pools),
        num_requests=len(sequences),
        wasted_slots=sum(sequence.num_wasted_slots() for sequence in sequences),
        evictions=sum(pool.num_evictions for pool in pools),
        prompt_tokens=allocator.num_prompt_tokens,
        hit_tokens=allocator.num_hit_tokens,
    )


def problems(allocator: "PageAllocator") -> list[str]:
    """Every rule that the books break; none if all is well. Linear in pages held and known."""
    found = []
    for number, group in enumerate(allocator.groups):
        holders = [0] * group.pool.num_pages
        for request, sequence in allocator.sequences.items():
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
