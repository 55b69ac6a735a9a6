"""After a step whose tokens form a tree: one path of it becomes the text."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from jaxkv.addressing import Index
from jaxkv.cache.ancestors import check_tree
from jaxkv.cache.checks import check_alive, check_counts, check_stateless
from jaxkv.cache.groups import in_every_group_of_tokens
from jaxkv.cache.hybrid import SameCache
from jaxkv.cache.kv_cache import OUT_OF_RANGE, KVCache, NumTokens
from jaxkv.cache.shards import in_each_shard
from jaxkv.codecs import Leaves
from jaxkv.devices import is_concrete
from jaxkv.placement import copy_runs, in_host_memory, scatter
from jaxkv.programs import one_program


def keep_path(
    cache: SameCache, path: Int[Array, "*batch kept"], num_tokens: NumTokens
) -> SameCache:
    """Of the newest ``num_tokens`` tokens keep these, as if no others had been appended.

    For trees of guesses, as in SpecInfer (Miao et al., 2024, section 4) and EAGLE (Li et al., 2024,
    section 4): append all tokens of a tree, `attend` with their ``ancestors``, `advance`, and keep
    the path that was accepted. What is stored of its tokens moves to the slots after the text
    before them, bit for bit; lengths follow, and the rest is dropped. In place under donation: only
    the vectors of the path move.

    Args:
      path: of each sequence, the numbers of the tokens to keep, from 0, the first of the step, in
        order; -1 after the last. Any number of them, none included.
      num_tokens: that the step had, as given to `advance`.

    Raises:
      ConfigError: a codec that takes a rope out of keys, a context that is split over devices, a
        policy's sums, ``blocks_per_query``, or more tokens than `Newest` or `HostMemory` keeps.
      ValueError: a cache with layers that keep a state; outside jit, a path that is none (inside
        jit, `check` says so after).

    >>> import jax.numpy as jnp, jaxkv
    >>> cache = jaxkv.create(jaxkv.KVCacheConfig(1, 16, num_kv_heads=1, head_dim=1))
    >>> keys = jnp.arange(4.0).reshape(4, 1, 1)
    >>> cache = jaxkv.advance(jaxkv.append(cache, keys, keys, layer=0), 4)
    >>> cache = jaxkv.keep_path(cache, jnp.array([0, 2, -1]), 4)
    >>> int(cache.lengths), jaxkv.layer(cache, 0)[0][:2, 0, 0].tolist()
    (2, [0.0, 2.0])
    """
    check_alive(cache)
    check_counts(cache, "num_tokens", num_tokens)
    check_stateless(cache, "keep_path", "Their state has seen all branches: check one at a time.")
    return _keep_in_group(cache, path, num_tokens)


@in_every_group_of_tokens
def _keep_in_group(cache: KVCache, path: Any, num_tokens: NumTokens) -> KVCache:
    given: Any = path if isinstance(path, jax.Array) else np.asarray(path, np.int32)
    most = given.shape[-1] if given.ndim else 0
    if is_concrete(num_tokens):
        most = int(np.max(jax.device_get(num_tokens)))
    check_tree(cache, "keep_path", most)
    _check_path(cache, given, num_tokens)
    return _keep_path(cache, given, num_tokens)


def _check_path(cache: KVCache, path: Any, num_tokens: NumTokens) -> None:
    shape = cache.config.batch_shape
    is_list = path.ndim == len(shape) + 1 and path.shape[:-1] == shape
    if not is_list or not jnp.issubdtype(path.dtype, jnp.integer):
        axes = ", ".join([*map(str, shape), "kept"])
        raise ValueError(
            f"keep_path: path must be int32[{axes}], got {path.dtype}{list(path.shape)}."
        )
    if not is_concrete(path, num_tokens, cache.lengths):
        return
    numbers, lengths, counts = jax.device_get((path, cache.lengths, num_tokens))
    if not np.all(_is_path(np, numbers, lengths, np.asarray(counts))):
        raise ValueError(
            "keep_path: path must have numbers of tokens in order, each below num_tokens, and -1 "
            f"after the last, and num_tokens be tokens of the cache; got {numbers.tolist()} of "
            f"{np.asarray(counts).tolist()} tokens, in sequences of {lengths.tolist()}."
        )


def _is_path(xp: Any, path: Any, lengths: Any, num_tokens: Any) -> Any:
    """Which sequences' paths are paths of their newest tokens; of numpy's arrays or jax's."""
    following, is_last = path[..., 1:], path[..., 1:] == -1
    in_order = ((following > path[..., :-1]) & (path[..., :-1] >= 0)) | is_last
    inside = (path >= -1) & (path < num_tokens[..., None])
    return in_order.all(-1) & inside.all(-1) & (num_tokens <= lengths) & (num_tokens >= 0)


@one_program()
@in_each_shard()
def _keep_path(cache: KVCache, path: Array, num_tokens: NumTokens) -> KVCache:
    lengths, counts = cache.lengths, jnp.asarray(num_tokens, jnp.int32)
    is_path = _is_path(jnp, path, lengths, counts)
    start = (lengths - counts)[..., None]
    origins = jnp.where(path >= 0, start + path, -1)
    # One that was dropped for want of room would be missed: the sequence stays full.
    is_held = ((path < 0) | (cache.index.slots(origins) >= 0)).all(-1)
    kept = (path >= 0) & (is_path & is_held)[..., None]
    origins = jnp.where(kept, origins, -1)
    targets = jnp.where(kept, start + jnp.arange(path.shape[-1], dtype=jnp.int32), -1)
    shorter = jnp.where(is_held, start[..., 0] + kept.sum(-1, dtype=jnp.int32), lengths)
    moved = _with_moved(cache, origins, targets)
    return moved.with_lengths(jnp.where(is_path, shorter, OUT_OF_RANGE))


def _with_moved(cache: KVCache, origins: Array, targets: Array) -> KVCache:
    """With what is at some positions at others too, also in the copies that newer tokens have."""
    newest, resident = cache.newest, cache.resident
    if newest is not None:
        newest = _with_moved(newest, origins, targets)
    if resident is not None:
        index = resident.index(cache.lengths)
        own = _moved(resident.storage, index, origins, targets)
        resident = dataclasses.replace(resident, storage=own)
    storage = _moved(cache.storage, cache.index, origins, targets)
    return dataclasses.replace(cache, storage=storage, newest=newest, resident=resident)


def _moved(storage: Leaves, index: Index, origins: Array, targets: Array) -> Leaves:
    sources, places = (index.slots(positions).reshape(-1) for positions in (origins, targets))

    def move(leaf: Array) -> Array:
        if in_host_memory(leaf):
            return copy_runs(leaf, sources, places, 1)
        return scatter(leaf, places, leaf.at[:, :, sources].get(mode="clip"))

    return {name: move(leaf) for name, leaf in storage.items()}
