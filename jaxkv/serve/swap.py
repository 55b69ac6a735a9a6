"""Pages of preempted requests in host memory, instead of computing their tokens again."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import jax
import numpy as np

from jaxkv.cache.hybrid import AnyCache
from jaxkv.cache.kv_cache import KVCache
from jaxkv.cache.rearrange import page_size_of
from jaxkv.counts import ceil_div
from jaxkv.serve import steps
from jaxkv.serve.figures import Figures
from jaxkv.serve.rank import Rank
from jaxkv.serve.request import Request

if TYPE_CHECKING:  # loaded when it is asked for
    from jaxkv.serve.choice import Choice

# Pages of each pool that one program moves, so that it is compiled once.
PAGES_AT_ONCE = 16

# Of each of the cache's `steps.pools_of`, the pages of one request, in the order of its tokens.
Pages = Sequence[np.ndarray]
HostLeaves = dict[str, np.ndarray]


class SwapSpace:
    """Host memory that preempted requests may keep their pages in; Kwon et al. (2023), 4.5.

    Args:
      size_bytes: at most.
      figures: where ``swapped_bytes`` are counted.
      num_ranks: data ranks of the engine.
      choice: of its policy, which has something of each row.
    """

    def __init__(
        self, size_bytes: int, figures: Figures, num_ranks: int, choice: "Choice | None" = None
    ):
        self._size_bytes, self._figures, self._num_ranks = size_bytes, figures, num_ranks
        self._choice = choice
        self._kept: dict[Request, list[list[HostLeaves]]] = {}
        self._chosen: dict[Request, np.ndarray] = {}

    def __contains__(self, request: Request) -> bool:
        return request in self._kept

    def keep(self, request: Request, rank: Rank, cache: AnyCache) -> bool:
        """Copy the pages of a request that runs there, or do nothing: False without room for it."""
        pools, pages = steps.pools_of(cache), pages_in_use(rank, request, cache)
        needed = sum(
            len(own) * page_size_of(pool) * _bytes_per_token(pool)
            for pool, own in zip(pools, pages, strict=True)
        )
        choice = self._choice if request.has_chosen else None
        needed += 0 if choice is None else choice.bytes_per_row
        if not 0 < needed <= self._size_bytes - self._figures.swapped_bytes:
            return False
        self._kept[request] = []
        for numbers in _portions(pages):
            given = jax.device_put(self._padded(numbers, rank))
            contents = jax.device_get(steps.read(given, cache))
            self._kept[request].append([
                {name: _first(leaf, len(own), pool, rank) for name, leaf in leaves.items()}
                for pool, own, leaves in zip(pools, numbers, contents, strict=True)
            ])  # fmt: skip
        if choice is not None:
            self._chosen[request] = choice.read(request.row)
        self._figures.swapped_bytes += needed
        most = max(self._figures.most_swapped_bytes, self._figures.swapped_bytes)
        self._figures.most_swapped_bytes, self._figures.swaps = most, self._figures.swaps + 1
        return True

    def put_back(self, request: Request, rank: Rank, cache: AnyCache) -> AnyCache:
        """The cache, donated, with what was kept of a request in the pages that it has now."""
        pages = pages_in_use(rank, request, cache)
        for numbers, contents in zip(_portions(pages), self._kept[request], strict=True):
            padded = tuple(
                {name: _filled_up(leaf, pool) for name, leaf in leaves.items()}
                for pool, leaves in zip(steps.pools_of(cache), contents, strict=True)
            )
            given = jax.device_put((self._padded(numbers, rank), padded))
            cache = steps.write(*given, cache)
        if self._choice is not None and request in self._chosen:
            self._choice.write(request.row, self._chosen[request])
        self.drop(request)
        return cache

    def drop(self, request: Request) -> None:
        """Forget what was kept of a request, if anything was."""
        kept = self._kept.pop(request, []), self._chosen.pop(request, None)
        self._figures.swapped_bytes -= sum(leaf.nbytes for leaf in jax.tree.leaves(kept))

    def _padded(self, pages: Pages, rank: Rank) -> tuple[np.ndarray, ...]:
        """As a program takes them: a part for each rank."""
        padded = np.full((len(pages), self._num_ranks, PAGES_AT_ONCE), -1, np.int32)
        for row, own in zip(padded, pages, strict=True):
            row[rank.number, : len(own)] = own
        return tuple(padded.reshape(len(pages), -1))


def pages_in_use(rank: Rank, request: Request, cache: AnyCache) -> Pages:
    """The pages of a request, in its row, that hold tokens which a later query may see."""
    end = ceil_div(request.num_slots(request.length), rank.pages.page_size)
    groups = range(len(rank.pages.groups))
    tables = [rank.pages.table(request.number, number)[:end] for number in groups]
    num_rings = len(steps.pools_of(cache)) - len(tables)
    row = np.array([rank.rows.index(request)])
    return [*(table[table >= 0] for table in tables), *[row] * num_rings]


def _bytes_per_token(pool: KVCache) -> int:
    """Copies of a KV head on several devices included."""
    return sum(leaf.nbytes // leaf.shape[2] for leaf in pool.storage.values())


def _portions(pages: Pages) -> list[Pages]:
    longest = max(len(own) for own in pages)
    starts = range(0, longest, PAGES_AT_ONCE)
    return [[own[start : start + PAGES_AT_ONCE] for own in pages] for start in starts]


def _first(leaf: np.ndarray, num_pages: int, pool: KVCache, rank: Rank) -> np.ndarray:
    """A copy of what the first pages of a rank hold, or all that was read would stay in memory."""
    start, size = rank.number * PAGES_AT_ONCE, page_size_of(pool)
    return np.array(leaf[:, :, start * size : (start + num_pages) * size])


def _filled_up(leaf: np.ndarray, pool: KVCache) -> np.ndarray:
    missing = PAGES_AT_ONCE * page_size_of(pool) - leaf.shape[2]
    return np.pad(leaf, [(0, missing) if axis == 2 else (0, 0) for axis in range(leaf.ndim)])
