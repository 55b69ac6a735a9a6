"""Saving a cache to a file."""

import dataclasses
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from jaxkv.cache.checks import check_here
from jaxkv.cache.hybrid import AnyCache
from jaxkv.cache.kv_cache import KVCache
from jaxkv.cache.regroup import gather
from jaxkv.cache.verbs import check
from jaxkv.programs import moves_data
from jaxkv.snapshot import container
from jaxkv.snapshot.fingerprint import fingerprint
from jaxkv.snapshot.group import Group
from jaxkv.snapshot.kept import KeptSource
from jaxkv.snapshot.manifest import Manifest
from jaxkv.snapshot.places import Places, buffer_of_layers, places_of, written_of

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
        check_here(group)
    cache = gather(cache)
    sources = [_sources_of(group) for group in cache.groups]
    lengths = tuple(np.asarray(cache.lengths).reshape(-1).tolist())
    ids = None if tokens is None else token_ids(tokens, cache.config.batch_size, lengths)
    manifest = Manifest(
        saved_by=f"jaxkv {__version__}",
        lengths=lengths,
        model=None if model is None else fingerprint(model),
        has_tokens=ids is not None,
        groups=tuple(_described(*both) for both in sources),
        group_of_layer=cache.config.group_of_layer,
        source_of_layer=cache.config.source_of_layer,
    )

    def pieces(name: str) -> Iterator[np.ndarray]:
        first, rest = name.split(".", 1)
        if ids is not None and rest == "tokens":
            return iter([ids[int(first)]])
        own, newest = sources[int(first)]
        source = newest if newest is not None and rest.startswith("newest.") else own
        sequence, _, leaf = rest.removeprefix("newest.").partition(".")
        if sequence in source.cache.codec_state:
            return iter([np.asarray(source.cache.codec_state[sequence])])
        return source.pieces(int(sequence), leaf)

    container.write(Path(path), manifest.to_json(), manifest.layout(), pieces)


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


def _sources_of(cache: KVCache) -> tuple["KeptSource | _Source", "_Source | None"]:
    """A cache and, where it has one, that of its newest tokens."""
    own = KeptSource.of(cache) if cache.index.per_head else _Source.of(cache)
    return own, None if cache.newest is None else _Source.of(cache.newest)


def _described(own: "KeptSource | _Source", newest: "_Source | None") -> Group:
    held = None if newest is None else newest.described.held
    return dataclasses.replace(own.described, newest=held)


@dataclasses.dataclass(frozen=True)
class _Source:
    """A cache, and where its tokens are."""

    cache: KVCache
    places: list[Places]

    @classmethod
    def of(cls, cache: KVCache) -> "_Source":
        return cls(cache, places_of(cache.index))

    @property
    def described(self) -> Group:
        written = tuple(written_of(self.cache.index).tolist())
        return Group(self.cache.config, written, tuple(len(p.slots) for p in self.places))

    def pieces(self, sequence: int, leaf: str) -> Iterator[np.ndarray]:
        """One sequence's positions, or a leaf of its codec, layer by layer."""
        positions, slots = self.places[sequence]
        if leaf == "positions":
            yield positions
            return
        config, layers = self.cache.config, buffer_of_layers(self.cache, leaf)
        dtype = config.pair.leaves[leaf].dtype
        for layer in range(config.num_layers):
            yield np.asarray(layers[layer][:, slots]).view(jnp.dtype(dtype))
