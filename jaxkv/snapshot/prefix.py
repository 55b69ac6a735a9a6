"""A saved prompt in a pool of pages, where all prompts that begin with it find it."""

import dataclasses
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from jaxkv.cache.hybrid import AnyCache
from jaxkv.cache.kv_cache import KVCache
from jaxkv.cache.rearrange import select
from jaxkv.cache.shards import check_whole
from jaxkv.codecs import Codec
from jaxkv.errors import CacheFullError, SnapshotError
from jaxkv.paging import PageAllocator
from jaxkv.programs import moves_data, on_device
from jaxkv.snapshot.fill import Fill
from jaxkv.snapshot.load import check_kind, check_model, opened
from jaxkv.snapshot.places import named, state_of_file


@moves_data
def load_prefix(
    path: str | os.PathLike[str],
    cache: AnyCache,
    pages: PageAllocator,
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
      pages: the books of the pool.
      model: what must have written the file; see `jaxkv.snapshot.fingerprint`.
      salt: of the requests that may find it.
      codec: the one that it was saved with, if it is not one of jaxkv's own.

    Raises:
      OSError: no such file.
      SnapshotError: a file that is damaged, of another model or kind of cache, of several
        sequences, or that does not name its tokens. The pool was not touched.
      PoolFullError: not enough pages are free now. Neither.
      CacheFullError: longer than the context or the whole pool. Neither.
      TypeError, ValueError: no shared pool, or one that shares nothing.

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
    check_whole(cache, "load_prefix")
    cache = jax.tree.map(on_device, cache)
    file, groups = Path(path), cache.groups
    _check_pool(groups, pages)
    with opened(file, codec, None) as (saved, tensors):
        check_model(file, saved, model)
        check_kind(file, saved, cache)
        for number, group in enumerate(groups):
            state_of_file(file, group, named(tensors, f"{number}."))
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
        prompt = pages.prompt([*tensors["0.tokens"].tolist(), 0], salt=salt)
        if pages.find(prompt) == length:
            return cache
        request = f"the prefix in {file}"
        pages.restore(request, prompt, length)
        try:
            fills = [
                Fill(
                    file,
                    saved.groups[number],
                    saved.lengths,
                    _row(group, pages.table(request, number)),
                    [0],
                    named(tensors, f"{number}."),
                )
                for number, group in enumerate(groups)
            ]
            filled = [fill() for fill in fills]  # once all of them are known to fit
            pages.advance(request, length)
        finally:
            pages.release(request)
    written = [
        dataclasses.replace(group, storage=row.storage).with_codec_state(row.codec_state)
        for group, row in zip(groups, filled, strict=True)
    ]
    return cache.with_groups(written)


def _check_pool(groups: tuple[KVCache, ...], pages: PageAllocator) -> None:
    pools = [group.pool.num_pages for group in pages.groups]
    sizes = [
        group.config.num_slots // group.pages.page_size
        for group in groups
        if group.pages is not None and group.pages.shared
    ]
    if sizes != pools or len(sizes) != len(groups):
        raise TypeError(
            f"load_prefix needs a cache with shared pools of {pools} pages, those of its books, "
            f"got {[group.config.addressing for group in groups]}."
        )
    if not pages.sharing:
        raise ValueError("load_prefix: the pool was made with sharing=False, so nothing is found.")


def _row(group: KVCache, table: Int[np.ndarray, " pages"]) -> KVCache:
    """One sequence of a pool, empty, with these pages."""
    row = select(group, [0])
    assert row.pages is not None
    padded = np.full(row.pages.table.shape, -1, np.int32)
    padded[0, : len(table)] = table
    return row.with_pages(jnp.asarray(padded), row.lengths)
