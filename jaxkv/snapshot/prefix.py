"""A saved prompt in a pool of pages, where all prompts that begin with it find it."""

import dataclasses
import os
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxkv.cache.hybrid import AnyCache
from jaxkv.cache.kv_cache import KVCache
from jaxkv.codecs import Codec
from jaxkv.errors import CacheFullError, SnapshotError
from jaxkv.paging import PageAllocator, Pools
from jaxkv.programs import moves_data, on_device
from jaxkv.snapshot.fill import Fill
from jaxkv.snapshot.load import check_kind, check_model, opened
from jaxkv.snapshot.places import named, state_of_file


@moves_data
def load_prefix(
    path: str | os.PathLike[str],
    cache: AnyCache,
    pages: PageAllocator | Pools,
    *,
    model: Any,
    salt: bytes | str = b"",
    codec: Codec | None = None,
) -> AnyCache:
    """The pool with a saved prompt among its cached pages, as if a request had just left it there.

    Prompts that begin with these tokens find them until the pages are taken for something else.
    Other pages and requests are not touched. What a hit gives are the bits of the file; they are
    those of a miss if the program that wrote it computed the same chunks.

    Args:
      path: a file that `save` wrote of one sequence, with ``tokens=`` and ``model=``.
      cache: of a shared pool. It is donated: use the one that is returned, as in
        ``engine.cache = jaxkv.load_prefix(path, engine.cache, engine.pages, model=model)``.
      pages: the books of the pool. Where the batch is split over devices, those of each part: it
        is written to all that do not have it.
      model: what must have written the file; see `jaxkv.snapshot.fingerprint`.
      salt: of the requests that may find it.
      codec: the one that it was saved with, if it is not one of jaxkv's own.

    Raises:
      OSError: no such file.
      SnapshotError: a file that is damaged, of another model or kind of cache, of several
        sequences, or that does not name its tokens. The pool was not touched.
      PoolFullError: not enough pages are free now, on one of the ranks. Neither.
      CacheFullError: longer than the context or the whole pool. Neither.
      TypeError, ValueError: no shared pool, or one that shares nothing or is split by context;
        layers with a state or cross-attention.

    >>> import tempfile, jaxkv
    >>> prompt = jaxkv.advance(jaxkv.create(jaxkv.KVCacheConfig(1, 16, 1, 4)), 5)
    >>> pool = jaxkv.create(prompt.config.replace(addressing=jaxkv.Paged(4, num_pages=8)))
    >>> pages = jaxkv.paging.PageAllocator(8, page_size=4)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     jaxkv.save(prompt, f"{folder}/file", tokens=[1, 2, 3, 4, 5], model="mine")
    ...     pool = load_prefix(f"{folder}/file", pool, pages, model="mine")
    >>> pages.find(pages.prompt([1, 2, 3, 4, 5, 6])), pages.find(pages.prompt([1, 2, 3, 4, 9, 9]))
    (5, 4)
    """
    if cache.states:
        raise ValueError(
            "load_prefix: this cache has layers with a state, which pages do not hold. Load the "
            "file with jaxkv.load."
        )
    if cache.cross:
        raise ValueError(
            "load_prefix: this cache has cross-attention, and its pages do not say what an encoder "
            "wrote. Load the file with jaxkv.load."
        )
    cache = jax.tree.map(on_device, cache)
    file, groups, pools = Path(path), cache.groups, Pools.of(pages)
    _check_pool(groups, pools)
    with opened(file, codec, None) as (saved, tensors):
        check_model(file, saved, model)
        check_kind(file, saved, cache)
        of_groups = [_tensors_of(group, tensors, number) for number, group in enumerate(groups)]
        for group, own in zip(groups, of_groups, strict=True):
            state_of_file(file, group, own)
        if len(saved.lengths) != 1 or not saved.has_tokens:
            raise SnapshotError(
                f"{file} holds {len(saved.lengths)} sequences, with"
                f"{'' if saved.has_tokens else 'out'} their tokens. A prefix is one sequence, "
                "saved with tokens=."
            )
        (length,) = saved.lengths
        if length >= cache.config.max_context_length:
            raise CacheFullError(
                f"{file} holds {length} tokens, and a prompt that begins with them and has one "
                f"more is longer than the context of {cache.config.max_context_length}."
            )
        # All but the last token of a prompt are shared, so it has one more, which is never found.
        prompt = pools[0].prompt([*tensors["0.tokens"].tolist(), 0], salt=salt)
        request = f"the prefix in {file}"
        without = [rank for rank, own in enumerate(pools) if own.find(prompt) < length]
        if not without:
            return cache
        for rank in without:
            pools[rank].check_restore(request, prompt, length)
        for rank in without:
            pools[rank].restore(request, prompt, length)
        try:
            fills = []
            for number, group in enumerate(groups):
                rows = _rows(group, pools, without, request, number)
                lengths, own = [length] * len(without), _of_each(of_groups[number], len(without))
                fill = Fill(file, saved.groups[number], lengths, rows, range(len(without)), own)
                fills.append(fill)
            filled = [fill() for fill in fills]  # once all of them are known to fit
            for rank in without:
                pools[rank].advance(request, length)
        finally:
            for rank in without:
                pools[rank].release(request)
    written = [
        dataclasses.replace(group, storage=row.storage).with_codec_state(row.codec_state)
        for group, row in zip(groups, filled, strict=True)
    ]
    return cache.with_groups(written)


def _check_pool(groups: tuple[KVCache, ...], pools: Pools) -> None:
    spread = groups[0].spread
    if spread is not None and spread.size("context") > 1:
        raise ValueError(
            "load_prefix: pages of a cache that is split by context hold other tokens than those "
            "of a file. Leave context out of its axes."
        )
    ranks = 1 if spread is None else spread.size("batch")
    books = [[group.pool.num_pages for group in pages.groups] for pages in pools]
    sizes = [
        group.config.num_slots // group.pages.page_size // ranks
        for group in groups
        if group.pages is not None and group.pages.shared
    ]
    if [sizes] * ranks != books or len(sizes) != len(groups):
        raise TypeError(
            f"load_prefix needs a cache with shared pools of {_one_or_all(books)} pages, those of "
            f"its books, got {[group.config.addressing for group in groups]}"
            f"{f', split over {ranks} ranks' if ranks > 1 else ''}."
        )
    if not pools[0].sharing:
        raise ValueError("load_prefix: the pool was made with sharing=False, so nothing is found.")


def _one_or_all(books: list[list[int]]) -> list[int] | list[list[int]]:
    return books[0] if len(books) == 1 else books


def _tensors_of(group: KVCache, tensors: dict[str, Any], number: int) -> dict[str, Any]:
    """Of a group, each KV head as often as devices hold it."""
    own, copies = named(tensors, f"{number}."), 1
    if group.spread is not None:
        copies = group.spread.copies(group.config)
    if copies == 1:
        return own
    state = {name: np.repeat(own[name], copies, axis=2) for name in group.codec_state}
    leaves = {f"0.{leaf}": own[f"0.{leaf}"].with_copies(copies) for leaf in group.storage}
    return own | state | leaves


def _of_each(tensors: dict[str, np.ndarray], num_ranks: int) -> dict[str, np.ndarray]:
    """Of as many sequences as ranks, which all are the file's first."""
    first = named(tensors, "0.")
    return tensors | {
        f"{row}.{name}": tensor for row in range(num_ranks) for name, tensor in first.items()
    }


def _rows(
    group: KVCache, pools: Pools, ranks: Sequence[int], request: Hashable, number: int
) -> KVCache:
    """An empty sequence on each of these ranks, with the pages that a request has there.

    Here pages are counted over all ranks: an array that is split has the slots of each in turn.
    """
    index = group.config.addressing.init(group.config.max_context_length, len(ranks))
    assert index.pages is not None
    tables = np.full(index.pages.table.shape, -1, np.int32)
    for row, rank in zip(tables, ranks, strict=True):
        table = pools[rank].table(request, number)
        first = rank * pools[rank].groups[number].pool.num_pages
        row[: len(table)] = np.where(table < 0, table, table + first)
    index = index.pages.with_table(jnp.asarray(tables))
    config = group.config.replace(batch_size=len(ranks))
    return KVCache(group.storage, index, config, group.codec_state)
