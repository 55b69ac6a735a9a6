"""Keys and values of an encoder's tokens: written once per request, then read by every step.

What layers with cross-attention keep is a `KVCache` like any other, whose tokens are the encoder's
and whose lengths no step of the text moves. So codecs, meshes and files are those of any group.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxkv.cache import verbs
from jaxkv.cache.checks import check_alive, check_pair
from jaxkv.cache.hybrid import AnyCache, HybridCache, locate_cross
from jaxkv.cache.kv_cache import OUT_OF_RANGE, KVCache, NumTokens
from jaxkv.cache.shards import in_each_shard, where_it_is
from jaxkv.devices import is_concrete
from jaxkv.errors import CacheFullError
from jaxkv.programs import one_program

_KEPT = -1  # in place of a length: that sequence keeps what it has


def write_cross(
    cache: AnyCache,
    keys: Float[Array, "*batch tokens kv_heads head_dim"],
    values: Float[Array, "*batch tokens kv_heads value_dim"] | None = None,
    *,
    layer: int,
    lengths: NumTokens | None = None,
) -> HybridCache:
    """Write what one layer's cross-attention reads, in place of what it read before.

    Once per request and layer, before the layer's first `attend_cross`; the same ``lengths`` in all
    layers. In place under donation. The text's own lengths do not move, and `advance` and
    `truncate` leave the encoder's tokens as they are; `reset` forgets them.

    Args:
      keys, values: of the encoder's tokens, as in `append`.
      layer: a plain int that counts over all layers of the model.
      lengths: how many of ``tokens`` are real, of each sequence of a ragged batch. All if None; 0
        for a sequence that has none, and -1 for one that keeps what was written before.

    Raises:
      CacheFullError: more tokens than the config has room for.
      IndexError, TypeError: no such layer, or a traced one; a dtype that is no float.
      ValueError: a layer without cross-attention, a bad shape, or ``lengths`` out of range. Inside
        jit nothing is written for such a sequence then, and `check` says so.

    >>> import jax.numpy as jnp, jaxkv
    >>> text = jaxkv.KVCacheConfig(1, 8, num_kv_heads=1, head_dim=4)
    >>> image = text.replace(max_context_length=6)
    >>> config = jaxkv.HybridConfig((text,), (0,), cross=(image,), cross_of_layer=(0,))
    >>> cache = jaxkv.create(config)
    >>> cache = jaxkv.write_cross(cache, jnp.ones((5, 1, 4)), jnp.ones((5, 1, 4)), layer=0)
    >>> int(cache.cross[0].lengths), int(cache.lengths)
    (5, 0)
    >>> jaxkv.attend_cross(cache, jnp.ones((2, 3, 4)), layer=0)[:, 0, 0].tolist()
    [1.0, 1.0]
    """
    check_alive(cache)
    number, position = locate_cross(cache.config, layer)
    cross = list(cache.cross)
    own = {"layer": position, "lengths": lengths}
    cross[number] = where_it_is(_write, cross[number], keys, values, **own)
    changed: Any = cache.with_groups(cache.groups, cache.states, cross)
    return changed


def cross_layer(
    cache: AnyCache, layer: int
) -> tuple[
    Float[Array, "*batch tokens kv_heads head_dim"],
    Float[Array, "*batch tokens kv_heads value_dim"],
]:
    """The decoded keys and values that one layer's cross-attention reads, all slots.

    Those at or past a sequence's ``cache.cross[...].lengths`` mean nothing: mask them.

    Raises:
      IndexError, TypeError: no such layer, or a traced one.
      ValueError: a layer without cross-attention.

    >>> import jaxkv
    >>> text = jaxkv.KVCacheConfig(1, 8, num_kv_heads=1, head_dim=4)
    >>> image = text.replace(max_context_length=6)
    >>> config = jaxkv.HybridConfig((text,), (0,), cross=(image,), cross_of_layer=(0,))
    >>> jaxkv.cross_layer(jaxkv.create(config), 0)[0].shape
    (6, 1, 4)
    """
    check_alive(cache)
    number, position = locate_cross(cache.config, layer)
    return verbs.layer(cache.cross[number], position)


def _write(
    cache: KVCache, keys: Array, values: Array | None, *, layer: int, lengths: NumTokens | None
) -> KVCache:
    check_pair(cache, keys, values)
    tokens, most = keys.shape[-3], cache.config.max_context_length
    if tokens > most:
        raise CacheFullError(
            f"write_cross: {tokens} encoder tokens were given, and this cache has room for {most} "
            "of each sequence. Nothing was written. Create it with a larger max_context_length in "
            "the config's cross."
        )
    counts = tokens if lengths is None else lengths
    _check_lengths(cache, counts, tokens)
    return _written(cache, keys, values, layer, counts)


def _check_lengths(cache: KVCache, lengths: NumTokens, tokens: int) -> None:
    """Refuse lengths that are not one for all sequences or one for each, or that cannot be."""
    given: Any = lengths if isinstance(lengths, jax.Array) else np.asarray(lengths)
    batch_shape = cache.config.batch_shape
    if given.shape not in ((), batch_shape) or not jnp.issubdtype(given.dtype, jnp.integer):
        allowed = "an int" + (f" or int32{list(batch_shape)}" if batch_shape else "")
        raise ValueError(f"lengths must be {allowed}, got {given.dtype}{list(given.shape)}.")
    if not is_concrete(lengths):
        return
    numbers = np.asarray(jax.device_get(lengths))
    if numbers.min() < _KEPT or numbers.max() > tokens:
        raise ValueError(
            f"lengths must be from 0 to {tokens}, the tokens given, or {_KEPT} for a sequence that "
            f"keeps what it has, got {numbers.tolist()}."
        )


@one_program()
@in_each_shard()
def _written(
    cache: KVCache, keys: Array, values: Array | None, number: int, lengths: NumTokens
) -> KVCache:
    before = cache.lengths
    given = jnp.broadcast_to(jnp.asarray(lengths, jnp.int32), before.shape)
    fits = (given >= _KEPT) & (given <= keys.shape[-3])
    count = jnp.where(fits, jnp.maximum(given, 0), 0)
    fresh = cache.with_lengths(jnp.where(given == _KEPT, before, 0))
    written = verbs.append(fresh, keys, values, layer=number, num_tokens=count)
    after = jnp.where(fits, given, OUT_OF_RANGE)
    return written.with_lengths(jnp.where(given == _KEPT, before, after))
