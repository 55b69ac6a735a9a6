"""Verbs that rearrange whole sequences: reorder, repeat, and copy pages that were shared."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from jaxkv.cache.checks import check_alive, check_rows, rows_exist
from jaxkv.cache.config import KVCacheConfig
from jaxkv.cache.groups import in_every_kind
from jaxkv.cache.hybrid import SameCache
from jaxkv.cache.kv_cache import KVCache, buffer_of
from jaxkv.cache.shards import beside_storage, in_each_shard
from jaxkv.cache.verbs import where_in_range
from jaxkv.devices import is_concrete
from jaxkv.placement import copy_runs, in_host_memory, scatter
from jaxkv.programs import on_device, one_program, promotes_ranks


@in_every_kind
def select(cache: KVCache, rows: Int[Array, " rows"] | Sequence[int]) -> KVCache:
    """A batch of these sequences of a cache: to reorder beams, drop finished ones, or repeat.

    The new sequences are copies that go on independently. Only with a shared pool of pages
    they keep the pages that they had: give those that go on pages of their own with
    `jaxkv.paging`, which says what to copy.

    Args:
      rows: which sequence each row of the new batch is, ``int32[rows]``; may be traced. A
        single sequence is row 0.

    Raises:
      IndexError: outside jit, a row that there is not (inside jit, `check` says so after).
      ValueError: inside jit, a cache in host memory whose sequences would have to be copied.

    >>> import jaxkv
    >>> prompt = jaxkv.advance(jaxkv.create(jaxkv.KVCacheConfig(1, 8, 1, 4)), 5)
    >>> jaxkv.select(prompt, [0, 0, 0]).lengths.tolist()
    [5, 5, 5]
    """
    check_alive(cache)
    given = rows if isinstance(rows, jax.Array) else np.asarray(rows, np.int32)
    chosen = on_device(given)
    check_rows(cache, chosen)
    own = _within_devices(cache, given)
    select_rows = _select
    if cache.pages is not None and cache.pages.shared:  # rows go on in the pages that they had
        select_rows = beside_storage(_select)
    elif in_host_memory(buffer_of(cache)):  # which no compiled program gathers from
        _check_here(cache)
        select_rows = _selected
    selected = select_rows(cache, own)
    return where_in_range(selected, rows_exist(cache, chosen))


def _check_here(cache: KVCache) -> None:
    if cache.spread is not None:
        raise ValueError(
            "select: sequences of a cache in host memory are copied by the host, and this one is "
            f"spread over {cache.spread.mesh.size} devices by {cache.spread.axes}. Bring it to them"
            " with jaxkv.prefetch first; jaxkv.offload brings it back."
        )


def _within_devices(cache: KVCache, rows: Int[Array | np.ndarray, " rows"]) -> Int[Array, " rows"]:
    """The numbers of these rows on their devices, where the batch is split over some.

    Raises:
      ValueError: rows that would move to another device, or nobody knows whether.
    """
    parts = 1 if cache.spread is None else cache.spread.size("batch")
    if parts == 1:
        return on_device(rows)
    each = cache.config.batch_size // parts  # type: ignore[operator]
    cure = (
        f"Each of {parts} devices has {each} sequences, in their order, and gives the new batch its"
        " part from them. Choose rows outside jit that stay on their devices, as fork does."
    )
    if not is_concrete(rows):
        raise ValueError(
            f"rows of a cache whose batch is split must be known while tracing. {cure}"
        )
    given = np.asarray(jax.device_get(rows))
    homes = np.repeat(np.arange(parts), len(given) // parts)
    if len(given) % parts or (given // each != homes).any():
        raise ValueError(f"rows {given.tolist()} would move between devices. {cure}")
    return on_device(np.asarray(given % each, np.int32))


def _with_rows(cache: KVCache, rows: Int[Array, " rows"]) -> KVCacheConfig:
    return cache.config.replace(batch_size=rows.size)


@in_each_shard(config_of=_with_rows)
def _selected(cache: KVCache, rows: Int[Array, " rows"]) -> KVCache:
    return cache.of_rows(rows)


_select = one_program()(_selected)


def fork(cache: SameCache, num_copies: int) -> SameCache:
    """Each sequence ``num_copies`` times, next to each other, as a batch.

    For parallel samples of one prompt; see `select` for pages of a shared pool.

    Args:
      num_copies: of each sequence, at least 1.

    >>> import jaxkv
    >>> prompt = jaxkv.advance(jaxkv.create(jaxkv.KVCacheConfig(1, 8, 1, 4)), 5)
    >>> fork(prompt, 4).lengths.tolist()
    [5, 5, 5, 5]
    """
    sequences = np.arange(cache.config.batch_size or 1, dtype=np.int32)
    return select(cache, np.repeat(sequences, num_copies).tolist())


def copy_pages(
    cache: KVCache, sources: Int[Array, " pages"], destinations: Int[Array, " pages"]
) -> KVCache:
    """Copy whole pages of a paged pool, in all layers, for sequences that part ways.

    In place under donation: only the pages' own bytes move.

    Args:
      sources: pages of the pool, ``int32[pages]``; where the batch is split over devices, whose
        pages are counted from 0 on each, a part for each.
      destinations: as many pages, each named once; one below 0 or past the pool is skipped, so
        that calls can be padded to one shape.

    Raises:
      TypeError: not a paged cache.
      ValueError: its newest tokens are on the device too (`HostMemory` of a pool that nobody
        shares).

    >>> import jax.numpy as jnp, jaxkv
    >>> config = jaxkv.KVCacheConfig(1, 8, 1, 4, addressing=jaxkv.Paged(page_size=4))
    >>> cache = jaxkv.create(config)
    >>> cache = jaxkv.append(cache, jnp.ones((4, 1, 4)), jnp.ones((4, 1, 4)), layer=0)
    >>> keys, values = jaxkv.layer(copy_pages(cache, jnp.array([0]), jnp.array([1])), 0)
    >>> keys[4:, 0, 0].tolist()
    [1.0, 1.0, 1.0, 1.0]
    """
    if len(cache.groups) > 1:
        raise TypeError(
            "copy_pages: a page is one of a pool, and this cache has a pool for each group. Copy "
            "in each of cache.groups, and put them back with cache.with_groups."
        )
    if cache.pages is None:
        raise TypeError(
            f"copy_pages needs a paged cache, got a {cache.config.addressing.name} one. Create it "
            "with addressing=jaxkv.Paged(page_size)."
        )
    if cache.resident is not None:
        raise ValueError(
            "copy_pages: this cache has its newest tokens on the device too, where there are no "
            "pages. Bring it back with jaxkv.prefetch first, or share a pool, "
            "jaxkv.Paged(num_pages=...), which has none there."
        )
    return copied(cache, sources, destinations)


@one_program()
@in_each_shard()
def copied(
    cache: KVCache, sources: Int[Array, " pages"], destinations: Int[Array, " pages"]
) -> KVCache:
    """`copy_pages`, or copies of whole sequences' slots where they have no pages."""
    targets, origins = slots_of_pages(cache, destinations), slots_of_pages(cache, sources)

    def with_copies(leaf: Array) -> Array:
        if in_host_memory(leaf):
            return copy_runs(leaf, sources, destinations, page_size_of(cache))
        found = leaf.at[:, :, origins].get(mode="clip")
        return scatter(leaf, targets, found)

    storage = {name: with_copies(leaf) for name, leaf in cache.storage.items()}
    return dataclasses.replace(cache, storage=storage)


def page_size_of(cache: KVCache) -> int:
    """Slots of a page, or of a sequence where it has no pages."""
    return cache.index.extent if cache.pages is None else cache.pages.page_size


@promotes_ranks
def slots_of_pages(cache: KVCache, pages: Int[Array, " pages"]) -> Int[Array, " slots"]:
    """The ctx slots of pages of a pool; -1 for those of pages that there are not.

    Of other caches a sequence's slots are its page.
    """
    num_slots = cache.config.num_slots
    page_size = page_size_of(cache)
    slots = (pages[:, None] * page_size + jnp.arange(page_size, dtype=jnp.int32)).reshape(-1)
    return jnp.where((slots < 0) | (slots >= num_slots), -1, slots)
