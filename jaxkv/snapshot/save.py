"""Saving a cache to a file."""

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Int

from jaxkv.cache.axes import Spread
from jaxkv.cache.checks import check_here
from jaxkv.cache.hybrid import AnyCache
from jaxkv.cache.regroup import gather
from jaxkv.cache.shards import books_of
from jaxkv.cache.verbs import check
from jaxkv.programs import moves_data
from jaxkv.snapshot import container, states
from jaxkv.snapshot.fingerprint import fingerprint
from jaxkv.snapshot.manifest import Manifest
from jaxkv.snapshot.parts import Parts, parts_named_by, remove, share_of
from jaxkv.snapshot.processes import all_or_none, processes_of
from jaxkv.snapshot.sources import Shares, Sources, sources_of_all, sources_of_shares
from jaxkv.snapshot.split import shares_of

Tokens = Sequence[int] | Sequence[Sequence[int]] | Int[Array, "*batch tokens"]


@moves_data
def save(
    cache: AnyCache,
    path: str | os.PathLike[str],
    *,
    tokens: Tokens | None = None,
    model: Any = None,
) -> None:
    """Write a cache's tokens to a file that `load` goes on from, bit for bit.

    A safetensors file with what the codec stores of each token and no more: free slots and
    other sequences' pages are left out. It appears under its name when all of it is on disk, so
    a crash leaves the old file or the new one; every byte is under a checksum.

    A cache that is spread over a mesh is not gathered. The devices of one process write the file
    that one device would. Several processes, all of which call this, write one part each, of what
    their devices hold, beside the file; the file itself names them, and is written last. They must
    see the same folder.

    Args:
      cache: of any codec and addressing, single, batched, hybrid or compressed.
      path: the file; replaced if there is one.
      tokens: the ids that the cache was filled with, as many as it is long (a list a sequence for
        a batch), to be compared on `load` and to enter a prefix cache.
      model: what wrote the cache, to be compared on `load`; see `jaxkv.snapshot.fingerprint`.

    Raises:
      CacheFullError, CacheClosedError: the cache is not sound.
      ValueError: tokens that are not as many as the cache holds.
      OSError: the file cannot be written. What was there before is as it was.
      SnapshotError: another process could not write its part. Likewise.

    >>> import tempfile, jaxkv
    >>> cache = jaxkv.advance(jaxkv.create(jaxkv.KVCacheConfig(1, 16, 1, 4)), 3)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     jaxkv.save(cache, f"{folder}/prompt", tokens=[7, 8, 9], model="my-model")
    ...     jaxkv.load(f"{folder}/prompt", tokens=[7, 8, 9], model="my-model").lengths.item()
    3
    """
    from jaxkv import __version__

    check(cache)
    for group in cache.groups:
        if group.spread is None or group.index.per_head:
            check_here(group)
    if any(group.index.per_head for group in cache.groups):
        cache = gather(cache)  # a number of tokens per head is not written by parts
    lengths = tuple(books_of(cache.groups[0])[0].reshape(-1).tolist())
    ids = None if tokens is None else token_ids(tokens, cache.config.batch_size, lengths)
    spread, shares = cache.groups[0].spread, sources_of_shares(cache)
    if spread is None:
        sources, parts = [Sources.of(group) for group in cache.groups], None
    else:
        sources = sources_of_all(cache, shares_of(spread, cache.config)[0], shares)
        states.check_processes((*cache.config.states, *cache.config.cross), spread, "save")
        parts = Parts.of(spread, cache.config)
    cross = [Sources.of(gather(each)) for each in cache.cross]
    sources = [*sources, *cross]
    manifest = Manifest(
        saved_by=f"jaxkv {__version__}",
        lengths=lengths,
        model=None if model is None else fingerprint(model),
        has_tokens=ids is not None,
        groups=tuple(each.described for each in sources[: len(cache.groups)]),
        group_of_layer=cache.config.group_of_layer,
        source_of_layer=cache.config.source_of_layer,
        parts=parts,
        states=cache.config.states,
        cross=tuple(each.described for each in cross),
        cross_of_layer=cache.config.cross_of_layer,
    )

    def pieces(name: str) -> Iterator[np.ndarray]:
        if name.startswith(states.PREFIX):
            return states.pieces(cache.states, name)
        first, rest = name.split(".", 1)
        if ids is not None and rest == "tokens":
            return iter([ids[int(first)]])
        return sources[int(first)].pieces(rest)

    def write() -> None:
        container.write(Path(path), manifest.to_json(), manifest.layout(), pieces)

    if spread is None or parts is None:
        before = parts_named_by(Path(path))
        write()
        remove(before)
    else:
        _save_parts(Path(path), manifest, parts, spread, shares, write)


def _save_parts(
    file: Path,
    manifest: Manifest,
    parts: Parts,
    spread: Spread,
    shares: Shares,
    write: Callable[[], None],
) -> None:
    """A part by each process, then, once all are on disk, the file that names them by the first."""
    number = processes_of(spread).index(jax.process_index())
    own = parts.path(file, number)

    def pieces(name: str) -> Iterator[np.ndarray]:
        share, rest = share_of(name)
        kind, rest = rest.split(".", 1)
        return shares[share][int(kind)].pieces(rest)

    layout, before = parts.layout(number, manifest.groups, manifest.lengths), parts_named_by(file)
    try:
        with all_or_none(spread):
            container.write(own, parts.to_json(number), layout, pieces)
        with all_or_none(spread):
            if number == 0:
                parts.check_here(file)
                write()
                remove(before)
    except BaseException:
        if own not in parts_named_by(file):
            remove([own])
        raise


def token_ids(tokens: Tokens, batch_size: int | None, lengths: Sequence[int]) -> list[np.ndarray]:
    """The ids of each sequence, int32.

    Raises:
      ValueError: not ints, or not as many as ``lengths`` says.
    """
    rows = [tokens] if batch_size is None else list(tokens)
    ids = [np.asarray(row) for row in rows]
    ids = [row.astype(np.int32) if row.size == 0 else row for row in ids]  # [] is of no ints
    if any(row.ndim != 1 or not np.issubdtype(row.dtype, np.integer) for row in ids):
        each = "" if batch_size is None else ", a list a sequence"
        raise ValueError(f"tokens must be token ids, ints{each}.")
    if [len(row) for row in ids] != list(lengths):
        raise ValueError(
            f"tokens must be those that the cache holds, {list(lengths)} a sequence, got "
            f"{[len(row) for row in ids]}. Truncate the cache to the tokens that you have."
        )
    return [row.astype(np.int32) for row in ids]
