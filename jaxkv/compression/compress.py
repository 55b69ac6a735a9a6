"""After prefill: score, choose, and gather what stays into a smaller cache."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from jaxkv.addressing import (
    Addressing,
    Contiguous,
    Kept,
    KeptByHead,
    Paged,
)
from jaxkv.cache.checks import check_alive, check_stateless
from jaxkv.cache.hybrid import AnyCache, HybridCache, HybridConfig
from jaxkv.cache.kv_cache import KVCache
from jaxkv.cache.shards import check_outside, check_sequences_whole
from jaxkv.compression.budgets import Keep, host_lengths, is_by_head, limits_of
from jaxkv.compression.gather import gathered
from jaxkv.compression.scoring import (
    LayerQueries,
    LayerScores,
    for_all_slots,
    score,
    scores_of,
)
from jaxkv.counts import ceil_div
from jaxkv.devices import is_concrete
from jaxkv.policies import Policy
from jaxkv.policies.policy import refuse_name
from jaxkv.programs import moves_data


@moves_data
def compress(
    cache: AnyCache,
    policy: Policy | LayerScores,
    *,
    keep: Keep,
    new: int | None = None,
    queries: LayerQueries | Sequence[Array] | None = None,
    sinks: int = 4,
    recent: int = 0,
    pages: Int[Array, "*batch pages"] | None = None,
) -> AnyCache:
    """A smaller cache that holds the tokens which a policy scores highest, in each layer and head.

    What is kept is gathered as it is stored, codes and scales, never encoded anew, and keeps its
    position: attention over the result is attention over exactly the tokens kept, and over its
    `jaxkv.Newest` ones, which stay. The old cache is as it was; let go of it to free its memory.
    Of a cache in host memory the result is on the device, unless ``pages`` are given.

    Args:
      cache: after prefill, with any codec. A paged one gives one with pages of its own, unless
        ``pages`` are given. Layers with a window in a hybrid cache stay as they are.
      policy: see `jaxkv.policies`, or scores ``[layers, *batch, kv_heads, slots]`` of one's own.
      keep: tokens that each head keeps; a float is a share of each sequence's tokens. One
        number; or one per layer, as `jaxkv.compression.pyramid` gives them, for a hybrid cache; or
        one per head, ints ``[layers, kv_heads]`` or ``[layers, batch, kv_heads]``, as
        `jaxkv.compression.adaptive` gives them, which are packed.
      new: tokens that fit beside those kept; as many as before if None.
      queries: of the newest tokens, for policies that look at them; `jaxkv.observed` gives them.
      sinks: first tokens of a sequence, which stay whatever a policy says, infinity included.
      recent: newest tokens, likewise. A head that keeps fewer than ``sinks + recent`` keeps those
        of them that score highest.
      pages: for sequences of a shared pool that are to stay in it: free pages for ``new`` and
        kept tokens, from the pool's books. Its buffers are donated, and are those of the result;
        other pages are not written.

    Raises:
      ValueError: a number of tokens that cannot be kept, scores of another shape, a policy
        without the queries that it needs, or pages that do not fit.
      TypeError: a cache with a window, a policy's name, or something that needs lengths while they
        are traced.

    >>> import jaxkv
    >>> cache = jaxkv.create(jaxkv.KVCacheConfig(2, 100, num_kv_heads=1, head_dim=4))
    >>> cache = jaxkv.advance(cache, 80)
    >>> small = compress(cache, jaxkv.policies.SinksAndRecent(), keep=0.25)
    >>> small.size_bytes / cache.size_bytes, int(small.lengths)
    (0.4, 80)
    """
    check_stateless(cache, "compress", "Compress caches of keys and values alone.")
    check_sequences_whole(cache, "compress")
    check_outside(cache, "compress")
    check_alive(cache)
    refuse_name(policy, "compress")
    options = {"new": new, "sinks": sinks, "recent": recent, "pages": pages}
    if len(cache.groups) > 1 and pages is not None:
        raise ValueError(
            "compress: pages are of one pool, and this cache has a group for each kind of layer. "
            "Leave pages= out, or compress one of cache.groups in its pool."
        )
    num_layers = cache.config.num_layers
    if np.ndim(keep) and len(keep) != num_layers:  # type: ignore[arg-type]
        raise ValueError(
            f"keep must be one number, or {num_layers} for layers, got {len(keep)}."  # type: ignore[arg-type]
        )
    parts: list[Part] = []
    for number, group in enumerate(cache.groups):
        layers = np.asarray(cache.config.layers_of(number))
        if group.config.addressing.window is not None and len(cache.groups) > 1:
            parts.append((layers, group))
            continue
        own_policy = policy if callable(policy) else of_layers(policy, layers)
        own_keep = np.asarray(keep)[layers] if np.ndim(keep) else keep
        own_queries = None if queries is None else of_layers(queries, layers)
        parts += _compressed(group, layers, own_policy, own_keep, own_queries, options)
    return _joined(parts, cache)


# Numbers of layers, and a cache of them.
Part = tuple[np.ndarray, KVCache]


def _compressed(
    cache: KVCache, layers: Any, policy: Any, keep: Any, queries: Any, options: dict[str, Any]
) -> list[Part]:
    """A smaller cache for each number of tokens to keep."""
    config, new = cache.config, options["new"]
    if config.addressing.window is not None:
        raise TypeError(
            f"compress: queries see the {config.addressing.window} newest tokens of this "
            f"{config.addressing.name} cache alone, so there is nothing to choose from. "
            "Create the cache with addressing=jaxkv.Contiguous() to choose among all tokens."
        )
    if new is None:
        new = max(1, config.max_context_length - host_lengths(cache, "new must be given").max())
    limits = limits_of(cache, keep)
    by_head, state = is_by_head(keep), None
    if by_head and callable(policy):  # whose numbers a packed cache has no room for
        scores = score(cache, policy, queries)
    elif callable(policy):
        scores, state = scores_of(cache, policy, queries)
    else:
        scores = policy
    scores = for_all_slots(cache, scores)
    names = () if state is None else policy.state

    per_layer = limits.reshape(len(limits), -1)
    sizes = _places(limits, cache) if by_head else per_layer.max(axis=1)
    pages, pool = options["pages"], None
    if pages is not None:
        if by_head or len(set(sizes.tolist())) > 1:
            raise ValueError("compress: in a pool all heads and layers keep one number of tokens.")
        pages, pool = _checked_pages(cache, pages, int(new + sizes[0])), cache.storage
        cache = dataclasses.replace(cache, storage={})
    parts = []
    for size in dict.fromkeys(sizes.tolist()):
        chosen = np.flatnonzero(sizes == size)
        shape = {"new": int(new), "num_layers": len(chosen), "num_kv_heads": config.num_kv_heads}
        addressing: Kept | KeptByHead
        if by_head:
            addressing = KeptByHead(places=size, longest=int(limits[chosen].max()), **shape)
        else:
            within = _like(config.addressing, pages is not None)
            addressing = Kept(tokens=size, sums=names, within=within, **shape)
        smaller = gathered(
            cache,
            scores,
            state,
            jnp.asarray(chosen, jnp.int32),
            jnp.asarray(limits[chosen]),
            pool=pool,
            pages=pages,
            config=config.replace(num_layers=len(chosen), addressing=addressing, placement=None),
            sinks=options["sinks"],
            recent=options["recent"],
        )
        parts.append((layers[chosen], smaller))
    return parts


def _places(limits: np.ndarray, cache: KVCache) -> np.ndarray:
    """Of each layer, those for vectors of all heads: as many on each device as the fullest needs.

    Args:
      limits: ``[layers, *batch, kv_heads]``.
    """
    spread, (layers, *batch, kv_heads) = cache.spread, limits.shape
    parts = devices = 1
    if spread is not None:
        parts = spread.size("batch")
        devices = spread.size("heads") // spread.copies(cache.config)
    shape = (layers, parts, math.prod(batch) // parts, devices, kv_heads // devices)
    needed = limits.reshape(shape).sum(axis=(2, 4)).max(axis=(1, 2))
    if parts * devices > 1:  # whole slots of all of a device's heads
        needed = ceil_div(needed, kv_heads // devices) * (kv_heads // devices)
    return needed * parts * devices


def _joined(parts: list[Part], whole: AnyCache) -> AnyCache:
    """One cache of all layers; those that read another's, or an encoder's, go on reading it."""
    config = whole.config
    if len(parts) == 1 and not config.source_of_layer and not config.cross:
        return parts[0][1]
    group_of_layer = {layer: group for group, (layers, _) in enumerate(parts) for layer in layers}
    sources = config.source_of_layer or range(config.num_layers)
    numbers = tuple(group_of_layer.get(source, -1) for source in sources)
    groups = tuple(cache for _, cache in parts)
    configs = tuple(group.config for group in groups)
    joined = HybridConfig(
        configs,
        numbers,
        config.source_of_layer,
        cross=config.cross,
        cross_of_layer=config.cross_of_layer,
    )
    return HybridCache(groups, joined, cross=whole.cross)


def _like(addressing: Addressing, in_pool: bool) -> Contiguous | Paged:
    """Where a compressed cache has its slots: pages for a paged one, of its own or of the pool."""
    if addressing.page_size is None:
        return Contiguous()
    return Paged(addressing.page_size, addressing.num_pages if in_pool else None)


def _checked_pages(cache: KVCache, pages: Array, slots: int) -> Int[Array, "*batch pages"]:
    """Pages of the cache's pool for ``slots`` slots per sequence, none of them its own."""
    index, parts = cache.index.pages, 1 if cache.spread is None else cache.spread.size("batch")
    if index is None or not index.shared:
        raise ValueError(
            f"compress: pages are of a shared pool, and this cache is {cache.config.addressing}. "
            "Leave pages= out, and the result has slots of its own."
        )
    expected = (*cache.config.batch_shape, ceil_div(slots, index.page_size))
    pages = jnp.asarray(pages, jnp.int32)
    if pages.shape != expected:
        raise ValueError(
            f"compress: pages must be int32{list(expected)}, for {slots} slots per sequence in "
            f"pages of {index.page_size}, got {list(pages.shape)}."
        )
    if is_concrete(pages, index.table):
        num_pages = cache.config.num_slots // index.page_size // parts
        taken = np.asarray(index.table).reshape(parts, -1)
        for given, theirs in zip(np.asarray(pages).reshape(parts, -1), taken, strict=True):
            bad = (given < 0) | (given >= num_pages) | np.isin(given, theirs)
            if bad.any() or len(set(given.tolist())) < len(given):
                raise ValueError(
                    f"compress: pages must be different ones of {num_pages} that the sequences do "
                    f"not have yet, got {given.tolist()}."
                )
    return pages


def of_layers(arrays: Array | Sequence[Array], layers: np.ndarray) -> Array:
    """Those of some layers."""
    return jnp.stack([arrays[layer] for layer in layers])
