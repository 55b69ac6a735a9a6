"""Pages of preempted requests in host memory, instead of computing their tokens again."""

from collections.abc import Sequence

import jax
import numpy as np

from jaxkv.cache.hybrid import AnyCache
from jaxkv.cache.kv_cache import KVCache
from jaxkv.cache.rearrange import page_size_of
from jaxkv.counts import ceil_div
from jaxkv.paging import PageAllocator
from jaxkv.serve import steps
from jaxkv.serve.figures import Figures
from jaxkv.serve.request import Request

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
    """

    def __init__(self, size_bytes: int, figures: Figures):
        self._size_bytes, self._figures = size_bytes, figures
        self._kept: dict[Request, list[list[HostLeaves]]] = {}

    def __contains__(self, request: Request) -> bool:
        return request in self._kept

    def keep(self, request: Request, cache: AnyCache, pages: Pages) -> bool:
        """Copy these pages of a request, or do nothing: False if there is no room for them."""
        pools = steps.pools_of(cache)
        needed = sum(
            len(own) * page_size_of(pool) * pool.config.bytes_per_token
            for pool, own in zip(pools, pages, strict=True)
        )
        if not 0 < needed <= self._size_bytes - self._figures.swapped_bytes:
            return False
        self._kept[request] = []
        for numbers in _portions(pages):
            contents = jax.device_get(steps.read(jax.device_put(_padded(numbers)), cache))
            # Copies, for a part of what a device gave would keep all of it in memory.
            self._kept[request].append([
                {
                    name: np.array(leaf[:, :, : len(own) * page_size_of(pool)])
                    for name, leaf in leaves.items()
                }
                for pool, own, leaves in zip(pools, numbers, contents, strict=True)
            ])  # fmt: skip
        self._figures.swapped_bytes += needed
        most = max(self._figures.most_swapped_bytes, self._figures.swapped_bytes)
        self._figures.most_swapped_bytes, self._figures.swaps = most, self._figures.swaps + 1
        return True

    def put_back(self, request: Request, cache: AnyCache, pages: Pages) -> AnyCache:
        """The cache, donated, with what was kept of a request in these pages, as many as before."""
        for numbers, contents in zip(_portions(pages), self._kept[request], strict=True):
            padded = tuple(
                {name: _filled_up(leaf, pool) for name, leaf in leaves.items()}
                for pool, leaves in zip(steps.pools_of(cache), contents, strict=True)
            )
            cache = steps.write(*jax.device_put((_padded(numbers), padded)), cache)
        self.drop(request)
        return cache

    def drop(self, request: Request) -> None:
        """Forget what was kept of a request, if anything was."""
        for contents in self._kept.pop(request, []):
            self._figures.swapped_bytes -= sum(leaf.nbytes for leaf in jax.tree.leaves(contents))


def pages_in_use(books: PageAllocator, request: Request, row: int, cache: AnyCache) -> Pages:
    """The pages of a request, in this row, that hold tokens which a later query may see."""
    end = ceil_div(request.length, books.page_size)
    tables = [books.table(request.number, number)[:end] for number in range(len(books.groups))]
    num_rings = len(steps.pools_of(cache)) - len(tables)
    return [*(table[table >= 0] for table in tables), *[np.array([row])] * num_rings]


def _portions(pages: Pages) -> list[Pages]:
    longest = max(len(own) for own in pages)
    starts = range(0, longest, PAGES_AT_ONCE)
    return [[own[start : start + PAGES_AT_ONCE] for own in pages] for start in starts]


def _padded(pages: Pages) -> tuple[np.ndarray, ...]:
    return tuple(
        np.concatenate([own, np.full(PAGES_AT_ONCE - len(own), -1)]).astype(np.int32)
        for own in pages
    )


def _filled_up(leaf: np.ndarray, pool: KVCache) -> np.ndarray:
    missing = PAGES_AT_ONCE * page_size_of(pool) - leaf.shape[2]
    return np.pad(leaf, [(0, missing) if axis == 2 else (0, 0) for axis in range(leaf.ndim)])
